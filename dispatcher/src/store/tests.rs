//! The store on a real file: first start, the key, the lock, secrets, leases and their counts.

use mayfly_common::names::LeaseId;
use mayfly_common::seal::KeyPair;
use mayfly_common::secret::Secret;
use mayfly_common::task::Created;
use serde_json::json;

use super::*;
use crate::lease::{BaseRef, Course, Event, Lease, State};
use crate::secrets::{self, Content};
use jiff::Timestamp;
use std::os::unix::fs::PermissionsExt;

fn place(directory: &std::path::Path) -> Place {
    let data_dir = directory.join("data");
    Place {
        database: data_dir.join("mayfly.db"),
        key_file: data_dir.join("master-key"),
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

async fn furnished(directory: &std::path::Path) -> (Store, std::fs::File) {
    let (store, _, lock) = Store::open(&place(directory)).unwrap();
    let pool = Pool {
        name: "pool1".parse().unwrap(),
        public_key: KeyPair::generate().public().clone(),
        next_key: None,
        previous_key: None,
        created: at(0),
    };
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
    (store, lock)
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
        course: Course::begin(at(30)),
    }
}

fn created() -> Event {
    Event::Created(
        Created {
            expiration: at(60),
            server: "s".to_owned(),
        },
        "e1".parse().unwrap(),
    )
}

#[tokio::test]
async fn the_first_start_makes_private_files_and_the_key_must_fit() {
    let directory = tempfile::tempdir().unwrap();
    let place = place(directory.path());
    let (store, identity, lock) = Store::open(&place).unwrap();
    for file in [&place.database, &place.key_file, &place.root_token_file] {
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
    assert!(!store.is_open());
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
    std::fs::write(&place.key_file, sealer::Sealer::random_key().expose()).unwrap();
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
        store.delete_pool("pool1".parse().unwrap()).await,
        Err(StoreError::InUse(_))
    ));
    let read = store.read_secret("db:dyn".parse().unwrap()).await.unwrap();
    assert_eq!(read.base.unwrap().target.password.expose(), "hunter2");
    let file = std::fs::read(place(directory.path()).database.with_extension("db-wal")).unwrap();
    assert!(
        !file.windows(7).any(|bytes| bytes == b"hunter2"),
        "sealed at rest"
    );
}

#[tokio::test]
async fn a_lease_lives_and_is_counted() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let lease = lease();
    store
        .place_lease(lease.clone(), Placing::default(), at(0))
        .await
        .unwrap();
    assert_eq!(
        store.lease(lease.id).await.unwrap(),
        lease,
        "read as it was written"
    );
    let applied = store.apply(lease.id, created(), at(1)).await.unwrap();
    assert_eq!(
        (applied.before, applied.lease.course.state),
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
    let revocation = revoking.revocation.unwrap();
    assert_eq!(
        (
            revocation.target.password.expose(),
            revocation.server.as_deref()
        ),
        ("new", Some("s"))
    );
    assert_eq!(revocation.ways, 2);

    // The secret goes, its lease keeps what it needs.
    store
        .delete_secret("db:dyn".parse().unwrap())
        .await
        .unwrap();
    store
        .delete_secret("db:root".parse().unwrap())
        .await
        .unwrap();
    store.forget(at(4)).await.unwrap();
    let again = store
        .apply(lease.id, Event::RevokeAsked, at(4))
        .await
        .unwrap();
    assert_eq!(
        again.revocation.unwrap().target.password.expose(),
        "new",
        "what works there now"
    );
    let gone = Event::Gone {
        conclusive: true,
        at: at(70),
        server: "s".to_owned(),
        by: "e2".parse().unwrap(),
    };
    let settled = store.apply(lease.id, gone, at(70)).await.unwrap().lease;
    assert_eq!(settled.course.state, State::Revoked);
    assert_eq!(
        store.pool_counts(at(100)).await.unwrap()[0].leases,
        [0, 0, 0, 1, 0]
    );
    store.delete_pool("pool1".parse().unwrap()).await.unwrap();
}

#[tokio::test]
async fn what_is_due_is_claimed_once_a_while() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let (one, two) = (lease(), lease());
    store
        .place_lease(one.clone(), Placing::default(), at(0))
        .await
        .unwrap();
    store
        .place_lease(two.clone(), Placing::default(), at(0))
        .await
        .unwrap();
    store.apply(two.id, created(), at(1)).await.unwrap();
    let pool = || "pool1".parse().unwrap();
    let claim = async |may_send, second| {
        store
            .claim_due(pool(), may_send, 10, at(second), 0.0)
            .await
            .unwrap()
    };
    assert!(claim(true, 34).await.is_empty());
    assert!(
        claim(false, 35).await.is_empty(),
        "given up, but nobody to tell"
    );
    assert_eq!(
        store.lease(one.id).await.unwrap().course.state,
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
            .place_lease(lease, Placing::default(), at(0))
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
    let placing = || Placing {
        most_of_secret: Some(3),
        most_of_secret_and_caller: Some(2),
        ..Placing::default()
    };
    let by = |who: &str| Lease {
        created_by: who.to_owned(),
        ..lease()
    };
    let many = (0..8).map(|_| store.place_lease(by("a"), placing(), at(0)));
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
        .place_lease(third.clone(), placing(), at(0))
        .await
        .unwrap();
    let refused = store
        .place_lease(by("c"), placing(), at(0))
        .await
        .unwrap_err();
    assert!(
        refused
            .to_string()
            .starts_with("maxLeases of `db:dyn`: 3 of 3")
    );
    store
        .apply(third.id, Event::NeverSent, at(1))
        .await
        .unwrap();
    store.place_lease(by("c"), placing(), at(0)).await.unwrap();
    let of_token = Placing {
        most_of_caller: Some(1),
        ..Placing::default()
    };
    let refused = store
        .place_lease(by("c"), of_token, at(0))
        .await
        .unwrap_err();
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
    let named = |key: &str| Placing {
        key: Some(key.to_owned()),
        ..Placing::default()
    };
    let first = lease();
    let place =
        async |lease: Lease, key: &str| store.place_lease(lease, named(key), at(0)).await.unwrap();
    assert_eq!(place(first.clone(), "k").await, Placed::New);
    assert_eq!(place(lease(), "k").await, Placed::Known(first.id));
    assert_eq!(place(lease(), "l").await, Placed::New);
    let stranger = Lease {
        created_by: "somebody".to_owned(),
        ..lease()
    };
    assert_eq!(
        place(stranger, "k").await,
        Placed::New,
        "keys are a caller's own"
    );
    // Nobody got a credential: the read begins anew.
    store.apply(first.id, Event::GivenUp, at(31)).await.unwrap();
    let second = lease();
    assert_eq!(place(second.clone(), "k").await, Placed::New);
    store.apply(second.id, created(), at(1)).await.unwrap();
    store
        .apply(second.id, Event::RevokeAsked, at(2))
        .await
        .unwrap();
    assert_eq!(
        place(lease(), "k").await,
        Placed::Known(second.id),
        "somebody got one"
    );
}

#[tokio::test]
async fn a_shared_lease_is_the_callers_own_and_lives_long_enough() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let shared = || Placing {
        share_for: Some(std::time::Duration::from_secs(30)),
        ..Placing::default()
    };
    let first = lease();
    let place = async |lease: Lease, second: i64| {
        store
            .place_lease(lease, shared(), at(second))
            .await
            .unwrap()
    };
    assert_eq!(place(first.clone(), 0).await, Placed::New);
    assert_eq!(
        place(lease(), 0).await,
        Placed::Known(first.id),
        "also while it is made"
    );
    store.apply(first.id, created(), at(1)).await.unwrap();
    assert_eq!(place(lease(), 30).await, Placed::Known(first.id));
    let stranger = Lease {
        created_by: "somebody".to_owned(),
        ..lease()
    };
    assert_eq!(place(stranger, 0).await, Placed::New);
    let changed = Lease {
        secret_version: 2,
        ..lease()
    };
    assert_eq!(
        place(changed, 0).await,
        Placed::New,
        "its grants may be others"
    );
    let later = lease();
    assert_eq!(
        place(later.clone(), 31).await,
        Placed::New,
        "too little life is left"
    );
    store.apply(later.id, created(), at(32)).await.unwrap();
    store
        .apply(later.id, Event::RevokeAsked, at(33))
        .await
        .unwrap();
    assert_eq!(
        place(lease(), 30).await,
        Placed::Known(first.id),
        "not one that is revoked"
    );
}

#[tokio::test]
async fn two_keys_of_a_pool_are_valid_side_by_side() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let name: mayfly_common::names::PoolName = "pool1".parse().unwrap();
    let old = store.pool(name.clone()).await.unwrap().public_key;
    let new = KeyPair::generate().public().clone();
    store
        .begin_key_rotation(name.clone(), new.clone())
        .await
        .unwrap();
    assert!(
        store
            .begin_key_rotation(name.clone(), new.clone())
            .await
            .is_err()
    );
    let both = store.pool(name.clone()).await.unwrap();
    assert_eq!(both.public_key, old);
    assert_eq!(both.keys(), [old.clone(), new.clone()]);
    let after = store.end_key_rotation(name.clone(), true).await.unwrap();
    assert_eq!(after.public_key, new);
    assert_eq!(after.keys(), [new, old]);
    assert!(store.end_key_rotation(name, true).await.is_err());
}
