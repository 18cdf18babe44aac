//! A job that fails touches no other.

use super::*;
use crate::store::sql::NONE;

/// A mistake in one job is that caller's alone.
#[tokio::test]
async fn a_job_that_panics_is_undone_alone() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let asked = lease();
    let (panicked, placed) = tokio::join!(
        store.run(|connection| {
            connection.execute_batch("DELETE FROM secrets WHERE kind = 'dynamic'")?;
            connection.counted(&"pool1".parse().unwrap(), State::Active, 5);
            assert!(connection.is_autocommit(), "on purpose");
            Ok(())
        }),
        store.admit(asked.clone(), Conditions::default(), at(0)),
    );
    assert!(matches!(panicked, Err(StoreError::Unavailable(_))));
    assert_eq!(placed.unwrap(), Admission::New, "its secret is there");
    assert_eq!(store.lease(asked.id).await.unwrap().id, asked.id);
    assert_counts(&store).await;
}

/// The same of one that is not the first of its transaction.
#[tokio::test]
async fn a_job_that_fails_after_others_is_undone_alone() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let (one, two) = (lease(), lease());
    let (first, failed, last) = tokio::join!(
        store.admit(one.clone(), Conditions::default(), at(0)),
        store.run(|connection| {
            connection.execute("DELETE FROM leases", NONE)?;
            connection.execute("DELETE FROM secrets WHERE kind = 'dynamic'", NONE)?;
            connection.counted(&"pool1".parse().unwrap(), State::Pending, -1);
            Err::<(), _>(StoreError::NotFound("it".to_owned()))
        }),
        store.admit(two.clone(), Conditions::default(), at(0)),
    );
    assert!(matches!(failed, Err(StoreError::NotFound(_))), "{failed:?}");
    for (admitted, lease) in [(first, one), (last, two)] {
        assert_eq!(admitted.unwrap(), Admission::New);
        assert_eq!(store.lease(lease.id).await.unwrap().id, lease.id);
    }
    assert_counts(&store).await;
}
