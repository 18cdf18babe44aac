//! Ends of accounts that somebody else has set: none lets an account live for ever unseen, and none harms the
//! dispatcher.

use mayfly_tests::postgres::{Admin, Credential, Server, Site};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::{Engine, System};
use mayfly_tests::{eventually, seconds};
use serde_json::json;

async fn with_date(server: Server, admin: Admin, date: &str) -> (System, Site, Engine, Credential) {
    let (system, site, path, engine) = Scenario::on(server.clone()).admin(admin).start().await;
    let credential = system.issue(&path, Some(4)).await;
    let root = site.server.superuser("postgres").await;
    root.batch_execute(&format!(
        "ALTER ROLE \"{}\" VALID UNTIL '{date}'",
        credential.username
    ))
    .await
    .unwrap();
    (system, site, engine, credential)
}

/// `infinity` is no end. The lease still has one.
async fn infinity(server: Server, admin: Admin) {
    let (system, site, _engine, credential) = with_date(server, admin, "infinity").await;
    system.gone(&site, &credential, seconds(15)).await;
    system
        .lease_becomes(&credential.lease, "revoked", seconds(30))
        .await;
}

#[tokio::test]
async fn infinity_on_15_as_superuser() {
    infinity(Server::pg15(), Admin::Superuser).await;
}

#[tokio::test]
async fn infinity_on_15_as_createrole() {
    infinity(Server::pg15(), Admin::CreateRole).await;
}

#[tokio::test]
async fn infinity_on_18_as_superuser() {
    infinity(Server::pg18(), Admin::Superuser).await;
}

#[tokio::test]
async fn infinity_on_18_as_createrole() {
    infinity(Server::pg18(), Admin::CreateRole).await;
}

/// An end in the far future is shown as the year 9000 at most. The account lives until the database's date, or until
/// somebody requests its end.
async fn the_end_of_time(server: Server) {
    let (mut system, site, _engine, credential) =
        with_date(server, Admin::CreateRole, "9999-12-31").await;
    for _ in 0..2 {
        eventually("the date is known", seconds(20), async || {
            let lease = system.lease(&credential.lease).await;
            let told = lease["expiration"].as_str().unwrap();
            (lease["state"] == "active" && told.starts_with("9000-")).then_some(())
        })
        .await;
        assert!(credential.login().await.is_ok());
        // The dispatcher reads the recorded value again at its start.
        system.kill_dispatcher();
        system.start_dispatcher().await;
        system.broker_up().await;
    }
    let one = format!("/v1/leases/{}", credential.lease);
    // The end does not move back, and no caller sees the lease as ended.
    let increment = json!({"increment": 60});
    let (status, body) = system.api.post(&format!("{one}/renew"), increment).await;
    assert_eq!(status, 200, "{body}");
    let (status, body) = system.api.delete(&one).await;
    assert_eq!(status, 200, "{body}");
    system.gone(&site, &credential, seconds(15)).await;
    system
        .lease_becomes(&credential.lease, "revoked", seconds(60))
        .await;
}

#[tokio::test]
async fn the_end_of_time_on_15() {
    the_end_of_time(Server::pg15()).await;
}

#[tokio::test]
async fn the_end_of_time_on_18() {
    the_end_of_time(Server::pg18()).await;
}
