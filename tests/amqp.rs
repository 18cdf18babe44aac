//! A hand in the broker: takes messages off a queue and puts them back as they are, twice if
//! wanted. What an operator of the broker could do.

use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicPublishOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, Consumer};

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

    /// Stops consuming, and so no longer passes for an engine.
    pub async fn leave(self) {
        let _ = self._connection.close(200, "bye".into()).await;
    }
}
