//! Heartbeats, recorded and sent again by the broker's operator or by an engine of another pool.

use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{
    BasicConsumeOptions, BasicPublishOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::FieldTable;
use lapin::{Channel, Connection, ConnectionProperties, Consumer};
use mayfly_tests::eventually;
use mayfly_tests::seconds;
use mayfly_tests::system::System;

const ENGINES: &str = "mayfly.v1.engines";

/// Receives what dispatchers receive.
struct Recorder {
    _connection: Connection,
    channel: Channel,
    consumer: Consumer,
}

impl Recorder {
    async fn on(url: &str) -> Self {
        let connection = Connection::connect(url, ConnectionProperties::default())
            .await
            .unwrap();
        let channel = connection.create_channel().await.unwrap();
        let exclusive = QueueDeclareOptions {
            exclusive: true,
            ..Default::default()
        };
        channel
            .queue_declare("recorder".into(), exclusive, FieldTable::default())
            .await
            .unwrap();
        channel
            .queue_bind(
                "recorder".into(),
                ENGINES.into(),
                "".into(),
                QueueBindOptions::default(),
                FieldTable::default(),
            )
            .await
            .unwrap();
        let options = BasicConsumeOptions {
            no_ack: true,
            ..Default::default()
        };
        let consumer = channel
            .basic_consume("recorder".into(), "".into(), options, FieldTable::default())
            .await
            .unwrap();
        Self {
            _connection: connection,
            channel,
            consumer,
        }
    }

    async fn record(&mut self, count: usize) -> Vec<Delivery> {
        let mut recorded = Vec::new();
        while recorded.len() < count {
            recorded.push(self.consumer.next().await.unwrap().unwrap());
        }
        recorded
    }

    async fn play(&self, recorded: &[Delivery]) {
        for delivery in recorded {
            self.channel
                .basic_publish(
                    ENGINES.into(),
                    "".into(),
                    BasicPublishOptions::default(),
                    &delivery.data,
                    delivery.properties.clone(),
                )
                .await
                .unwrap();
        }
    }
}

async fn engines(system: &System, pool: &str) -> (u64, String) {
    let listed = system.api.ok("/v1/engines").await["length"].as_u64();
    let metrics = system.admin_text("/metrics").await;
    let line = format!(r#"mayfly_dispatcher_engines{{pool="{pool}"}} "#);
    let shown = metrics.lines().find_map(|one| one.strip_prefix(&line));
    (listed.unwrap(), shown.unwrap().to_owned())
}

/// After its end an engine is not listed, and the alert's number is 0, even if its heartbeats are sent again.
#[tokio::test]
async fn recorded_heartbeats_make_no_dead_engine_live() {
    let system = System::start().await;
    let pool = system.pool().await;
    let mut recorder = Recorder::on(&system.rabbit.url()).await;
    let engine = system.engine(&pool).await;
    let recorded = recorder.record(3).await;
    eventually("it is listed", seconds(10), async || {
        (engines(&system, &pool).await == (1, "1".to_owned())).then_some(())
    })
    .await;
    engine.process.kill();
    let dead = async || (engines(&system, &pool).await == (0, "0".to_owned())).then_some(());
    eventually("its end is noticed", seconds(20), dead).await;
    for _ in 0..12 {
        recorder.play(&recorded).await;
        tokio::time::sleep(std::time::Duration::from_millis(250)).await;
        assert_eq!(engines(&system, &pool).await, (0, "0".to_owned()));
    }
    let refused = r#"mayfly_dispatcher_messages_refused_total{reason="replayed"} "#;
    let metrics = system.admin_text("/metrics").await;
    let refused = metrics.lines().find_map(|one| one.strip_prefix(refused));
    assert!(refused.unwrap().parse::<u64>().unwrap() >= 36, "{metrics}");

    // A second engine leaves in the usual way. Its recorded heartbeats do not count afterwards.
    let engine = system.engine(&pool).await;
    let of_old = 36;
    let recorded = recorder.record(of_old + 2).await.split_off(of_old);
    assert_eq!(engines(&system, &pool).await.0, 1);
    engine.process.stop();
    eventually("it has left", seconds(10), dead).await;
    recorder.play(&recorded).await;
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    assert_eq!(engines(&system, &pool).await.0, 0);
}

/// Engines of one name in two pools: both are seen, and both can be asked.
#[tokio::test]
async fn no_pool_hides_another_pools_engine() {
    let system = System::start().await;
    let (one, two) = (system.pool().await, system.pool().await);
    let name = [("MAYFLY__ENGINE__NAME", "same")];
    let (first, second) = (
        system.engine_with(&one, &name),
        system.engine_with(&two, &name),
    );
    first.ready().await;
    second.ready().await;
    eventually("both are listed", seconds(10), async || {
        (system.api.ok("/v1/engines").await["length"] == 2).then_some(())
    })
    .await;
    for path in ["/v1/engines?limit=1", "/v1/engines/same"] {
        let (status, body) = system.api.get(path).await;
        match path.ends_with("same") {
            true => assert_eq!(
                (status, body["error"].as_str()),
                (400, Some("invalid")),
                "{body}"
            ),
            false => {
                let cursor = body["cursor"].as_str().unwrap();
                let next = system.api.ok(&format!("{path}&cursor={cursor}")).await;
                assert_ne!(
                    body["engines"][0]["poolName"],
                    next["engines"][0]["poolName"]
                );
            }
        }
    }
    for pool in [&one, &two] {
        let read = system
            .api
            .ok(&format!("/v1/engines/same?pool={pool}"))
            .await;
        assert_eq!(read["poolName"], pool.as_str());
        let ping = format!("/v1/engines/same/ping?pool={pool}");
        let (status, body) = system.api.post(&ping, serde_json::json!({})).await;
        assert_eq!(
            (status, body["poolName"].as_str()),
            (200, Some(pool.as_str())),
            "{body}"
        );
    }
    second.process.kill();
    eventually("one is left", seconds(20), async || {
        let (status, body) = system.api.get("/v1/engines/same").await;
        (status == 200 && body["poolName"] == one.as_str()).then_some(())
    })
    .await;
}
