//! An engine that connects while a dispatcher declares what they share.

use lapin::options::ExchangeDeclareOptions;
use lapin::types::FieldTable;
use lapin::{Connection, ConnectionProperties, ExchangeKind};
use mayfly_tests::system::System;
use mayfly_tests::users::Part;
use mayfly_tests::{eventually, seconds};
use serde_json::json;

/// The entry of the delay levels is declared before the exchange by which engines know a dispatcher of this
/// version. An engine that finds only the former connects again when the latter is there.
#[tokio::test]
async fn an_engine_that_came_in_between_connects_again() {
    let mut system = System::start().await;
    let pool = system.pool().await;
    system.kill_dispatcher();
    system.rabbit.wipe();
    let url = system.rabbit.url_for(&Part::Dispatcher);
    let connection = Connection::connect(&url, ConnectionProperties::default())
        .await
        .unwrap();
    let channel = connection.create_channel().await.unwrap();
    channel
        .exchange_declare(
            "mayfly.v1.delay.L24".into(),
            ExchangeKind::Topic,
            ExchangeDeclareOptions {
                durable: true,
                ..Default::default()
            },
            FieldTable::default(),
        )
        .await
        .unwrap();
    let engine = system.engine_unready(&pool);
    eventually("the engine waits for its queues", seconds(20), async || {
        system.logged().contains("waiting to consume").then_some(())
    })
    .await;
    system.start_dispatcher().await;
    engine.ready().await;
    let ping = format!("/v1/engines/{}/ping", engine.name);
    eventually("the engine answers a ping", seconds(20), async || {
        let (status, _) = system.api.post(&ping, json!({})).await;
        (status == 200).then_some(())
    })
    .await;
}
