//! Metrics of what a dispatcher does besides answering reads: renewals, sweeps, its store and its broker.

use std::time::Duration;

use mayfly_protocol::names::PoolName;
use prometheus::{Histogram, IntCounter, IntCounterVec};

use super::{Declare, Metrics};
use crate::error::Code;

/// Upper bounds in seconds, from a fast disk to a server that hardly answers.
const COMMITS: [f64; 12] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0,
];

#[derive(Clone)]
pub(super) struct Work {
    renewals: IntCounterVec,
    sweeps: IntCounterVec,
    swept: IntCounterVec,
    commits: Histogram,
    reconnects: IntCounter,
}

impl Work {
    pub(super) fn new(declare: &Declare) -> Result<Self, prometheus::Error> {
        Ok(Self {
            renewals: declare.counters(
                "mayfly_dispatcher_renewals_total",
                "Renewals of leases. outcome: ok; refused (the lease or the request makes it impossible); failed.",
                &["pool", "outcome"],
            )?,
            sweeps: declare.counters(
                "mayfly_dispatcher_sweeps_total",
                "Sweeps of database servers for accounts past their end. outcome: ok; failed (the accounts could not be listed).",
                &["pool", "outcome"],
            )?,
            swept: declare.counters(
                "mayfly_dispatcher_swept_accounts_total",
                "Accounts that sweeps found past their end, or whose lease had ended. A revocation was sent for each.",
                &["pool"],
            )?,
            commits: declare.histogram(
                "mayfly_dispatcher_store_commit_duration_seconds",
                "Duration of a COMMIT of the lease store, in seconds. It waits for the store's disk or server.",
                &COMMITS,
            )?,
            reconnects: declare.counter(
                "mayfly_dispatcher_broker_reconnects_total",
                "Connections to RabbitMQ that were opened after the first.",
            )?,
        })
    }

    /// Shows a pool's counters from the start. Otherwise `rate` does not see their first events.
    pub(super) fn show(&self, pool: &str) {
        for outcome in ["ok", "refused", "failed"] {
            self.renewals.with_label_values(&[pool, outcome]);
        }
        for outcome in ["ok", "failed"] {
            self.sweeps.with_label_values(&[pool, outcome]);
        }
        self.swept.with_label_values(&[pool]);
    }
}

impl Metrics {
    /// A renewal was answered.
    pub(crate) fn renewed(&self, pool: &PoolName, error: Option<Code>) {
        let outcome = match error {
            None => "ok",
            Some(code) if code.is_refusal() => "refused",
            Some(_) => "failed",
        };
        self.work
            .renewals
            .with_label_values(&[pool.as_str(), outcome])
            .inc();
    }

    /// A server was swept, and this number of accounts had to be ended. `None`: the sweep failed.
    pub(crate) fn swept(&self, pool: &PoolName, ended: Option<usize>) {
        let outcome = if ended.is_some() { "ok" } else { "failed" };
        let pool = pool.as_str();
        self.work.sweeps.with_label_values(&[pool, outcome]).inc();
        self.work
            .swept
            .with_label_values(&[pool])
            .inc_by(u64::try_from(ended.unwrap_or(0)).unwrap_or(u64::MAX));
    }

    /// A function that records the time of each COMMIT of the store.
    pub(crate) fn commits(&self) -> impl Fn(Duration) + Send + Sync + 'static {
        let commits = self.work.commits.clone();
        move |took| commits.observe(took.as_secs_f64())
    }

    /// How often the broker's connection was opened again since the process began.
    pub(crate) fn reconnects(&self, count: u64) {
        let reconnects = &self.work.reconnects;
        reconnects.inc_by(count.saturating_sub(reconnects.get()));
    }
}
