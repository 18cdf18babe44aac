//! A COMMIT that waits for a synchronous standby: an account that is being made does not count as absent, and an end
//! does not wait.

use mayfly_tests::postgres::{Admin, Server, scalar};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::{eventually, seconds};
use serde_json::json;

async fn standbys(server: &Server, names: &str) {
    let root = server.superuser("postgres").await;
    // The COMMIT of these statements does not wait for a standby.
    root.batch_execute("SET synchronous_commit = local")
        .await
        .unwrap();
    for statement in [
        &format!("ALTER SYSTEM SET synchronous_standby_names = '{names}'"),
        "SELECT pg_reload_conf()",
    ] {
        root.batch_execute(statement).await.unwrap();
    }
    eventually("the server knows its standbys", seconds(20), async || {
        let root = server.superuser("postgres").await;
        let now = scalar(&root, "SHOW synchronous_standby_names").await;
        (now == names).then_some(())
    })
    .await;
}

async fn what_waits_to_commit_is_ended(server: Server, admin: Admin) {
    // The account's absence is final 24 s after this deadline.
    let environment = [("MAYFLY__CREATE__DEADLINE_SECONDS", "12")];
    let (system, site, path, _engine) = Scenario::on(server.clone())
        .admin(admin)
        .settings(&environment)
        .start()
        .await;
    let before = system.issue(&path, None).await;
    let renewed = system.issue(&path, None).await;

    standbys(&server, "nobody").await;
    let (status, answer) = system.api.get(&format!("/v1/secrets/{path}")).await;
    assert!(status == 502 || status == 504, "{status} {answer}");
    let root = server.superuser("postgres").await;
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND application_name LIKE 'mayfly lease %'";
    assert_eq!(scalar(&root, waiting).await, "1", "its COMMIT waits");

    // The end of another account does not wait.
    let (status, _) = system
        .api
        .delete(&format!("/v1/leases/{}", before.lease))
        .await;
    assert!(status < 300);
    system.gone(&site, &before, seconds(15)).await;

    // The end of an account whose renewal waits does not wait either.
    let renew = format!("/v1/leases/{}/renew", renewed.lease);
    let (status, answer) = system.api.post(&renew, json!({"increment": 400})).await;
    assert!(status >= 500, "{status} {answer}");
    let (status, _) = system
        .api
        .delete(&format!("/v1/leases/{}", renewed.lease))
        .await;
    assert!(status < 300);
    system.gone(&site, &renewed, seconds(30)).await;

    // Nothing is final while the account may still appear. It is made to appear, and ended.
    let list = format!("/v1/leases?path={path}&state=failed");
    eventually("the lease is final", seconds(120), async || {
        let leases = system.api.ok(&list).await;
        let settled = leases["length"] == 1;
        let status = system.api.ok("/v1/status").await;
        (settled && mayfly_tests::system::open_leases(&status) == 0).then_some(())
    })
    .await;
    assert_eq!(scalar(&root, waiting).await, "0");
    standbys(&server, "").await;
    let roles = site.accounts().await;
    assert!(roles.is_empty(), "{roles:?}");
    let works = system.issue(&path, None).await;
    assert!(works.login().await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_to_commit_is_ended_on_15() {
    what_waits_to_commit_is_ended(Server::own(""), Admin::CreateRole).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_to_commit_is_ended_on_18() {
    what_waits_to_commit_is_ended(Server::own_of(Some("18"), ""), Admin::CreateRole).await;
}
