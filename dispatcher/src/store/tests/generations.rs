//! Keys that are renewed while a dispatcher runs, and passwords that are forgotten.

use super::*;
use crate::password::{Nonce, Seed};
use crate::store::Generation;
use crate::store::sql::NONE;
use mayfly_protocol::names::PoolName;

/// Records a lease as a read does; gives it with its password.
async fn issued(store: &Store, lease: Lease) -> Result<(Lease, Secret), StoreError> {
    let (generation, key) = store.keys(false).await?.derivation;
    let nonce = Nonce::random();
    let password = Seed::of_nonce(key, nonce.expose()).password();
    let conditions = Conditions {
        nonce: Some((generation, nonce)),
        ..Conditions::default()
    };
    store.admit(lease.clone(), conditions, at(0)).await?;
    Ok((lease, password))
}

async fn column(store: &Store, sql: &'static str) -> Vec<Option<Vec<u8>>> {
    let read = store.run(move |connection| {
        let rows = connection.prepare(sql)?.query(NONE)?;
        rows.iter().map(|row| Ok(row.get(0)?)).collect()
    });
    read.await.unwrap()
}

async fn end(store: &Store, lease: &Lease) {
    for event in [created(), Event::RevokeAsked] {
        store.apply(lease.id, event, at(1)).await.unwrap();
    }
}

#[tokio::test]
async fn a_password_is_forgotten_with_its_lease() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let (lease, password) = issued(&store, lease()).await.unwrap();
    let again = || async { store.seed(lease.id).await.map(|seed| seed.password()) };
    assert!(again().await.unwrap() == password);
    let nonces = "SELECT nonce FROM leases";
    assert!(column(&store, nonces).await[0].is_some());

    end(&store, &lease).await;
    assert!(matches!(again().await, Err(StoreError::NotFound(_))));
    assert_eq!(column(&store, nonces).await, [None], "the nonce is left");
}

#[tokio::test]
async fn a_lease_of_the_version_before_keeps_its_password() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let (_, key) = store.keys(false).await.unwrap().derivation;
    let lease = lease();
    let conditions = Conditions::default();
    store.admit(lease.clone(), conditions, at(0)).await.unwrap();
    // The derivation key is needed also after it was renewed.
    renew(&store).await;
    store.keys(true).await.unwrap();
    let seed = store.seed(lease.id).await.unwrap();
    assert!(seed.password() == Seed::of_id(key, &lease.id).password());
}

async fn renew(store: &Store) -> Generation {
    let sealer = store.sealer.clone();
    store
        .run(move |connection| crate::store::generations::add_derivation(connection, &sealer))
        .await
        .unwrap()
}

#[tokio::test]
async fn a_derivation_key_goes_when_its_last_lease_has_ended() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let values = "SELECT value FROM meta WHERE key >= 'derivation_key' AND key < 'derivation_key/' ORDER BY key";
    let first = column(&store, values).await;
    assert_eq!(first.len(), 1);

    let (old, old_password) = issued(&store, lease()).await.unwrap();
    assert_eq!(renew(&store).await, 2);
    let (new, new_password) = issued(&store, lease()).await.unwrap();
    assert_eq!(renew(&store).await, 3);
    assert_eq!(store.keys(true).await.unwrap().derivation.0, 3);
    for (lease, password) in [(&old, &old_password), (&new, &new_password)] {
        assert!(store.seed(lease.id).await.unwrap().password() == *password);
    }
    assert_eq!(column(&store, values).await.len(), 3);

    end(&store, &old).await;
    store.keys(true).await.unwrap();
    let left = column(&store, values).await;
    assert_eq!(left.len(), 3);
    assert_ne!(left[0], first[0], "the first key is left");
    // A dispatcher that was suspended when it had the first key makes no lease with that key later.
    let conditions = Conditions {
        nonce: Some((1, Nonce::random())),
        ..Conditions::default()
    };
    let late = store.admit(lease(), conditions, at(0)).await;
    assert!(matches!(late, Err(StoreError::Unavailable(_))), "{late:?}");
    assert!(store.seed(new.id).await.unwrap().password() == new_password);

    end(&store, &new).await;
    store.keys(true).await.unwrap();
    assert_eq!(column(&store, values).await.len(), 2, "the second is left");
}

/// An older dispatcher gives the password of a lease's id: it must not find one with a nonce.
#[tokio::test]
async fn leases_with_nonces_are_not_shared_with_the_version_before() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let (generation, _) = store.keys(false).await.unwrap().derivation;
    let conditions = Conditions {
        key: Some("k".to_owned()),
        nonce: Some((generation, Nonce::random())),
        ..Conditions::default()
    };
    let asked = lease();
    store
        .admit(asked.clone(), conditions.clone(), at(0))
        .await
        .unwrap();
    let older = "SELECT value FROM meta WHERE EXISTS (SELECT 1 FROM reads WHERE key = 'k')";
    assert!(column(&store, older).await.is_empty());
    let again = store.admit(lease(), conditions, at(0)).await.unwrap();
    assert_eq!(again, Admission::Known(asked.id));
}

/// The dispatcher's new key takes the place of the earlier one only when all pools have it.
#[tokio::test]
async fn the_dispatchers_key_is_renewed_with_the_pools_keys() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    store.create_pool(a_pool("pool2")).await.unwrap();
    let sealer = store.sealer.clone();
    let change = async |change: fn(&Connection, &Sealer) -> Result<Generation, StoreError>| {
        let sealer = sealer.clone();
        store
            .run(move |connection| change(connection, &sealer))
            .await
    };
    let add = crate::store::generations::add_dispatcher;
    let finish = crate::store::generations::finish_dispatcher;
    let generations = async || -> Vec<Generation> {
        let ring = store.keys(false).await.unwrap();
        ring.dispatcher.iter().map(|(n, _)| *n).collect()
    };
    assert!(matches!(change(finish).await, Err(StoreError::InUse(_))));
    assert_eq!(change(add).await.unwrap(), 2);
    assert!(matches!(change(add).await, Err(StoreError::InUse(_))));
    assert_eq!(generations().await, [1, 2]);
    let behind = change(finish).await.unwrap_err().to_string();
    assert!(behind.contains("pool1, pool2"), "{behind}");

    let name = |text: &str| text.parse::<PoolName>().unwrap();
    let key = || KeyPair::generate().public().clone();
    store
        .begin_key_rotation(name("pool1"), key(), 2)
        .await
        .unwrap();
    let pool = store.pool(name("pool1")).await.unwrap();
    assert_eq!(
        pool.recipient().unwrap().from,
        1,
        "until all engines have it"
    );
    let pool = store.end_key_rotation(name("pool1"), true).await.unwrap();
    assert_eq!(pool.recipient().unwrap().from, 2);
    let behind = change(finish).await.unwrap_err().to_string();
    assert!(
        !behind.contains("pool1") && behind.contains("pool2"),
        "{behind}"
    );
    // Nothing is sent to a distrusted pool, so it needs no new key.
    store.distrust_pool(name("pool2"), at(1)).await.unwrap();
    assert_eq!(change(finish).await.unwrap(), 2);
    assert_eq!(generations().await, [2]);
    // A dispatcher that was suspended when it had the first key gives that key to no pool later.
    let late = store.begin_key_rotation(name("pool1"), key(), 1).await;
    assert!(matches!(late, Err(StoreError::Unavailable(_))), "{late:?}");
    let late = store.create_pool(a_pool("pool3")).await;
    assert!(matches!(late, Err(StoreError::Unavailable(_))), "{late:?}");
}
