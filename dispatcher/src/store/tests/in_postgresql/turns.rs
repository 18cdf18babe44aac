//! The store's turn and its slots: who has one, who waits, and who cannot take one.

use super::*;

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
    // This lock is of the session, not of a transaction. It is kept to the end.
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
        // No statement deletes from the view.
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

/// A dispatcher of the previous version and one of this write one after another.
#[tokio::test]
async fn a_dispatcher_of_the_version_before_has_its_turn() {
    let directory = tempfile::tempdir().unwrap();
    let Some((store, root, _)) = in_postgresql(directory.path()).await else {
        return;
    };
    // The dispatcher of the earlier version connects as the store's own role.
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
            // The writer does the job: it has all slots, and no other session has one.
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
    // A dispatcher of the previous version takes its turn in this way.
    other.batch_execute(TAKE).await.unwrap();
    let admitting = one.admit(lease(), Conditions::default(), at(0));
    tokio::pin!(admitting);
    assert!(tokio::time::timeout(short, &mut admitting).await.is_err());
    other.batch_execute(GIVE).await.unwrap();
    admitting.await.unwrap();
}

/// A store of the previous version, whose turn is a table, has slots after the next start.
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
    // A statement of somebody else on the table prevents its replacement. The store works nevertheless.
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
