//! The broker accepts no messages because its memory is used up. Callers get an error, the number of connections
//! stays limited, and work continues without help when the broker accepts messages again.

use std::time::Instant;

use mayfly_tests::postgres::{Credential, Server};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::{eventually, seconds};

/// Longer than a peer may be silent (twice the AMQP heartbeat).
const ALARM: std::time::Duration = seconds(25);

#[tokio::test]
async fn the_brokers_memory_is_used_up() {
    let (system, site, path, _engine) = Scenario::on(Server::pg15())
        .broker(Rabbit::own())
        .start()
        .await;
    let read = format!("/v1/secrets/{path}?ttl=60");
    let due = system.issue(&path, Some(10)).await;
    let kept = system.issue(&path, Some(120)).await;
    let connections = system.rabbit.connections();

    system.rabbit.memory_alarm(true);
    let begun = Instant::now();
    // The first publish is sent, and waits for its confirm.
    let mut patience = seconds(20);
    while begun.elapsed() < ALARM {
        let at = Instant::now();
        let (status, body) = system.api.get(&read).await;
        assert_eq!(
            (status, body["error"].as_str()),
            (503, Some("broker_unavailable")),
            "{body}"
        );
        assert!(at.elapsed() < patience, "{:?}", at.elapsed());
        patience = seconds(10);
        assert!(system.rabbit.connections() <= connections);
    }
    let (_, status) = system.api.get("/v1/status").await;
    assert_eq!(status["broker"], "down", "{status}");
    assert!(due.is_refused().await, "its date has passed");
    assert!(kept.login().await.is_ok(), "no broker is needed for that");

    system.rabbit.memory_alarm(false);
    let answer = eventually("an account is issued", seconds(15), async || {
        let (status, answer) = system.api.get(&read).await;
        (status == 200).then_some(answer)
    })
    .await;
    let after = Credential::from_answer(&answer);
    assert!(after.login().await.is_ok());
    system.gone(&site, &due, seconds(15)).await;
    system
        .lease_becomes(&due.lease, "revoked", seconds(30))
        .await;
    assert!(kept.login().await.is_ok(), "not before its time");
    assert!(system.rabbit.connections() <= connections);
    for credential in [&after, &kept] {
        let lease = format!("/v1/leases/{}", credential.lease);
        system.api.delete(&lease).await;
        system.gone(&site, credential, seconds(15)).await;
    }
    // Ends that were requested meanwhile happen, too.
    site.no_accounts(seconds(60)).await;
}
