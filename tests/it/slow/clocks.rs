//! The database's clock is minutes ahead or behind: it alone decides about ends, and the difference harms nobody.

use std::time::Instant;

use mayfly_tests::postgres::{Credential, Server};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::{eventually, seconds};
use serde_json::json;

async fn with_clock(clock: &str, skew: i64) {
    let (system, site, path, engine) = Scenario::on(Server::with_clock(clock))
        .attributes(json!({"share": true, "maxLeases": 3}))
        .start()
        .await;
    let read = async |ttl: u64, key: &str| {
        let path = format!("/v1/secrets/{path}?ttl={ttl}");
        let (status, body) = system.api.get_with(&path, ("idempotency-key", key)).await;
        assert_eq!(status, 200, "{body}");
        Credential::from_answer(&body)
    };
    let asked = Instant::now();
    let one = read(6, "one").await;
    // The end is a timestamp of the database's clock.
    let told = one
        .expiration
        .duration_since(jiff::Timestamp::now())
        .as_secs();
    assert!((told - 6 - skew).abs() < 3, "{told}");
    assert_eq!(read(6, "one").await.lease, one.lease, "the same read again");
    assert_eq!(
        read(6, "two").await.lease,
        one.lease,
        "shared while it lives"
    );
    let renewed = read(60, "three").await;
    let renew = format!("/v1/leases/{}/renew", renewed.lease);
    let (status, body) = system.api.post(&renew, json!({"increment": 90})).await;
    assert_eq!(status, 200, "{body}");
    let text = engine.admin_text("/metrics").await;
    let line = text
        .lines()
        .find(|line| line.starts_with("mayfly_clock_skew_seconds"))
        .unwrap();
    let measured: f64 = line.split_whitespace().last().unwrap().parse().unwrap();
    assert!((measured.abs() - skew.abs() as f64).abs() < 5.0, "{line}");
    while asked.elapsed() < seconds(5) {
        assert!(
            one.login().await.is_ok(),
            "refused after {:?}",
            asked.elapsed()
        );
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    }
    eventually("its role is gone", seconds(8), async || {
        site.server
            .roles(&one.username)
            .await
            .is_empty()
            .then_some(())
    })
    .await;
    assert!(renewed.login().await.is_ok());
    // Engines are not asked about live leases again and again.
    let copies = system.rabbit.messages("mayfly.v1.pool");
    assert_eq!(copies, 0);
    let lease = format!("/v1/leases/{}", renewed.lease);
    system.api.delete(&lease).await;
    system.gone(&site, &renewed, seconds(10)).await;
    assert_eq!(site.accounts().await, Vec::<String>::new());
    for credential in [&one, &renewed] {
        system
            .lease_becomes(&credential.lease, "revoked", seconds(70))
            .await;
    }
    let asked_often = std::fs::read_to_string(system.log())
        .unwrap()
        .matches("\"not due yet\"")
        .count();
    assert!(
        asked_often < 10,
        "a live lease was asked after {asked_often} times"
    );
}

#[tokio::test]
async fn the_databases_clock_is_ahead() {
    with_clock("+300s", 300).await;
}

#[tokio::test]
async fn the_databases_clock_is_behind() {
    with_clock("-300s", -300).await;
}
