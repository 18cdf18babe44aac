//! Grants while others change the database: tables that come and go, tables that a migration holds,
//! names that are not UTF-8, privileges that a version does not have, and more tables than a read has
//! time for.

use mayfly_tests::postgres::{Credential, Server, Site, scalar, sqlstate};
use mayfly_tests::scenario::{Scenario, Stage};
use mayfly_tests::{eventually, seconds};
use serde_json::json;
use tokio_util::sync::CancellationToken;

/// A read that must work, and its warnings.
async fn account(stage: &Stage, path: &str) -> (tokio_postgres::Client, String) {
    let (status, answer) = stage.read(path).await;
    assert_eq!(status, 200, "{answer}");
    let client = Credential::from_answer(&answer).login().await.unwrap();
    let warnings = match answer.get("warnings") {
        Some(warnings) => warnings.to_string(),
        None => String::new(),
    };
    (client, warnings)
}

/// The findings of `secret check` about grants, as one text.
async fn grant_findings(stage: &Stage, path: &str) -> String {
    let findings = stage.findings(path).await;
    let grants = findings
        .iter()
        .filter(|finding| finding["check"] == "grant");
    grants
        .map(|finding| format!("{} {}\n", finding["ok"], finding["message"]))
        .collect()
}

/// A metric of the engine.
async fn metric(stage: &Stage, name: &str) -> f64 {
    let text = stage.engine.admin_text("/metrics").await;
    let line = text.lines().find(|line| line.starts_with(name)).unwrap();
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// Runs a job's statement until it is done: a change of an object during a GRANT on it may get
/// XX000 (tuple concurrently updated), from PostgreSQL.
async fn run(hand: &tokio_postgres::Client, statement: &str) {
    while let Err(error) = hand.batch_execute(statement).await {
        let code = error.code().map(|code| code.code());
        assert_eq!(code, Some("XX000"), "{statement}: {error}");
    }
}

/// Creates and drops the tables of a job as fast as the server can.
async fn stages(site: Site, over: CancellationToken) -> usize {
    let hand = site.admin().await;
    let mut rounds = 0;
    while !over.is_cancelled() {
        for verb in ["CREATE TABLE stage_{} (id int)", "DROP TABLE stage_{}"] {
            for n in 0..30 {
                let statement = verb.replace("{}", &n.to_string());
                run(&hand, &statement).await;
            }
        }
        rounds += 1;
    }
    rounds
}

/// Reads of a secret on a pattern work while a job makes and drops tables, and grant the lasting ones.
async fn tables_come_and_go(server: Server) {
    let stage = Scenario::on(server).stage().await;
    let over = CancellationToken::new();
    let jobs: Vec<_> = (0..2)
        .map(|n| {
            let (site, over) = (stage.site.clone(), over.clone());
            tokio::spawn(async move {
                if n == 0 {
                    stages(site, over).await
                } else {
                    schemas(site, over).await
                }
            })
        })
        .collect();
    for round in 0..12 {
        // Each has its own grant role, so that each grants at once.
        let what = ["SELECT", "SELECT,INSERT", "SELECT,UPDATE"][round % 3];
        let grants = json!({"what": what, "where": "*.*"});
        let path = stage.secret(json!({"grantPermissions": grants})).await;
        for _ in 0..2 {
            let (client, _) = account(&stage, &path).await;
            assert_eq!(
                sqlstate(&client, "SELECT * FROM app.orders").await,
                "00000",
                "round {round}"
            );
        }
        tokio::time::sleep(std::time::Duration::from_millis(600)).await;
    }
    over.cancel();
    for job in jobs {
        assert!(
            job.await.unwrap() > 1,
            "the job did not run beside the reads"
        );
    }
}

/// Creates and drops schemas with tables until the test is over.
async fn schemas(site: Site, over: CancellationToken) -> usize {
    let hand = site.admin().await;
    let mut rounds = 0;
    while !over.is_cancelled() {
        run(
            &hand,
            "CREATE SCHEMA stage CREATE TABLE a (id serial) CREATE TABLE b (id serial)",
        )
        .await;
        run(&hand, "DROP SCHEMA stage CASCADE").await;
        rounds += 1;
    }
    rounds
}

#[tokio::test(flavor = "multi_thread")]
async fn grant_faults_tables_come_and_go_on_15() {
    tables_come_and_go(Server::pg15()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn grant_faults_tables_come_and_go_on_18() {
    tables_come_and_go(Server::pg18()).await;
}

/// A migration holds one table. A pattern grants the rest at once, reports that, and grants the table to the live
/// accounts when the migration has ended. A named table is refused with its name, long before the caller's deadline.
async fn a_migration_holds_a_table(server: Server) {
    let stage = Scenario::on(server).stage().await;
    let hand = stage.site.admin().await;
    hand.batch_execute(
        "CREATE TABLE app.held (id int); CREATE SCHEMA alone CREATE TABLE held (id int)",
    )
    .await
    .unwrap();
    let migration = stage.site.admin().await;
    migration
        .batch_execute(
            "BEGIN; ALTER TABLE app.held ADD COLUMN b int; ALTER TABLE alone.held ADD COLUMN b int",
        )
        .await
        .unwrap();

    let path = stage.granting("SELECT", "app.*").await;
    let begun = std::time::Instant::now();
    let (client, warnings) = account(&stage, &path).await;
    let took = begun.elapsed();
    assert!(took < seconds(20), "a lock took {took:?} of the read");
    assert_eq!(sqlstate(&client, "SELECT * FROM app.orders").await, "00000");
    assert!(warnings.contains("another transaction holds"), "{warnings}");
    assert!(
        !warnings.contains("held\""),
        "an object is named: {warnings}"
    );
    assert!(metric(&stage, "mayfly_engine_grants_waiting").await >= 1.0);
    let checked = grant_findings(&stage, &path).await;
    assert!(
        checked.contains("app.held") && checked.contains("another transaction"),
        "{checked}"
    );

    // One secret names a locked table, the other has a pattern that finds only a locked table.
    for on in ["app.held", "alone.*"] {
        let path = stage.granting("SELECT", on).await;
        let begun = std::time::Instant::now();
        let (status, answer) = stage.read(&path).await;
        assert_eq!(
            (status, answer["error"].as_str()),
            (503, Some("object_locked")),
            "{answer}"
        );
        let message = answer["message"].as_str().unwrap();
        assert!(
            message.contains("held") && message.contains("55P03"),
            "{message}"
        );
        assert!(begun.elapsed() < seconds(20), "{:?}", begun.elapsed());
    }
    // Many reads at once do not wait one after another.
    let path_of_named = stage.granting("SELECT,INSERT", "app.held").await;
    let reads = (0..6).map(|_| stage.read(&path_of_named));
    for (status, answer) in futures_util::future::join_all(reads).await {
        assert_eq!(
            (status, answer["error"].as_str()),
            (503, Some("object_locked")),
            "{answer}"
        );
    }

    migration.batch_execute("COMMIT").await.unwrap();
    // The privilege is granted without another read.
    eventually("the table is granted later", seconds(60), async || {
        (sqlstate(&client, "SELECT * FROM app.held").await == "00000").then_some(())
    })
    .await;
    eventually("nothing waits any more", seconds(60), async || {
        (metric(&stage, "mayfly_engine_grants_waiting").await == 0.0).then_some(())
    })
    .await;
    let (named, _) = account(&stage, &path_of_named).await;
    assert_eq!(sqlstate(&named, "SELECT * FROM app.held").await, "00000");
}

#[tokio::test(flavor = "multi_thread")]
async fn grant_faults_migration_holds_a_table_on_15() {
    a_migration_holds_a_table(Server::pg15()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn grant_faults_migration_holds_a_table_on_18() {
    a_migration_holds_a_table(Server::pg18()).await;
}

/// MAINTAIN came with 17. Before, it is reported, and refused if nothing else is requested. In a list, what cannot be
/// granted is reported.
async fn what_comes_to_nothing(server: Server, maintain: bool) {
    let stage = Scenario::on(server).stage().await;
    let hand = stage.site.admin().await;
    hand.batch_execute("CREATE SCHEMA fresh").await.unwrap();

    let path = stage.granting("SELECT,MAINTAIN", "app.*").await;
    let (client, _) = account(&stage, &path).await;
    assert_eq!(sqlstate(&client, "SELECT * FROM app.orders").await, "00000");
    let checked = grant_findings(&stage, &path).await;
    let says = checked.contains("MAINTAIN does not exist in PostgreSQL");
    assert_eq!(says, !maintain, "{checked}");
    let skipped = metric(&stage, "mayfly_engine_grants_skipped").await;
    assert_eq!(skipped > 0.0, !maintain, "{skipped}");

    let path = stage.granting("MAINTAIN", "*.*").await;
    let (status, answer) = stage.read(&path).await;
    if maintain {
        assert_eq!(status, 200, "{answer}");
    } else {
        assert_eq!(
            (status, answer["error"].as_str()),
            (422, Some("grant_refused")),
            "{answer}"
        );
        assert!(
            answer["message"]
                .as_str()
                .unwrap()
                .contains("PostgreSQL 15"),
            "{answer}"
        );
    }

    // An account makes the first table of a schema.
    let grants = json!([{"what": "USAGE,CREATE", "where": "schema:fresh"}, {"what": "ALL", "where": "fresh.*"}]);
    let path = stage.secret(json!({"grantPermissions": grants})).await;
    let checked = grant_findings(&stage, &path).await;
    assert!(
        checked.contains("nothing in the database matches") && !checked.contains("false"),
        "{checked}"
    );
    let (client, _) = account(&stage, &path).await;
    assert_eq!(
        sqlstate(&client, "CREATE TABLE fresh.first (id int)").await,
        "00000"
    );

    for (grants, code) in [
        (
            json!([{"what": "ALL", "where": "nowhere.*"}, {"what": "ALL", "where": "nowhere2.*"}]),
            "no_such_object",
        ),
        (
            json!([{"what": "ALL", "where": "function:app.*"}]),
            "grant_refused",
        ),
        // A named object must exist, also in a list with others.
        (
            json!([{"what": "SELECT", "where": "app.*"}, {"what": "SELECT", "where": "app.absent"}]),
            "no_such_object",
        ),
    ] {
        let path = stage.secret(json!({"grantPermissions": grants})).await;
        let (status, answer) = stage.read(&path).await;
        assert_eq!(
            (status, answer["error"].as_str()),
            (422, Some(code)),
            "{grants}: {answer}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn grant_faults_nothing_comes_of_it_on_15() {
    what_comes_to_nothing(Server::pg15(), false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn grant_faults_nothing_comes_of_it_on_18() {
    what_comes_to_nothing(Server::pg18(), true).await;
}

/// One table whose name is not UTF-8, in a database without an encoding, is skipped and shown.
async fn a_name_that_is_not_utf8(server: Server) {
    let stage = Scenario::on(server).stage().await;
    let name = format!("{}_raw", stage.site.name);
    let root = stage.site.server.superuser("postgres").await;
    root.batch_execute(&format!(
        "CREATE DATABASE {name} OWNER {} TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'",
        stage.site.name
    ))
    .await
    .unwrap();
    let hand = stage
        .site
        .server
        .login(&stage.site.name, &stage.site.password, &name)
        .await
        .unwrap();
    hand.batch_execute(
        "CREATE SCHEMA app; CREATE TABLE app.orders (id int); CREATE TABLE app.\"café\" (id int); \
         DO $$ BEGIN EXECUTE 'CREATE TABLE app.\"caf' || convert_from('\\xe9', 'SQL_ASCII') || '\" (id int)'; END $$; \
         DO $$ BEGIN EXECUTE 'CREATE SCHEMA \"s' || convert_from('\\xff', 'SQL_ASCII') || '\" CREATE TABLE t (id int)'; END $$",
    )
    .await
    .unwrap();
    let attributes =
        json!({"grantPermissions": {"what": "SELECT", "where": "*.*"}, "database": name});
    let path = stage
        .system
        .secret(&stage.site, &stage.pool, attributes)
        .await;
    let (client, _) = account(&stage, &path).await;
    assert_eq!(sqlstate(&client, "SELECT * FROM app.orders").await, "00000");
    assert_eq!(
        sqlstate(&client, "SELECT * FROM app.\"café\"").await,
        "00000"
    );
    assert_eq!(scalar(&client, "SELECT current_database()").await, name);
    assert!(metric(&stage, "mayfly_engine_grants_skipped").await >= 2.0);
    let checked = grant_findings(&stage, &path).await;
    assert!(
        checked.contains("xe9") && checked.contains("not UTF-8"),
        "{checked}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn grant_faults_name_is_not_utf8_on_15() {
    a_name_that_is_not_utf8(Server::pg15()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn grant_faults_name_is_not_utf8_on_18() {
    a_name_that_is_not_utf8(Server::pg18()).await;
}

/// Time runs out before a pattern's objects are granted. The read is answered with a warning of what is missing, and
/// the engine continues. If it dies in the middle, the next read continues.
async fn time_runs_out(server: Server) {
    let fault = mayfly_tests::run_dir().join(mayfly_tests::word());
    let mut stage = Scenario::on(server)
        .engine(&[("MAYFLY_FAULT_FILE", fault.to_str().unwrap())])
        .stage()
        .await;
    let path = stage.granting("SELECT", "app.*").await;
    std::fs::write(&fault, "grant.page delay 3300").unwrap();
    let (client, warnings) = account(&stage, &path).await;
    assert!(
        warnings.contains("the engine is still granting"),
        "{warnings}"
    );
    eventually("the rest is granted later", seconds(30), async || {
        (sqlstate(&client, "SELECT * FROM app.orders").await == "00000").then_some(())
    })
    .await;
    eventually("nothing waits any more", seconds(30), async || {
        (metric(&stage, "mayfly_engine_grants_waiting").await == 0.0).then_some(())
    })
    .await;
    let (_, warnings) = account(&stage, &path).await;
    assert_eq!(warnings, "");

    // The engine dies while it grants in the background.
    let path = stage.granting("SELECT", "public.*").await;
    std::fs::write(&fault, "grant.page delay 3300").unwrap();
    let (early, warnings) = account(&stage, &path).await;
    assert!(
        warnings.contains("the engine is still granting"),
        "{warnings}"
    );
    std::fs::write(&fault, "grant.page kill").unwrap();
    eventually("the engine died, or was done", seconds(30), async || {
        let done = sqlstate(&early, "SELECT * FROM items").await == "00000";
        (done || !fault.exists()).then_some(())
    })
    .await;
    let second = stage.system.engine(&stage.pool).await;
    drop(std::mem::replace(&mut stage.engine, second));
    let (late, _) = account(&stage, &path).await;
    for client in [late, early] {
        assert_eq!(sqlstate(&client, "SELECT * FROM items").await, "00000");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn grant_faults_time_runs_out_on_15() {
    time_runs_out(Server::pg15()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn grant_faults_time_runs_out_on_18() {
    time_runs_out(Server::pg18()).await;
}
