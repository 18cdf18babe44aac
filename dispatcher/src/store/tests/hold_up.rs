//! Who can write the store makes the row of a base secret or a pool useless. It holds up no lease of another one.

use super::*;
use crate::store::sql::NONE;

/// A lease that is active, of the dynamic secret at `path`.
async fn issued(store: &Store, path: &str, base: &str, pool: &str) -> LeaseId {
    let lease = Lease {
        id: LeaseId::random(),
        path: path.parse().unwrap(),
        pool: pool.parse().unwrap(),
        base: BaseRef {
            id: base.to_owned(),
            version: 1,
        },
        ..lease()
    };
    let conditions = Conditions::default();
    store.admit(lease.clone(), conditions, at(0)).await.unwrap();
    store.apply(lease.id, created(), at(0)).await.unwrap();
    lease.id
}

/// Two base secrets of one pool, and one of another pool, with a lease of each.
async fn three(directory: &std::path::Path) -> (Store, Option<std::fs::File>, [LeaseId; 3]) {
    let (store, lock) = furnished(directory).await;
    store.create_pool(a_pool("pool2")).await.unwrap();
    let mut leases = vec![issued(&store, "db:dyn", "db:root", "pool1").await];
    for (root, path, pool) in [
        ("db2:root", "db2:dyn", "pool1"),
        ("db3:root", "db3:dyn", "pool2"),
    ] {
        let attributes = json!({"type": "postgresql"});
        add(&store, root, attributes, base_data()).await.unwrap();
        add(&store, path, dynamic(root, pool), json!({}))
            .await
            .unwrap();
        leases.push(issued(&store, path, root, pool).await);
    }
    (store, lock, leases.try_into().unwrap())
}

async fn attack(store: &Store, sql: &'static str) {
    store
        .run(move |connection| Ok(connection.execute_batch(sql)?))
        .await
        .unwrap();
}

const BEND_BASE: &str = "UPDATE base_versions SET server = 'x' WHERE secret_id = 'db:root'";
const BEND_POOL: &str = "UPDATE pools SET created = 7 WHERE name = 'pool1'";

/// What the reconciler sends, pool by pool.
async fn due(store: &Store) -> Vec<LeaseId> {
    let mut found = Vec::new();
    for pool in store.pools_with_due(at(900)).await.unwrap() {
        let living = vec!["pool1".parse().unwrap(), "pool2".parse().unwrap()];
        let claimed = store.claim_due(pool, living, 9, at(900), 0.5).await;
        found.extend(claimed.unwrap().iter().map(|access| access.lease.id));
    }
    found.sort();
    found
}

fn sorted<const N: usize>(mut ids: [LeaseId; N]) -> [LeaseId; N] {
    ids.sort();
    ids
}

#[tokio::test]
async fn the_reconciler_goes_on_with_the_others() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock, [_, second, third]) = three(directory.path()).await;
    attack(&store, BEND_BASE).await;
    assert_eq!(due(&store).await, sorted([second, third]));
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock, [_, _, third]) = three(directory.path()).await;
    attack(&store, BEND_POOL).await;
    assert_eq!(due(&store).await, [third]);
}

/// A pool whose name no pool can have, with the lease of another.
#[tokio::test]
async fn a_planted_pool_holds_up_none() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock, [first, second, third]) = three(directory.path()).await;
    attack(
        &store,
        "INSERT INTO pools (name, public_key, created, dispatcher_generation) VALUES ('A Pool', 'x', 0, 1)",
    )
    .await;
    let bend =
        format!("UPDATE leases SET pool = 'A Pool', next_reconcile = 0 WHERE id = '{first}'");
    store
        .run(move |connection| Ok(connection.execute(&bend, NONE)?))
        .await
        .unwrap();
    assert_eq!(due(&store).await, sorted([second, third]));
    let many = store.pools_with_many_due(at(0), at(900), 1).await.unwrap();
    assert_eq!(many, ["pool1".parse().unwrap(), "pool2".parse().unwrap()]);
    assert_eq!(store.pool_counts(at(900)).await.unwrap().len(), 2);
}

#[tokio::test]
async fn the_ends_of_the_others_are_sent_together() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock, [first, second, _]) = three(directory.path()).await;
    attack(&store, BEND_BASE).await;
    let from = AfterEnd::all_of(at(0));
    let pool: PoolName = "pool1".parse().unwrap();
    let page = store.due_together(pool, from, at(900), 9).await.unwrap();
    let found: Vec<LeaseId> = page.access.iter().map(|access| access.lease.id).collect();
    assert_eq!(found, [second]);
    // All below a path: each is marked, and those that can be sent are.
    let all = [("db", 1, 0), ("db2", 1, 1)];
    for (path, count, sent) in all {
        let path = path.parse().unwrap();
        let request = RevokeBelow::new(path, None, "root".to_owned(), at(10));
        let marked = store.mark_below(request, 9, at(12)).await.unwrap();
        assert_eq!((marked.count, marked.access.len()), (count, sent));
    }
    let state = store.lease(first).await.unwrap().status.state;
    assert_eq!(state, State::Revoking);
}

#[tokio::test]
async fn the_other_servers_are_swept() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock, _) = three(directory.path()).await;
    let paths = async || -> Vec<String> {
        let bases = store.bases_in_use().await.unwrap();
        bases.iter().map(|(path, _)| path.to_string()).collect()
    };
    attack(&store, BEND_BASE).await;
    assert_eq!(paths().await, ["db2:root", "db3:root"]);
    attack(&store, BEND_POOL).await;
    assert_eq!(paths().await, ["db3:root"]);
}

/// A report about a lease whose account cannot be ended now is recorded.
#[tokio::test]
async fn what_engines_report_is_recorded() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock, [first, ..]) = three(directory.path()).await;
    attack(&store, BEND_BASE).await;
    let applied = store
        .apply(first, Event::RevokeAsked, at(20))
        .await
        .unwrap();
    assert!(applied.access.is_none());
    assert_eq!(applied.lease.status.state, State::Revoking);
}
