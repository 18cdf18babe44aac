//! What only a store in PostgreSQL does: several dispatchers, and batches the server would not have.

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
    // At once, on an empty database.
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
    // Quotas are exact over both.
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
    // One leads, until it says no more.
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

/// Whether the last batch was written is known a moment after its answers are out.
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
/// The lock of the version before: the bytes of `mayfly.w`.
const OLDER: &str = "x'6d6179666c792e77'::bit(64)::bigint";

#[tokio::test]
async fn a_batch_that_waited_in_vain_harms_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let Some((store, other, database)) = in_postgresql(directory.path()).await else {
        return;
    };
    other.batch_execute(TAKE).await.unwrap();
    let cancelled = async {
        // What `lock_timeout` does after a longer while.
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
        // The writer's, and readers'.
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
    // What is asked for behind a batch that waits is one batch.
    other.batch_execute(TAKE).await.unwrap();
    let (first, (done, broken)) = tokio::join!(store.run(|_| Ok(())), async {
        waiting(&other, &database).await;
        let behind = async {
            tokio::join!(
                store.create_pool(a_pool("one")),
                store.run(|connection| {
                    connection.execute_batch("RELEASE job")?;
                    connection.execute_batch("SELECT 1 / 0")?;
                    Ok(())
                })
            )
        };
        // Polled first: both are asked for when the lock is given.
        let (behind, given) = tokio::join!(behind, other.batch_execute(GIVE));
        given.unwrap();
        behind
    });
    // It was in the same transaction, or in one before.
    drop(first);
    broken.unwrap_err();
    let names = store.all_pools().await.unwrap();
    assert_eq!((done.is_ok(), names.len()), (false, 0), "{done:?}");
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
    // A server that does not tell is taken for the one it was.
    let refused = "ALTER FUNCTION pg_catalog.pg_current_wal_lsn() RENAME TO nobody_says";
    other.batch_execute(refused).await.unwrap();
    claim(&early, 50).await;
}

/// A session of a user without any privilege.
async fn stranger(root: &tokio_postgres::Client, database: &str) -> tokio_postgres::Client {
    let name = format!("other_{}", mayfly_protocol::names::random_text(8));
    root.batch_execute(&format!("CREATE ROLE {name} LOGIN PASSWORD 'theirs'"))
        .await
        .unwrap();
    login(&name, "theirs", database).await
}

/// No lock that keeps the store from writing can be taken by another user of its server, with all
/// that PostgreSQL gives to one without any privilege.
#[tokio::test]
async fn no_other_user_holds_the_store_up() {
    let directory = tempfile::tempdir().unwrap();
    let Some((store, root, database)) = in_postgresql(directory.path()).await else {
        return;
    };
    furnish(&store).await;
    let other = stranger(&root, &database).await;
    // Of a session, not of a transaction: it is kept to the end.
    let lock = format!("SELECT pg_advisory_lock({OLDER})");
    other.batch_execute(&lock).await.unwrap();
    other.batch_execute("BEGIN").await.unwrap();
    let tables = other
        .query(
            "SELECT relname::text FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v')",
            &[],
        )
        .await
        .unwrap();
    assert!(tables.len() > 5);
    let names: Vec<String> = tables.iter().map(|row| row.get(0)).collect();
    assert!(names.iter().any(|name| name == "mayfly_turn"), "{names:?}");
    let slots = names.iter().filter(|name| name.starts_with("mayfly_slot_"));
    assert_eq!(slots.count(), 32);
    for table in names {
        // Nobody deletes from the view.
        let is_view = table == "mayfly_turn";
        for statement in ["DELETE FROM", "SELECT FROM"]
            .into_iter()
            .skip(usize::from(is_view))
        {
            let name = mayfly_protocol::names::random_text(8);
            let row = if statement == "SELECT FROM" {
                "FOR UPDATE"
            } else {
                ""
            };
            let prepare = format!("PREPARE s_{name} AS {statement} public.{table} {row}");
            other.batch_execute(&prepare).await.unwrap();
        }
        for mode in [
            "ACCESS SHARE",
            "ROW SHARE",
            "ROW EXCLUSIVE",
            "SHARE UPDATE EXCLUSIVE",
            "SHARE",
            "SHARE ROW EXCLUSIVE",
            "EXCLUSIVE",
            "ACCESS EXCLUSIVE",
        ] {
            let lock = format!("SAVEPOINT a; LOCK TABLE public.{table} IN {mode} MODE NOWAIT");
            let refused = other.batch_execute(&lock).await.unwrap_err();
            assert_eq!(refused.code().unwrap().code(), "42501", "{mode} on {table}");
            other.batch_execute("ROLLBACK TO a").await.unwrap();
        }
    }
    let held = "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid \
                WHERE a.pid = pg_backend_pid() AND l.mode = 'RowExclusiveLock'";
    let held: i64 = other.query_one(held, &[]).await.unwrap().get(0);
    assert!(held > 5, "{held}");
    let begun = std::time::Instant::now();
    for n in 0..20 {
        store
            .create_pool(a_pool(&format!("pool-{n}")))
            .await
            .unwrap();
    }
    // Another dispatcher starts, too.
    let server = std::env::var_os("MAYFLY_TEST_PG15").unwrap();
    let place = Place {
        backend: Backend::Postgres(Box::new(url_of(server.as_ref(), &database))),
        ..place(directory.path())
    };
    let (second, _, _) = Store::open(&place).unwrap();
    second.create_pool(a_pool("last")).await.unwrap();
    for _ in 0..20 {
        second
            .admit(lease(), Conditions::default(), at(0))
            .await
            .unwrap();
    }
    assert!(begun.elapsed().as_secs() < 10, "{:?}", begun.elapsed());
}

/// A dispatcher of the version before and one of this write one after another.
#[tokio::test]
async fn a_dispatcher_of_the_version_before_has_its_turn() {
    let directory = tempfile::tempdir().unwrap();
    let Some((store, root, _)) = in_postgresql(directory.path()).await else {
        return;
    };
    // It comes as the store's own role.
    let lock = format!("SELECT pg_advisory_lock({OLDER})");
    root.batch_execute(&lock).await.unwrap();
    let writing = store.create_pool(a_pool("one"));
    tokio::pin!(writing);
    let early = tokio::time::timeout(std::time::Duration::from_millis(500), &mut writing).await;
    assert!(early.is_err(), "two had their turn at once");
    root.batch_execute("SELECT pg_advisory_unlock_all()")
        .await
        .unwrap();
    writing.await.unwrap();
}

/// A slot that is given up holds nothing any more. Its server would end the transaction only after 5 s, and until
/// then no job that sees the store alone could begin.
#[tokio::test]
async fn a_slot_that_is_given_up_is_free_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let Some((store, root, database)) = in_postgresql(directory.path()).await else {
        return;
    };
    furnish(&store).await;
    let holders = "SELECT count(*) FROM pg_locks l JOIN pg_class c ON c.oid = l.relation \
                   JOIN pg_stat_activity a ON a.pid = l.pid \
                   WHERE a.datname = $1 AND l.granted AND c.relname LIKE 'mayfly\\_slot\\_%' \
                   GROUP BY l.pid";
    let mut fewest = std::time::Duration::MAX;
    for _ in 0..5 {
        let lock = format!("SELECT pg_advisory_lock({OLDER})");
        root.batch_execute(&lock).await.unwrap();
        let begun = std::time::Instant::now();
        let admitting = store.admit(lease(), Conditions::default(), at(0));
        let watching = async {
            // The writer does the job: it has all slots, and nobody else has one.
            loop {
                let found = root.query(holders, &[&database]).await.unwrap();
                if matches!(found.as_slice(), [one] if one.get::<_, i64>(0) == 32) {
                    break;
                }
                assert!(begun.elapsed().as_secs() < 20, "the writer has no turn");
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
            let waited = begun.elapsed();
            root.batch_execute("SELECT pg_advisory_unlock_all()")
                .await
                .unwrap();
            waited
        };
        let (admitted, waited) = tokio::join!(admitting, watching);
        assert_eq!(admitted.unwrap(), Admission::New);
        fewest = fewest.min(waited);
        if fewest.as_secs() < 4 {
            return;
        }
    }
    panic!("a slot is free after {fewest:?}");
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

/// Only reads that count against one quota wait for each other. All others go on, of this dispatcher and of
/// another, and so does all that follows for their leases.
#[tokio::test]
async fn a_lock_for_one_secret_stops_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let Some((one, two, other, database)) = with_one_secret_held(directory.path()).await else {
        return;
    };
    let limited = || Conditions {
        most_of_secret: Some(100),
        ..Conditions::default()
    };
    let waiting = one.admit(lease(), limited(), at(0));
    tokio::pin!(waiting);
    let early = tokio::time::timeout(std::time::Duration::from_millis(300), &mut waiting).await;
    assert!(early.is_err(), "a quota was counted beside another count");
    blocked(&other, &database, 1).await;
    let issues = async {
        for store in [&one, &two] {
            for (path, conditions) in [
                ("db:dyn2", limited()),
                ("db:dyn2", Conditions::default()),
                // Nothing of this read must be exact.
                ("db:dyn", Conditions::default()),
            ] {
                let lease = Lease {
                    path: path.parse().unwrap(),
                    ..lease()
                };
                let admitted = store.admit(lease.clone(), conditions, at(0)).await.unwrap();
                assert_eq!(admitted, Admission::New);
                store.apply(lease.id, created(), at(1)).await.unwrap();
                store
                    .apply(lease.id, Event::RevokeAsked, at(2))
                    .await
                    .unwrap();
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(10), issues)
        .await
        .expect("a read waits for another secret's lock");
    other.batch_execute("ROLLBACK").await.unwrap();
    waiting.await.unwrap();
    // Counted by each session, shown as one.
    let counts = two.pool_counts(at(3)).await.unwrap();
    assert_eq!(counts[0].leases, [1, 0, 6, 0, 0]);
    assert!(!one.forget(at(3), HISTORY).await.unwrap());
    assert_eq!(two.pool_counts(at(3)).await.unwrap(), counts);
    let parts = "SELECT count(*) FROM lease_counts WHERE part <> 0";
    let parts: i64 = other.query_one(parts, &[]).await.unwrap().get(0);
    assert_eq!(parts, 0, "added up");
}

/// Reads that wait for one quota take one session, not those of other reads.
#[tokio::test]
async fn many_reads_of_one_secret_leave_sessions_to_others() {
    let directory = tempfile::tempdir().unwrap();
    let Some((one, _, other, database)) = with_one_secret_held(directory.path()).await else {
        return;
    };
    let limited = || Conditions {
        most_of_secret: Some(100),
        ..Conditions::default()
    };
    let waiting = (0..20).map(|_| one.admit(lease(), limited(), at(0)));
    let mut waiting = futures_util::future::join_all(waiting);
    let early = tokio::time::timeout(std::time::Duration::from_millis(300), &mut waiting).await;
    assert!(early.is_err(), "a quota was counted beside another count");
    blocked(&other, &database, 1).await;
    let issues = async {
        for _ in 0..10 {
            let lease = Lease {
                path: "db:dyn2".parse().unwrap(),
                ..lease()
            };
            let admitted = one.admit(lease.clone(), limited(), at(0)).await.unwrap();
            assert_eq!(admitted, Admission::New);
            one.apply(lease.id, created(), at(1)).await.unwrap();
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(10), issues)
        .await
        .expect("another secret's reads have all sessions");
    other.batch_execute("ROLLBACK").await.unwrap();
    for admitted in waiting.await {
        assert_eq!(admitted.unwrap(), Admission::New);
    }
    // Where the row is not given up, the others hear so by their deadline.
    other
        .batch_execute("BEGIN; SELECT 1 FROM secrets WHERE path = 'db:dyn' FOR UPDATE")
        .await
        .unwrap();
    let first = one.admit(lease(), limited(), at(0));
    tokio::pin!(first);
    assert!(futures_util::poll!(&mut first).is_pending());
    let late = one.admit(lease(), limited(), lease().create_deadline).await;
    assert!(matches!(late, Err(StoreError::Unavailable(_))), "{late:?}");
    other.batch_execute("ROLLBACK").await.unwrap();
    first.await.unwrap();
}

/// A job that sees the store alone waits for those about single leases, and they wait for it.
#[tokio::test]
async fn a_turn_is_exclusive_with_every_slot() {
    let directory = tempfile::tempdir().unwrap();
    let Some((one, _, other, database)) = with_one_secret_held(directory.path()).await else {
        return;
    };
    let limited = Conditions {
        most_of_secret: Some(100),
        ..Conditions::default()
    };
    let short = std::time::Duration::from_millis(300);
    let admitting = one.admit(lease(), limited, at(0));
    tokio::pin!(admitting);
    assert!(tokio::time::timeout(short, &mut admitting).await.is_err());
    blocked(&other, &database, 1).await;
    let changing = one.create_pool(a_pool("one"));
    tokio::pin!(changing);
    assert!(tokio::time::timeout(short, &mut changing).await.is_err());
    blocked(&other, &database, 2).await;
    other.batch_execute("ROLLBACK").await.unwrap();
    admitting.await.unwrap();
    changing.await.unwrap();
    // As a dispatcher of the version before takes it.
    other.batch_execute(TAKE).await.unwrap();
    let admitting = one.admit(lease(), Conditions::default(), at(0));
    tokio::pin!(admitting);
    assert!(tokio::time::timeout(short, &mut admitting).await.is_err());
    other.batch_execute(GIVE).await.unwrap();
    admitting.await.unwrap();
}

/// A store of the version before, whose turn is a table, has slots after the next start.
#[tokio::test]
async fn the_turn_of_the_version_before_is_split() {
    let directory = tempfile::tempdir().unwrap();
    let Some((store, root, database)) = in_postgresql(directory.path()).await else {
        return;
    };
    furnish(&store).await;
    store.close().await;
    let names: Vec<String> = (0..32).map(|n| format!("mayfly_slot_{n:02}")).collect();
    let before = format!(
        "DROP VIEW mayfly_turn; DROP TABLE {}; CREATE TABLE mayfly_turn ()",
        names.join(", ")
    );
    root.batch_execute(&before).await.unwrap();
    let server = std::env::var_os("MAYFLY_TEST_PG15").unwrap();
    let place = Place {
        backend: Backend::Postgres(Box::new(url_of(server.as_ref(), &database))),
        ..place(directory.path())
    };
    let kind = async || -> String {
        let kind =
            "SELECT relkind::text FROM pg_class WHERE oid = to_regclass('public.mayfly_turn')";
        root.query_one(kind, &[]).await.unwrap().get(0)
    };
    // Somebody's statement on the table keeps it from being replaced: the store works all the same.
    let holding = "BEGIN; PREPARE s AS DELETE FROM public.mayfly_turn";
    root.batch_execute(holding).await.unwrap();
    let (unsplit, _, _) = Store::open(&place).unwrap();
    root.batch_execute("ROLLBACK; DEALLOCATE ALL")
        .await
        .unwrap();
    assert_eq!(kind().await, "r");
    let admitted = unsplit.admit(lease(), Conditions::default(), at(0)).await;
    assert_eq!(admitted.unwrap(), Admission::New);
    let (split, _, _) = Store::open(&place).unwrap();
    assert_eq!(kind().await, "v");
    for store in [&unsplit, &split] {
        let admitted = store.admit(lease(), Conditions::default(), at(0)).await;
        assert_eq!(admitted.unwrap(), Admission::New);
    }
    assert_eq!(split.pool_counts(at(1)).await.unwrap()[0].leases[0], 3);
}

/// What an issue costs in statements, which does not depend on the speed of the machine.
#[tokio::test]
async fn an_issue_is_few_round_trips() {
    let directory = tempfile::tempdir().unwrap();
    let Some((store, _, _)) = in_postgresql(directory.path()).await else {
        return;
    };
    furnish(&store).await;
    let issue = async || {
        let lease = lease();
        store.bearer(Secret::new("some")).await.unwrap();
        store.read_secret("db:dyn".parse().unwrap()).await.unwrap();
        let nonce = Some((1, crate::password::Nonce::random()));
        let conditions = Conditions {
            nonce,
            ..Conditions::default()
        };
        store.admit(lease.clone(), conditions, at(0)).await.unwrap();
        store.apply_to(&lease, created(), at(1)).await.unwrap();
    };
    let read = || store.health.tally.all();
    // Each session prepares a statement when it first needs it, so the fewest count.
    let mut fewest = [u64::MAX; 4];
    for _ in 0..60 {
        let before = read();
        issue().await;
        for ((fewest, now), was) in fewest.iter_mut().zip(read()).zip(before) {
            *fewest = (now - was).min(*fewest);
        }
    }
    let [jobs, transactions, statements, round_trips] = fewest;
    assert_eq!(
        [jobs, transactions],
        [4, 2],
        "four jobs, of which two write"
    );
    // A token, a secret: one each. A lease recorded and made: one that reads, and one that writes and commits.
    assert_eq!(round_trips, 6);
    assert!(statements <= 25, "{statements}");
}
