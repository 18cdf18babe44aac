//! Who is given which credentials, and who ends the leases of a pool that may not.

use mayfly_protocol::names::PoolName;
use mayfly_protocol::task::{Failure, FailureCode};

use super::*;

fn pool(name: &str) -> PoolName {
    name.parse().unwrap()
}

async fn add_pool(store: &Store, name: &str) {
    let key = KeyPair::generate().public().clone();
    let new = Pool::new(pool(name), key, 1, at(0));
    store.create_pool(new).await.unwrap();
}

/// A lease of pool1 that somebody holds until second 60.
async fn held(store: &Store) -> Lease {
    let lease = lease();
    let conditions = Conditions::default();
    store.admit(lease.clone(), conditions, at(0)).await.unwrap();
    store.apply(lease.id, created(), at(0)).await.unwrap();
    lease
}

async fn claim(store: &Store, of: &str, living: &[&str], second: i64) -> Vec<LeaseAccess> {
    let living = living.iter().map(|name| pool(name)).collect();
    store
        .claim_due(pool(of), living, 10, at(second), 0.0)
        .await
        .unwrap()
}

async fn change_password(store: &Store, second: i64) {
    let revise = |mut content: Content| {
        content.data.insert("password".to_owned(), json!("newer"));
        let spec = secrets::parse(&content, 86_400).unwrap();
        Ok(Revised { content, spec })
    };
    let path = "db:root".parse().unwrap();
    store
        .update_secret(path, revise, "root".to_owned(), at(second))
        .await
        .unwrap();
}

async fn refused(store: &Store, lease: &Lease, second: i64) -> Applied {
    let failing = Event::Failing {
        failure: Failure::new(FailureCode::DatabaseRefusedLogin, "no"),
        attempts: 1,
        again: None,
    };
    store.apply(lease.id, failing, at(second)).await.unwrap()
}

async fn passwords(store: &Store, lease: &Lease) -> Vec<String> {
    let mut found = Vec::new();
    for turn in 0..4 {
        let way = store.lease_access(lease.id, turn).await.unwrap().unwrap();
        found.push(way.target.password.expose().to_owned());
    }
    found
}

async fn count(store: &Store, name: &str, state: State) -> u64 {
    let counts = store.pool_counts(at(0)).await.unwrap();
    let counts = counts.iter().find(|count| count.pool.as_str() == name);
    let n = State::ALL.iter().position(|one| *one == state).unwrap();
    counts.unwrap().leases[n]
}

#[tokio::test]
async fn a_distrusted_pools_leases_are_taken_over() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    for name in ["pool2", "pool3"] {
        add_pool(&store, name).await;
        let path = format!("db:dyn-{name}");
        add(&store, &path, dynamic("db:root", name), json!({}))
            .await
            .unwrap();
    }
    let lease = held(&store).await;
    let before = store.distrust_pool(pool("pool1"), at(5)).await.unwrap();
    assert_eq!((before.bases.len(), before.leases), (1, 1));
    assert!(before.pool.keys().is_empty());
    let none = before.pool.recipient();
    assert!(matches!(none, Err(StoreError::Distrusted(_))));
    assert!(store.lease_access(lease.id, 0).await.unwrap().is_none());
    let placed = store.admit(super::lease(), Conditions::default(), at(6));
    assert!(matches!(placed.await, Err(StoreError::Distrusted(_))));
    let named = add(&store, "db:other", dynamic("db:root", "pool1"), json!({})).await;
    let Err(StoreError::Invalid(problems)) = named else {
        panic!("it is named all the same: {named:?}")
    };
    assert!(problems.contains_key("attributes.pool"));
    let begun = store.begin_key_rotation(pool("pool1"), before.pool.public_key, 1);
    assert!(begun.await.is_err(), "it is for good");

    // A pool with engines takes the lease over, although another pool comes first by name.
    let taken = claim(&store, "pool1", &["pool3"], 6).await;
    let [taken] = taken.as_slice() else {
        panic!("{taken:?}")
    };
    assert!(taken.taken_over);
    assert_eq!(taken.lease.pool, pool("pool3"));
    let other = store.pool(pool("pool3")).await.unwrap();
    assert_eq!(taken.recipient.key, other.public_key);
    assert_eq!(count(&store, "pool1", State::Active).await, 0);
    assert_eq!(count(&store, "pool3", State::Active).await, 1);
    assert!(claim(&store, "pool1", &["pool3"], 7).await.is_empty());
    assert!(claim(&store, "pool3", &["pool3"], 7).await.is_empty());
    let due = claim(&store, "pool3", &["pool3"], 65).await;
    assert_eq!(due.len(), 1, "it is looked after at its date");
    assert!(!due[0].taken_over);
}

#[tokio::test]
async fn without_another_pool_they_are_stuck_until_there_is_one() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    add_pool(&store, "pool2").await;
    let lease = held(&store).await;
    store.distrust_pool(pool("pool1"), at(5)).await.unwrap();
    assert!(claim(&store, "pool1", &["pool2"], 6).await.is_empty());
    let stuck = store.lease(lease.id).await.unwrap().status;
    assert!(stuck.stuck);
    let said = stuck.last_error.unwrap();
    assert!(
        said.starts_with("no_pool: ") && said.contains("--detach"),
        "{said}"
    );

    assert!(stuck.next_reconcile.unwrap() > at(7));
    add(&store, "db:dyn2", dynamic("db:root", "pool2"), json!({}))
        .await
        .unwrap();
    let taken = claim(&store, "pool1", &[], 7).await;
    assert_eq!(taken[0].lease.pool, pool("pool2"));
    let status = store.lease(lease.id).await.unwrap().status;
    assert_eq!((status.stuck, status.last_error), (false, None));
}

/// The pool may have been moved away from because it is not trusted: it is not given what is newer
/// than its lease, whatever happens.
#[tokio::test]
async fn newer_credentials_are_only_for_pools_that_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let lease = held(&store).await;
    change_password(&store, 1).await;
    assert_eq!(
        passwords(&store, &lease).await,
        ["newer", "hunter2", "newer", "hunter2"],
        "while a secret names it"
    );
    add_pool(&store, "pool2").await;
    let moved = |content: Content| {
        let content = Content {
            attributes: dynamic("db:root", "pool2").as_object().unwrap().clone(),
            ..content
        };
        let spec = secrets::parse(&content, 86_400).unwrap();
        Ok(Revised { content, spec })
    };
    let path = "db:dyn".parse().unwrap();
    store
        .update_secret(path, moved, "root".to_owned(), at(2))
        .await
        .unwrap();
    assert_eq!(passwords(&store, &lease).await, ["hunter2"; 4]);

    // The pool uses the credentials that it has as long as they work. Then the other pool takes over.
    assert!(
        claim(&store, "pool1", &["pool1", "pool2"], 60)
            .await
            .is_empty()
    );
    let due = claim(&store, "pool1", &["pool1", "pool2"], 65).await;
    assert_eq!(due[0].lease.pool, pool("pool1"));
    let applied = refused(&store, &lease, 66).await;
    let other = applied
        .access
        .map(|way| way.target.password.expose().to_owned());
    assert!(other.is_none_or(|password| password == "hunter2"));
    let taken = claim(&store, "pool1", &["pool1", "pool2"], 75).await;
    assert!(taken[0].taken_over);
    assert_eq!(taken[0].lease.pool, pool("pool2"));
    assert_eq!(passwords(&store, &lease).await[0], "newer");
}

#[tokio::test]
async fn a_pool_whose_secrets_are_gone_is_told_nothing_newer() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let lease = held(&store).await;
    store
        .apply(lease.id, Event::RevokeAsked, at(1))
        .await
        .unwrap();
    store
        .delete_secret("db:dyn".parse().unwrap())
        .await
        .unwrap();
    let path = || "db:root".parse().unwrap();
    assert!(store.base(path()).await.unwrap().last.is_some());
    assert_eq!(store.bases_in_use().await.unwrap().len(), 1);

    change_password(&store, 2).await;
    assert!(store.base(path()).await.unwrap().last.is_none());
    assert!(
        store.bases_in_use().await.unwrap().is_empty(),
        "swept with it"
    );
    assert_eq!(passwords(&store, &lease).await, ["hunter2"; 4]);
    refused(&store, &lease, 3).await;
    let tried = claim(&store, "pool1", &["pool1"], 10).await;
    assert_eq!(tried[0].target.password.expose(), "hunter2");
    let status = store.lease(lease.id).await.unwrap().status;
    assert!(status.stuck);
    assert!(status.last_error.unwrap().starts_with("no_pool: "));
}
