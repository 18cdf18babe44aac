//! Leases that are due together: found in pages, in the order of their ends, without those that are over.

use super::*;
use crate::store::sql::NONE;

/// A lease that is active, with its end at this second.
async fn issued(store: &Store, end: i64) -> LeaseId {
    let lease = Lease {
        id: LeaseId::random(),
        ..lease()
    };
    let conditions = Conditions::default();
    store.admit(lease.clone(), conditions, at(0)).await.unwrap();
    let created = Created {
        expiration: at(end),
        server: "s".to_owned(),
        warnings: vec![],
    };
    let event = Event::Created(created, "e1".parse().unwrap());
    // The clocks of database and store are the same, because the answer came at once.
    store.apply(lease.id, event, at(end - 60)).await.unwrap();
    lease.id
}

/// The leases that are due after 60 s and until 70 s, in pages of two.
async fn due(store: &Store) -> Vec<LeaseId> {
    let (mut next, mut found) = (Some(AfterEnd::all_of(at(60))), Vec::new());
    while let Some(from) = next {
        let pool: PoolName = "pool1".parse().unwrap();
        let page = store.due_together(pool, from, at(70), 2).await.unwrap();
        assert!(page.access.len() <= 2);
        found.extend(page.access.iter().map(|access| access.lease.id));
        next = page.next;
    }
    found
}

#[tokio::test]
async fn what_is_due_together_is_found_once() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    issued(&store, 60).await;
    let mut expected = Vec::new();
    for end in [61, 61, 61, 65, 70] {
        expected.push(issued(&store, end).await);
    }
    issued(&store, 71).await;
    assert_eq!(due(&store).await, expected);
    let many = async |many| {
        let pools = store.pools_with_many_due(at(60), at(70), many).await;
        pools.unwrap().len()
    };
    assert_eq!((many(5).await, many(6).await), (1, 0));
    // One lease is gone, one is renewed, and the row of one was changed by somebody else.
    let gone = Event::Gone {
        conclusive: true,
        at: at(61),
        server: "s".to_owned(),
        by: "e1".parse().unwrap(),
        seen: at(61),
    };
    store.apply(expected[0], gone, at(61)).await.unwrap();
    let renewed = Event::Renewed(at(300));
    store.apply(expected[3], renewed, at(62)).await.unwrap();
    let bent = format!(
        "UPDATE leases SET role = 'postgres' WHERE id = '{}'",
        expected[1]
    );
    store
        .run(move |connection| Ok(connection.execute(&bent, NONE)?))
        .await
        .unwrap();
    assert_eq!(due(&store).await, [expected[2], expected[4]]);
}
