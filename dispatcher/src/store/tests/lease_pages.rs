//! Pages of leases below a path: the same as all leases filtered, in whatever pages, with a history of many paths.

use super::*;
use crate::store::synthetic;

/// Pages of this size, until there are no more.
async fn paged(store: &Store, filter: &Filter, size: usize) -> Vec<LeaseId> {
    let (mut ids, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = store.leases(filter.clone(), cursor, size).await.unwrap();
        let Some(last) = page.last() else { return ids };
        cursor = last.id.to_string();
        ids.extend(page.iter().map(|lease| lease.id));
    }
}

#[tokio::test]
async fn pages_below_a_path_hold_what_is_below_it() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    for path in ["db:dyn-b", "db:dyn:h07x"] {
        let secret = add(&store, path, dynamic("db:root", "pool1"), json!({}));
        secret.await.unwrap();
    }
    for path in ["db:dyn", "db:dyn-b", "db:dyn:h07x"] {
        let lease = Lease {
            path: path.parse().unwrap(),
            ..lease()
        };
        let conditions = Conditions::default();
        store.admit(lease.clone(), conditions, at(0)).await.unwrap();
        store.apply(lease.id, created(), at(1)).await.unwrap();
    }
    // The added leases are like the newest lease, whose path is `db:dyn:h07x`.
    synthetic::add(&store, 120).await.unwrap();
    let every = Filter::default();
    let all = store.leases(every, String::new(), 1000).await.unwrap();
    assert_eq!(all.len(), 123);
    let filter = |path: &str| Filter {
        path: Some(path.parse().unwrap()),
        ..Filter::default()
    };
    let mut tried = 0;
    for path in ["db", "db:dyn", "db:dyn:h07x", "db:dyn:h07x:h07", "db:none"] {
        let is_below = |lease: &&Lease| {
            lease.path.as_str() == path || lease.path.as_str().starts_with(&format!("{path}:"))
        };
        for (state, pool) in [
            (None, None),
            (Some(State::Revoked), None),
            (Some(State::Active), None),
            (None, Some("pool1")),
            (Some(State::Revoked), Some("pool2")),
        ] {
            let filter = Filter {
                state,
                pool: pool.map(|pool| pool.parse().unwrap()),
                ..filter(path)
            };
            let expected: Vec<LeaseId> = all
                .iter()
                .filter(is_below)
                .filter(|lease| state.is_none_or(|state| lease.status.state == state))
                .filter(|lease| pool.is_none_or(|pool| lease.pool.as_str() == pool))
                .map(|lease| lease.id)
                .collect();
            tried += usize::from(!expected.is_empty());
            for size in [3, 500] {
                let found = paged(&store, &filter, size).await;
                assert!(found == expected, "{filter:?}, pages of {size}");
            }
        }
    }
    assert!(tried > 10, "{tried}");
}
