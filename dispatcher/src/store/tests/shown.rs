//! Lists, counts and the deletion of a pool go by what is shown of leases.

use super::*;
use crate::store::{PoolCount, shown};
use mayfly_protocol::timing::timing;

/// A lease of every status that matters here.
fn of_each_kind() -> Vec<Lease> {
    let (yes, no) = (Some(at(1)), None);
    let mut all = Vec::new();
    for state in State::ALL {
        for expiration in [yes, no] {
            for revoked_at in [yes, no] {
                for stuck in [false, true] {
                    let status = Status {
                        state,
                        expiration,
                        revoked_at,
                        stuck,
                        ..Status::begin(at(31))
                    };
                    all.push(Lease { status, ..lease() });
                }
            }
        }
    }
    // These combinations cannot exist: only an account whose end has begun can be found gone.
    all.retain(|lease| {
        let status = &lease.status;
        let ends = !matches!(status.state, State::Pending | State::Active);
        (ends || status.revoked_at.is_none()) && !(status.state.is_settled() && status.stuck)
    });
    all
}

async fn filled(directory: &std::path::Path) -> (Store, Option<std::fs::File>, Vec<Lease>) {
    let (store, lock) = furnished(directory).await;
    let all = of_each_kind();
    for lease in &all {
        let lease = lease.clone();
        store
            .admit(lease.clone(), Conditions::default(), at(0))
            .await
            .unwrap();
        store
            .run(move |connection| {
                let mut stored = lease_row::load_stored(connection, lease.id)?;
                stored.lease = lease;
                stored.write(connection)
            })
            .await
            .unwrap();
    }
    (store, lock, all)
}

/// Far from the store every statement costs a round trip.
#[tokio::test]
async fn the_numbers_of_many_pools_are_one_statement() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock, all) = filled(directory.path()).await;
    let statements = async || {
        let before = store.health.tally.all()[2];
        let counts = store.pool_counts(at(0)).await.unwrap();
        (store.health.tally.all()[2] - before, counts)
    };
    let (of_one_pool, alone) = statements().await;
    for n in 2..=30 {
        store
            .create_pool(a_pool(&format!("pool{n}")))
            .await
            .unwrap();
    }
    let (of_many, counts) = statements().await;
    // A statement of the store's own may fall between the two measurements. One statement for each pool would be 29
    // more.
    assert!(of_many < of_one_pool + 10, "{of_many}, {of_one_pool}");
    assert_eq!(counts.len(), 30);
    let counted = |count: &PoolCount| count.leases.iter().sum::<u64>();
    assert_eq!(counted(&counts[0]), all.len() as u64);
    assert_eq!(counts[0], alone[0], "not mixed with those of others");
    assert!(counts[1..].iter().all(|count| counted(count) == 0));
}

#[tokio::test]
async fn lists_and_counts_are_of_what_is_shown() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock, all) = filled(directory.path()).await;
    let counts = store.pool_counts(at(0)).await.unwrap().remove(0);
    for (n, state) in counts.leases.into_iter().zip(State::ALL) {
        let mut expected: Vec<LeaseId> = all
            .iter()
            .filter(|lease| shown::state(&lease.status) == state)
            .map(|lease| lease.id)
            .collect();
        expected.sort();
        expected.reverse();
        assert_eq!(n, expected.len() as u64, "{state:?}");
        let filter = Filter {
            state: Some(state),
            ..Filter::default()
        };
        // The leases are read page by page, as over the API.
        let (mut found, mut cursor) = (Vec::new(), String::new());
        loop {
            let page = store.leases(filter.clone(), cursor, 2).await.unwrap();
            let Some(last) = page.last() else { break };
            cursor = last.id.to_string();
            found.extend(page.iter().map(|lease| lease.id));
        }
        assert_eq!(found, expected, "{state:?}");
    }
    let stuck = |lease: &&Lease| shown::is_stuck(&lease.status);
    let filter = Filter {
        stuck: true,
        ..Filter::default()
    };
    let found = store.leases(filter, String::new(), 100).await.unwrap();
    assert_eq!(found.len(), all.iter().filter(stuck).count());
    assert_eq!(counts.stuck, found.len() as u64);
    assert_eq!(counts.settling, 4);
}

#[tokio::test]
async fn a_pool_waits_for_creates_that_could_still_commit() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let gone = |at_second: i64, conclusive: bool| Event::Gone {
        conclusive,
        at: at(at_second),
        server: "s".to_owned(),
        by: "e".parse().unwrap(),
        seen: at(at_second),
    };
    let lease = lease();
    store
        .admit(lease.clone(), Conditions::default(), at(0))
        .await
        .unwrap();
    let delete = async |second: i64| {
        let deleted = store.delete_pool("pool1".parse().unwrap(), at(second));
        deleted.await
    };
    assert!(matches!(delete(1).await, Err(StoreError::InUse(_))));
    store.apply(lease.id, Event::GivenUp, at(1)).await.unwrap();
    for path in ["db:dyn", "db:root"] {
        store.delete_secret(path.parse().unwrap()).await.unwrap();
    }
    let refused = delete(2).await;
    assert!(matches!(&refused, Err(StoreError::InUse(why)) if why.contains("not revoked yet")));
    store.apply(lease.id, gone(2, false), at(2)).await.unwrap();
    let settles_at = lease.settles_at() + timing().reconcile_grace;
    match delete(3).await {
        Err(StoreError::InUseUntil { message, until }) => {
            assert_eq!(until, settles_at);
            assert!(message.contains("could still commit"), "{message}");
        }
        other => panic!("{other:?}"),
    }
    // The server has been unreachable since then: the message names the way out.
    let later = settles_at.as_second() - at(0).as_second() + 1;
    match delete(later).await {
        Err(StoreError::InUse(why)) => assert!(why.contains(&lease.id.to_string()), "{why}"),
        other => panic!("{other:?}"),
    }
    store
        .apply(lease.id, gone(later, true), at(later))
        .await
        .unwrap();
    delete(later).await.unwrap();
}
