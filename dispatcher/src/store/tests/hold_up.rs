//! An attacker who can write the store makes the row of a base secret or a pool useless. This delays no lease of
//! another base secret or pool.

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

async fn attack(store: &Store, sql: impl Into<String>) {
    let sql = sql.into();
    store
        .run(move |connection| Ok(connection.execute(&sql, NONE)?))
        .await
        .unwrap();
}

const CHANGE_BASE: &str = "UPDATE base_versions SET server = 'x' WHERE secret_id = 'db:root'";
const CHANGE_POOL: &str = "UPDATE pools SET created = 7 WHERE name = 'pool1'";

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
    attack(&store, CHANGE_BASE).await;
    assert_eq!(due(&store).await, sorted([second, third]));
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock, [_, _, third]) = three(directory.path()).await;
    attack(&store, CHANGE_POOL).await;
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
    attack(&store, bend).await;
    assert_eq!(due(&store).await, sorted([second, third]));
    let many = store.pools_with_many_due(at(0), at(900), 1).await.unwrap();
    assert_eq!(many, ["pool1".parse().unwrap(), "pool2".parse().unwrap()]);
    assert_eq!(store.pool_counts(at(900)).await.unwrap().len(), 2);
}

#[tokio::test]
async fn the_ends_of_the_others_are_sent_together() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock, [first, second, _]) = three(directory.path()).await;
    attack(&store, CHANGE_BASE).await;
    let from = AfterEnd::all_of(at(0));
    let pool: PoolName = "pool1".parse().unwrap();
    let page = store.due_together(pool, from, at(900), 9).await.unwrap();
    let found: Vec<LeaseId> = page.access.iter().map(|access| access.lease.id).collect();
    assert_eq!(found, [second]);
    // Each lease below the path is marked, and those that can be sent are sent.
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
    attack(&store, CHANGE_BASE).await;
    assert_eq!(paths().await, ["db2:root", "db3:root"]);
    attack(&store, CHANGE_POOL).await;
    assert_eq!(paths().await, ["db3:root"]);
}

/// A report about a lease whose account cannot be ended now is recorded.
#[tokio::test]
async fn what_engines_report_is_recorded() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock, [first, ..]) = three(directory.path()).await;
    attack(&store, CHANGE_BASE).await;
    let applied = store
        .apply(first, Event::RevokeAsked, at(20))
        .await
        .unwrap();
    assert!(applied.access.is_none());
    assert_eq!(applied.lease.status.state, State::Revoking);
}

/// Plants copies of a lease that sort before, between and after the others, and a secret.
async fn plant(store: &Store, lease: LeaseId) {
    let columns = "path, pool, role, state, base_secret_id, base_version, database, owned_objects, traceparent, created, created_by,
         ttl_seconds, create_deadline, expiration, ends_here, next_reconcile, reconcile_attempts, attempts, stuck, secret_version, max_ttl_seconds";
    let mut attacks = Vec::new();
    for prefix in ["", "0", &lease.to_string()[..13], "zz"] {
        for n in 0..3 {
            let id = format!("CAST(CAST('{prefix}' AS BLOB) || x'ff3{n}' AS TEXT)");
            attacks.push(format!(
                "INSERT INTO leases (id, {columns}) SELECT {id}, {columns} FROM leases WHERE id = '{lease}'"
            ));
        }
    }
    attacks.push(
        "UPDATE leases SET role = CAST(x'ff' AS TEXT) || id WHERE hex(id) LIKE '%FF3%'".to_owned(),
    );
    attacks.push(
        "INSERT INTO secrets (id, path, kind, attributes, data, version, created, created_by, last_modified, last_modified_by)
         SELECT 'x', CAST(x'ff' AS TEXT), kind, attributes, data, version, created, created_by, last_modified, last_modified_by
         FROM secrets WHERE path = 'db:root'"
            .to_owned(),
    );
    for sql in attacks {
        attack(store, sql).await;
    }
}

/// SQLite stores any bytes as a text. A text that is not UTF-8 is read as a different text. A page that begins after
/// that text would contain the same row again.
#[tokio::test]
async fn a_text_that_is_not_utf8_makes_no_list_endless() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock, [_, second, third]) = three(directory.path()).await;
    if store.slots.is_some() {
        // PostgreSQL refuses such a text.
        return;
    }
    let mut last = LeaseId::random();
    for _ in 0..3 {
        last = issued(&store, "db2:dyn", "db2:root", "pool1").await;
    }
    plant(&store, second).await;
    let listing = async {
        let secrets = store.secrets(String::new(), 100, |_| true).await.unwrap();
        assert_eq!(secrets.len(), 6);
        let (mut next, mut found) = (Some(AfterEnd::all_of(at(0))), 0);
        while let Some(from) = next {
            let pool: PoolName = "pool1".parse().unwrap();
            let page = store.due_together(pool, from, at(900), 2).await.unwrap();
            found += page.access.len();
            next = page.next;
        }
        assert_eq!(found, 5);
        let (mut next, mut found) = (Some(String::new()), 0);
        while let Some(after) = next {
            let pool = "pool1".parse().unwrap();
            let page = store
                .active_by_role("db2:root".to_owned(), pool, after, 2)
                .await;
            let (leases, after) = page.unwrap();
            (found, next) = (found + leases.len(), after);
        }
        assert!(found > 0);
        let path = "db2".parse().unwrap();
        let mut rest = Some(RevokeBelow::new(path, None, "root".to_owned(), at(10)));
        while let Some(request) = rest {
            rest = store.mark_below(request, 2, at(12)).await.unwrap().rest;
        }
        let (mut next, mut found) = (Some(String::new()), 0);
        while let Some(after) = next {
            let path = "db:dyn".parse().unwrap();
            let some = store.end_some(path, OfState::Live, Event::RevokeAsked, after, 2, at(12));
            let some = some.await.unwrap();
            (found, next) = (found + some.count, some.after);
        }
        assert_eq!(found, 1);
    };
    tokio::time::timeout(Duration::from_secs(30), listing)
        .await
        .expect("the lists end");
    for marked in [second, last] {
        let state = store.lease(marked).await.unwrap().status.state;
        assert_eq!(state, State::Revoking);
    }
    assert_eq!(
        store.lease(third).await.unwrap().status.state,
        State::Active
    );
}

/// A settled lease of a pool whose name no pool can have.
#[tokio::test]
async fn the_others_are_forgotten() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock, [first, second, third]) = three(directory.path()).await;
    let settle = format!(
        "UPDATE leases SET next_reconcile = NULL, created = 0 WHERE id IN ('{first}', '{second}')"
    );
    attack(&store, settle).await;
    let bend = format!("UPDATE leases SET pool = 'A Pool' WHERE id = '{first}'");
    attack(&store, bend).await;
    let history = Duration::from_secs(60);
    assert!(!store.forget(at(900), history).await.unwrap());
    let ids = store
        .read(Lane::Pages, |connection| {
            let rows = connection.prepare("SELECT id FROM leases")?.query(NONE)?;
            rows.iter()
                .map(|row| Ok(row.get::<String>(0)?))
                .collect::<Result<Vec<_>, StoreError>>()
        })
        .await;
    assert_eq!(ids.unwrap(), [third.to_string()]);
}
