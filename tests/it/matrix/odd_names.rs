//! Names that are not UTF-8, and databases of other encodings: an engine survives them, and the affected objects are
//! named.

use mayfly_tests::postgres::{Admin, Server, scalar};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::System;
use mayfly_tests::{eventually, seconds, word};
use serde_json::json;

/// A database in LATIN1: its `é` is one byte, which is not UTF-8.
async fn latin(server: &Server, name: &str, owner: &str) {
    let root = server.superuser("postgres").await;
    root.batch_execute(&format!(
        "CREATE DATABASE {name} OWNER {owner} ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
    ))
    .await
    .unwrap();
}

async fn a_name_is_not_utf8(server: Server, admin: Admin) {
    let (system, site, pool, engine) = Scenario::on(server.clone())
        .admin(admin)
        .start_without_secret()
        .await;
    latin(&server, "latin", "postgres").await;
    let root = server.superuser("postgres").await;
    root.batch_execute(&format!("CREATE DATABASE odd OWNER {}", site.name))
        .await
        .unwrap();
    let attributes = json!({"database": "odd",
        "grantPermissions": {"what": "CREATE", "where": "schema:public"}});
    let odd_path = system.secret(&site, &pool, attributes).await;
    let path = system.secret(&site, &pool, json!({})).await;
    let culprit = system.issue(&odd_path, None).await;
    let client = culprit.login().await.unwrap();
    client
        .batch_execute("CREATE TABLE public.owned ()")
        .await
        .unwrap();
    drop(client);
    let mut neighbours = Vec::new();
    for _ in 0..4 {
        neighbours.push(system.issue(&path, None).await);
    }
    // The catalog keeps `é` as one byte. Databases with another encoding read it differently.
    let in_latin = server.superuser("latin").await;
    eventually("nobody is in the database", seconds(20), async || {
        let rename = "ALTER DATABASE odd RENAME TO \"odd é\"";
        in_latin.batch_execute(rename).await.ok()
    })
    .await;
    let group = "SELECT g.rolname FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid \
        JOIN pg_roles r ON r.oid = m.member WHERE starts_with(g.rolname, 'mayfly_grant_') LIMIT 1";
    let group = scalar(&root, group).await;
    let comment = "SELECT shobj_description(oid, 'pg_authid') FROM pg_roles WHERE rolname = ";
    let comment = scalar(&root, &format!("{comment}'{}'", culprit.username)).await;
    for statement in [
        "CREATE ROLE \"odd é\"",
        &format!("COMMENT ON ROLE \"odd é\" IS '{comment}'"),
        "CREATE ROLE \"member é\"",
        &format!("GRANT {group} TO \"member é\""),
    ] {
        in_latin.batch_execute(statement).await.unwrap();
    }

    for path in [&odd_path, &path] {
        let (status, answer) = system.api.delete(&format!("/v1/leases?path={path}")).await;
        assert!(status < 300, "{status} {answer}");
    }
    for neighbour in &neighbours {
        system.gone(&site, neighbour, seconds(20)).await;
    }
    eventually(
        "the failure names what holds the account",
        seconds(30),
        async || {
            let lease = system.lease(&culprit.lease).await;
            let error = lease["lastError"].as_str().unwrap_or_default();
            error.contains("not UTF-8").then_some(())
        },
    )
    .await;
    assert!(culprit.is_refused().await);
    // All other requests that list names work.
    let (status, answer) = system.api.post("/v1/leases/reconcile", json!({})).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(
        answer["unreachable"].as_array().map(Vec::len),
        Some(0),
        "{answer}"
    );
    let tidy = format!("/v1/secrets/db:{}:root::tidy", site.name);
    let (status, answer) = system.api.post(&tidy, json!({})).await;
    assert_eq!(status, 200, "{answer}");
    assert!(answer.to_string().contains("not UTF-8"), "{answer}");
    let log = std::fs::read_to_string(system.log()).unwrap();
    assert!(!log.contains("panicked"), "an engine has panicked");
    let text = engine.admin_text("/metrics").await;
    assert!(text.contains("mayfly_engine_tasks_total"));

    in_latin
        .batch_execute("ALTER DATABASE \"odd é\" RENAME TO odd")
        .await
        .unwrap();
    system.gone(&site, &culprit, seconds(60)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_not_utf8_ends_nothing_on_15() {
    a_name_is_not_utf8(Server::own(""), Admin::Superuser).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_not_utf8_ends_nothing_on_18() {
    a_name_is_not_utf8(Server::own_of(Some("18"), ""), Admin::CreateRole).await;
}

/// A prefix outside of ASCII, if the admin's database or the one with the account's objects is in LATIN1: the
/// credential logs in, and its objects do not prevent its end.
async fn a_prefix_works_in_latin1(server: Server, admin: Admin) {
    let (system, site, pool, _engine) = Scenario::on(server.clone())
        .admin(admin)
        .start_without_secret()
        .await;
    let utf8 = site.name.clone();
    let home = format!("latin_{}", word());
    latin(&server, &home, &site.name).await;
    for (home, other) in [(&home, &utf8), (&utf8, &home)] {
        let mut data = site.data();
        data["database"] = json!(home);
        let base = format!("db:{}:{}", site.name, word());
        system
            .api
            .create(
                &format!("/v1/secrets/{base}"),
                json!({"attributes": {"type": "postgresql"}, "data": data}),
            )
            .await;
        let path = format!("db:{}:{}", site.name, word());
        let attributes = json!({
            "grantPermissions": {"what": "CREATE", "where": "schema:public"},
            "linkConfig": {"linkType": "dynamic", "linkedSecret": base},
            "pool": pool, "ttl": 300, "userPrefix": "é_größe_", "database": other,
        });
        system
            .api
            .create(
                &format!("/v1/secrets/{path}"),
                json!({"attributes": attributes, "data": {}}),
            )
            .await;
        let account = system.issue(&path, None).await;
        let client = account.login().await.unwrap();
        client
            .batch_execute("CREATE TABLE public.größe (é int)")
            .await
            .unwrap();
        let (status, _) = system
            .api
            .delete(&format!("/v1/leases/{}", account.lease))
            .await;
        assert!(status < 300);
        system.gone(&site, &account, seconds(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_outside_ascii_works_in_latin1_on_15() {
    a_prefix_works_in_latin1(Server::pg15(), Admin::CreateRole).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_outside_ascii_works_in_latin1_on_18() {
    a_prefix_works_in_latin1(Server::pg18(), Admin::CreateRole).await;
}

/// The owner of a database may have the server report a setting that is not UTF-8 to its clients.
#[tokio::test(flavor = "multi_thread")]
async fn a_reported_setting_that_is_not_utf8_keeps_nobody_out() {
    let system = System::start().await;
    let server = Server::own_of(Some("18"), "");
    let site = server.site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let _engine = system.engine(&pool).await;
    latin(&server, "latin", &site.name).await;
    let path = system.secret(&site, &pool, json!({})).await;
    let account = system.issue(&path, None).await;
    let owner = server.login(&site.name, &site.password, "latin").await;
    let plant = format!("ALTER DATABASE {} SET search_path = 'é'", site.name);
    owner.unwrap().batch_execute(&plant).await.unwrap();
    let other = system.issue(&path, None).await;
    for account in [&account, &other] {
        let (status, _) = system
            .api
            .delete(&format!("/v1/leases/{}", account.lease))
            .await;
        assert!(status < 300);
        eventually("the account is gone", seconds(20), async || {
            server
                .roles(&account.username)
                .await
                .is_empty()
                .then_some(())
        })
        .await;
    }
}
