//! A copy or a restored store: what was in progress when it was made may have a holder.

use super::*;
use std::os::unix::fs::PermissionsExt;

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
