//! The disk of the store is full for some time: callers get errors, accounts end, and work continues without help
//! when there is room.

use std::time::Instant;

use mayfly_tests::disk::Disk;
use mayfly_tests::postgres::Server;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::{eventually, run_dir, seconds, word};
use serde_json::json;

#[tokio::test]
async fn the_disk_of_the_store_is_full() {
    let disk = Disk::new(8);
    let token = run_dir().join(format!("token-{}", word()));
    let (system, site, path, _engine) = Scenario::on(Server::pg15())
        .settings(&[
            ("MAYFLY__DATA_DIR", disk.path().to_str().unwrap()),
            ("MAYFLY__INIT__ROOT_TOKEN_FILE", token.to_str().unwrap()),
            ("MAYFLY__CREATE__DEADLINE_SECONDS", "3"),
        ])
        .attributes(json!({"maxTtl": 600}))
        .start()
        .await;
    let due = system.issue(&path, Some(6)).await;
    let kept = system.issue(&path, Some(240)).await;
    let id = system.dispatcher().id();

    disk.fill();
    let lease = format!("/v1/leases/{}", kept.lease);
    for n in 0..20 {
        let asked = Instant::now();
        let (status, body) = match n % 4 {
            // The renewal is done in the database, but not recorded. The account lives at least as long as the caller
            // knows.
            0 => {
                let renew = format!("{lease}/renew");
                system.api.post(&renew, json!({"increment": 300 + n})).await
            }
            1 => system.api.delete(&lease).await,
            _ => system.api.get(&format!("/v1/secrets/{path}")).await,
        };
        assert_eq!(
            (status, body["error"].as_str()),
            (503, Some("store_unavailable")),
            "{body}"
        );
        assert!(asked.elapsed() < seconds(10), "{:?}", asked.elapsed());
    }
    // The metrics show the failure, with its cause.
    eventually("it says that its disk is full", seconds(20), async || {
        let said = system.admin_text("/readyz").await;
        said.contains("the lease store fails: its disk is full")
            .then_some(())
    })
    .await;
    let metrics = system.admin_text("/metrics").await;
    assert!(
        metrics.contains("\nmayfly_dispatcher_store_up 0"),
        "{metrics}"
    );
    let failures = "\nmayfly_dispatcher_store_failures_total{cause=\"full\"} ";
    assert!(!metrics.contains(&format!("{failures}0")), "{metrics}");
    assert!(system.dispatcher().is_alive());
    // Existing leases are still shown.
    assert_eq!(system.lease(&kept.lease).await["state"], "active");
    system.gone(&site, &due, seconds(12)).await;
    assert!(kept.login().await.is_ok(), "its end was not recorded");
    let roles = site.accounts().await;
    assert_eq!(roles, [kept.username.as_str()], "a half-made account");

    disk.make_room();
    let again = eventually("a read works again", seconds(10), async || {
        let read = format!("/v1/secrets/{path}?ttl=2");
        let (status, answer) = system.api.get(&read).await;
        (status == 200).then(|| mayfly_tests::postgres::Credential::from_answer(&answer))
    })
    .await;
    assert!(again.login().await.is_ok());
    eventually("it is ready again by itself", seconds(30), async || {
        system.is_ready().await.then_some(())
    })
    .await;
    let metrics = system.admin_text("/metrics").await;
    assert!(
        metrics.contains("\nmayfly_dispatcher_store_up 1"),
        "{metrics}"
    );
    system
        .lease_becomes(&due.lease, "revoked", seconds(20))
        .await;
    let (status, answer) = system.api.delete(&lease).await;
    assert_eq!(status, 200, "{answer}");
    for credential in [&kept, &again] {
        system.gone(&site, credential, seconds(20)).await;
        system
            .lease_becomes(&credential.lease, "revoked", seconds(40))
            .await;
    }
    assert!(system.dispatcher().is_alive());
    assert_eq!(system.dispatcher().id(), id, "it was started again");
}
