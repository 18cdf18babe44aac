//! Servers as providers run them, imitated: the admin may make roles, is no superuser, and is a member of the
//! provider's role; the server keeps some functions to itself.

use mayfly_tests::postgres::{Admin, Server, scalar, sqlstate};
use mayfly_tests::seconds;
use mayfly_tests::system::System;
use serde_json::json;

/// The master user of RDS, Cloud SQL or Azure by its documented attributes: CREATEROLE, CREATEDB, a
/// member of the provider's role, which has the predefined roles. Reading pg_authid is a superuser's
/// anyway; `pg_control_system` is taken from everybody, and the server has reserved connections.
async fn on(version: &str) {
    let system = System::start().await;
    let server = Server::of_version(version);
    let site = server.site(Admin::CreateRole).await;
    let root = server.superuser(&site.name).await;
    let admin = &site.name;
    root.batch_execute(&format!(
        "CREATE ROLE provider_superuser NOLOGIN; \
         GRANT pg_monitor, pg_signal_backend TO provider_superuser; \
         GRANT provider_superuser TO {admin}; ALTER ROLE {admin} CREATEDB NOREPLICATION NOBYPASSRLS; \
         CREATE ROLE provider_admin SUPERUSER LOGIN"
    ))
    .await
    .unwrap();
    for database in [admin.as_str(), "postgres"] {
        let root = server.superuser(database).await;
        root.batch_execute("REVOKE EXECUTE ON FUNCTION pg_control_system FROM PUBLIC, pg_monitor")
            .await
            .unwrap();
    }
    let as_admin = site.admin().await;
    assert_eq!(
        sqlstate(&as_admin, "SELECT rolpassword FROM pg_authid").await,
        "42501"
    );
    assert_eq!(
        sqlstate(&as_admin, "SELECT pg_control_system()").await,
        "42501"
    );

    let pool = system.pool().await;
    let _engine = system.engine(&pool).await;
    let grants = json!([{"what": "SELECT,INSERT", "where": "*.*"}, {"what": "CREATE,USAGE", "where": "schema:app"}]);
    let path = system
        .secret(
            &site,
            &pool,
            json!({"grantPermissions": grants, "maxTtl": 600}),
        )
        .await;
    let (status, answer) = system
        .api
        .post(&format!("/v1/secrets/{path}::check"), json!({}))
        .await;
    assert_eq!(status, 200, "{answer}");
    for check in [
        "connect",
        "create roles",
        "end sessions",
        "grant",
        "issue",
        "revoke",
    ] {
        let findings = answer["findings"].as_array().unwrap();
        for finding in findings.iter().filter(|one| one["check"] == check) {
            assert_eq!(finding["ok"], true, "{version}: {finding}");
        }
    }

    // The account works, is renewed, leaves a table behind, and is ended with its session open.
    let credential = system.issue(&path, Some(60)).await;
    let client = credential.login().await.unwrap();
    client
        .batch_execute(
            "INSERT INTO items (note) VALUES ('x'); CREATE TABLE app.left_behind (id int)",
        )
        .await
        .unwrap();
    let renew = format!("/v1/leases/{}/renew", credential.lease);
    let (status, answer) = system.api.post(&renew, json!({"increment": 120})).await;
    assert_eq!(status, 200, "{answer}");
    system
        .api
        .delete(&format!("/v1/leases/{}", credential.lease))
        .await;
    system.gone(&site, &credential, seconds(30)).await;
    assert!(client.batch_execute("SELECT 1").await.is_err());
    let owner = "SELECT tableowner FROM pg_tables WHERE tablename = 'left_behind'";
    assert!(
        scalar(&root, owner).await.starts_with("mayfly_quarantine_"),
        "{version}"
    );
    // The end of the TTL ends an account too.
    let short = system.issue(&path, Some(4)).await;
    system.gone(&site, &short, seconds(30)).await;
    assert!(site.accounts().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_admin_as_providers_have_it_on_14() {
    on("14").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_admin_as_providers_have_it_on_16() {
    on("16").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_admin_as_providers_have_it_on_18() {
    on("18").await;
}
