//! A pool's reports change leases of that pool only, and only if they are about the lease's role.

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

async fn hear(store: &Store, id: LeaseId, report: Report, now: Timestamp) -> Heard {
    let heard = store.hear(vec![(id, report)], now).await.unwrap();
    heard.into_iter().next().unwrap()
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
                let heard = hear(&store, before.id, stranger, at(second)).await;
                prop_assert!(matches!(heard, Heard::OtherPool));
                let bent = report("pool1", Some("mayfly_y"), event, late);
                let heard = hear(&store, before.id, bent, at(second)).await;
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
    let heard = hear(&store, leases[0].id, late, at(1)).await;
    assert!(matches!(heard, Heard::NotYet), "{heard:?}");
    let renewed = report("pool1", Some("mayfly_x"), Event::Renewed(at(500)), false);
    let heard = hear(&store, leases[1].id, renewed, at(1)).await;
    let Heard::Applied(applied) = heard else {
        panic!("{heard:?}");
    };
    assert_eq!(applied.lease.status.expiration, Some(at(500)));
    let unknown = report("pool1", None, Event::RevokeAsked, false);
    let heard = hear(&store, LeaseId::random(), unknown, at(1)).await;
    assert!(matches!(heard, Heard::Unknown));
}

/// A report from a server that has replaced the lease's own server settles the lease. A server at another address may
/// be a copy, and settles nothing.
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
        let Heard::Applied(applied) = hear(&store, lease.id, report, at(100)).await else {
            panic!("it is the pool's own lease")
        };
        let status = applied.lease.status;
        assert_eq!(status.state.is_settled(), settles, "{status:?}");
        assert_eq!(status.stuck, !settles, "{status:?}");
    }
}

fn gone(second: i64) -> Event {
    Event::Gone {
        at: at(second),
        server: "s".to_owned(),
        by: "e1".parse().unwrap(),
        conclusive: true,
        seen: at(second),
    }
}

async fn active(store: &Store, count: usize) -> Vec<LeaseId> {
    let mut ids = Vec::new();
    for _ in 0..count {
        let lease = Lease {
            id: LeaseId::random(),
            ..lease()
        };
        let conditions = Conditions::default();
        store.admit(lease.clone(), conditions, at(0)).await.unwrap();
        store.apply(lease.id, created(), at(0)).await.unwrap();
        ids.push(lease.id);
    }
    ids
}

/// Reports in one message count one by one: what does not belong to the pool changes nothing, and keeps nothing
/// else from being recorded. The results have the order of the reports.
#[tokio::test]
async fn reports_together_are_judged_one_by_one() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let ids = active(&store, 4).await;
    let strange = LeaseId::random();
    let reports = vec![
        (ids[3], report("pool1", Some("mayfly_x"), gone(100), false)),
        (strange, report("pool1", None, gone(100), false)),
        (ids[2], report("pool2", None, gone(100), false)),
        (ids[1], report("pool1", Some("mayfly_y"), gone(100), false)),
        (ids[0], report("pool1", Some("mayfly_x"), gone(100), false)),
    ];
    let before = store.health.tally.all()[0];
    let heard = store.hear(reports, at(100)).await.unwrap();
    assert_eq!(store.health.tally.all()[0] - before, 1, "one job for all");
    let words: Vec<String> = heard
        .iter()
        .map(|heard| match heard {
            Heard::Applied(applied) => applied.lease.id.to_string(),
            other => format!("{other:?}"),
        })
        .collect();
    let expected = [
        ids[3].to_string(),
        "Unknown".to_owned(),
        "OtherPool".to_owned(),
        "OtherRole".to_owned(),
        ids[0].to_string(),
    ];
    assert_eq!(words, expected);
    for (n, state) in [State::Revoked, State::Active, State::Active, State::Revoked]
        .into_iter()
        .enumerate()
    {
        assert_eq!(store.lease(ids[n]).await.unwrap().status.state, state);
    }
}

/// Somebody has changed the row of one lease. The report about this lease fails if it is alone. If it comes together
/// with others, none of them is applied.
#[tokio::test]
async fn a_changed_row_fails_its_job() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let ids = active(&store, 3).await;
    let sql = format!(
        "UPDATE leases SET database = 'another' WHERE id = '{}'",
        ids[1]
    );
    store
        .run(move |connection| Ok(connection.execute(&sql, crate::store::sql::NONE)?))
        .await
        .unwrap();
    let of = |n: usize| (ids[n], report("pool1", None, gone(100), false));
    assert!(
        store
            .hear(vec![of(0), of(1), of(2)], at(100))
            .await
            .is_err()
    );
    assert_eq!(
        store.lease(ids[0]).await.unwrap().status.state,
        State::Active
    );
    assert!(store.hear(vec![of(1)], at(100)).await.is_err());
    for n in [0, 2] {
        store.hear(vec![of(n)], at(100)).await.unwrap();
        assert_eq!(
            store.lease(ids[n]).await.unwrap().status.state,
            State::Revoked
        );
    }
}
