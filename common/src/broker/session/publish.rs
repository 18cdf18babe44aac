//! Publishing on a session, with confirms, and the queue of messages that cannot be read.

use std::sync::atomic::Ordering;
use std::time::Duration;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{BasicProperties, Channel, Confirmation};
use tokio::sync::mpsc;
use tracing::{debug, error};

use super::{CONFIRM_TIMEOUT, Session};
use crate::broker::publishers::Closing;
use crate::broker::wire::{Outgoing, again, outgoing, specimen};
use crate::broker::{Address, BrokerError, Incoming, Message};
use mayfly_protocol::names::PoolName;
use mayfly_protocol::topology;

/// Unreadable messages that wait to be kept. More are only counted.
pub(super) const SPECIMENS: usize = 64;
/// Pause between two kept copies: a flood of unreadable messages must not keep the broker busy.
const SPECIMEN_PAUSE: Duration = Duration::from_millis(10);
/// In a flood of unreadable messages only every thousandth is logged.
const LOGGED_OF_UNREADABLE: u64 = 1000;

impl Session {
    pub(super) async fn open_publisher(&self) -> Result<Channel, BrokerError> {
        let channel = self.connection.create_channel().await?;
        channel
            .confirm_select(ConfirmSelectOptions::default())
            .await?;
        Ok(channel)
    }

    /// Publishes a message of this process.
    pub(in crate::broker) async fn send(
        &self,
        message: Message,
        id: String,
    ) -> Result<(), BrokerError> {
        let sent = self
            .publish(outgoing(&message, id.clone(), &self.routes))
            .await;
        match (sent, &message.to) {
            (Err(BrokerError::NotAllowed(_)), Address::Delayed(..)) if self.has_older_rights() => {
                self.publish(outgoing(&message, id, &self.routes)).await
            }
            (sent, _) => sent,
        }
    }

    /// Whether an engine was refused at the entry exchange for the first time. Revocations then go through the exchange
    /// of earlier versions.
    fn has_older_rights(&self) -> bool {
        let refused = self.is_engine && self.routes.entry.swap(false, Ordering::Relaxed);
        if refused {
            error!(
                "this engine's user of the broker may not write to {}: ends are parked through {}, where an absent delay level is not detected; import deploy/rabbitmq/definitions.json again",
                topology::ENTRY,
                topology::PARK
            );
        }
        refused
    }

    /// Parks a message of a newer version.
    pub(in crate::broker) async fn park_again(
        &self,
        message: &Incoming,
        after: Duration,
        pool: &PoolName,
        id: String,
    ) -> Result<(), BrokerError> {
        let copy = || again(message, after, pool, id.clone(), &self.routes);
        // An answer is never parked.
        let sent = self.publish(copy().ok_or(BrokerError::Unroutable)?).await;
        match sent {
            Err(BrokerError::NotAllowed(_)) if self.has_older_rights() => {
                self.publish(copy().ok_or(BrokerError::Unroutable)?).await
            }
            sent => sent,
        }
    }

    /// Sends an answer, without a confirm: if it is lost, its reader asks again or gives up. The answers have a
    /// channel of their own. RabbitMQ routes them in order, each at once.
    pub(in crate::broker) async fn answer(
        &self,
        message: &Message,
        id: String,
    ) -> Result<(), BrokerError> {
        if self.is_blocked() {
            return Err(BrokerError::Down);
        }
        let message = outgoing(message, id, &self.routes);
        let sending = async {
            let channel = self.answers_channel().await?;
            let options = BasicPublishOptions::default();
            let (exchange, key) = (message.exchange.into(), message.key.into());
            let (body, properties) = (&message.body, message.properties);
            let publish = channel.basic_publish(exchange, key, options, body, properties);
            // lapin keeps a confirm that nobody awaits, also one that was not requested.
            publish.await?.await?;
            Ok(())
        };
        match tokio::time::timeout(CONFIRM_TIMEOUT, sending).await {
            Ok(sent) => sent,
            Err(_) => {
                self.give_up();
                Err(BrokerError::Unconfirmed("not sent in time".to_owned()))
            }
        }
    }

    /// The channel of answers, opened again if the broker has closed it.
    async fn answers_channel(&self) -> Result<Channel, BrokerError> {
        let mut answers = self.answers.lock().await;
        if let Some(channel) = &*answers {
            if channel.status().connected() {
                return Ok(channel.clone());
            }
            error!(
                "the broker has refused an answer; check that this user may write to {}",
                topology::ANSWERS
            );
        }
        let channel = self.connection.create_channel().await?;
        Ok(answers.insert(channel).clone())
    }

    pub(in crate::broker) async fn publish(&self, message: Outgoing) -> Result<(), BrokerError> {
        if self.is_blocked() {
            return Err(BrokerError::Down);
        }
        let mut turn = self.publishers.turn().await?;
        let open = async || {
            let opening = tokio::time::timeout(CONFIRM_TIMEOUT, self.open_publisher());
            opening.await.unwrap_or_else(|_| {
                self.give_up();
                Err(BrokerError::Down)
            })
        };
        let channel = turn.channel(open).await?;
        match tokio::time::timeout(CONFIRM_TIMEOUT, publish_on(channel, message)).await {
            // A refused publish leaves the channel usable.
            Ok(Ok(answer)) => {
                turn.give_back();
                answer
            }
            Ok(Err(error)) => Err(error),
            Err(_) => {
                self.give_up();
                Err(BrokerError::Unconfirmed(
                    "no publisher confirm in time".to_owned(),
                ))
            }
        }
    }

    /// Replaces a connection that does not answer. A blocked connection is not replaced: the broker would not read
    /// its close either.
    fn give_up(&self) {
        if !self.is_blocked() {
            self.broken.store(true, Ordering::Relaxed);
        }
    }

    /// Closes publisher channels that are not used again, until the session ends.
    pub(super) async fn close_unused(&self, mut unused: mpsc::UnboundedReceiver<Closing>) {
        while let Some(one) = unused.recv().await {
            if !one.done().await {
                self.give_up();
            }
        }
    }

    /// Counts a message that is not one of Mayfly's, and keeps a copy while there is room. It never waits, so such
    /// messages do not delay the valid ones behind them.
    pub(in crate::broker) fn keep_specimen(&self, properties: &BasicProperties, body: &[u8]) {
        let n = self.unreadable.fetch_add(1, Ordering::Relaxed);
        if n.is_multiple_of(LOGGED_OF_UNREADABLE) {
            error!(
                so_far = n + 1,
                "a message cannot be read; see the queue {}",
                topology::UNREADABLE
            );
        }
        // Dispatchers of earlier versions do not declare this queue.
        if !self.is_engine || self.routes.entrances {
            let _ = self
                .specimens
                .try_send(specimen(properties, body, format!("unreadable-{n}")));
        }
    }

    /// Publishes the copies that are kept, until the session ends.
    pub(super) async fn keep_specimens(&self, mut specimens: mpsc::Receiver<Outgoing>) {
        while let Some(one) = specimens.recv().await {
            // A lost copy does no harm: the message was counted.
            if let Err(error) = self.publish(one).await {
                debug!(%error, "an unreadable message was not kept");
            }
            tokio::time::sleep(SPECIMEN_PAUSE).await;
        }
    }
}

/// Publishes and returns the broker's answer. After an error the channel must not be used again.
async fn publish_on(
    channel: &Channel,
    message: Outgoing,
) -> Result<Result<(), BrokerError>, BrokerError> {
    let confirm = channel
        .basic_publish(
            message.exchange.into(),
            message.key.into(),
            BasicPublishOptions {
                mandatory: message.mandatory,
                immediate: false,
            },
            &message.body,
            message.properties,
        )
        .await?
        .await?;
    let unconfirmed = |why: &str| BrokerError::Unconfirmed(why.to_owned());
    match confirm {
        Confirmation::Ack(None) => Ok(Ok(())),
        Confirmation::Ack(Some(returned)) => {
            let returned_id = returned.delivery.properties.message_id().as_ref();
            match returned_id.is_some_and(|returned| returned.as_str() == message.id) {
                true => Ok(Err(BrokerError::Unroutable)),
                false => Err(unconfirmed(
                    "a message was returned that was not published here",
                )),
            }
        }
        // basic.nack: the message was not taken, and nothing is wrong with the channel.
        Confirmation::Nack(_) => Ok(Err(unconfirmed(
            "refused (its queue is full, or has no leader at present)",
        ))),
        Confirmation::NotRequested => Err(unconfirmed("no confirms")),
    }
}
