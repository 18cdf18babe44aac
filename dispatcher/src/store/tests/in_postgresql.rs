//! What only a store in PostgreSQL does: several dispatchers, and batches that the server refuses.

mod side_by_side;
mod turns;

use super::*;
use mayfly_protocol::names::PoolName;

#[tokio::test]
async fn several_dispatchers_share_a_store_in_postgresql() {
    let Some(server) = std::env::var_os("MAYFLY_TEST_PG15") else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let place = Place {
        backend: Backend::Postgres(Box::new(database(server.as_ref()).await)),
        ..place(directory.path())
    };
    // Two dispatchers start at the same time on an empty database.
    let opened = std::thread::scope(|scope| {
        let opening = [0, 1].map(|_| scope.spawn(|| Store::open(&place).unwrap()));
        opening.map(|one| one.join().unwrap())
    });
    let [(one, first, _), (two, second, _)] = opened;
    assert_eq!(first.installation, second.installation);
    let pool = Pool::new(
        "pool1".parse().unwrap(),
        KeyPair::generate().public().clone(),
        1,
        at(0),
    );
    one.create_pool(pool).await.unwrap();
    add(&one, "db:root", json!({"type": "postgresql"}), base_data())
        .await
        .unwrap();
    add(&two, "db:dyn", dynamic("db:root", "pool1"), json!({}))
        .await
        .unwrap();
    // Quotas are exact over both dispatchers.
    let conditions = || Conditions {
        most_of_secret: Some(5),
        ..Conditions::default()
    };
    let placed = (0..20).map(|n| {
        let store = if n % 2 == 0 { &one } else { &two };
        store.admit(lease(), conditions(), at(0))
    });
    let placed = futures_util::future::join_all(placed).await;
    assert_eq!(placed.iter().filter(|placed| placed.is_ok()).count(), 5);
    assert_eq!(
        two.pool_counts(at(0)).await.unwrap()[0].leases,
        [5, 0, 0, 0, 0]
    );
    // One dispatcher leads until it stops writing.
    let lead = async |store: &Store, who: &str, second: i64| {
        store.lead(who.to_owned(), at(second)).await.unwrap()
    };
    assert!(lead(&one, "one", 0).await && !lead(&two, "two", 1).await);
    assert!(lead(&one, "one", 4).await && !lead(&two, "two", 8).await);
    assert!(lead(&two, "two", 10).await && !lead(&one, "one", 11).await);
    two.step_down("two".to_owned()).await.unwrap();
    assert!(lead(&one, "one", 11).await);
    assert!((one.now().as_millisecond() - two.now().as_millisecond()).abs() < 1000);
}

/// A server of the test suite, a store in a database of it, and a session there.
async fn in_postgresql(
    directory: &std::path::Path,
) -> Option<(Store, tokio_postgres::Client, String)> {
    let server = std::env::var_os("MAYFLY_TEST_PG15")?;
    let url = database(server.as_ref()).await;
    let name = url.to_string().rsplit(' ').next().unwrap().to_owned();
    let place = Place {
        backend: Backend::Postgres(Box::new(url)),
        ..place(directory)
    };
    let (store, _, _) = Store::open(&place).unwrap();
    let read = std::fs::read_to_string(std::path::Path::new(&server).join("superuser-password"));
    let client = login("postgres", read.unwrap().trim(), &name).await;
    Some((store, client, name))
}

/// A session on the server of the test suite.
pub(super) async fn login(user: &str, password: &str, database: &str) -> tokio_postgres::Client {
    let server = std::env::var_os("MAYFLY_TEST_PG15").unwrap();
    let port = std::fs::read_to_string(std::path::Path::new(&server).join("port")).unwrap();
    let mut config = tokio_postgres::Config::new();
    config
        .host("127.0.0.1")
        .port(port.trim().parse().unwrap())
        .user(user)
        .password(password)
        .dbname(database);
    let (client, connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// The store's session, once its batch waits for its turn.
async fn waiting(client: &tokio_postgres::Client, database: &str) -> i32 {
    let started = std::time::Instant::now();
    loop {
        let found = client
            .query(
                "SELECT pid FROM pg_stat_activity WHERE datname = $1 AND wait_event_type = 'Lock'",
                &[&database],
            )
            .await
            .unwrap();
        if let Some(row) = found.first() {
            return row.get(0);
        }
        assert!(started.elapsed().as_secs() < 20, "nobody waits");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

/// Waits until the store reports that its last batch was written, or was not. It does so shortly after the answers.
async fn reached(store: &Store, is: bool) {
    let started = std::time::Instant::now();
    while store.is_reached() != is {
        assert!(started.elapsed().as_secs() < 5, "it stays {}", !is);
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

/// The lock under which batches are written, as another dispatcher takes it.
const TAKE: &str = "BEGIN; LOCK TABLE public.mayfly_turn IN SHARE UPDATE EXCLUSIVE MODE";
const GIVE: &str = "ROLLBACK";
/// The lock of the previous version: the bytes of `mayfly.w`.
const OLDER: &str = "x'6d6179666c792e77'::bit(64)::bigint";

#[tokio::test]
async fn a_batch_that_waited_in_vain_harms_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let Some((store, other, database)) = in_postgresql(directory.path()).await else {
        return;
    };
    other.batch_execute(TAKE).await.unwrap();
    let cancelled = async {
        // `lock_timeout` has the same effect, but takes longer.
        let pid = waiting(&other, &database).await;
        other
            .query("SELECT pg_cancel_backend($1)", &[&pid])
            .await
            .unwrap();
    };
    let (failed, ()) = tokio::join!(store.create_pool(a_pool("one")), cancelled);
    assert!(
        matches!(failed, Err(StoreError::Unavailable(_))),
        "{failed:?}"
    );
    reached(&store, false).await;
    other.batch_execute(GIVE).await.unwrap();
    store.create_pool(a_pool("one")).await.unwrap();
    reached(&store, true).await;
}

#[tokio::test]
async fn a_connection_that_ended_unused_costs_nobody_an_answer() {
    let directory = tempfile::tempdir().unwrap();
    let Some((store, other, database)) = in_postgresql(directory.path()).await else {
        return;
    };
    for name in ["one", "two"] {
        store.create_pool(a_pool(name)).await.unwrap();
        store.all_pools().await.unwrap();
        let ended = other
            .query(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity \
                 WHERE datname = $1 AND application_name = 'mayfly-dispatcher'",
                &[&database],
            )
            .await
            .unwrap();
        // The ended sessions are those of the writer and of readers.
        assert!(ended.len() >= 2, "{}", ended.len());
    }
    assert_eq!(store.all_pools().await.unwrap().len(), 2);
}

/// A read ends its transaction without a wait for the answer. One that stayed open would keep the server from
/// removing old rows until the server ends the session.
#[tokio::test]
async fn a_read_leaves_no_transaction_open() {
    let directory = tempfile::tempdir().unwrap();
    let Some((store, other, database)) = in_postgresql(directory.path()).await else {
        return;
    };
    furnish(&store).await;
    for _ in 0..20 {
        store.read_secret("db:dyn".parse().unwrap()).await.unwrap();
    }
    let sessions = async || -> Vec<(i32, String)> {
        let sql = "SELECT pid, state FROM pg_stat_activity \
                   WHERE datname = $1 AND application_name = 'mayfly-dispatcher'";
        let found = other.query(sql, &[&database]).await.unwrap();
        found.iter().map(|row| (row.get(0), row.get(1))).collect()
    };
    let first = sessions().await;
    let started = std::time::Instant::now();
    let last = loop {
        let found = sessions().await;
        if found.iter().all(|(_, state)| state == "idle") {
            break found;
        }
        assert!(started.elapsed().as_secs() < 20, "{found:?}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    };
    let pids = |sessions: Vec<(i32, String)>| -> std::collections::BTreeSet<i32> {
        sessions.into_iter().map(|(pid, _)| pid).collect()
    };
    assert_eq!(pids(first), pids(last), "the server ended a session");
}

/// PostgreSQL answers COMMIT in a failed transaction with ROLLBACK, and no error.
#[tokio::test]
async fn what_was_rolled_back_is_not_called_done() {
    let directory = tempfile::tempdir().unwrap();
    let Some((store, other, database)) = in_postgresql(directory.path()).await else {
        return;
    };
    // Jobs that are sent while a batch waits become one batch. On a busy machine the first job may use up the time of
    // its transaction. Then the second job has a transaction of its own.
    for n in 0..20 {
        let name = format!("pool-{n}");
        other.batch_execute(TAKE).await.unwrap();
        let (first, (done, broken)) = tokio::join!(store.run(|_| Ok(())), async {
            waiting(&other, &database).await;
            let behind = async {
                tokio::join!(
                    store.create_pool(a_pool(&name)),
                    store.run(|connection| {
                        connection.execute_batch("RELEASE job")?;
                        connection.execute_batch("SELECT 1 / 0")?;
                        Ok(())
                    })
                )
            };
            // `behind` is polled first, so that both jobs are sent before the lock is free.
            let (behind, given) = tokio::join!(behind, other.batch_execute(GIVE));
            given.unwrap();
            behind
        });
        // Both jobs were in one transaction, or the first was in an earlier one.
        drop(first);
        broken.unwrap_err();
        let pools = store.all_pools().await.unwrap();
        let is_there = pools.iter().any(|pool| pool.name.as_str() == name);
        assert_eq!(done.is_ok(), is_there, "{done:?}");
        if !is_there {
            return;
        }
    }
    panic!("the two jobs were never in one transaction");
}

/// Another server was promoted, and the former primary still runs. The store neither reads nor writes there any more.
#[tokio::test]
async fn no_session_stays_at_a_former_primary() {
    let Some(server) = std::env::var_os("MAYFLY_TEST_PG15") else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let url = database(server.as_ref()).await;
    let place = Place {
        backend: Backend::Postgres(Box::new(url.clone())),
        ..place(directory.path())
    };
    let (store, _, _) = Store::open(&place).unwrap();
    furnish(&store).await;
    let lease = lease();
    let conditions = Conditions::default();
    store.admit(lease.clone(), conditions, at(0)).await.unwrap();
    store.lease(lease.id).await.unwrap();
    assert!(url.primary.advance(), "the server tells its timeline");
    let read = store.lease(lease.id).await;
    assert!(matches!(read, Err(StoreError::Unavailable(_))), "{read:?}");
    let written = store.create_pool(a_pool("other")).await;
    assert!(written.is_err());
    let applied = store.apply(lease.id, created(), at(1)).await;
    assert!(applied.is_err());
}

/// A standby that took over may lack the last commits: what was being made then may be somebody's.
#[tokio::test]
async fn a_standby_that_took_over_is_a_copy() {
    let directory = tempfile::tempdir().unwrap();
    let Some((store, other, _)) = in_postgresql(directory.path()).await else {
        return;
    };
    furnish(&store).await;
    let [early, late] = [at(0), at(60)].map(|created| Lease { created, ..lease() });
    let claim = async |lease: &Lease, second: i64| {
        let pool: PoolName = "pool1".parse().unwrap();
        let now = at(second);
        store
            .claim_due(pool.clone(), vec![pool], 10, now, 0.0)
            .await
            .unwrap();
        store.lease(lease.id).await.unwrap().status.state
    };
    for lease in [&early, &late] {
        let placed = store.admit(lease.clone(), Conditions::default(), at(0));
        placed.await.unwrap();
    }
    // Nothing is due. The dispatcher that begins to reconcile records which server it found.
    store.wake_put_off(at(10)).await.unwrap();
    let promoted = "UPDATE meta SET value = '00000000' WHERE key = 'timeline'";
    assert_eq!(other.execute(promoted, &[]).await.unwrap(), 1);
    assert_eq!(claim(&early, 40).await, State::Active);
    assert_eq!(
        store.lease(late.id).await.unwrap().status.state,
        State::Revoking,
        "that one was made since"
    );
    // A server that does not report its position is treated as the same server as before.
    let refused = "ALTER FUNCTION pg_catalog.pg_current_wal_lsn() RENAME TO nobody_says";
    other.batch_execute(refused).await.unwrap();
    claim(&early, 50).await;
}

/// Waits until `wanted` sessions of the database wait for a lock.
async fn blocked(client: &tokio_postgres::Client, database: &str, wanted: i64) {
    let started = std::time::Instant::now();
    let sql =
        "SELECT count(*) FROM pg_stat_activity WHERE datname = $1 AND wait_event_type = 'Lock'";
    while client
        .query_one(sql, &[&database])
        .await
        .unwrap()
        .get::<_, i64>(0)
        != wanted
    {
        assert!(started.elapsed().as_secs() < 20, "not {wanted} wait");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

/// A store with two dynamic secrets, a second dispatcher on it, and a session there that holds the row of the
/// first secret.
async fn with_one_secret_held(
    directory: &std::path::Path,
) -> Option<(Store, Store, tokio_postgres::Client, String)> {
    let (store, other, database) = in_postgresql(directory).await?;
    furnish(&store).await;
    add(&store, "db:dyn2", dynamic("db:root", "pool1"), json!({}))
        .await
        .unwrap();
    let server = std::env::var_os("MAYFLY_TEST_PG15").unwrap();
    let place = Place {
        backend: Backend::Postgres(Box::new(url_of(server.as_ref(), &database))),
        ..place(directory)
    };
    let (second, _, _) = Store::open(&place).unwrap();
    other
        .batch_execute("BEGIN; SELECT 1 FROM secrets WHERE path = 'db:dyn' FOR UPDATE")
        .await
        .unwrap();
    Some((store, second, other, database))
}
