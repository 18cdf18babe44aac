//! The store on a real file, or, where MAYFLY_TEST_PG15 is the directory of a server of the test
//! suite, in a database of that server: first start, the key, the lock, secrets, leases and their
//! counts. `make test` runs them both candidates.

use mayfly_protocol::names::LeaseId;
use mayfly_protocol::names::PoolName;
use mayfly_protocol::seal::KeyPair;
use mayfly_protocol::secret::Secret;
use mayfly_protocol::task::Created;
use serde_json::json;

mod forgotten;
mod generations;
mod heard;
mod in_postgresql;
mod plans;
mod readers;
mod revoke_below;
mod rotations;
mod shown;
mod takeover;
#[allow(clippy::too_many_lines, reason = "every table is named")]
mod tampering;
mod upgrade;

use super::*;
use crate::secrets::{self, Content};
use jiff::Timestamp;
use mayfly_protocol::lease::{self, BaseRef, Event, Lease, State, Status};
use std::os::unix::fs::PermissionsExt;

/// As the settings have it.
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

/// Where the tests of both stores are.
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
    /// Whose token this is.
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

#[tokio::test]
async fn the_first_start_makes_private_files_and_the_key_must_fit() {
    let directory = tempfile::tempdir().unwrap();
    let place = place(directory.path());
    let (store, identity, lock) = Store::open(&place).unwrap();
    let Backend::Sqlite(file) = &place.backend else {
        panic!("a file")
    };
    for file in [file, &place.key_file, &place.root_token_file] {
        assert_eq!(
            std::fs::metadata(file).unwrap().permissions().mode() & 0o777,
            0o600,
            "{file:?}"
        );
    }
    assert_eq!(
        std::fs::metadata(&place.data_dir)
            .unwrap()
            .permissions()
            .mode()
            & 0o777,
        0o700
    );
    let token = std::fs::read_to_string(&place.root_token_file).unwrap();
    assert!(matches!(
        store.bearer(Secret::new(token.trim())).await.unwrap(),
        Some(Bearer::Root)
    ));
    assert!(store.bearer(Secret::new("other")).await.unwrap().is_none());
    assert!(
        matches!(Store::open(&place), Err(OpenError::Locked { .. })),
        "one dispatcher at a time"
    );
    store.close().await;
    assert!(store.ready().is_err());
    drop(lock);

    let (store, again, lock) = Store::open(&place).unwrap();
    assert_eq!(again.installation, identity.installation);
    assert_eq!(
        std::fs::read_to_string(&place.root_token_file).unwrap(),
        token,
        "made once"
    );
    store.close().await;
    drop(lock);

    let key = std::fs::read(&place.key_file).unwrap();
    std::fs::write(&place.key_file, sealer::Keys::random().expose()).unwrap();
    assert!(
        matches!(Store::open(&place), Err(OpenError::Key { file, .. }) if file == place.key_file)
    );
    std::fs::remove_file(&place.key_file).unwrap();
    assert!(
        matches!(Store::open(&place), Err(OpenError::Key { file, .. }) if file == place.key_file)
    );
    std::fs::write(&place.key_file, key).unwrap();
    assert!(Store::open(&place).is_ok());
}

#[tokio::test]
async fn names_are_resolved_and_what_is_needed_stays() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    add(&store, "plain", json!({}), json!({})).await.unwrap();
    for (linked, pool, field) in [
        ("nobody", "pool1", "attributes.linkConfig.linkedSecret"),
        ("plain", "pool1", "attributes.linkConfig.linkedSecret"),
        ("db:dyn", "pool1", "attributes.linkConfig.linkedSecret"),
        ("db:root", "pool2", "attributes.pool"),
    ] {
        match add(&store, "db:other", dynamic(linked, pool), json!({})).await {
            Err(StoreError::Invalid(problems)) => {
                assert_eq!(problems.keys().next().unwrap(), field)
            }
            other => panic!("{linked} {pool}: {other:?}"),
        }
    }
    assert!(matches!(
        add(&store, "db:dyn", json!({}), json!({})).await,
        Err(StoreError::Exists(_))
    ));
    assert!(matches!(
        store.delete_secret("db:root".parse().unwrap()).await,
        Err(StoreError::InUse(_))
    ));
    assert!(matches!(
        store.delete_pool("pool1".parse().unwrap(), at(100)).await,
        Err(StoreError::InUse(_))
    ));
    let read = store.read_secret("db:dyn".parse().unwrap()).await.unwrap();
    assert_eq!(read.base.unwrap().target.password.expose(), "hunter2");
    let log = directory.path().join("data/mayfly.db-wal");
    if log.exists() {
        let file = std::fs::read(log).unwrap();
        assert!(
            !file.windows(7).any(|bytes| bytes == b"hunter2"),
            "sealed at rest"
        );
    }
}

#[tokio::test]
async fn a_lease_lives_and_is_counted() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let lease = lease();
    store
        .admit(lease.clone(), Conditions::default(), at(0))
        .await
        .unwrap();
    assert_eq!(
        store.lease(lease.id).await.unwrap(),
        lease,
        "read as it was written"
    );
    let applied = store.apply(lease.id, created(), at(0)).await.unwrap();
    assert_eq!(
        (applied.before, applied.lease.status.state),
        (State::Pending, State::Active)
    );
    let counts = store.pool_counts(at(100)).await.unwrap();
    assert_eq!((counts[0].leases, counts[0].overdue), ([0, 1, 0, 0, 0], 1));
    assert!(matches!(
        store.delete_secret("db:dyn".parse().unwrap()).await,
        Err(StoreError::InUse(_))
    ));

    // The admin's password changes: what is still to be done is done with the new one.
    let revise = |mut content: Content| {
        content.data.insert("password".to_owned(), json!("new"));
        let spec = secrets::parse(&content, 86_400).unwrap();
        Ok(Revised { content, spec })
    };
    store
        .update_secret("db:root".parse().unwrap(), revise, "root".to_owned(), at(2))
        .await
        .unwrap();
    let revoking = store
        .apply(lease.id, Event::RevokeAsked, at(3))
        .await
        .unwrap();
    let revocation = revoking.access.unwrap();
    assert_eq!(
        (
            revocation.target.password.expose(),
            revocation.server.as_deref()
        ),
        ("new", Some("s"))
    );
    assert_eq!(revocation.candidates, 2);

    // The secret goes, its lease keeps what it needs.
    store
        .delete_secret("db:dyn".parse().unwrap())
        .await
        .unwrap();
    store
        .delete_secret("db:root".parse().unwrap())
        .await
        .unwrap();
    store.forget(at(4), HISTORY).await.unwrap();
    let again = store
        .apply(lease.id, Event::RevokeAsked, at(4))
        .await
        .unwrap();
    assert_eq!(
        again.access.unwrap().target.password.expose(),
        "new",
        "what works there now"
    );
    let gone = Event::Gone {
        conclusive: true,
        at: at(70),
        server: "s".to_owned(),
        by: "e2".parse().unwrap(),
        seen: at(70),
    };
    let settled = store.apply(lease.id, gone, at(70)).await.unwrap().lease;
    assert_eq!(settled.status.state, State::Revoked);
    assert_eq!(
        store.pool_counts(at(100)).await.unwrap()[0].leases,
        [0, 0, 0, 1, 0]
    );
    store
        .delete_pool("pool1".parse().unwrap(), at(100))
        .await
        .unwrap();
}

#[test]
fn the_store_does_what_the_life_cycle_says() {
    use proptest::strategy::Strategy;
    use proptest::test_runner::{Config, TestRunner};
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = runtime.block_on(furnished(directory.path()));
    let event = mayfly_protocol::fixtures::any_event();
    let lives = proptest::collection::vec((event, 0i64..10), 0..12);
    // Each step is a commit.
    let mut runner = TestRunner::new(Config {
        cases: 32,
        failure_persistence: None,
        ..Config::default()
    });
    let each = lives.prop_map(|life| (lease(), life));
    runner
        .run(&each, |(mut lease, life)| {
            let placed = store.admit(lease.clone(), Conditions::default(), at(0));
            runtime.block_on(placed).unwrap();
            let mut now = 0;
            for (event, passed) in life {
                now += passed;
                let change = lease::next(&lease, event.clone(), at(now));
                let applied = runtime
                    .block_on(store.apply(lease.id, event, at(now)))
                    .unwrap();
                proptest::prop_assert_eq!(applied.before, lease.status.state);
                proptest::prop_assert_eq!(applied.send, change.send);
                lease.status = change.status;
                proptest::prop_assert_eq!(&applied.lease, &lease);
                let stored = runtime.block_on(store.lease(lease.id)).unwrap();
                proptest::prop_assert_eq!(&stored, &lease, "and it is kept so");
            }
            Ok(())
        })
        .unwrap();
}

#[tokio::test]
async fn what_is_due_is_claimed_once_a_while() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let (one, two) = (lease(), lease());
    store
        .admit(one.clone(), Conditions::default(), at(0))
        .await
        .unwrap();
    store
        .admit(two.clone(), Conditions::default(), at(0))
        .await
        .unwrap();
    store.apply(two.id, created(), at(0)).await.unwrap();
    let pool = || "pool1".parse().unwrap();
    let claim = async |may_send: bool, second| {
        let living = may_send.then(pool).into_iter().collect();
        store
            .claim_due(pool(), living, 10, at(second), 0.0)
            .await
            .unwrap()
    };
    assert!(claim(true, 34).await.is_empty());
    assert!(
        claim(false, 35).await.is_empty(),
        "given up, but nobody to tell"
    );
    assert_eq!(
        store.lease(one.id).await.unwrap().status.state,
        State::Revoking
    );
    let due = claim(true, 35).await;
    assert_eq!(
        due.iter().map(|due| due.lease.id).collect::<Vec<_>>(),
        [one.id]
    );
    assert!(claim(true, 39).await.is_empty(), "put off");
    assert_eq!(claim(true, 40).await.len(), 1);
    let due = claim(true, 65).await;
    assert_eq!(due.len(), 2, "the expired one too");
    assert_eq!(store.wake_put_off(at(66)).await.unwrap(), 2);
    assert_eq!(claim(true, 66).await.len(), 2);
}

#[tokio::test]
async fn leases_are_found_by_whole_segments_and_pages() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    for path in ["db:dyn:a", "db:dyn-b", "db:dyn+c"] {
        add(&store, path, dynamic("db:root", "pool1"), json!({}))
            .await
            .unwrap();
    }
    let mut ids = Vec::new();
    for path in ["db:dyn", "db:dyn:a", "db:dyn-b", "db:dyn+c"] {
        let lease = Lease {
            path: path.parse().unwrap(),
            ..lease()
        };
        ids.push(lease.id);
        store
            .admit(lease, Conditions::default(), at(0))
            .await
            .unwrap();
    }
    let below = || Filter {
        path: Some("db:dyn".parse().unwrap()),
        ..Filter::default()
    };
    let found = store.leases(below(), String::new(), 10).await.unwrap();
    assert_eq!(
        found.iter().map(|lease| lease.id).collect::<Vec<_>>(),
        [ids[1], ids[0]]
    );
    let next = store.leases(below(), ids[1].to_string(), 10).await.unwrap();
    assert_eq!(
        next.iter().map(|lease| lease.id).collect::<Vec<_>>(),
        [ids[0]]
    );
    let exact = Filter {
        exact_path: Some("db:dyn".parse().unwrap()),
        ..Filter::default()
    };
    assert_eq!(
        store
            .end_matching(exact, Event::RevokeAsked, 10, at(5))
            .await
            .unwrap(),
        1
    );
    assert_eq!(
        store
            .end_matching(below(), Event::RevokeAsked, 10, at(5))
            .await
            .unwrap(),
        1
    );
    let revoking = Filter {
        state: Some(State::Revoking),
        ..Filter::default()
    };
    assert_eq!(
        store
            .leases(revoking, String::new(), 10)
            .await
            .unwrap()
            .len(),
        2
    );
}

#[tokio::test]
async fn quotas_are_exact_and_say_when_a_place_frees_up() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let conditions = || Conditions {
        most_of_secret: Some(3),
        most_of_secret_and_caller: Some(2),
        ..Conditions::default()
    };
    let by = |who: &str| Lease {
        created_by: who.to_owned(),
        ..lease()
    };
    let many = (0..8).map(|_| store.admit(by("a"), conditions(), at(0)));
    let placed = futures_util::future::join_all(many).await;
    assert_eq!(placed.iter().filter(|placed| placed.is_ok()).count(), 2);
    let Err(StoreError::Quota { message, until }) =
        placed.into_iter().find(Result::is_err).unwrap()
    else {
        panic!("another error");
    };
    assert!(
        message.starts_with("maxLeasesPerCaller of `db:dyn`: 2 of 2"),
        "{message}"
    );
    assert_eq!(until, Some(at(60)));
    let third = by("b");
    store
        .admit(third.clone(), conditions(), at(0))
        .await
        .unwrap();
    let refused = store.admit(by("c"), conditions(), at(0)).await.unwrap_err();
    assert!(
        refused
            .to_string()
            .starts_with("maxLeases of `db:dyn`: 3 of 3")
    );
    store
        .apply(third.id, Event::NothingMade, at(1))
        .await
        .unwrap();
    store.admit(by("c"), conditions(), at(0)).await.unwrap();
    let of_token = Conditions {
        most_of_caller: Some(1),
        ..Conditions::default()
    };
    let refused = store.admit(by("c"), of_token, at(0)).await.unwrap_err();
    assert!(
        refused
            .to_string()
            .starts_with("maxLeases of this token: 1 of 1")
    );
}

#[tokio::test]
async fn a_read_of_the_same_name_finds_its_lease() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let named = |key: &str| Conditions {
        key: Some(key.to_owned()),
        ..Conditions::default()
    };
    let first = lease();
    let place =
        async |lease: Lease, key: &str| store.admit(lease, named(key), at(0)).await.unwrap();
    assert_eq!(place(first.clone(), "k").await, Admission::New);
    assert_eq!(place(lease(), "k").await, Admission::Known(first.id));
    assert_eq!(place(lease(), "l").await, Admission::New);
    let stranger = Lease {
        created_by: "somebody".to_owned(),
        ..lease()
    };
    assert_eq!(
        place(stranger, "k").await,
        Admission::New,
        "keys are a caller's own"
    );
    // Nobody got a credential: the read begins again.
    store.apply(first.id, Event::GivenUp, at(31)).await.unwrap();
    let second = lease();
    assert_eq!(place(second.clone(), "k").await, Admission::New);
    store.apply(second.id, created(), at(0)).await.unwrap();
    store
        .apply(second.id, Event::RevokeAsked, at(2))
        .await
        .unwrap();
    assert_eq!(
        place(lease(), "k").await,
        Admission::Known(second.id),
        "somebody got one"
    );
}

#[tokio::test]
async fn a_shared_lease_is_the_callers_own_and_lives_long_enough() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let shared = || Conditions {
        share_for: Some(std::time::Duration::from_secs(30)),
        ..Conditions::default()
    };
    let first = lease();
    let place =
        async |lease: Lease, second: i64| store.admit(lease, shared(), at(second)).await.unwrap();
    let short = Lease {
        ttl_seconds: 29,
        ..lease()
    };
    assert_eq!(place(short, 0).await, Admission::New);
    assert_eq!(
        place(first.clone(), 0).await,
        Admission::New,
        "the other will not live for long enough"
    );
    let trial = Lease {
        secret_version: lease::NOBODYS_VERSION,
        ..lease()
    };
    let placed = store.admit(trial, Conditions::default(), at(0)).await;
    assert_eq!(placed.unwrap(), Admission::New);
    assert_eq!(
        place(lease(), 0).await,
        Admission::Known(first.id),
        "also while it is made, and none that is made for trial"
    );
    let doubtful = lease();
    let placed = store
        .admit(doubtful.clone(), Conditions::default(), at(0))
        .await;
    assert_eq!(placed.unwrap(), Admission::New);
    store
        .apply(doubtful.id, Event::MaybeHeld, at(0))
        .await
        .unwrap();
    assert_eq!(
        place(lease(), 0).await,
        Admission::Known(first.id),
        "not one that no engine is known to have made"
    );
    store.apply(first.id, created(), at(0)).await.unwrap();
    assert_eq!(place(lease(), 30).await, Admission::Known(first.id));
    let stranger = Lease {
        created_by: "somebody".to_owned(),
        ..lease()
    };
    assert_eq!(place(stranger, 0).await, Admission::New);
    let changed = Lease {
        secret_version: 2,
        ..lease()
    };
    assert_eq!(
        place(changed, 0).await,
        Admission::New,
        "its grants may be others"
    );
    let later = lease();
    assert_eq!(
        place(later.clone(), 31).await,
        Admission::New,
        "too little life is left"
    );
    store.apply(later.id, created(), at(32)).await.unwrap();
    store
        .apply(later.id, Event::RevokeAsked, at(33))
        .await
        .unwrap();
    assert_eq!(
        place(lease(), 30).await,
        Admission::Known(first.id),
        "not one that is revoked"
    );
}

#[tokio::test]
async fn two_keys_of_a_pool_are_valid_side_by_side() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let name: mayfly_protocol::names::PoolName = "pool1".parse().unwrap();
    let old = store.pool(name.clone()).await.unwrap().public_key;
    let new = KeyPair::generate().public().clone();
    store
        .begin_key_rotation(name.clone(), new.clone(), 2)
        .await
        .unwrap();
    assert!(
        store
            .begin_key_rotation(name.clone(), new.clone(), 2)
            .await
            .is_err()
    );
    let both = store.pool(name.clone()).await.unwrap();
    assert_eq!(both.public_key, old);
    assert_eq!(both.keys(), [old.clone(), new.clone()]);
    let after = store.end_key_rotation(name.clone(), true).await.unwrap();
    assert_eq!(after.public_key, new);
    assert_eq!(after.keys(), [new], "the old key is of no use any more");
    assert_eq!(after.dispatcher_generation, 2);
    assert!(store.end_key_rotation(name, true).await.is_err());
}

/// A mistake in one job is that caller's alone.
#[tokio::test]
async fn an_expired_token_is_forgotten_after_a_week() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let token = |id: &str, end: i64| tokens::Token {
        id: id.to_owned(),
        read: vec!["db:*".parse().unwrap()],
        created: at(0),
        expiration: at(end),
        max_leases: None,
    };
    for (id, end) in [("early", 10), ("late", 1_000)] {
        let secret = Secret::new(format!("secret of {id}"));
        store.create_token(token(id, end), &secret).await.unwrap();
    }
    let week = 7 * 86_400;
    let kept = async || {
        let found = store.tokens(String::new(), 10).await.unwrap();
        found.into_iter().map(|token| token.id).collect::<Vec<_>>()
    };
    store.forget(at(week + 9), HISTORY).await.unwrap();
    assert_eq!(kept().await, ["early", "late"]);
    store.forget(at(week + 11), HISTORY).await.unwrap();
    assert_eq!(kept().await, ["late"]);
    // The root token has no end.
    store.forget(at(100 * week), HISTORY).await.unwrap();
    assert!(kept().await.is_empty());
}

#[tokio::test]
async fn a_job_that_panics_is_undone_alone() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let asked = lease();
    let (panicked, placed) = tokio::join!(
        store.run(|connection| {
            connection.execute_batch("DELETE FROM secrets WHERE kind = 'dynamic'")?;
            assert!(connection.is_autocommit(), "on purpose");
            Ok(())
        }),
        store.admit(asked.clone(), Conditions::default(), at(0)),
    );
    assert!(matches!(panicked, Err(StoreError::Unavailable(_))));
    assert_eq!(placed.unwrap(), Admission::New, "its secret is there");
    assert_eq!(store.lease(asked.id).await.unwrap().id, asked.id);
}

#[tokio::test]
async fn a_copy_knows_that_it_is_one() {
    let directory = tempfile::tempdir().unwrap();
    let place = place(directory.path());
    let (store, _, lock) = Store::open(&place).unwrap();
    let pool = Pool::new(
        "pool1".parse().unwrap(),
        KeyPair::generate().public().clone(),
        1,
        at(0),
    );
    store.create_pool(pool).await.unwrap();
    add(
        &store,
        "db:root",
        json!({"type": "postgresql"}),
        base_data(),
    )
    .await
    .unwrap();
    add(&store, "db:dyn", dynamic("db:root", "pool1"), json!({}))
        .await
        .unwrap();
    let asked = lease();
    store
        .admit(asked.clone(), Conditions::default(), at(0))
        .await
        .unwrap();
    let copy = directory.path().join("copy.db");
    back_up(&place, &copy, None).unwrap();
    assert!(
        back_up(&place, &copy, None).is_err(),
        "nothing is overwritten"
    );
    assert_eq!(
        std::fs::metadata(&copy).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let claim = async |store: &Store| {
        let pool: PoolName = "pool1".parse().unwrap();
        store
            .claim_due(pool.clone(), vec![pool], 10, at(40), 0.0)
            .await
            .unwrap();
        store.lease(asked.id).await.unwrap().status.state
    };
    assert_eq!(claim(&store).await, State::Revoking, "nobody got it");
    store.close().await;
    drop(lock);
    let restored = Place {
        backend: Backend::Sqlite(copy),
        ..place
    };
    let (store, _, _lock) = Store::open(&restored).unwrap();
    assert_eq!(
        claim(&store).await,
        State::Active,
        "somebody may have got it since"
    );
}

#[tokio::test]
async fn a_store_can_be_marked_as_restored() {
    let directory = tempfile::tempdir().unwrap();
    let place = tested(directory.path()).await;
    std::fs::create_dir_all(&place.data_dir).unwrap();
    assert!(mark_restored(&place).is_err(), "nothing was ever in it");
    let (store, _, lock) = Store::open(&place).unwrap();
    furnish(&store).await;
    let asked = lease();
    store
        .admit(asked.clone(), Conditions::default(), at(0))
        .await
        .unwrap();
    store.close().await;
    drop(lock);
    mark_restored(&place).unwrap();
    let (store, _, lock) = Store::open(&place).unwrap();
    if lock.is_some() {
        assert!(mark_restored(&place).is_err(), "beside a dispatcher");
    }
    let pool: PoolName = "pool1".parse().unwrap();
    store
        .claim_due(pool.clone(), vec![pool], 10, at(40), 0.0)
        .await
        .unwrap();
    assert_eq!(
        store.lease(asked.id).await.unwrap().status.state,
        State::Active,
        "somebody may have got it since"
    );
}

#[tokio::test]
async fn a_root_token_made_beforehand_is_taken_if_it_is_one() {
    let directory = tempfile::tempdir().unwrap();
    let place = tested(directory.path()).await;
    std::fs::create_dir_all(&place.data_dir).unwrap();
    for bad in ["short", &"with spaces ".repeat(4), &"ü".repeat(32)] {
        std::fs::write(&place.root_token_file, bad).unwrap();
        let refused = Store::open(&place).err().unwrap().to_string();
        assert!(refused.contains("root-token"), "{refused}");
        assert!(!refused.contains(bad), "{refused}");
    }
    let given = "0123456789abcdef".repeat(2);
    std::fs::write(&place.root_token_file, format!("{given}\n")).unwrap();
    let (store, _, _lock) = Store::open(&place).unwrap();
    assert!(matches!(
        store.bearer(Secret::new(given.as_str())).await.unwrap(),
        Some(Bearer::Root)
    ));
}
