//! A job that fails touches no other.

use super::*;

/// A mistake in one job is that caller's alone.
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
