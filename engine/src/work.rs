//! What every kind of task shares: the engine's identity and tools, and sending sealed answers.

use jiff::Timestamp;
use mayfly_common::VERSION;
use mayfly_common::broker::{Address, Broker, BrokerError, Incoming, Message};
use mayfly_common::names::{EngineName, LeaseId, PoolName};
use mayfly_common::seal::{KeyRing, PublicKey};
use mayfly_common::task::{Head, Heartbeat, Kind, OpenError, Reply, ReplyResult};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use crate::metrics::Metrics;
use crate::pg::{GrantRoles, Servers};
use crate::verdicts::Verdicts;

/// Waits for all, side by side.
pub(crate) async fn together(all: impl Iterator<Item = impl Future<Output = ()>>) {
    let mut all: Vec<_> = all.map(Box::pin).collect();
    std::future::poll_fn(move |context| {
        all.retain_mut(|one| one.as_mut().poll(context).is_pending());
        if all.is_empty() {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
}

/// One engine.
pub(crate) struct Engine {
    pub(crate) name: EngineName,
    pub(crate) pool: PoolName,
    pub(crate) pool_keys: KeyRing,
    pub(crate) dispatcher_key: PublicKey,
    pub(crate) started: Timestamp,
    pub(crate) broker: Broker,
    pub(crate) metrics: Metrics,
    pub(crate) servers: Servers,
    pub(crate) grant_roles: GrantRoles,
    pub(crate) verdicts: Verdicts,
    /// Places of revocations that cannot be opened and wait for a verdict.
    pub(crate) unopened: Semaphore,
}

impl Engine {
    /// Opens a message, which must come from the dispatcher.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub(crate) fn open<T: DeserializeOwned>(&self, message: &Incoming) -> Result<T, OpenError> {
        message
            .head
            .open(&self.pool_keys, &self.dispatcher_key, &message.body)
    }

    /// Seals a body to the dispatcher and publishes it.
    pub(crate) async fn send<T: Serialize>(
        &self,
        to: Address,
        kind: Kind,
        lease: Option<LeaseId>,
        answers: Option<String>,
        traceparent: &str,
        body: &T,
    ) -> Result<(), BrokerError> {
        let head = Head {
            kind,
            pool: self.pool.clone(),
            lease,
            issued: Timestamp::now(),
            deadline: None,
            attempt: 0,
            settling: false,
            traceparent: traceparent.to_owned(),
        };
        let body = head
            .seal(&self.pool_keys.newest, &self.dispatcher_key, body)
            .map_err(|error| BrokerError::Unconfirmed(error.to_string()))?;
        let message = Message {
            to,
            head,
            body,
            reply_as: None,
            answers,
            expires: None,
        };
        self.broker.publish(message).await
    }

    /// Answers a request, if anybody still waits.
    pub(crate) async fn reply(&self, request: &Incoming, result: ReplyResult) {
        let Some(reply_to) = request.reply_to.clone() else {
            return;
        };
        let body = Reply {
            engine: self.name.clone(),
            result,
        };
        let sent = self
            .send(
                Address::Answer(reply_to),
                Kind::Reply,
                request.head.lease,
                request.correlation.clone(),
                &request.head.traceparent,
                &body,
            )
            .await;
        match sent {
            Ok(()) => {}
            // The lease is revoked for lack of an answer.
            Err(error) => warn!(%error, "the answer could not be sent"),
        }
    }

    /// A sign of life.
    pub(crate) fn heartbeat(&self, leaving: bool) -> Heartbeat {
        Heartbeat {
            engine: self.name.clone(),
            pool: self.pool.clone(),
            version: VERSION.to_owned(),
            started: self.started,
            in_flight: self.metrics.in_flight(),
            leaving,
        }
    }

    /// Tells all dispatchers that this engine lives, or leaves. Whether the broker has it.
    pub(crate) async fn send_heartbeat(&self, leaving: bool) -> bool {
        let sent = self
            .send(
                Address::Engines,
                Kind::Heartbeat,
                None,
                None,
                "",
                &self.heartbeat(leaving),
            )
            .await;
        if let Err(error) = sent {
            debug!(%error, "a heartbeat was not sent");
            return false;
        }
        true
    }
}
