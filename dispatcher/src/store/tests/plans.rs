//! Every query of the store that finds leases uses an index: with 1,000,000 rows of history it costs what it
//! costs with none. The queries are those that the store itself ran, and the plans are the database's.

use super::*;
use crate::store::heard::Report;
use mayfly_protocol::names::SecretPath;

/// Queries that may look at more leases than they find, and why.
const WHOLE: [(&str, &str); 3] = [
    (
        "FROM leases WHERE 1 = 1 ORDER BY id DESC LIMIT",
        "the newest page, by the primary key",
    ),
    (
        "IN (SELECT base_secret_id FROM leases WHERE pool",
        "once, when a pool is distrusted: what it knew",
    ),
    (
        "WITH RECURSIVE with_paths",
        "steps from path to path: one entry of the index for each",
    ),
];
/// Indexes of unsettled leases only: as long as what lives.
const OF_LIVE: [&str; 9] = [
    "leases_active_role",
    "leases_base",
    "leases_reconcile",
    "leases_overdue",
    "leases_held",
    "leases_live_path",
    "leases_gone",
    "leases_stuck",
    "leases_derivation",
];

/// Filters as callers combine them.
fn filters() -> Vec<Filter> {
    let path: SecretPath = "db:dyn".parse().unwrap();
    let base = || Filter::default();
    let mut all = vec![
        base(),
        Filter {
            path: Some(path.clone()),
            ..base()
        },
        Filter {
            pool: Some("pool1".parse().unwrap()),
            ..base()
        },
        Filter {
            path: Some(path.clone()),
            pool: Some("pool1".parse().unwrap()),
            ..base()
        },
        Filter {
            role: Some("mayfly_x".parse().unwrap()),
            ..base()
        },
        Filter {
            created_by: Some("root".to_owned()),
            ..base()
        },
        Filter {
            stuck: true,
            ..base()
        },
        Filter {
            stuck: true,
            pool: Some("pool1".parse().unwrap()),
            ..base()
        },
    ];
    let of_states: Vec<Filter> = all
        .iter()
        .flat_map(|filter| {
            State::ALL.map(|state| Filter {
                state: Some(state),
                ..filter.clone()
            })
        })
        .collect();
    all.extend(of_states);
    all
}

/// Runs everything that finds leases.
async fn exercise(store: &Store) {
    let (pool, path): (PoolName, SecretPath) =
        ("pool1".parse().unwrap(), "db:dyn".parse().unwrap());
    let all = Conditions {
        key: Some("k".to_owned()),
        share_for: Some(Duration::from_secs(1)),
        nonce: Some((1, crate::password::Nonce::random())),
        most_of_secret: Some(1),
        most_of_secret_and_caller: Some(1),
        most_of_caller: Some(1),
    };
    let first = lease();
    store
        .admit(first.clone(), all.clone(), at(0))
        .await
        .unwrap();
    let other = Lease {
        created_by: "other".to_owned(),
        ..lease()
    };
    let refused = store.admit(other, all, at(0)).await;
    assert!(
        matches!(refused, Err(StoreError::Quota { .. })),
        "{refused:?}"
    );
    store.apply(first.id, created(), at(1)).await.unwrap();
    store.seed(first.id).await.unwrap();
    store.lease(first.id).await.unwrap();
    store.leases_of(vec![first.id]).await.unwrap();
    store.lease_access(first.id, 0).await.unwrap();
    for filter in filters() {
        for cursor in [String::new(), first.id.to_string()] {
            store.leases(filter.clone(), cursor, 10).await.unwrap();
        }
    }
    for cursor in [String::new(), first.id.to_string()] {
        store.in_state(State::Active, cursor, 10).await.unwrap();
    }
    let (base, none) = ("db:root".to_owned(), String::new());
    store
        .active_by_role(base.clone(), pool.clone(), none.clone(), 10)
        .await
        .unwrap();
    store.open_of_base(base, pool.clone()).await.unwrap();
    upkeep(store, &first, (pool, path)).await;
}

/// What is done again and again, and what ends leases.
async fn upkeep(store: &Store, first: &Lease, (pool, path): (PoolName, SecretPath)) {
    store.living(at(1)).await.unwrap();
    store.pool_counts(at(1)).await.unwrap();
    store.paths_with_accounts().await.unwrap();
    store.bases_in_use().await.unwrap();
    store.bases_of(pool.clone()).await.unwrap();
    store.pools_with_due(at(1)).await.unwrap();
    store.pools_with_many_due(at(0), at(1), 1).await.unwrap();
    store
        .due_together(pool.clone(), AfterEnd::all_of(at(0)), at(1), 1)
        .await
        .unwrap();
    store.wake_put_off(at(1)).await.unwrap();
    store.requeue_abandoned(at(1), at(1)).await.unwrap();
    for living in [vec![pool.clone()], vec![]] {
        store
            .claim_due(pool.clone(), living, 10, at(100), 0.0)
            .await
            .unwrap();
    }
    for only in [None, Some("root".to_owned())] {
        let request = RevokeBelow::new(path.clone(), only, "root".to_owned(), at(100));
        store.mark_below(request, 1, at(100)).await.unwrap();
    }
    store.recorded_below().await.unwrap();
    for state in [OfState::Live, OfState::Revoking] {
        let (path, after) = (path.clone(), String::new());
        let event = Event::RevokeAsked;
        store
            .end_some(path, state, event, after, 10, at(100))
            .await
            .unwrap();
    }
    let report = Report {
        pool: pool.clone(),
        role: None,
        found: None,
        event: Event::Found,
        late: false,
    };
    store.hear(vec![(first.id, report)], at(100)).await.unwrap();
    store.keys(true).await.unwrap();
    while store.forget(at(10_000_000), HISTORY).await.unwrap() {}
    store.delete_secret(path).await.unwrap();
    let _ = store.delete_pool(pool, at(10_000_000)).await;
}

/// The queries of leases that the store ran, as its database knows them.
async fn queries(store: &Store) -> Vec<String> {
    exercise(store).await;
    let mut all = store.health.tally.texts();
    all.retain(|sql| sql.contains("leases") && !sql.starts_with("INSERT INTO leases"));
    assert!(all.len() > 40, "{}", all.len());
    all
}

/// How many parameters a statement has: `?1` to `?n`, or as many as there are `?`.
fn parameters(sql: &str) -> usize {
    let mut parts = sql.split('?');
    parts.next();
    let of = |part: &str| {
        let end = part
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(part.len());
        part[..end].parse::<usize>().ok()
    };
    let parts: Vec<&str> = parts.collect();
    parts
        .iter()
        .filter_map(|part| of(part))
        .max()
        .unwrap_or(parts.len())
}

fn is_whole(sql: &str) -> bool {
    WHOLE.iter().any(|(known, _)| sql.contains(known))
}

#[tokio::test]
async fn every_query_of_leases_in_sqlite_uses_an_index() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _, _lock) = Store::open(&place(directory.path())).unwrap();
    furnish(&store).await;
    let mut slow = Vec::new();
    for sql in queries(&store).await {
        let explain = format!("EXPLAIN QUERY PLAN {sql}");
        let plan = store
            .read(Lane::Pages, move |connection| {
                let nulls = vec![sql::Cell::Null; parameters(&explain)];
                let rows = connection.prepare(&explain)?.query(nulls)?;
                rows.iter().map(|row| Ok(row.get::<String>(3)?)).collect()
            })
            .await;
        let plan: Vec<String> = plan.unwrap_or_else(|error| panic!("{error}: {sql}"));
        let is_flat = |step: &str| {
            let of_leases =
                step.contains(" leases ") || step.ends_with(" leases") || step.contains(" l ");
            let of_live = OF_LIVE.iter().any(|index| step.contains(index));
            !of_leases || of_live || step.starts_with("SEARCH") && !step.contains("_path (path>")
        };
        // A list of live leases is found by an index of live leases.
        let of_live_state = ["'pending'", "'active'", "'revoking'"]
            .iter()
            .any(|state| sql.contains(&format!(" AND state = {state}")));
        let by_history = [
            "leases_pool ",
            "leases_path ",
            "leases_created_by ",
            "PRIMARY KEY (id<",
        ]
        .iter()
        .any(|index| plan.iter().any(|step| step.contains(index)));
        // One caller or one base secret may have all live leases. So the leases of a secret are found by its path.
        let by_more = sql.contains("path = ?1 AND")
            && ["leases_held_caller", "leases_base"]
                .iter()
                .any(|index| plan.iter().any(|step| step.contains(index)));
        let is_flat =
            plan.iter().all(|step| is_flat(step)) && !(of_live_state && by_history) && !by_more;
        let sorts = plan
            .iter()
            .any(|step| step.contains("TEMP B-TREE FOR ORDER BY"))
            && !plan
                .iter()
                .any(|step| OF_LIVE.iter().any(|index| step.contains(index)));
        if (!is_flat || sorts) && !is_whole(&sql) {
            slow.push(format!("{sql}\n    {}", plan.join("\n    ")));
        }
    }
    assert!(slow.is_empty(), "{}", slow.join("\n"));
}

#[tokio::test]
async fn every_query_of_leases_in_postgresql_uses_an_index() {
    let Some(server) = std::env::var_os("MAYFLY_TEST_PG15") else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let url = database(server.as_ref()).await;
    let name = url.to_string().rsplit(' ').next().unwrap().to_owned();
    let place = Place {
        backend: Backend::Postgres(Box::new(url)),
        ..place(directory.path())
    };
    let (store, _, _) = Store::open(&place).unwrap();
    furnish(&store).await;
    let read = std::fs::read_to_string(std::path::Path::new(&server).join("superuser-password"));
    let client = in_postgresql::login("postgres", read.unwrap().trim(), &name).await;
    client
        .batch_execute("SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off")
        .await
        .unwrap();
    let mut slow = Vec::new();
    for sql in queries(&store).await {
        let text = sql::for_postgres(&sql);
        let statement = client.prepare(&text).await;
        let statement = statement.unwrap_or_else(|error| panic!("{error}: {text}"));
        let nulls = vec!["NULL"; statement.params().len()].join(", ");
        let arguments = if nulls.is_empty() {
            nulls
        } else {
            format!("({nulls})")
        };
        client
            .batch_execute(&format!("PREPARE asked AS {text}"))
            .await
            .unwrap();
        let plan = client
            .query(&format!("EXPLAIN EXECUTE asked{arguments}"), &[])
            .await;
        let plan: Vec<String> = plan.unwrap().iter().map(|row| row.get(0)).collect();
        client.batch_execute("DEALLOCATE asked").await.unwrap();
        let scans = plan.iter().any(|step| step.contains("Seq Scan on leases"));
        let by_all_paths = sql.contains("with_paths")
            && plan
                .iter()
                .any(|step| step.contains("leases_state") || step.contains("leases_pool"));
        if scans && !is_whole(&sql) || by_all_paths {
            slow.push(format!("{sql}\n    {}", plan.join("\n    ")));
        }
    }
    assert!(slow.is_empty(), "{}", slow.join("\n"));
}
