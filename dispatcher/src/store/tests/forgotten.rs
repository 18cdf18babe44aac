//! What is forgotten of leases, and when.

use super::*;

#[tokio::test]
async fn failed_leases_are_forgotten_soon_and_others_are_not() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let place = async |key: Option<&str>| {
        let lease = lease();
        let conditions = Conditions {
            key: key.map(str::to_owned),
            ..Conditions::default()
        };
        store.admit(lease.clone(), conditions, at(0)).await.unwrap();
        lease.id
    };
    let gone = |second: i64| Event::Gone {
        conclusive: true,
        at: at(second),
        server: "s".to_owned(),
        by: "e1".parse().unwrap(),
        seen: at(second),
    };
    let apply = async |id: LeaseId, event: Event, second: i64| {
        store.apply(id, event, at(second)).await.unwrap();
    };
    let never_sent = place(Some("key")).await;
    apply(never_sent, Event::NothingMade, 1).await;
    let absent = place(None).await;
    apply(absent, Event::GivenUp, 1).await;
    apply(absent, gone(70), 70).await;
    let (open, detached, revoked) = (place(None).await, place(None).await, place(None).await);
    // Nobody has seen yet that there is no account.
    apply(open, Event::GivenUp, 1).await;
    let by = "root".to_owned();
    apply(detached, Event::Detached { by }, 1).await;
    apply(revoked, created(), 0).await;
    apply(revoked, gone(70), 70).await;

    let known = async || {
        let all = store
            .leases(Filter::default(), String::new(), 100)
            .await
            .unwrap();
        let mut ids: Vec<LeaseId> = all.iter().map(|lease| lease.id).collect();
        ids.sort();
        ids
    };
    let sorted = |mut ids: Vec<LeaseId>| {
        ids.sort();
        ids
    };
    assert!(!store.forget(at(600), HISTORY).await.unwrap());
    assert_eq!(known().await.len(), 5);
    assert!(!store.forget(at(601), HISTORY).await.unwrap());
    assert_eq!(known().await, sorted(vec![open, detached, revoked]));
    // The key of the forgotten lease is free, and late reports about that lease change nothing.
    let late = store.apply(never_sent, created(), at(602)).await;
    assert!(matches!(late, Err(StoreError::NotFound(_))));
    place(Some("key")).await;
    store.forget(at(30 * 86_400 + 1), HISTORY).await.unwrap();
    assert_eq!(known().await.len(), 2, "what is not settled stays");
    assert_counts(&store).await;
}
