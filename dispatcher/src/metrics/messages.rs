//! Metrics of the messages between dispatcher and engines, and of the broker.

use mayfly_common::broker::Waiting;
use mayfly_protocol::names::PoolName;
use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use super::{Declare, Metrics};

/// Reasons why a message from an engine is refused. The metric shows all of them from the start.
const REFUSALS: [&str; 11] = [
    "unknown_version",
    "other_key",
    "not_authentic",
    "unknown_pool",
    "other_kind",
    "other_lease",
    "other_pool",
    "distrusted_pool",
    "out_of_date",
    "replayed",
    "too_many",
];

#[derive(Clone)]
pub(super) struct Messages {
    waiting: IntGaugeVec,
    unreadable_kept: IntGauge,
    unroutable: IntCounter,
    unroutable_live: IntCounter,
    delays_overridden: IntGauge,
    levels_absent: IntCounter,
    refused: IntCounterVec,
    broker_up: IntGauge,
}

impl Messages {
    pub(super) fn new(declare: &Declare) -> Result<Self, prometheus::Error> {
        let refused = declare.counters(
            "mayfly_dispatcher_messages_refused_total",
            "Messages from engines that the dispatcher refused, by reason.",
            &["reason"],
        )?;
        for reason in REFUSALS {
            refused.with_label_values(&[reason]);
        }
        Ok(Self {
            waiting: declare.gauges(
                "mayfly_dispatcher_queue_messages",
                "Messages in a pool's queue (create, revoke) that no engine has taken yet.",
                &["pool", "queue"],
            )?,
            unreadable_kept: declare.gauge(
                "mayfly_dispatcher_unreadable_messages",
                "Unreadable messages in the queue mayfly.v1.unreadable. It keeps at most 1,000, for a week.",
            )?,
            unroutable: declare.counter(
                "mayfly_dispatcher_unroutable_total",
                "Messages that RabbitMQ returned because it had no queue for them.",
            )?,
            unroutable_live: declare.counter(
                "mayfly_dispatcher_unroutable_live_total",
                "Messages that RabbitMQ returned because it had no queue for them, and whose lease has not ended.",
            )?,
            delays_overridden: declare.gauge(
                "mayfly_dispatcher_delays_overridden",
                "1 if the last probe found that something at RabbitMQ, such as a policy, overrides the delay levels; else 0.",
            )?,
            levels_absent: declare.counter(
                "mayfly_dispatcher_delay_levels_absent_total",
                "Delay levels whose queue was absent. A dispatcher declares each again.",
            )?,
            refused,
            broker_up: declare.gauge(
                "mayfly_dispatcher_broker_up",
                "1 while the dispatcher is connected to RabbitMQ, else 0.",
            )?,
        })
    }
}

impl Metrics {
    /// Sets the number of messages that wait for engines, for each pool that could be counted.
    pub(crate) fn waiting(&self, pools: &[(PoolName, Waiting)]) {
        self.messages.waiting.reset();
        for (pool, waiting) in pools {
            for (queue, messages) in [("create", waiting.create), ("revoke", waiting.revoke)] {
                self.messages
                    .waiting
                    .with_label_values(&[pool.as_str(), queue])
                    .set(messages.into());
            }
        }
    }

    /// Sets the number of kept messages that nobody could read.
    pub(crate) fn unreadable_kept(&self, messages: u32) {
        self.messages.unreadable_kept.set(messages.into());
    }

    /// Sets whether the delay levels were found not to work.
    pub(crate) fn delays_overridden(&self, overridden: bool) {
        self.messages.delays_overridden.set(overridden.into());
    }

    /// Adds to the number of delay levels found without a queue.
    pub(crate) fn levels_absent(&self, count: usize) {
        self.messages
            .levels_absent
            .inc_by(u64::try_from(count).unwrap_or(u64::MAX));
    }

    /// The broker could not route a message. `is_live`: it may be about a lease that has not ended.
    pub(crate) fn unroutable(&self, is_live: bool) {
        self.messages.unroutable.inc();
        if is_live {
            self.messages.unroutable_live.inc();
        }
    }

    /// A message from an engine was refused for this reason.
    pub(crate) fn refused(&self, reason: &str) {
        self.messages.refused.with_label_values(&[reason]).inc();
    }

    /// Whether the broker is connected.
    pub(crate) fn broker_up(&self, up: bool) {
        self.messages.broker_up.set(i64::from(up));
    }
}
