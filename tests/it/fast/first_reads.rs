//! The first reads of a dispatcher that reports that it is ready, as a load balancer sends them.

use mayfly_tests::api::Api;
use mayfly_tests::postgres::Server;
use mayfly_tests::proxy::{Mode, Proxy};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::System;
use mayfly_tests::{eventually, seconds};
use serde_json::json;

/// Starts the dispatcher on a path to the broker in the mode `mode`.
async fn restart(system: &mut System, way: &Proxy, mode: Mode) {
    system.stop_dispatcher();
    way.set(mode);
    system.start_dispatcher_unready();
}

#[tokio::test]
async fn a_dispatcher_is_ready_once_it_has_tried_to_connect() {
    let (mut system, _site, path, engine) = Scenario::on(Server::pg15()).start().await;
    let read = format!("/v1/secrets/{path}?ttl=60");
    eventually("a read works", seconds(20), async || {
        (system.api.get(&read).await.0 == 200).then_some(())
    })
    .await;
    let url = system.log().with_file_name("amqp-url");
    let direct = std::fs::read_to_string(&url).unwrap();
    let (address, _) = direct.rsplit_once('/').unwrap();
    let port: u16 = address.rsplit_once(':').unwrap().1.parse().unwrap();
    let way = Proxy::to(port).await;
    let proxied = direct.replace(&format!(":{port}"), &format!(":{}", way.port));
    assert_ne!(proxied, direct);
    std::fs::write(&url, proxied).unwrap();

    // A slow broker: no read is sent to this dispatcher yet.
    restart(&mut system, &way, Mode::Hole).await;
    eventually("it says what it waits for", seconds(20), async || {
        let admin = Api::new(
            format!("http://127.0.0.1:{}", system.admin_port()),
            String::new(),
        );
        let page = admin.try_text("/readyz").await?;
        (page.trim() == "connecting to the broker").then_some(())
    })
    .await;
    way.set(Mode::Pass);
    system.ready().await;
    let (status, body) = system.api.get(&read).await;
    assert_eq!(status, 200, "the first read: {body}");

    // An absent broker does not keep the dispatcher from serving.
    restart(&mut system, &way, Mode::Cut).await;
    system.ready().await;
    let token = json!({"read": [path], "ttl": 60});
    let token = system.api.create("/v1/tokens", token).await;
    let reader = system.api.with_token(token["token"].as_str().unwrap());
    let (status, body) = reader.get(&read).await;
    assert_eq!(
        (status, body["error"].as_str()),
        (503, Some("broker_unavailable"))
    );
    let message = body["message"].as_str().unwrap();
    let (_, trace) = message.rsplit_once(' ').unwrap();
    let log = system.logged();
    let line = log
        .lines()
        .find(|line| line.contains("not issued") && line.contains(trace));
    assert!(line.is_some(), "the log says nothing under trace {trace}");
    way.set(Mode::Pass);
    drop(engine);
}
