//! Grants on columns, types, foreign servers, large objects and parameters.

use mayfly_tests::postgres::{Admin, Server, scalar, sqlstate};
use mayfly_tests::scenario::{Scenario, Stage};
use mayfly_tests::word;
use serde_json::{Value, json};

async fn refused(stage: &Stage, what: &str, on: &str) -> Value {
    let path = stage.granting(what, on).await;
    let (status, answer) = stage.read(&path).await;
    assert_eq!(status, 422, "{what} on {on}: {answer}");
    answer
}

/// The finding of a check about this grant.
async fn finding(stage: &Stage, path: &str, text: &str) -> Value {
    let findings = stage.findings(path).await;
    let found = findings.iter().find(|found| {
        found["check"] == "grant" && found["message"].as_str().unwrap().starts_with(text)
    });
    found
        .unwrap_or_else(|| panic!("{text}: {findings:?}"))
        .clone()
}

async fn columns(server: Server) {
    let g = Scenario::on(server).stage().await;
    let hand = g.site.admin().await;
    hand.batch_execute("CREATE TABLE app.people (id serial, name text, \"Pay, ment\" int); INSERT INTO app.people (name) VALUES ('a')")
        .await
        .unwrap();
    let client = g
        .login(
            "SELECT (id, name), UPDATE (\"Pay, ment\"), DELETE",
            "app.people",
        )
        .await;
    for (statement, state) in [
        ("SELECT id, name FROM app.people", "00000"),
        ("SELECT * FROM app.people", "42501"),
        ("SELECT \"Pay, ment\" FROM app.people", "42501"),
        (
            "UPDATE app.people SET \"Pay, ment\" = 1 WHERE id = 1",
            "00000",
        ),
        ("UPDATE app.people SET name = 'b'", "42501"),
        ("DELETE FROM app.people WHERE id = 1", "00000"),
    ] {
        assert_eq!(sqlstate(&client, statement).await, state, "{statement}");
    }
    let client = g.login("INSERT (name)", "people").await;
    let insert = "INSERT INTO app.people (name) VALUES ('c')";
    assert_eq!(
        sqlstate(&client, insert).await,
        "00000",
        "its number can be taken"
    );
    let insert = "INSERT INTO app.people (name, \"Pay, ment\") VALUES ('c', 1)";
    assert_eq!(sqlstate(&client, insert).await, "42501");

    let answer = refused(&g, "SELECT (nothing)", "app.people").await;
    assert_eq!(answer["error"], "no_such_object", "{answer}");
    let answer = refused(&g, "SELECT (id)", "public.items_id_seq").await;
    assert_eq!(answer["error"], "grant_refused", "{answer}");

    // What the admin lacks is reported as a statement that gives it.
    let root = g.site.server.superuser(&g.site.name).await;
    root.batch_execute(&format!(
        "CREATE TABLE app.others (id int, name text); GRANT SELECT (name) ON app.others TO {} WITH GRANT OPTION",
        g.site.name
    ))
    .await
    .unwrap();
    let path = g.granting("SELECT (id, name)", "app.others").await;
    let found = finding(&g, &path, "SELECT (id, name) on app.others").await;
    assert_eq!(found["ok"], false, "{found}");
    assert_eq!(found["fix"].as_array().unwrap().len(), 1, "{found}");
    root.batch_execute(found["fix"][0].as_str().unwrap())
        .await
        .unwrap();
    let client = g.system.issue(&path, None).await.login().await.unwrap();
    assert_eq!(
        sqlstate(&client, "SELECT id, name FROM app.others").await,
        "00000"
    );
}

#[tokio::test]
async fn columns_on_15() {
    columns(Server::pg15()).await;
}

#[tokio::test]
async fn columns_on_18() {
    columns(Server::pg18()).await;
}

async fn other_kinds(server: Server) {
    let g = Scenario::on(server).admin(Admin::Superuser).stage().await;
    let hand = g.site.admin().await;
    let far = format!("far_{}", word());
    hand.batch_execute(&format!(
        "CREATE TYPE app.mood AS ENUM ('well'); CREATE DOMAIN app.small AS int; CREATE TYPE app.pair AS (a int, b int); \
         REVOKE USAGE ON TYPE app.mood, app.small, app.pair FROM PUBLIC; \
         CREATE FOREIGN DATA WRAPPER {far}; CREATE SERVER {far} FOREIGN DATA WRAPPER {far}"
    ))
    .await
    .unwrap();
    let may = |what: &str| {
        format!("SELECT has_type_privilege(oid, 'USAGE') FROM pg_type WHERE typname = '{what}'")
    };
    let client = g.login("USAGE", "type:app.mood").await;
    assert_eq!(scalar(&client, &may("mood")).await, "t");
    assert_eq!(scalar(&client, &may("small")).await, "f");
    let client = g.login("USAGE", "type:app.*").await;
    for kind in ["mood", "small", "pair"] {
        assert_eq!(scalar(&client, &may(kind)).await, "t", "{kind}");
    }
    let client = g.login("USAGE", &format!("server:{far}")).await;
    let mapping = format!("CREATE USER MAPPING FOR CURRENT_USER SERVER {far}");
    assert_eq!(sqlstate(&client, &mapping).await, "00000");
    let wrapper = format!("SELECT has_foreign_data_wrapper_privilege('{far}', 'USAGE')");
    assert_eq!(scalar(&client, &wrapper).await, "f");
    let client = g.login("USAGE", &format!("fdw:{far}")).await;
    assert_eq!(scalar(&client, &wrapper).await, "t");

    let (one, two) = (
        scalar(&hand, "SELECT lo_from_bytea(0, 'one')").await,
        scalar(&hand, "SELECT lo_from_bytea(0, 'two')").await,
    );
    let client = g.login("SELECT", &format!("largeobject:{one}")).await;
    let read = |oid: &str| format!("SELECT lo_get({oid})");
    let write = |oid: &str| format!("SELECT lo_put({oid}, 0, 'x')");
    assert_eq!(sqlstate(&client, &read(&one)).await, "00000");
    assert_eq!(sqlstate(&client, &read(&two)).await, "42501");
    assert_eq!(sqlstate(&client, &write(&one)).await, "42501");
    let client = g.login("SELECT, UPDATE", "largeobject:*").await;
    for oid in [&one, &two] {
        assert_eq!(sqlstate(&client, &read(oid)).await, "00000");
        assert_eq!(sqlstate(&client, &write(oid)).await, "00000");
    }
    for (what, on) in [
        ("USAGE", "type:app.nothing"),
        ("USAGE", "server:nothing"),
        ("USAGE", "fdw:nothing"),
        ("SELECT", "largeobject:1"),
    ] {
        let answer = refused(&g, what, on).await;
        assert_eq!(answer["error"], "no_such_object", "{answer}");
    }

    let version: u32 = scalar(&hand, "SHOW server_version_num")
        .await
        .parse()
        .unwrap();
    if version < 150_000 {
        for what in ["SET", "ALL"] {
            let answer = refused(&g, what, "parameter:log_min_messages").await;
            assert_eq!(answer["error"], "grant_refused", "{answer}");
            let message = answer["message"].as_str().unwrap();
            assert!(message.contains("PostgreSQL 14"), "{message}");
        }
    } else {
        let client = g.login("SET", "parameter:log_min_messages").await;
        assert_eq!(
            sqlstate(&client, "SET log_min_messages = 'error'").await,
            "00000"
        );
        assert_eq!(
            sqlstate(&client, "SET log_statement = 'none'").await,
            "42501"
        );
        let alter = "ALTER SYSTEM SET log_min_messages = 'warning'";
        assert_eq!(sqlstate(&client, alter).await, "42501");
        let client = g.login("SET", "parameter:app.tenant").await;
        let has = "SELECT has_parameter_privilege('app.tenant', 'SET')";
        assert_eq!(scalar(&client, has).await, "t");
    }
    // The privileges of these roles do not prevent their removal.
    let tidy = format!("/v1/secrets/db:{}:root::tidy", g.site.name);
    for lease in g.system.api.ok("/v1/leases?state=active").await["leases"]
        .as_array()
        .unwrap()
    {
        let lease = format!("/v1/leases/{}", lease["id"].as_str().unwrap());
        assert_eq!(g.system.api.delete(&lease).await.0, 200);
    }
    mayfly_tests::eventually("the grant roles go", mayfly_tests::seconds(90), async || {
        let (_, answer) = g.system.api.post(&tidy, json!({})).await;
        let roles = "SELECT count(*) FROM pg_roles r JOIN pg_shdescription d ON d.objoid = r.oid \
            JOIN pg_shdepend s ON s.refobjid = r.oid WHERE r.rolname LIKE 'mayfly\\_grant\\_%' \
            AND s.dbid = (SELECT oid FROM pg_database WHERE datname = current_database())";
        (answer["kept"].as_array().is_some_and(Vec::is_empty) && scalar(&hand, roles).await == "0")
            .then_some(())
    })
    .await;
}

#[tokio::test]
async fn other_kinds_on_14() {
    other_kinds(Server::of_version("14")).await;
}

#[tokio::test]
async fn other_kinds_on_15() {
    other_kinds(Server::pg15()).await;
}

#[tokio::test]
async fn other_kinds_on_18() {
    other_kinds(Server::pg18()).await;
}
