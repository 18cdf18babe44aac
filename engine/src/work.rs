//! The parts that all kinds of task share: the engine's identity and tools, and the sending of sealed answers.

use jiff::Timestamp;
use mayfly_common::VERSION;
use mayfly_common::broker::{Address, Broker, BrokerError, Incoming, Message};
use mayfly_protocol::names::{EngineName, LeaseId, PoolName};
use mayfly_protocol::request::RequestId;
use mayfly_protocol::seal::{Form, KeyRing, PublicKey, SealError};
use mayfly_protocol::task::{
    Failure, FailureCode, Head, Heartbeat, Kind, OpenError, Reply, ReplyResult,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use crate::bundles::Bundles;
use crate::ended::Ended;
use crate::metrics::Metrics;
use crate::pg::{GrantRoles, Servers};
use crate::verdicts::Verdicts;

/// The dispatcher's public keys. While its key is renewed, the earlier key is valid too.
pub(crate) struct Dispatcher {
    /// Messages of this engine are sealed to this key.
    newest: PublicKey,
    previous: Vec<PublicKey>,
}

impl Dispatcher {
    /// A dispatcher with these keys, the newest first.
    ///
    /// # Errors
    /// The list is empty.
    pub(crate) fn new(keys: Vec<PublicKey>) -> Result<Self, String> {
        let mut keys = keys.into_iter();
        Ok(Self {
            newest: keys.next().ok_or("the dispatcher has no key")?,
            previous: keys.collect(),
        })
    }

    /// Opens a message that must come from the dispatcher. Returns the name of the request, if there is one.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub(crate) fn open<T: DeserializeOwned>(
        &self,
        keys: &KeyRing,
        head: &Head,
        body: &[u8],
    ) -> Result<(T, Option<RequestId>), OpenError> {
        let mut opened = head.open_request(keys, &self.newest, body);
        for key in &self.previous {
            // The request may be sealed with an earlier key.
            if !matches!(opened, Err(OpenError::Sealed(SealError::NotAuthentic))) {
                break;
            }
            opened = head.open_request(keys, key, body);
        }
        opened
    }
}

/// The parts of a request that its answer needs.
struct Asked {
    correlation: Option<String>,
    name: Option<RequestId>,
    /// The form of the request. Its dispatcher can open an answer in this form.
    form: Form,
}

/// The state that all tasks of one engine share.
pub(crate) struct Engine {
    pub(crate) name: EngineName,
    pub(crate) pool: PoolName,
    pub(crate) pool_keys: KeyRing,
    pub(crate) dispatcher: Dispatcher,
    pub(crate) started: Timestamp,
    pub(crate) broker: Broker,
    pub(crate) metrics: Metrics,
    pub(crate) servers: Servers,
    pub(crate) grant_roles: GrantRoles,
    pub(crate) verdicts: Verdicts,
    /// Permits for revocations that cannot be opened and wait for a verdict.
    pub(crate) unopened: Semaphore,
    /// Permits for outcomes that are being published.
    pub(crate) reports: Semaphore,
    pub(crate) ended: Ended,
    pub(crate) authorities: Bundles,
}

impl Engine {
    /// Opens a message, which must come from the dispatcher.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub(crate) fn open<T: DeserializeOwned>(&self, message: &Incoming) -> Result<T, OpenError> {
        self.open_request(message).map(|(body, _)| body)
    }

    /// Seals a body to the dispatcher and publishes it.
    pub(crate) async fn send<T: Serialize>(
        &self,
        to: Address,
        kind: Kind,
        lease: Option<LeaseId>,
        traceparent: &str,
        body: &T,
    ) -> Result<(), BrokerError> {
        self.send_answer(to, kind, lease, None, traceparent, body)
            .await
    }

    /// Like [`Engine::send`], for the answer to a request.
    async fn send_answer<T: Serialize>(
        &self,
        to: Address,
        kind: Kind,
        lease: Option<LeaseId>,
        asked: Option<Asked>,
        traceparent: &str,
        body: &T,
    ) -> Result<(), BrokerError> {
        let form = asked.as_ref().map_or(Form::Alone, |asked| asked.form);
        let request = asked.as_ref().and_then(|asked| asked.name);
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
            .seal_request(
                form,
                &self.pool_keys.newest,
                &self.dispatcher.newest,
                body,
                request,
            )
            .map_err(|error| BrokerError::Unconfirmed(error.to_string()))?;
        let message = Message {
            to,
            head,
            body,
            reply_as: None,
            answers: asked.and_then(|asked| asked.correlation),
            expires: None,
        };
        self.broker.publish(message).await
    }

    /// Opens a request. Returns the name that the answer must have; dispatchers of earlier versions give none.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub(crate) fn open_request<T: DeserializeOwned>(
        &self,
        message: &Incoming,
    ) -> Result<(T, Option<RequestId>), OpenError> {
        self.dispatcher
            .open(&self.pool_keys, &message.head, &message.body)
    }

    /// Answers a request of this name, if anybody still waits.
    pub(crate) async fn reply(
        &self,
        request: &Incoming,
        name: Option<RequestId>,
        result: ReplyResult,
    ) {
        let Some(reply_to) = request.reply_to.clone() else {
            return;
        };
        let body = Reply {
            engine: self.name.clone(),
            result,
        };
        let asked = Asked {
            correlation: request.correlation.clone(),
            name,
            form: Form::of(&request.body),
        };
        let sent = self
            .send_answer(
                Address::Answer(reply_to),
                Kind::Reply,
                request.head.lease,
                Some(asked),
                &request.head.traceparent,
                &body,
            )
            .await;
        match sent {
            Ok(()) => {}
            // Without an answer the lease is revoked.
            Err(error) => warn!(%error, "the answer could not be sent"),
        }
    }

    /// The failure if a task of this engine has panicked.
    pub(crate) fn mistaken(&self) -> Failure {
        Failure::new(
            FailureCode::StatementFailed,
            format!(
                "engine {} failed at this task because of a mistake in its program; its log has details",
                self.name
            ),
        )
    }

    /// The body of a heartbeat.
    pub(crate) fn heartbeat(&self, leaving: bool) -> Heartbeat {
        Heartbeat {
            engine: self.name.clone(),
            pool: self.pool.clone(),
            version: VERSION.to_owned(),
            started: self.started,
            in_flight: self.metrics.in_flight(),
            leaving,
            authorities: self.authorities.offered(),
            opens_shared: true,
            ends_batches: true,
        }
    }

    /// Sends a heartbeat to all dispatchers: this engine runs, or is leaving. Returns whether the broker has it.
    pub(crate) async fn send_heartbeat(&self, leaving: bool) -> bool {
        let sent = self
            .send(
                Address::Engines,
                Kind::Heartbeat,
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use mayfly_protocol::seal::KeyPair;

    #[test]
    fn tasks_of_the_listed_dispatcher_keys_are_opened_and_of_no_other() {
        let (old, new, pool) = (
            KeyPair::generate(),
            KeyPair::generate(),
            KeyPair::generate(),
        );
        let head = Head {
            kind: Kind::Ping,
            pool: "pool1".parse().unwrap(),
            lease: None,
            issued: Timestamp::UNIX_EPOCH,
            deadline: None,
            attempt: 0,
            settling: false,
            traceparent: String::new(),
        };
        let from = |key: &KeyPair| head.seal(key, pool.public(), &1).unwrap();
        let ring = KeyRing {
            newest: pool.clone(),
            previous: vec![],
        };
        let both = vec![new.public().clone(), old.public().clone()];
        let both = Dispatcher::new(both).unwrap();
        let only = Dispatcher::new(vec![new.public().clone()]).unwrap();
        let opens = |dispatcher: &Dispatcher, sealed: &[u8]| {
            dispatcher.open::<u32>(&ring, &head, sealed).is_ok()
        };
        assert!(opens(&both, &from(&old)) && opens(&both, &from(&new)));
        assert!(opens(&only, &from(&new)) && !opens(&only, &from(&old)));
        assert!(!opens(&both, &from(&KeyPair::generate())));
        assert!(Dispatcher::new(vec![]).is_err());
    }
}
