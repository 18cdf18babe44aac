//! A database server that is rolled back to a snapshot has ended accounts again: settled leases whose accounts exist
//! are ended.

use mayfly_tests::postgres::Server;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::windows::SOON_FINAL;
use mayfly_tests::{eventually, seconds};
use serde_json::json;

/// Copies the server's files, which must not run.
fn copy(server: &Server, from: &str, to: &str) {
    let (from, to) = (server.directory().join(from), server.directory().join(to));
    let _ = std::fs::remove_dir_all(&to);
    let copied = std::process::Command::new("cp")
        .arg("-a")
        .args([from, to])
        .status()
        .unwrap();
    assert!(copied.success());
}

async fn what_comes_back_is_ended(server: Server) {
    let (system, site, path, _engine) = Scenario::on(server.clone())
        .settings(&SOON_FINAL)
        .start()
        .await;
    let (revoked, living) = (
        system.issue(&path, None).await,
        system.issue(&path, None).await,
    );
    server.kill();
    copy(&server, "data", "snapshot");
    server.start();
    eventually("the server is asked again", seconds(30), async || {
        let answer = system.api.get(&format!("/v1/secrets/{path}?ttl=1")).await;
        (answer.0 == 200).then_some(())
    })
    .await;
    let (status, _) = system
        .api
        .delete(&format!("/v1/leases/{}", revoked.lease))
        .await;
    assert!(status < 300);
    system.gone(&site, &revoked, seconds(20)).await;
    system
        .lease_becomes(&revoked.lease, "revoked", seconds(20))
        .await;

    server.kill();
    copy(&server, "snapshot", "data");
    let _ = std::fs::remove_file(server.directory().join("data/postmaster.pid"));
    server.start();
    assert!(revoked.login().await.is_ok(), "it is there again");
    eventually("the comparison ends it", seconds(60), async || {
        let (status, answer) = system.api.post("/v1/leases/reconcile", json!({})).await;
        assert_eq!(status, 200, "{answer}");
        let refused = revoked.is_refused().await;
        refused.then_some(())
    })
    .await;
    system.gone(&site, &revoked, seconds(20)).await;
    assert!(living.login().await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_rollback_brings_back_is_ended_on_15() {
    what_comes_back_is_ended(Server::own("")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_rollback_brings_back_is_ended_on_18() {
    what_comes_back_is_ended(Server::own_of(Some("18"), "")).await;
}
