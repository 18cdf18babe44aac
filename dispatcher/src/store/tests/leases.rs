//! The life of a lease in the store: counted, kept with its secret, claimed when it is due, listed.

use super::*;

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

    // The admin's password changes. Ends that are still to be done use the new password.
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

    // The secret is deleted. Its lease keeps what it needs.
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
    // Each step of a test case is a commit.
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
    for path in ["db:dyn", "db:dyn:a"] {
        let (path, live) = (path.parse().unwrap(), OfState::Live);
        let ended = store
            .end_some(path, live, Event::RevokeAsked, String::new(), 10, at(5))
            .await
            .unwrap();
        assert_eq!((ended.count, ended.after), (1, None));
    }
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
