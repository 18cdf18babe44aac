//! A revocation of one lease, and its message, which may have revocations of several leases.

use std::sync::Arc;

use mayfly_common::broker::Incoming;
use mayfly_common::trace::Span;
use mayfly_protocol::names::PoolName;
use mayfly_protocol::revocation::is_conclusive;
use mayfly_protocol::task::{Head, Instead, Revoke};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

/// A revocation of one lease.
pub(super) struct Item {
    pub(super) task: Revoke,
    pub(super) held: Held,
}

/// The place of a revocation in its message. The message is acked when the last of its revocations is settled.
pub(super) struct Held {
    /// The head under which it is parked again. It names the lease.
    pub(super) head: Head,
    /// The body that is parked instead of the message's own body.
    instead: Option<Vec<u8>>,
    incoming: Arc<Incoming>,
}

/// The revocations of these messages.
pub(super) fn items(batch: Vec<(Incoming, Revoke)>) -> Vec<Item> {
    let each = batch.into_iter().flat_map(|(incoming, task)| {
        let first = Held::new(incoming);
        // `each` begins with the first lease.
        let (head, incoming) = (first.head, first.incoming);
        task.each().map(move |(task, trace)| Item {
            held: Held {
                head: Head {
                    lease: Some(task.lease),
                    traceparent: trace.unwrap_or_else(|| head.traceparent.clone()),
                    ..head.clone()
                },
                instead: None,
                incoming: incoming.clone(),
            },
            task,
        })
    });
    each.collect()
}

impl Item {
    /// Whether absence of the role is final.
    pub(super) fn is_conclusive(&self) -> bool {
        is_conclusive(&self.task, self.held.head.settling)
    }
}

impl Held {
    /// The place of the only revocation of a message.
    pub(super) fn new(incoming: Incoming) -> Self {
        Self {
            head: incoming.head.clone(),
            instead: None,
            incoming: Arc::new(incoming),
        }
    }

    /// The span of the message, if this is its only revocation.
    pub(super) fn span(&mut self) -> Option<&mut Span> {
        Arc::get_mut(&mut self.incoming)?.span.as_mut()
    }

    /// Parks another sealed revocation of the same lease instead of the delivered one.
    pub(super) fn replace(&mut self, instead: &Instead) {
        if let Ok(body) = BASE64_STANDARD.decode(&instead.body) {
            self.head.issued = instead.issued;
            self.instead = Some(body);
        }
    }

    /// The body to park.
    pub(super) fn body(&self) -> &[u8] {
        self.instead.as_deref().unwrap_or(&self.incoming.body)
    }

    /// Time since the message was delivered, in seconds.
    pub(super) fn seconds(&self) -> f64 {
        self.incoming.arrived.elapsed().as_secs_f64()
    }

    /// See [`Incoming::is_stale`].
    pub(super) fn is_stale(&self) -> bool {
        self.incoming.is_stale()
    }

    /// Parks a message of a newer version unchanged.
    ///
    /// # Errors
    /// See [`mayfly_common::broker::Broker::publish`].
    pub(super) async fn park_unchanged(
        &self,
        broker: &mayfly_common::broker::Broker,
        after: std::time::Duration,
        pool: &PoolName,
    ) -> Result<(), mayfly_common::broker::BrokerError> {
        broker.park_again(&self.incoming, after, pool).await
    }

    /// Acks the message if this was the last of its revocations.
    pub(super) async fn ack(self) {
        if let Some(incoming) = Arc::into_inner(self.incoming) {
            incoming.ack().await;
        }
    }
}
