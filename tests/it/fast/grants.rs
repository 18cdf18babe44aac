//! Grants: an account may do exactly what was requested, for every form of `where`.

use mayfly_tests::postgres::{Server, scalar, sqlstate};
use mayfly_tests::scenario::{Scenario, Stage};
use mayfly_tests::seconds;
use serde_json::{Value, json};

async fn refused(stage: &Stage, what: &str, on: &str) -> (u16, Value) {
    let path = stage.granting(what, on).await;
    let answer = stage.read(&path).await;
    assert_ne!(answer.0, 200, "{what} on {on} was granted");
    answer
}

#[tokio::test]
async fn every_form_of_where() {
    let g = Scenario::on(Server::pg18()).stage().await;
    let hand = g.site.admin().await;
    hand.batch_execute(
        "CREATE FUNCTION app.secret_number() RETURNS int LANGUAGE sql AS 'SELECT 42'; REVOKE EXECUTE ON FUNCTION app.secret_number() FROM PUBLIC; \
         CREATE SEQUENCE app.counter; CREATE VIEW app.view AS SELECT * FROM app.orders; CREATE MATERIALIZED VIEW app.mat AS SELECT * FROM app.orders; \
         CREATE SCHEMA \"we.ird\"; CREATE TABLE \"we.ird\".\"a;b\"\"c$${{x}}é\" (id int)",
    )
    .await
    .unwrap();

    let client = g.login("SELECT", "app.*").await;
    assert_eq!(
        scalar(&client, "SELECT count(*) FROM app.orders").await,
        "2"
    );
    assert_eq!(scalar(&client, "SELECT count(*) FROM app.view").await, "2");
    assert_eq!(scalar(&client, "SELECT count(*) FROM app.mat").await, "2");
    assert_eq!(
        sqlstate(&client, "SELECT * FROM public.items").await,
        "42501"
    );

    let client = g.login("SELECT, INSERT", "public.items").await;
    assert_eq!(
        sqlstate(&client, "INSERT INTO items (note) VALUES ('serial works')").await,
        "00000"
    );
    assert_eq!(sqlstate(&client, "DELETE FROM items").await, "42501");
    assert_eq!(sqlstate(&client, "SELECT * FROM app.orders").await, "42501");

    let client = g.login("select", "orders").await;
    assert_eq!(
        scalar(&client, "SELECT count(*) FROM app.orders").await,
        "2"
    );

    let client = g.login("INSERT", "*.*").await;
    assert_eq!(
        sqlstate(&client, "INSERT INTO items (note) VALUES ('serial works')").await,
        "00000"
    );
    assert_eq!(sqlstate(&client, "SELECT * FROM items").await, "42501");

    let client = g.login("ALL", "*.*").await;
    assert_eq!(
        sqlstate(&client, "DELETE FROM app.orders WHERE id = 99").await,
        "00000"
    );

    let client = g.login("USAGE, SELECT", "sequence:app.counter").await;
    assert_eq!(scalar(&client, "SELECT nextval('app.counter')").await, "1");

    let client = g.login("EXECUTE", "function:app.secret_number()").await;
    assert_eq!(scalar(&client, "SELECT app.secret_number()").await, "42");

    let client = g.login("CREATE", "schema:app").await;
    assert_eq!(
        sqlstate(&client, "CREATE TABLE app.made (id int)").await,
        "00000"
    );

    let client = g.login("TEMP", &format!("database:{}", g.site.name)).await;
    assert_eq!(
        sqlstate(&client, "CREATE TEMP TABLE t (id int)").await,
        "00000"
    );

    let client = g.login("SELECT", "\"we.ird\".\"a;b\"\"c$${{x}}é\"").await;
    assert_eq!(
        scalar(
            &client,
            "SELECT count(*) FROM \"we.ird\".\"a;b\"\"c$${{x}}é\""
        )
        .await,
        "0"
    );

    hand.batch_execute("CREATE ROLE reader_of_orders; GRANT USAGE ON SCHEMA app TO reader_of_orders; GRANT SELECT ON app.orders TO reader_of_orders").await.unwrap();
    let client = g.login("ALL", "role:reader_of_orders").await;
    assert_eq!(
        scalar(&client, "SELECT count(*) FROM app.orders").await,
        "2"
    );
    assert_eq!(
        sqlstate(&client, "SET ROLE reader_of_orders").await,
        "42501",
        "membership was for inheriting only"
    );
}

/// A table made later is covered by the next issue, for earlier leases too. Objects of accounts are left out.
#[tokio::test]
async fn tables_made_later() {
    let g = Scenario::on(Server::pg15()).stage().await;
    let path = g.system.secret(&g.site, &g.pool, json!({})).await;
    let early = g.system.issue(&path, None).await.login().await.unwrap();
    let hand = g.site.admin().await;
    hand.batch_execute("CREATE TABLE app.later (id int)")
        .await
        .unwrap();
    mayfly_tests::eventually("the new table is covered", seconds(10), async || {
        let late = g.system.issue(&path, None).await.login().await.unwrap();
        (sqlstate(&late, "SELECT * FROM app.later").await == "00000").then_some(())
    })
    .await;
    assert_eq!(
        sqlstate(&early, "SELECT * FROM app.later").await,
        "00000",
        "an earlier lease is left behind"
    );
}

#[tokio::test]
async fn what_cannot_be_granted() {
    let g = Scenario::on(Server::pg18()).stage().await;
    let root = g.site.server.superuser(&g.site.name).await;
    root.batch_execute(
        "CREATE SCHEMA locked; CREATE TABLE locked.t (id int); CREATE SCHEMA twin; CREATE TABLE twin.orders (id int); CREATE SCHEMA empty",
    )
    .await
    .unwrap();
    for (what, on, status, code) in [
        ("SELECT", "nothing_of_this_name", 422, "no_such_object"),
        ("SELECT", "app.nothing", 422, "no_such_object"),
        ("SELECT", "nowhere.*", 422, "no_such_object"),
        ("USAGE", "schema:nowhere", 422, "no_such_object"),
        ("EXECUTE", "function:nothing", 422, "no_such_object"),
        ("ALL", "role:nobody_of_this_name", 422, "no_such_object"),
        ("SELECT", "orders", 422, "ambiguous_object"),
        ("SELECT", "locked.t", 422, "admin_lacks_rights"),
        ("SELECT", "locked.*", 422, "grant_refused"),
        ("SELECT", "empty.*", 422, "grant_refused"),
        ("INSERT", "public.items_id_seq", 422, "grant_refused"),
    ] {
        let (got, body) = refused(&g, what, on).await;
        assert_eq!(
            (got, body["error"].as_str().unwrap()),
            (status, code),
            "{what} on {on}: {body}"
        );
        assert!(!body["message"].as_str().unwrap().is_empty());
    }
    // A pattern passes over what the admin may not grant, and grants the rest.
    let client = g.login("SELECT", "*.*").await;
    assert_eq!(
        scalar(&client, "SELECT count(*) FROM public.items").await,
        "2"
    );
    assert_eq!(sqlstate(&client, "SELECT * FROM locked.t").await, "42501");
    // Failed reads leave neither accounts nor empty grant roles.
    mayfly_tests::eventually("no role of a failed lease", seconds(60), async || {
        let failed = g.system.api.ok("/v1/leases?state=failed&limit=500").await;
        (failed["length"].as_u64().unwrap() >= 11).then_some(())
    })
    .await;
}

/// Another database of the server than that of the base secret.
#[tokio::test]
async fn another_database() {
    let g = Scenario::on(Server::pg15()).stage().await;
    let other = format!("other_{}", mayfly_tests::word());
    let root = g.site.server.superuser("postgres").await;
    root.batch_execute(&format!("CREATE DATABASE {other} OWNER {}", g.site.name))
        .await
        .unwrap();
    let there = g
        .site
        .server
        .login(&g.site.name, &g.site.password, &other)
        .await
        .unwrap();
    there
        .batch_execute("CREATE TABLE only_here (id int)")
        .await
        .unwrap();
    let attributes =
        json!({"database": other, "grantPermissions": {"what": "SELECT", "where": "only_here"}});
    let path = g.system.secret(&g.site, &g.pool, attributes).await;
    let credential = g.system.issue(&path, Some(3)).await;
    assert_eq!(credential.database, other);
    let client = credential.login().await.unwrap();
    assert_eq!(scalar(&client, "SELECT count(*) FROM only_here").await, "0");
    g.system.gone(&g.site, &credential, seconds(10)).await;
}

/// Limits of the account.
#[tokio::test]
async fn extras() {
    let g = Scenario::on(Server::pg18()).stage().await;
    let prefix = "O'Re\"il;ly $${{é}} ";
    let attributes = json!({"connectionLimit": 1, "scramIterations": 1, "userPrefix": prefix});
    let path = g.system.secret(&g.site, &g.pool, attributes).await;
    let credential = g.system.issue(&path, None).await;
    assert!(credential.username.starts_with(prefix));
    let _first = credential.login().await.unwrap();
    let second = credential
        .login()
        .await
        .expect_err("a second session was allowed");
    assert_eq!(second.code().unwrap().code(), "53300");
    g.system
        .api
        .delete(&format!("/v1/leases/{}", credential.lease))
        .await;
    g.system.gone(&g.site, &credential, seconds(10)).await;
}
