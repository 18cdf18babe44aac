//! The store on a real file, or, where MAYFLY_TEST_PG15 is the directory of a server of the test
//! suite, in a database of that server: first start, the key, the lock, secrets, leases and their
//! counts. `make test` runs them on both.

use mayfly_protocol::names::LeaseId;
use mayfly_protocol::names::PoolName;
use mayfly_protocol::seal::KeyPair;
use mayfly_protocol::secret::Secret;
use mayfly_protocol::task::Created;
use serde_json::json;

mod admission;
mod copies;
mod due_together;
mod first_start;
mod forgotten;
mod generations;
mod heard;
mod hold_up;
mod in_postgresql;
mod jobs;
mod lease_pages;
mod leases;
mod names;
mod plans;
mod raw_queries;
mod readers;
mod revoke_below;
mod rotations;
mod shown;
mod takeover;
mod tampering;
mod upgrade;

use super::*;
use crate::secrets::{self, Content};
use jiff::Timestamp;
use mayfly_protocol::lease::{self, BaseRef, Event, Lease, State, Status};

/// The default of the settings.
const HISTORY: Duration = Duration::from_hours(30 * 24);

fn place(directory: &std::path::Path) -> Place {
    let data_dir = directory.join("data");
    Place {
        backend: Backend::Sqlite(data_dir.join("mayfly.db")),
        key_file: data_dir.join("master-key"),
        next_key_file: None,
        root_token_file: data_dir.join("root-token"),
        data_dir,
    }
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_000_000 + second).unwrap()
}

async fn add(
    store: &Store,
    path: &str,
    attributes: serde_json::Value,
    data: serde_json::Value,
) -> Result<Record, StoreError> {
    let object = |value: serde_json::Value| value.as_object().unwrap().clone();
    let content = Content {
        attributes: object(attributes),
        description: None,
        data: object(data),
    };
    let spec = secrets::parse(&content, 86_400).unwrap();
    let record = Record {
        id: path.to_owned(),
        path: path.parse().unwrap(),
        kind: spec.kind(),
        attributes: content.attributes.clone(),
        description: None,
        version: 1,
        created: at(0),
        created_by: "root".to_owned(),
        last_modified: at(0),
        last_modified_by: "root".to_owned(),
    };
    store.create_secret(record, Revised { content, spec }).await
}

fn base_data() -> serde_json::Value {
    json!({"host": "h", "port": 5432, "username": "admin", "password": "hunter2"})
}

/// A new database of the server in `directory`.
async fn database(directory: &std::path::Path) -> Url {
    let read = |name: &str| {
        let text = std::fs::read_to_string(directory.join(name)).unwrap();
        text.trim().to_owned()
    };
    let (port, password) = (read("port"), read("superuser-password"));
    let name = format!("store_{:016x}", rand::random::<u64>());
    let mut config = tokio_postgres::Config::new();
    config
        .host("127.0.0.1")
        .port(port.parse().unwrap())
        .user("postgres")
        .password(&password)
        .dbname("postgres");
    let (client, connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
    let driven = tokio::spawn(connection);
    client
        .batch_execute(&format!("CREATE DATABASE {name}"))
        .await
        .unwrap();
    drop(client);
    driven.await.unwrap().unwrap();
    url_of(directory, &name)
}

/// A database of the server in `directory`.
fn url_of(directory: &std::path::Path, name: &str) -> Url {
    let read = |name: &str| {
        let text = std::fs::read_to_string(directory.join(name)).unwrap();
        text.trim().to_owned()
    };
    let (port, password) = (read("port"), read("superuser-password"));
    let url = format!("postgres://postgres:{password}@127.0.0.1:{port}/{name}?sslmode=disable");
    Url::parse(&Secret::new(url)).unwrap()
}

/// The place of the store that is tested.
async fn tested(directory: &std::path::Path) -> Place {
    let place = place(directory);
    match std::env::var_os("MAYFLY_TEST_PG15") {
        Some(server) => Place {
            backend: Backend::Postgres(Box::new(database(server.as_ref()).await)),
            ..place
        },
        None => place,
    }
}

/// Asserts that the counts are those of the rows.
async fn assert_counts(store: &Store) {
    let counted = store.read(Lane::Pages, copying::check_counts).await;
    counted.unwrap();
}

async fn furnished(directory: &std::path::Path) -> (Store, Option<std::fs::File>) {
    let (store, _, lock) = Store::open(&tested(directory).await).unwrap();
    furnish(&store).await;
    (store, lock)
}

async fn furnish(store: &Store) {
    let pool = Pool::new(
        "pool1".parse().unwrap(),
        KeyPair::generate().public().clone(),
        1,
        at(0),
    );
    store.create_pool(pool).await.unwrap();
    add(store, "db:root", json!({"type": "postgresql"}), base_data())
        .await
        .unwrap();
    add(store, "db:dyn", dynamic("db:root", "pool1"), json!({}))
        .await
        .unwrap();
}

fn a_pool(name: &str) -> Pool {
    let key = KeyPair::generate().public().clone();
    Pool::new(name.parse().unwrap(), key, 1, at(0))
}

impl Store {
    /// The owner of a token.
    async fn bearer(&self, presented: Secret) -> Result<Option<Bearer>, StoreError> {
        let found = self.bearers(vec![token_hash(&presented)]).await?;
        Ok(found.into_iter().flatten().next())
    }
}

fn dynamic(linked: &str, pool: &str) -> serde_json::Value {
    json!({"grantPermissions": {"what": "SELECT", "where": "*.*"}, "pool": pool, "ttl": 60,
        "linkConfig": {"linkType": "dynamic", "linkedSecret": linked}})
}

fn lease() -> Lease {
    Lease {
        id: LeaseId::random(),
        path: "db:dyn".parse().unwrap(),
        pool: "pool1".parse().unwrap(),
        role: "mayfly_x".parse().unwrap(),
        base: BaseRef {
            id: "db:root".to_owned(),
            version: 1,
        },
        database: "postgres".to_owned(),
        owned_objects: Default::default(),
        traceparent: String::new(),
        created: at(0),
        created_by: "root".to_owned(),
        secret_version: 1,
        ttl_seconds: 60,
        max_ttl_seconds: 600,
        create_deadline: at(30),
        status: Status::begin(at(30)),
    }
}

fn created() -> Event {
    Event::Created(
        Created {
            expiration: at(60),
            server: "s".to_owned(),
            warnings: vec![],
        },
        "e1".parse().unwrap(),
    )
}
