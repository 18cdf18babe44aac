//! The earlier password is kept after a rotation until a lease was made with the new password. So a server that has
//! lost the change, after a failover or a restore, can still be used.

use mayfly_tests::postgres::Server;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::{eventually, seconds};
use serde_json::json;

use super::rotate::{rotating, still_works};

async fn the_change_is_lost(server: Server) {
    let (system, site, path, _engine) = Scenario::on(server.clone()).start().await;
    let live = system.issue(&path, None).await;
    let root = server.superuser("postgres").await;
    let verifier = || async {
        let stored = format!(
            "SELECT rolpassword FROM pg_authid WHERE rolname = '{}'",
            site.name
        );
        mayfly_tests::postgres::scalar(&root, &stored).await
    };
    let before = verifier().await;
    let (status, answer) = rotating(&system, &site).await.unwrap();
    assert_eq!(status, 200, "{answer}");
    let after = verifier().await;
    let put_back = async |verifier: &str| {
        let text = format!(
            "ALTER ROLE {0} PASSWORD '{verifier}'; \
             SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{0}'",
            site.name
        );
        root.batch_execute(&text).await.unwrap();
    };
    // The server has the earlier password again, as after a failover to a standby that did not have the change yet.
    put_back(&before).await;
    eventually(
        "the earlier password is used again",
        seconds(60),
        async || {
            let (status, answer) = system.api.get(&format!("/v1/secrets/{path}")).await;
            assert!(
                status == 200 || answer["error"] == "database_refused_login",
                "{answer}"
            );
            (status == 200).then_some(())
        },
    )
    .await;
    still_works(&system, &site, &path).await;
    system
        .api
        .delete(&format!("/v1/leases/{}", live.lease))
        .await;
    system.gone(&site, &live, seconds(40)).await;
    let described = system
        .api
        .ok(&format!("/v1/secrets/db:{}:root::description", site.name))
        .await;
    assert_eq!(described["version"], "3");

    // A lease was made with the new password, so the other password is forgotten.
    put_back(&after).await;
    let log = std::fs::read_to_string(system.log()).unwrap().len();
    let read = async || system.api.get(&format!("/v1/secrets/{path}")).await;
    for _ in 0..3 {
        let (status, answer) = read().await;
        assert_eq!(
            (status, &answer["error"]),
            (502, &json!("database_refused_login")),
            "{answer}"
        );
        tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    }
    let said = std::fs::read_to_string(system.log()).unwrap();
    assert!(!said[log..].contains("is used again"));
    put_back(&before).await;
    still_works(&system, &site, &path).await;
}

#[tokio::test]
async fn a_change_is_lost_on_15() {
    the_change_is_lost(Server::pg15()).await;
}

#[tokio::test]
async fn a_change_is_lost_on_18() {
    the_change_is_lost(Server::pg18()).await;
}
