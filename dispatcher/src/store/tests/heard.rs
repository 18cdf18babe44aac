//! What a pool says changes leases of that pool only, and only where it speaks of their role.

use super::*;
use mayfly_protocol::fixtures::any_event;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

fn report(pool: &str, role: Option<&str>, event: Event, late: bool) -> Report {
    Report {
        pool: pool.parse().unwrap(),
        role: role.map(|role| role.parse().unwrap()),
        found: None,
        event,
        late,
    }
}

/// One lease in each state.
async fn in_every_state(store: &Store) -> Vec<Lease> {
    let asked = || vec![created(), Event::RevokeAsked];
    let ended = Event::Gone {
        at: at(100),
        server: "s".to_owned(),
        by: "e1".parse().unwrap(),
        conclusive: true,
        seen: at(100),
    };
    let courses = [
        vec![],
        vec![created()],
        asked(),
        vec![created(), ended],
        vec![Event::NothingMade],
    ];
    let mut leases = Vec::new();
    for (events, state) in courses.into_iter().zip(State::ALL) {
        let mut lease = lease();
        store
            .admit(lease.clone(), Conditions::default(), at(0))
            .await
            .unwrap();
        for event in events {
            lease = store.apply(lease.id, event, at(100)).await.unwrap().lease;
        }
        assert_eq!(lease.status.state, state);
        leases.push(lease);
    }
    leases
}

#[tokio::test]
async fn another_pools_word_changes_no_lease() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let leases = in_every_state(&store).await;
    let runtime = tokio::runtime::Handle::current();
    let tested = tokio::task::spawn_blocking(move || {
        let config = Config {
            cases: 200,
            failure_persistence: None,
            ..Config::default()
        };
        let any = (
            0..leases.len(),
            any_event(),
            any::<bool>(),
            proptest::option::of(Just("mayfly_x")),
            0i64..10_000,
        );
        let ran = TestRunner::new(config).run(&any, |(n, event, late, role, second)| {
            let before = &leases[n];
            runtime.block_on(async {
                let stranger = report("pool2", role, event.clone(), late);
                let heard = store.hear(before.id, stranger, at(second)).await.unwrap();
                prop_assert!(matches!(heard, Heard::OtherPool));
                let bent = report("pool1", Some("mayfly_y"), event, late);
                let heard = store.hear(before.id, bent, at(second)).await.unwrap();
                prop_assert!(matches!(heard, Heard::OtherRole));
                prop_assert_eq!(&store.lease(before.id).await.unwrap(), before);
                Ok(())
            })
        });
        ran.unwrap();
    });
    tested.await.unwrap();
}

#[tokio::test]
async fn its_own_pools_word_counts() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let leases = in_every_state(&store).await;
    let late = report("pool1", None, created(), true);
    let heard = store.hear(leases[0].id, late, at(1)).await.unwrap();
    assert!(matches!(heard, Heard::NotYet), "{heard:?}");
    let renewed = report("pool1", Some("mayfly_x"), Event::Renewed(at(500)), false);
    let heard = store.hear(leases[1].id, renewed, at(1)).await.unwrap();
    let Heard::Applied(applied) = heard else {
        panic!("{heard:?}");
    };
    assert_eq!(applied.lease.status.expiration, Some(at(500)));
    let unknown = report("pool1", None, Event::RevokeAsked, false);
    let heard = store.hear(LeaseId::random(), unknown, at(1)).await.unwrap();
    assert!(matches!(heard, Heard::Unknown));
}

/// Another server in the place of the one a lease was made on ends its account; one at another address
/// may be a copy, and settles nothing.
#[tokio::test]
async fn an_account_counts_where_it_was_found() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let own = store.base("db:root".parse().unwrap()).await.unwrap().target;
    for (address, settles) in [
        (Some(own.address()), true),
        (Some("elsewhere 5432".to_owned()), false),
        (None, false),
    ] {
        let lease = Lease {
            id: LeaseId::random(),
            ..lease()
        };
        let conditions = Conditions::default();
        store.admit(lease.clone(), conditions, at(0)).await.unwrap();
        store.apply(lease.id, created(), at(0)).await.unwrap();
        let gone = Event::Gone {
            at: at(100),
            server: "another".to_owned(),
            by: "e1".parse().unwrap(),
            conclusive: true,
            seen: at(100),
        };
        let report = Report {
            found: address.map(|address| Found {
                address,
                server: "another".to_owned(),
            }),
            ..report("pool1", None, gone, false)
        };
        let Heard::Applied(applied) = store.hear(lease.id, report, at(100)).await.unwrap() else {
            panic!("it is the pool's own lease")
        };
        let status = applied.lease.status;
        assert_eq!(status.state.is_settled(), settles, "{status:?}");
        assert_eq!(status.stuck, !settles, "{status:?}");
    }
}
