//! Access to the broker as its operator has it: takes messages off a queue and puts them back, unchanged, changed or
//! twice.

use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, QueueBindOptions,
    QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, Consumer};

use crate::rabbit::Rabbit;
use crate::seconds;

/// A consumer of one queue that holds what it takes.
pub struct Tap {
    _connection: Connection,
    channel: Channel,
    consumer: Consumer,
    queue: String,
}

impl Tap {
    /// Begins to take messages off a queue.
    pub async fn on(url: &str, queue: &str) -> Self {
        let connection = Connection::connect(url, ConnectionProperties::default())
            .await
            .unwrap();
        let channel = connection.create_channel().await.unwrap();
        let consumer = channel
            .basic_consume(
                queue.into(),
                "".into(),
                BasicConsumeOptions::default(),
                FieldTable::default(),
            )
            .await
            .unwrap();
        Self {
            _connection: connection,
            channel,
            consumer,
            queue: queue.to_owned(),
        }
    }

    /// The next message.
    pub async fn take(&mut self) -> Delivery {
        self.consumer.next().await.unwrap().unwrap()
    }

    /// Puts a message into the queue as it came, changed by `bend`.
    pub async fn put(&self, delivery: &Delivery, bend: impl FnOnce(&mut Vec<u8>)) {
        let mut body = delivery.data.clone();
        bend(&mut body);
        self.publish(&body, delivery.properties.clone()).await;
    }

    /// Puts a message into the queue as one of another kind.
    pub async fn put_as(&self, delivery: &Delivery, kind: &str) {
        let properties = delivery.properties.clone().with_type(kind.into());
        self.publish(&delivery.data, properties).await;
    }

    async fn publish(&self, body: &[u8], properties: BasicProperties) {
        self.channel
            .basic_publish(
                "".into(),
                self.queue.as_str().into(),
                BasicPublishOptions::default(),
                body,
                properties,
            )
            .await
            .unwrap();
    }

    /// Acknowledges a message.
    pub async fn ack(&self, delivery: &Delivery) {
        delivery.ack(BasicAckOptions::default()).await.unwrap();
    }

    /// Stops consuming, so that it does not count as an engine any more.
    pub async fn leave(self) {
        let _ = self._connection.close(200, "bye".into()).await;
    }
}

/// Puts a message into a queue.
pub async fn put(url: &str, queue: &str, body: &[u8], properties: BasicProperties) {
    let connection = Connection::connect(url, ConnectionProperties::default())
        .await
        .unwrap();
    let channel = connection.create_channel().await.unwrap();
    channel
        .basic_publish(
            "".into(),
            queue.into(),
            BasicPublishOptions::default(),
            body,
            properties,
        )
        .await
        .unwrap()
        .await
        .unwrap();
    connection.close(200, "bye".into()).await.unwrap();
}

/// A message that was recorded.
#[derive(Debug, Clone)]
pub struct Recorded {
    pub properties: BasicProperties,
    pub body: Vec<u8>,
}

impl Recorded {
    /// What it is.
    pub fn kind(&self) -> &str {
        let kind = self.properties.kind().as_ref();
        kind.map_or("", ShortString::as_str)
    }

    /// Sends it as the answer to a request.
    pub async fn replay_to(&self, url: &str, request: &Delivery) {
        let asked = &request.properties;
        let correlation = asked.correlation_id().clone().unwrap();
        let properties = self.properties.clone().with_correlation_id(correlation);
        let reply_to = asked.reply_to().clone().unwrap();
        put(url, reply_to.as_str(), &self.body, properties).await;
    }
}

/// Records every message that is published in a virtual host, by the broker's own tracing (`rabbitmqctl trace_on`).
pub struct Recorder {
    tap: Tap,
    rabbit: Rabbit,
    recorded: Vec<Recorded>,
}

impl Recorder {
    /// Begins.
    pub async fn on(rabbit: &Rabbit) -> Self {
        let url = rabbit.url();
        let connection = Connection::connect(&url, ConnectionProperties::default())
            .await
            .unwrap();
        let channel = connection.create_channel().await.unwrap();
        let queue = "recorder";
        channel
            .queue_declare(
                queue.into(),
                QueueDeclareOptions::default(),
                FieldTable::default(),
            )
            .await
            .unwrap();
        channel
            .queue_bind(
                queue.into(),
                "amq.rabbitmq.trace".into(),
                "publish.#".into(),
                QueueBindOptions::default(),
                FieldTable::default(),
            )
            .await
            .unwrap();
        connection.close(200, "bye".into()).await.unwrap();
        let rabbit = rabbit.handle();
        rabbit.trace(true);
        Self {
            tap: Tap::on(&url, queue).await,
            rabbit,
            recorded: Vec::new(),
        }
    }

    /// Stops; returns the recorded messages, in order.
    pub async fn stop(mut self) -> Vec<Recorded> {
        let quiet = seconds(1);
        while let Ok(delivery) = tokio::time::timeout(quiet, self.tap.take()).await {
            self.tap.ack(&delivery).await;
            self.recorded.push(traced(&delivery));
        }
        self.rabbit.trace(false);
        self.tap.leave().await;
        self.recorded
    }
}

/// The message that a message of the broker's trace is about.
fn traced(delivery: &Delivery) -> Recorded {
    let headers = delivery.properties.headers().as_ref().unwrap();
    let Some(AMQPValue::FieldTable(table)) = headers.inner().get("properties") else {
        panic!("a trace without properties: {headers:?}");
    };
    let table = table.inner();
    let text = |name: &str| match table.get(name) {
        Some(AMQPValue::LongString(text)) => Some(ShortString::from(
            String::from_utf8_lossy(text.as_bytes()).into_owned(),
        )),
        _ => None,
    };
    let mut properties = BasicProperties::default().with_delivery_mode(2);
    if let Some(AMQPValue::FieldTable(headers)) = table.get("headers") {
        properties = properties.with_headers(headers.clone());
    }
    if let Some(kind) = text("type") {
        properties = properties.with_type(kind);
    }
    if let Some(content) = text("content_type") {
        properties = properties.with_content_type(content);
    }
    if let Some(id) = text("message_id") {
        properties = properties.with_message_id(id);
    }
    if let Some(reply_to) = text("reply_to") {
        properties = properties.with_reply_to(reply_to);
    }
    if let Some(correlation) = text("correlation_id") {
        properties = properties.with_correlation_id(correlation);
    }
    Recorded {
        properties,
        body: delivery.data.clone(),
    }
}
