//! Grants while others change the database: tables that come and go, tables that a migration holds,
//! names that are not UTF-8, privileges that a version does not have, and more tables than a read has
//! time for.

use mayfly_tests::postgres::{Admin, Credential, Server, Site, scalar, sqlstate};
use mayfly_tests::system::{Engine, System};
use mayfly_tests::{eventually, seconds};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

struct Bench {
    system: System,
    site: Site,
    pool: String,
    engine: Engine,
}

async fn bench(server: Server) -> Bench {
    let system = System::start().await;
    let site = server.site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let engine = system.engine(&pool).await;
    Bench {
        system,
        site,
        pool,
        engine,
    }
}

impl Bench {
    async fn secret(&self, grants: Value) -> String {
        let attributes = json!({"grantPermissions": grants});
        self.system.secret(&self.site, &self.pool, attributes).await
    }

    async fn read(&self, path: &str) -> (u16, Value) {
        self.system.api.get(&format!("/v1/secrets/{path}")).await
    }

    /// A read that must work, and its warnings.
    async fn account(&self, path: &str) -> (tokio_postgres::Client, String) {
        let (status, answer) = self.read(path).await;
        assert_eq!(status, 200, "{answer}");
        let client = Credential::from_answer(&answer).login().await.unwrap();
        let warnings = match answer.get("warnings") {
            Some(warnings) => warnings.to_string(),
            None => String::new(),
        };
        (client, warnings)
    }

    /// The findings of `secret check` about grants, as one text.
    async fn checked(&self, path: &str) -> String {
        let (status, answer) = self
            .system
            .api
            .post(&format!("/v1/secrets/{path}::check"), json!({}))
            .await;
        assert_eq!(status, 200, "{answer}");
        let findings = answer["findings"].as_array().unwrap().iter();
        let grants = findings.filter(|finding| finding["check"] == "grant");
        grants
            .map(|finding| format!("{} {}\n", finding["ok"], finding["message"]))
            .collect()
    }

    /// A metric of the engine.
    async fn metric(&self, name: &str) -> f64 {
        let text = self.engine.admin_text("/metrics").await;
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }
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

/// Every read of a secret on a pattern works beside a job that makes and drops tables, and gives what
/// stays.
async fn tables_come_and_go(server: Server) {
    let bench = bench(server).await;
    let over = CancellationToken::new();
    let jobs: Vec<_> = (0..2)
        .map(|n| {
            let (site, over) = (bench.site.clone(), over.clone());
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
        // Each its own grant role, so that each grants at once.
        let what = ["SELECT", "SELECT,INSERT", "SELECT,UPDATE"][round % 3];
        let grants = json!({"what": what, "where": "*.*"});
        let path = bench.secret(grants).await;
        for _ in 0..2 {
            let (client, _) = bench.account(&path).await;
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

/// A migration holds one table. A pattern grants the rest at once, says so, and grants the table when
/// the migration has ended, to the accounts there are; a named table is refused with its name, long
/// before the caller's deadline.
async fn a_migration_holds_a_table(server: Server) {
    let bench = bench(server).await;
    let hand = bench.site.admin().await;
    hand.batch_execute(
        "CREATE TABLE app.held (id int); CREATE SCHEMA alone CREATE TABLE held (id int)",
    )
    .await
    .unwrap();
    let migration = bench.site.admin().await;
    migration
        .batch_execute(
            "BEGIN; ALTER TABLE app.held ADD COLUMN b int; ALTER TABLE alone.held ADD COLUMN b int",
        )
        .await
        .unwrap();

    let path = bench
        .secret(json!({"what": "SELECT", "where": "app.*"}))
        .await;
    let begun = std::time::Instant::now();
    let (client, warnings) = bench.account(&path).await;
    let took = begun.elapsed();
    assert!(took < seconds(20), "a lock took {took:?} of the read");
    assert_eq!(sqlstate(&client, "SELECT * FROM app.orders").await, "00000");
    assert!(warnings.contains("another transaction holds"), "{warnings}");
    assert!(
        !warnings.contains("held\""),
        "an object is named: {warnings}"
    );
    assert!(bench.metric("mayfly_engine_grants_waiting").await >= 1.0);
    let checked = bench.checked(&path).await;
    assert!(
        checked.contains("app.held") && checked.contains("another transaction"),
        "{checked}"
    );

    // Named, and a pattern that finds nothing else.
    for on in ["app.held", "alone.*"] {
        let path = bench.secret(json!({"what": "SELECT", "where": on})).await;
        let begun = std::time::Instant::now();
        let (status, answer) = bench.read(&path).await;
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
    // Many at once do not wait one after another.
    let path_of_named = bench
        .secret(json!({"what": "SELECT,INSERT", "where": "app.held"}))
        .await;
    let reads = (0..6).map(|_| bench.read(&path_of_named));
    for (status, answer) in futures_util::future::join_all(reads).await {
        assert_eq!(
            (status, answer["error"].as_str()),
            (503, Some("object_locked")),
            "{answer}"
        );
    }

    migration.batch_execute("COMMIT").await.unwrap();
    // Nobody reads again.
    eventually("the table is granted later", seconds(60), async || {
        (sqlstate(&client, "SELECT * FROM app.held").await == "00000").then_some(())
    })
    .await;
    eventually("nothing waits any more", seconds(60), async || {
        (bench.metric("mayfly_engine_grants_waiting").await == 0.0).then_some(())
    })
    .await;
    let (named, _) = bench.account(&path_of_named).await;
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

/// MAINTAIN came with 17: before, it is reported, and refused where nothing else is asked for. In a
/// list, what comes to nothing is reported.
async fn what_comes_to_nothing(server: Server, maintain: bool) {
    let bench = bench(server).await;
    let hand = bench.site.admin().await;
    hand.batch_execute("CREATE SCHEMA fresh").await.unwrap();

    let path = bench
        .secret(json!({"what": "SELECT,MAINTAIN", "where": "app.*"}))
        .await;
    let (client, _) = bench.account(&path).await;
    assert_eq!(sqlstate(&client, "SELECT * FROM app.orders").await, "00000");
    let checked = bench.checked(&path).await;
    let says = checked.contains("MAINTAIN does not exist in PostgreSQL");
    assert_eq!(says, !maintain, "{checked}");
    let skipped = bench.metric("mayfly_engine_grants_skipped").await;
    assert_eq!(skipped > 0.0, !maintain, "{skipped}");

    let path = bench
        .secret(json!({"what": "MAINTAIN", "where": "*.*"}))
        .await;
    let (status, answer) = bench.read(&path).await;
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

    // The account that makes the first table of a schema.
    let grants = json!([{"what": "USAGE,CREATE", "where": "schema:fresh"}, {"what": "ALL", "where": "fresh.*"}]);
    let path = bench.secret(grants).await;
    let checked = bench.checked(&path).await;
    assert!(
        checked.contains("nothing in the database matches") && !checked.contains("false"),
        "{checked}"
    );
    let (client, _) = bench.account(&path).await;
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
        // A named object must exist, also beside others.
        (
            json!([{"what": "SELECT", "where": "app.*"}, {"what": "SELECT", "where": "app.absent"}]),
            "no_such_object",
        ),
    ] {
        let path = bench.secret(grants.clone()).await;
        let (status, answer) = bench.read(&path).await;
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

/// One table whose name is not UTF-8, in a database without an encoding, is passed over and shown.
async fn a_name_that_is_not_utf8(server: Server) {
    let bench = bench(server).await;
    let name = format!("{}_raw", bench.site.name);
    let root = bench.site.server.superuser("postgres").await;
    root.batch_execute(&format!(
        "CREATE DATABASE {name} OWNER {} TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'",
        bench.site.name
    ))
    .await
    .unwrap();
    let hand = bench
        .site
        .server
        .login(&bench.site.name, &bench.site.password, &name)
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
    let path = bench
        .system
        .secret(&bench.site, &bench.pool, attributes)
        .await;
    let (client, _) = bench.account(&path).await;
    assert_eq!(sqlstate(&client, "SELECT * FROM app.orders").await, "00000");
    assert_eq!(
        sqlstate(&client, "SELECT * FROM app.\"café\"").await,
        "00000"
    );
    assert_eq!(scalar(&client, "SELECT current_database()").await, name);
    assert!(bench.metric("mayfly_engine_grants_skipped").await >= 2.0);
    let checked = bench.checked(&path).await;
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

/// Time runs out before a pattern's objects are granted. The read is answered all the same, says what
/// is missing, and the engine goes on; where it dies in the middle, the next read goes on.
async fn time_runs_out(server: Server) {
    let system = System::start().await;
    let site = server.site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let fault = mayfly_tests::run_dir().join(mayfly_tests::word());
    let environment = [("MAYFLY_FAULT_FILE", fault.to_str().unwrap())];
    let engine = system.engine_with(&pool, &environment);
    engine.ready().await;
    let mut bench = Bench {
        system,
        site,
        pool,
        engine,
    };
    let path = bench
        .secret(json!({"what": "SELECT", "where": "app.*"}))
        .await;
    std::fs::write(&fault, "grant.page delay 3300").unwrap();
    let (client, warnings) = bench.account(&path).await;
    assert!(
        warnings.contains("the engine is still granting"),
        "{warnings}"
    );
    eventually("the rest is granted later", seconds(30), async || {
        (sqlstate(&client, "SELECT * FROM app.orders").await == "00000").then_some(())
    })
    .await;
    eventually("nothing waits any more", seconds(30), async || {
        (bench.metric("mayfly_engine_grants_waiting").await == 0.0).then_some(())
    })
    .await;
    let (_, warnings) = bench.account(&path).await;
    assert_eq!(warnings, "");

    // The engine dies while it goes on.
    let path = bench
        .secret(json!({"what": "SELECT", "where": "public.*"}))
        .await;
    std::fs::write(&fault, "grant.page delay 3300").unwrap();
    let (early, warnings) = bench.account(&path).await;
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
    let second = bench.system.engine(&bench.pool).await;
    drop(std::mem::replace(&mut bench.engine, second));
    let (late, _) = bench.account(&path).await;
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
