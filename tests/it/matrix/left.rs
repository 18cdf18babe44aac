//! Objects that an account has created as its grant role, on PostgreSQL 14 and 15: they go to the quarantine role
//! with the account's end, and give nobody any right.

use mayfly_tests::postgres::{Admin, Server, Site, scalar, sqlstate};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::{Engine, System, prefix};
use mayfly_tests::{eventually, seconds, word};
use serde_json::{Value, json};
use tokio_postgres::Client;

/// Reads for any caller, with the rights of its owner.
fn a_loophole(name: &str) -> String {
    format!(
        "CREATE FUNCTION app.{name}(query text) RETURNS text LANGUAGE plpgsql SECURITY DEFINER AS \
         $$ DECLARE found text; BEGIN EXECUTE query INTO found; RETURN found; END $$"
    )
}

async fn grant_role(site: &Site) -> String {
    let root = site.server.superuser("postgres").await;
    let query = format!(
        "SELECT DISTINCT g.rolname FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid \
         JOIN pg_roles r ON r.oid = m.member WHERE starts_with(r.rolname, '{}') AND starts_with(g.rolname, 'mayfly_grant_')",
        prefix(site)
    );
    scalar(&root, &query).await
}

async fn owned(root: &Client, role: &str) -> String {
    let query = format!(
        "SELECT count(*) FROM pg_shdepend WHERE refobjid = '{role}'::regrole AND deptype = 'o'"
    );
    scalar(root, &query).await
}

async fn left_objects(engine: &Engine) -> u64 {
    let text = engine.admin_text("/metrics").await;
    let line = text
        .lines()
        .find(|line| line.starts_with("mayfly_engine_left_objects_total{"))
        .unwrap();
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

async fn what_is_left_gives_nothing(server: Server) {
    let grants = json!({"grantPermissions": [
        {"what": "SELECT", "where": "*.*"}, {"what": "CREATE", "where": "schema:app"}]});
    let (system, site, path, engine) = Scenario::on(server.clone())
        .attributes(grants)
        .start()
        .await;
    let (account, other) = (
        system.issue(&path, None).await,
        system.issue(&path, None).await,
    );
    let group = grant_role(&site).await;
    let root = server.superuser(&site.name).await;
    let passer = format!("passer_{}", word());
    root.batch_execute(&format!(
        "CREATE ROLE {passer} LOGIN PASSWORD 'theirs'; GRANT USAGE ON SCHEMA app TO {passer}"
    ))
    .await
    .unwrap();
    let passer = server.login(&passer, "theirs", &site.name).await.unwrap();
    let working = other.login().await.unwrap();

    let session = account.login().await.unwrap();
    for statement in [
        &format!("SET ROLE {group}"),
        &a_loophole("hole"),
        "CREATE TABLE app.left_behind (id int)",
        "SELECT lo_create(0)",
        "ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO PUBLIC",
        "ALTER DEFAULT PRIVILEGES IN SCHEMA app GRANT SELECT ON TABLES TO PUBLIC",
        "ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC",
        "RESET ROLE",
        &a_loophole("own_hole"),
    ] {
        session.batch_execute(statement).await.unwrap();
    }
    let through = "SELECT app.hole('SELECT count(*) FROM items')";
    assert_eq!(scalar(&passer, through).await, "2");
    assert_eq!(owned(&root, &group).await, "6");

    let lease = format!("/v1/leases/{}", account.lease);
    system.api.delete(&lease).await;
    system.gone(&site, &account, seconds(20)).await;
    assert_eq!(owned(&root, &group).await, "0");
    assert_eq!(left_objects(&engine).await, 6);
    for hole in ["hole", "own_hole"] {
        let through = format!("SELECT app.{hole}('SELECT count(*) FROM items')");
        assert_eq!(sqlstate(&passer, &through).await, "42501", "{hole}");
        let owner = format!("SELECT proowner::regrole FROM pg_proc WHERE proname = '{hole}'");
        let owner = scalar(&root, &owner).await;
        assert!(owner.starts_with("mayfly_quarantine_"), "{hole}: {owner}");
        // The function cannot read other objects in quarantine either.
        root.batch_execute("INSERT INTO app.left_behind VALUES (7)")
            .await
            .unwrap();
        let through = format!("SELECT app.{hole}('SELECT id FROM app.left_behind')");
        assert_eq!(sqlstate(&passer, &through).await, "42501", "{hole}");
    }
    // A live account is not disturbed.
    assert_eq!(scalar(&working, "SELECT count(*) FROM items").await, "2");

    // The sweep finds what an engine has left that died before it had moved the objects.
    let left = format!("SET ROLE {group}; {}; RESET ROLE", a_loophole("late_hole"));
    root.batch_execute(&left).await.unwrap();
    let (status, answer) = system.api.post("/v1/leases/reconcile", json!({})).await;
    assert_eq!(status, 200, "{answer}");
    eventually("the grant role owns nothing", seconds(20), async || {
        (owned(&root, &group).await == "0").then_some(())
    })
    .await;
    let through = "SELECT app.late_hole('SELECT count(*) FROM items')";
    assert_eq!(sqlstate(&passer, through).await, "42501");
    assert_eq!(left_objects(&engine).await, 7);
    let next = system.issue(&path, None).await;
    let client = next.login().await.unwrap();
    assert_eq!(scalar(&client, "SELECT count(*) FROM items").await, "2");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_account_left_gives_nothing_on_14() {
    what_is_left_gives_nothing(Server::of_version("14")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_account_left_gives_nothing_on_15() {
    what_is_left_gives_nothing(Server::pg15()).await;
}

/// The finding about objects, if there is one.
async fn found(system: &System, path: &str) -> (bool, Option<Value>) {
    let path = format!("/v1/secrets/{path}::check");
    let (status, answer) = system.api.post(&path, json!({})).await;
    assert_eq!(status, 200, "{answer}");
    let findings = answer["findings"].as_array().unwrap();
    let found = findings.iter().find(|one| one["check"] == "create objects");
    (answer["ok"] == true, found.cloned())
}

#[tokio::test(flavor = "multi_thread")]
async fn check_says_where_accounts_may_create() {
    let system = System::start().await;
    let pool = system.pool().await;
    let _engine = system.engine(&pool).await;
    // On 14 everybody may create in `public`.
    let old = Server::of_version("14");
    let site = old.site(Admin::CreateRole).await;
    let path = system.secret(&site, &pool, json!({})).await;
    let (ok, finding) = found(&system, &path).await;
    let finding = finding.unwrap();
    let fix = finding["fix"][0].as_str().unwrap();
    assert!(
        !ok && finding["ok"] == false && fix.contains("FROM PUBLIC"),
        "{finding}"
    );
    let root = old.superuser(&site.name).await;
    root.batch_execute(fix).await.unwrap();
    assert_eq!(found(&system, &path).await, (true, None));

    let grants = json!({"grantPermissions": [
        {"what": "SELECT", "where": "*.*"}, {"what": "CREATE", "where": "schema:app"}]});
    for (server, fails) in [(Server::pg15(), true), (Server::pg18(), false)] {
        let site = server.site(Admin::CreateRole).await;
        let path = system.secret(&site, &pool, grants.clone()).await;
        for _ in 0..2 {
            // In the second round the grant role exists.
            let (ok, finding) = found(&system, &path).await;
            assert_eq!((ok, finding.is_some()), (!fails, fails), "{finding:?}");
        }
    }
}
