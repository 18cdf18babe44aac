//! Jobs about different leases run side by side, in few round trips.

use super::*;

/// Only reads that count against one quota wait for each other. All other reads continue, of this dispatcher and of
/// another, and so does all further work on their leases.
#[tokio::test]
async fn a_lock_for_one_secret_stops_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let Some((one, two, other, database)) = with_one_secret_held(directory.path()).await else {
        return;
    };
    let limited = || Conditions {
        most_of_secret: Some(100),
        ..Conditions::default()
    };
    let waiting = one.admit(lease(), limited(), at(0));
    tokio::pin!(waiting);
    let early = tokio::time::timeout(std::time::Duration::from_millis(300), &mut waiting).await;
    assert!(early.is_err(), "a quota was counted beside another count");
    blocked(&other, &database, 1).await;
    let issues = async {
        for store in [&one, &two] {
            for (path, conditions) in [
                ("db:dyn2", limited()),
                ("db:dyn2", Conditions::default()),
                // This read has no limit that must be exact.
                ("db:dyn", Conditions::default()),
            ] {
                let lease = Lease {
                    path: path.parse().unwrap(),
                    ..lease()
                };
                let admitted = store.admit(lease.clone(), conditions, at(0)).await.unwrap();
                assert_eq!(admitted, Admission::New);
                store.apply(lease.id, created(), at(1)).await.unwrap();
                store
                    .apply(lease.id, Event::RevokeAsked, at(2))
                    .await
                    .unwrap();
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(10), issues)
        .await
        .expect("a read waits for another secret's lock");
    other.batch_execute("ROLLBACK").await.unwrap();
    waiting.await.unwrap();
    // Each session has its own counts, and their sum is shown.
    let counts = two.pool_counts(at(3)).await.unwrap();
    assert_eq!(counts[0].leases, [1, 0, 6, 0, 0]);
    assert!(!one.forget(at(3), HISTORY).await.unwrap());
    assert_eq!(two.pool_counts(at(3)).await.unwrap(), counts);
    let parts = "SELECT count(*) FROM lease_counts WHERE part <> 0";
    let parts: i64 = other.query_one(parts, &[]).await.unwrap().get(0);
    assert_eq!(parts, 0, "added up");
}

/// Reads that wait for one quota take one session, not those of other reads.
#[tokio::test]
async fn many_reads_of_one_secret_leave_sessions_to_others() {
    let directory = tempfile::tempdir().unwrap();
    let Some((one, _, other, database)) = with_one_secret_held(directory.path()).await else {
        return;
    };
    let limited = || Conditions {
        most_of_secret: Some(100),
        ..Conditions::default()
    };
    let waiting = (0..20).map(|_| one.admit(lease(), limited(), at(0)));
    let mut waiting = futures_util::future::join_all(waiting);
    let early = tokio::time::timeout(std::time::Duration::from_millis(300), &mut waiting).await;
    assert!(early.is_err(), "a quota was counted beside another count");
    blocked(&other, &database, 1).await;
    let issues = async {
        for _ in 0..10 {
            let lease = Lease {
                path: "db:dyn2".parse().unwrap(),
                ..lease()
            };
            let admitted = one.admit(lease.clone(), limited(), at(0)).await.unwrap();
            assert_eq!(admitted, Admission::New);
            one.apply(lease.id, created(), at(1)).await.unwrap();
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(10), issues)
        .await
        .expect("another secret's reads have all sessions");
    other.batch_execute("ROLLBACK").await.unwrap();
    for admitted in waiting.await {
        assert_eq!(admitted.unwrap(), Admission::New);
    }
    // If the row stays locked, the others get an error by their deadline.
    other
        .batch_execute("BEGIN; SELECT 1 FROM secrets WHERE path = 'db:dyn' FOR UPDATE")
        .await
        .unwrap();
    let first = one.admit(lease(), limited(), at(0));
    tokio::pin!(first);
    assert!(futures_util::poll!(&mut first).is_pending());
    let late = one.admit(lease(), limited(), lease().create_deadline).await;
    assert!(matches!(late, Err(StoreError::Unavailable(_))), "{late:?}");
    other.batch_execute("ROLLBACK").await.unwrap();
    first.await.unwrap();
}

/// What an issue costs in statements, which does not depend on the speed of the machine.
#[tokio::test]
async fn an_issue_is_few_round_trips() {
    let directory = tempfile::tempdir().unwrap();
    let Some((store, _, _)) = in_postgresql(directory.path()).await else {
        return;
    };
    furnish(&store).await;
    let issue = async || {
        let lease = lease();
        store.bearer(Secret::new("some")).await.unwrap();
        store.read_secret("db:dyn".parse().unwrap()).await.unwrap();
        let nonce = Some((1, crate::password::Nonce::random()));
        let conditions = Conditions {
            nonce,
            ..Conditions::default()
        };
        store.admit(lease.clone(), conditions, at(0)).await.unwrap();
        store.apply_to(&lease, created(), at(1)).await.unwrap();
    };
    let read = || store.health.tally.all();
    // Each session prepares a statement when it first needs it, so the smallest numbers count.
    let mut fewest = [u64::MAX; 4];
    for _ in 0..60 {
        let before = read();
        issue().await;
        for ((fewest, now), was) in fewest.iter_mut().zip(read()).zip(before) {
            *fewest = (now - was).min(*fewest);
        }
    }
    let [jobs, transactions, statements, round_trips] = fewest;
    assert_eq!(
        [jobs, transactions],
        [4, 2],
        "four jobs, of which two write"
    );
    // The look-ups of the token and of the secret take one round trip each. Each of the two writes of the lease takes
    // two: one that reads, and one that writes and commits.
    assert_eq!(round_trips, 6);
    assert!(statements <= 25, "{statements}");
}
