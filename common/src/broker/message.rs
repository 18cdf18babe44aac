//! Messages in the form that the rest of the program uses: their addresses, incoming ones, and their settlement.

use std::time::Duration;

use lapin::Channel;
use lapin::options::{BasicAckOptions, ConfirmSelectOptions};
use tracing::debug;

use crate::arrival::Arrival;
use crate::trace::Span;
use mayfly_protocol::names::{EngineName, PoolName};
use mayfly_protocol::task::Head;
use mayfly_protocol::topology;

/// If the work on a message panics, the message is requeued after this pause.
const GIVEN_BACK_AFTER: Duration = Duration::from_secs(1);
/// The broker may take this long to process an ack.
const ACK_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a message goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// Straight to a queue. Only a dispatcher may.
    Queue(String),
    /// To the queue that a request names for its answer.
    Answer(String),
    /// To the dispatchers' queue of outcomes.
    Outcomes,
    /// To a pool's revoke queue after a delay.
    Delayed(Duration, PoolName),
    /// Through the delay levels to the probes of the same connection.
    Probe(Duration),
    /// To every dispatcher: heartbeats.
    Engines,
}

/// A message to publish.
#[derive(Debug, Clone)]
pub struct Message {
    /// Where the message goes.
    pub to: Address,
    /// The part that is not sealed.
    pub head: Head,
    /// The part that is sealed to its reader.
    pub body: Vec<u8>,
    /// Whether an answer is expected, under this name.
    pub reply_as: Option<String>,
    /// Name of the request this answers.
    pub answers: Option<String>,
    /// The broker drops the message after this time in a queue.
    pub expires: Option<Duration>,
}

/// A message that was delivered. If it is dropped without an ack, the broker delivers it again, to any consumer.
#[derive(Debug)]
pub struct Incoming {
    /// The part that is not sealed.
    pub head: Head,
    /// The part that is sealed to its reader.
    pub body: Vec<u8>,
    /// The queue for the answer.
    pub reply_to: Option<String>,
    /// Name of the request, or of the request this answers.
    pub correlation: Option<String>,
    /// When it arrived here.
    pub arrived: Arrival,
    /// The span of the work on it, until it is settled.
    pub span: Option<Span>,
    pub(super) settle: Option<Settle>,
}

#[derive(Debug)]
pub(super) struct Settle {
    pub(super) delivery: lapin::message::Delivery,
    /// Keeps the channel open until the last delivery from it is settled.
    pub(super) channel: Channel,
}

/// A message that is dropped by a panic is requeued (basic.nack with requeue). Otherwise it would take a place of
/// the prefetch for ever. No other path requeues a message.
impl Drop for Settle {
    fn drop(&mut self) {
        if !std::thread::panicking() || !self.channel.status().connected() {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        let (channel, tag) = (self.channel.clone(), self.delivery.delivery_tag);
        runtime.spawn(async move {
            // The message may cause the panic again.
            tokio::time::sleep(GIVEN_BACK_AFTER).await;
            let back = lapin::options::BasicNackOptions {
                requeue: true,
                multiple: false,
            };
            if let Err(error) = channel.basic_nack(tag, back).await {
                debug!(%error, "a message was not requeued; it is delivered again when the connection ends");
            }
        });
    }
}

impl Incoming {
    /// Whether the message's channel is closed. The broker then delivers the message again.
    pub fn is_stale(&self) -> bool {
        self.settle
            .as_ref()
            .is_some_and(|settle| !settle.channel.status().connected())
    }

    /// Whether the message still has the routing key of a probe. Dead-lettering keeps a message's key, unless a
    /// policy changes it.
    pub fn is_for_probes(&self) -> bool {
        let key = self.settle.as_ref();
        key.is_some_and(|settle| topology::is_probe_key(settle.delivery.routing_key.as_str()))
    }

    /// Acknowledges the message and waits until the broker has processed the ack. `true`: no other consumer has had
    /// it or will have it. A later [`Incoming::ack`] does nothing.
    pub async fn take_for_good(&mut self) -> bool {
        // Another consumer may have had the message. It stays unacknowledged until the end.
        let is_first = |settle: &mut Settle| !settle.delivery.redelivered;
        let Some(settle) = self.settle.take_if(is_first) else {
            return false;
        };
        let acked = settle.delivery.ack(BasicAckOptions::default()).await;
        if acked.is_err() {
            return false;
        }
        // An ack has no answer. A channel processes its frames in order, so an answered call proves the ack.
        let asked = settle
            .channel
            .confirm_select(ConfirmSelectOptions::default());
        matches!(tokio::time::timeout(ACK_TIMEOUT, asked).await, Ok(Ok(())))
    }

    /// Acknowledges the message. This is the last of all steps.
    pub async fn ack(self) {
        if let Some(settle) = self.settle {
            // A failed ack means a lost connection: the broker delivers the message again.
            if let Err(error) = settle.delivery.ack(BasicAckOptions::default()).await {
                debug!(%error, "a message was not acknowledged; it will be delivered again");
            }
        }
    }
}

/// A queue that can be consumed.
#[derive(Debug, Clone)]
pub enum Source {
    /// A pool's create tasks.
    Creates(PoolName),
    /// A pool's revoke tasks.
    Revokes(PoolName),
    /// The pings of one engine of a pool; an exclusive queue.
    Pings(PoolName, EngineName),
    /// The outcomes that engines report about revocations.
    Outcomes,
    /// Heartbeats; an exclusive queue of this connection.
    Heartbeats,
    /// Messages that no binding routes.
    Unroutable,
    /// Probes that have passed the delay levels; an exclusive queue of this connection.
    Probes,
}
