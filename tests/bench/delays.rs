//! RabbitMQ alone: messages that leave the delay levels together, without a program of Mayfly.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    ConfirmSelectOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Connection, ConnectionProperties};
use mayfly_protocol::topology::delay_route_to;
use mayfly_tests::rabbit::Rabbit;

/// Size of an `expire` message, in bytes.
const BYTES: usize = 1_300;
const PUBLISHERS: usize = 16;
/// Number of unsettled messages, as for an engine.
const PREFETCH: u16 = 800;
const QUEUE: &str = "bench";
const PERSISTENT: u8 = 2;

/// Parks messages that are due in the second that begins after `lead`. Returns for each how long after that second
/// it was delivered, in the order of delivery.
pub async fn late(rabbit: &Rabbit, number: usize, lead: Duration) -> Vec<Duration> {
    let url = rabbit.url();
    let connection = Connection::connect(&url, ConnectionProperties::default());
    let connection = connection.await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let durable = QueueDeclareOptions {
        durable: true,
        ..QueueDeclareOptions::default()
    };
    let mut quorum = FieldTable::default();
    quorum.insert(
        "x-queue-type".into(),
        AMQPValue::LongString("quorum".into()),
    );
    channel
        .queue_declare(QUEUE.into(), durable, quorum)
        .await
        .unwrap();
    channel
        .queue_bind(
            QUEUE.into(),
            "mayfly.v1.deliver".into(),
            format!("#.{QUEUE}").as_str().into(),
            QueueBindOptions::default(),
            FieldTable::default(),
        )
        .await
        .unwrap();
    let due = Instant::now() + lead;
    let mut publishers = tokio::task::JoinSet::new();
    for first in 0..PUBLISHERS {
        let channel = connection.create_channel().await.unwrap();
        publishers.spawn(async move {
            let confirms = ConfirmSelectOptions::default();
            channel.confirm_select(confirms).await.unwrap();
            for n in (first..number).step_by(PUBLISHERS) {
                let within = Duration::from_secs_f64(n as f64 / number as f64);
                let left = (due + within).saturating_duration_since(Instant::now());
                let (exchange, key) = delay_route_to(left, QUEUE);
                let properties = BasicProperties::default().with_delivery_mode(PERSISTENT);
                channel
                    .basic_publish(
                        exchange.as_str().into(),
                        key.as_str().into(),
                        BasicPublishOptions::default(),
                        &[0; BYTES],
                        properties,
                    )
                    .await
                    .unwrap()
                    .await
                    .unwrap();
            }
        });
    }
    publishers.join_all().await;
    assert!(
        Instant::now() < due,
        "to park {number} messages took longer than {lead:?}"
    );
    let late = deliveries(&channel, number, due + Duration::from_secs(1)).await;
    let options = QueueDeleteOptions::default();
    channel.queue_delete(QUEUE.into(), options).await.unwrap();
    late
}

async fn deliveries(channel: &lapin::Channel, number: usize, over: Instant) -> Vec<Duration> {
    channel
        .basic_qos(PREFETCH, BasicQosOptions::default())
        .await
        .unwrap();
    let consumer = channel.basic_consume(
        QUEUE.into(),
        "".into(),
        BasicConsumeOptions::default(),
        FieldTable::default(),
    );
    let mut deliveries = consumer.await.unwrap();
    let mut late = Vec::with_capacity(number);
    while late.len() < number {
        let delivery = deliveries.next().await.unwrap().unwrap();
        late.push(over.elapsed());
        delivery.ack(BasicAckOptions::default()).await.unwrap();
    }
    late
}
