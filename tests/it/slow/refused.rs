//! Publishes that the broker refuses (basic.nack): a full queue with `overflow: reject-publish`. Each is an error for
//! its caller, and each channel is used again.

use mayfly_tests::postgres::Server;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::{eventually, seconds};
use serde_json::json;

/// No queue accepts anything.
const FULL: &str = r#"{"max-length": 0, "overflow": "reject-publish"}"#;

/// A connection has 2,047 channels at most (RabbitMQ's `channel_max`). One that is lost with each
/// refused publish would end all reads and revocations of the process.
#[tokio::test(flavor = "multi_thread")]
async fn five_thousand_refused_publishes_cost_no_channel() {
    let (system, site, path, engine) = Scenario::on(Server::pg15()).start().await;
    let before = system.issue(&path, Some(300)).await;
    let channels = system.rabbit.channels();

    system
        .rabbit
        .policy("full", r"^mayfly\.v1\.(delay|engine)\.", FULL, 10);
    let ping = format!("/v1/engines/{}/ping", engine.name);
    eventually("the engine's queue is full", seconds(30), async || {
        let (status, _) = system.api.post(&ping, json!({})).await;
        (status == 503).then_some(())
    })
    .await;
    // Reads are refused by the delay levels, and undone. A quorum queue accepts one message although it is full.
    let read = format!("/v1/secrets/{path}?ttl=60");
    let mut refused = 0;
    eventually("reads are refused", seconds(60), async || {
        let (status, body) = system.api.get(&read).await;
        if status == 503 {
            assert_eq!(body["error"], "broker_unavailable", "{body}");
            refused += 1;
        }
        (refused == 20).then_some(())
    })
    .await;
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let (api, ping) = (system.api.clone(), ping.clone());
        callers.spawn(async move {
            for _ in 0..313 {
                let (status, body) = api.post(&ping, json!({})).await;
                let error = body["error"].as_str();
                assert_eq!((status, error), (503, Some("broker_unavailable")), "{body}");
            }
        });
    }
    callers.join_all().await;
    // Each publisher in use has a channel, and a busy machine has more publishers at a time.
    let after = system.rabbit.channels();
    assert!(
        after <= channels + 200,
        "{channels} channels became {after}"
    );

    system.rabbit.clear_policy("full");
    eventually(
        "the engine's queue takes messages",
        seconds(30),
        async || {
            let (status, _) = system.api.post(&ping, json!({})).await;
            (status == 200).then_some(())
        },
    )
    .await;
    let credential = system.issue(&path, Some(3)).await;
    system.gone(&site, &credential, seconds(20)).await;
    system
        .api
        .delete(&format!("/v1/leases/{}", before.lease))
        .await;
    system.gone(&site, &before, seconds(20)).await;
}
