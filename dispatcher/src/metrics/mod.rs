//! All metrics of this process, in one struct. Only these modules name prometheus.

mod declare;
mod health;
mod http;
mod messages;
mod work;

use std::time::Duration;

use mayfly_common::VERSION;
use mayfly_protocol::names::PoolName;
use prometheus::{
    Encoder, HistogramVec, IntCounter, IntCounterVec, IntGaugeVec, Registry, TextEncoder,
};

use crate::error::Code;
use crate::store::PoolCount;
use mayfly_protocol::lease::State;

use declare::Declare;
use health::Health;
use http::Http;
use messages::Messages;
use work::Work;

/// Upper bounds in seconds: from one round trip to the default deadline.
const BUCKETS: [f64; 12] = [
    0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0,
];

/// The dispatcher's metrics. Clones share their values.
#[derive(Clone)]
pub(crate) struct Metrics {
    registry: Registry,
    http: Http,
    work: Work,
    messages: Messages,
    health: Health,
    issues: IntCounterVec,
    errors: IntCounterVec,
    issue_duration: HistogramVec,
    leases: IntGaugeVec,
    overdue: IntGaugeVec,
    stuck: IntGaugeVec,
    settling: IntGaugeVec,
    token_lookups: IntCounter,
    tokens_refused: IntCounter,
    engines: IntGaugeVec,
}

impl Metrics {
    /// Declares all metrics.
    ///
    /// # Errors
    /// A mistake in this file; a test finds it.
    pub(crate) fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let declare = Declare(&registry);
        let info = declare.gauges(
            "mayfly_build_info",
            "Always 1. The label has the version of this program.",
            &["version"],
        )?;
        info.with_label_values(&[VERSION]).set(1);
        Ok(Self {
            http: Http::new(&declare)?,
            work: Work::new(&declare)?,
            messages: Messages::new(&declare)?,
            health: Health::new(&declare)?,
            issues: declare.counters(
                "mayfly_dispatcher_issues_total",
                "Reads of dynamic secrets. outcome: ok; refused (PostgreSQL or the request makes it impossible); failed.",
                &["pool", "outcome"],
            )?,
            errors: declare.counters(
                "mayfly_dispatcher_errors_total",
                "Reads of dynamic secrets that were refused or failed, by the code in the answer.",
                &["pool", "code"],
            )?,
            issue_duration: declare.histograms(
                "mayfly_dispatcher_issue_duration_seconds",
                "Time from a read of a dynamic secret to its answer, in seconds.",
                &BUCKETS,
                &["pool"],
            )?,
            leases: declare.gauges(
                "mayfly_dispatcher_leases",
                "Leases by state.",
                &["pool", "state"],
            )?,
            overdue: declare.gauges(
                "mayfly_dispatcher_leases_overdue",
                "Leases more than 10 s past their end. No engine has reported that the account is gone.",
                &["pool"],
            )?,
            stuck: declare.gauges(
                "mayfly_dispatcher_leases_stuck",
                "Leases whose revocation keeps failing.",
                &["pool"],
            )?,
            settling: declare.gauges(
                "mayfly_dispatcher_leases_settling",
                "Leases whose account is gone but whose create could still commit. An engine looks for the account once more.",
                &["pool"],
            )?,
            token_lookups: declare.counter(
                "mayfly_dispatcher_token_lookups_total",
                "Jobs of the store that look up tokens. One job may look up several tokens.",
            )?,
            tokens_refused: declare.counter(
                "mayfly_dispatcher_tokens_refused_total",
                "Wrong or expired tokens. Requests with the same token share a look-up, which is counted once.",
            )?,
            engines: declare.gauges(
                "mayfly_dispatcher_engines",
                "Engines whose last heartbeat is at most 8 s old.",
                &["pool"],
            )?,
            registry,
        })
    }

    /// A read of a dynamic secret was answered.
    pub(crate) fn issued(&self, pool: &PoolName, error: Option<Code>, took: Duration) {
        let outcome = match error {
            None => "ok",
            Some(code) => {
                let labels = [pool.as_str(), code.as_str()];
                self.errors.with_label_values(&labels).inc();
                if code.is_refusal() {
                    "refused"
                } else {
                    "failed"
                }
            }
        };
        self.issues
            .with_label_values(&[pool.as_str(), outcome])
            .inc();
        self.issue_duration
            .with_label_values(&[pool.as_str()])
            .observe(took.as_secs_f64());
    }

    /// Shows the present numbers of all pools. A deleted pool is not shown any more. If the store cannot be read, no
    /// pool is shown.
    pub(crate) fn pools(
        &self,
        counts: Option<&[PoolCount]>,
        engines_of: impl Fn(&PoolName) -> usize,
    ) {
        let gauge = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        for gauges in [
            &self.leases,
            &self.overdue,
            &self.stuck,
            &self.settling,
            &self.engines,
        ] {
            gauges.reset();
        }
        for count in counts.unwrap_or_default() {
            let pool = count.pool.as_str();
            for (n, state) in count.leases.into_iter().zip(State::ALL) {
                self.leases
                    .with_label_values(&[pool, state.as_str()])
                    .set(gauge(n));
            }
            self.overdue
                .with_label_values(&[pool])
                .set(gauge(count.overdue));
            self.stuck
                .with_label_values(&[pool])
                .set(gauge(count.stuck));
            self.settling
                .with_label_values(&[pool])
                .set(gauge(count.settling));
            let engines = u64::try_from(engines_of(&count.pool)).unwrap_or(u64::MAX);
            self.engines.with_label_values(&[pool]).set(gauge(engines));
            for outcome in ["ok", "refused", "failed"] {
                self.issues.with_label_values(&[pool, outcome]);
            }
            self.work.show(pool);
            // A counter must exist before its first event; otherwise `rate` does not see that event.
            for code in Code::of_a_read() {
                self.errors.with_label_values(&[pool, code.as_str()]);
            }
        }
    }

    /// Counts a job of the store that looks up tokens.
    pub(crate) fn token_lookup(&self) {
        self.token_lookups.inc();
    }

    /// Counts a wrong or expired token.
    pub(crate) fn token_refused(&self) {
        self.tokens_refused.inc();
    }

    /// All metrics in Prometheus' text format.
    pub(crate) fn text(&self) -> String {
        let mut text = Vec::new();
        // Writing to memory does not fail; a family without samples is left out by itself.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        String::from_utf8_lossy(&text).into_owned()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
