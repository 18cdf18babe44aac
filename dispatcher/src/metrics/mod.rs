//! Every number this process shows, in one struct (the only folder that names prometheus).

mod http;
mod work;

use std::time::Duration;

use mayfly_common::VERSION;
use mayfly_common::broker::Waiting;
use mayfly_common::serve::Tls;
use mayfly_protocol::names::PoolName;
use prometheus::{
    Encoder, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

use crate::error::Code;
use crate::store::{Cause, PoolCount};
use mayfly_protocol::lease::State;

use http::Http;
use work::Work;

/// Upper bounds in seconds: from one round trip to the default deadline.
const BUCKETS: [f64; 12] = [
    0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0,
];

/// Why a message from an engine is refused; all of them are shown from the start.
pub(crate) const REFUSALS: [&str; 11] = [
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

/// The dispatcher's metrics. A copy shows the same.
#[derive(Clone)]
pub(crate) struct Metrics {
    registry: Registry,
    http: Http,
    work: Work,
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
    waiting: IntGaugeVec,
    unreadable_kept: IntGauge,
    unroutable: IntCounter,
    unroutable_live: IntCounter,
    delays_overridden: IntGauge,
    levels_absent: IntCounter,
    refused: IntCounterVec,
    rows_refused: IntCounterVec,
    broker_up: IntGauge,
    store_up: IntGauge,
    store_failures: IntCounterVec,
    leads: IntGauge,
    tls_reloaded: IntGaugeVec,
}

impl Metrics {
    /// Declares them all.
    ///
    /// # Errors
    /// Never but by a mistake in this file; a test finds it.
    #[allow(clippy::too_many_lines, reason = "a list of declarations")]
    pub(crate) fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let gauges = |name: &str, help: &str, labels: &[&str]| {
            let gauges = IntGaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(gauges.clone()))?;
            Ok::<_, prometheus::Error>(gauges)
        };
        let counters = |name: &str, help: &str, labels: &[&str]| {
            let counters = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(counters.clone()))?;
            Ok::<_, prometheus::Error>(counters)
        };
        let issue_duration = HistogramVec::new(
            HistogramOpts::new(
                "mayfly_dispatcher_issue_duration_seconds",
                "Time from a read of a dynamic secret to its answer, in seconds.",
            )
            .buckets(BUCKETS.to_vec()),
            &["pool"],
        )?;
        registry.register(Box::new(issue_duration.clone()))?;
        let counter = |name: &str, help: &str| {
            let counter = IntCounter::new(name, help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let gauge = |name: &str, help: &str| {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        gauges(
            "mayfly_build_info",
            "Always 1. The label has the version of this program.",
            &["version"],
        )?
        .with_label_values(&[VERSION])
        .set(1);
        let refused = counters(
            "mayfly_dispatcher_messages_refused_total",
            "Messages from engines that the dispatcher refused, by reason.",
            &["reason"],
        )?;
        for reason in REFUSALS {
            refused.with_label_values(&[reason]);
        }
        let store_failures = counters(
            "mayfly_dispatcher_store_failures_total",
            "Statements of the lease store that failed because of its disk or its server. cause: full; io; read_only; damaged; away; other.",
            &["cause"],
        )?;
        for cause in Cause::ALL {
            store_failures.with_label_values(&[cause.as_str()]);
        }
        Ok(Self {
            http: Http::new(&registry)?,
            work: Work::new(&registry)?,
            issues: counters(
                "mayfly_dispatcher_issues_total",
                "Reads of dynamic secrets. outcome: ok; refused (PostgreSQL or the request makes it impossible); failed.",
                &["pool", "outcome"],
            )?,
            errors: counters(
                "mayfly_dispatcher_errors_total",
                "Reads of dynamic secrets that were refused or failed, by the code in the answer.",
                &["pool", "code"],
            )?,
            issue_duration,
            leases: gauges(
                "mayfly_dispatcher_leases",
                "Leases by state.",
                &["pool", "state"],
            )?,
            overdue: gauges(
                "mayfly_dispatcher_leases_overdue",
                "Leases more than 10 s past their end. No engine has reported that the account is gone.",
                &["pool"],
            )?,
            stuck: gauges(
                "mayfly_dispatcher_leases_stuck",
                "Leases whose revocation keeps failing.",
                &["pool"],
            )?,
            settling: gauges(
                "mayfly_dispatcher_leases_settling",
                "Leases whose account is gone but whose create could still commit. An engine looks for the account once more.",
                &["pool"],
            )?,
            token_lookups: counter(
                "mayfly_dispatcher_token_lookups_total",
                "Jobs of the store that look up tokens. One job may look up several tokens.",
            )?,
            tokens_refused: counter(
                "mayfly_dispatcher_tokens_refused_total",
                "Wrong or expired tokens. Requests with the same token share a look-up, which is counted once.",
            )?,
            engines: gauges(
                "mayfly_dispatcher_engines",
                "Engines whose last heartbeat is at most 8 s old.",
                &["pool"],
            )?,
            waiting: gauges(
                "mayfly_dispatcher_queue_messages",
                "Messages in a pool's queue (create, revoke) that no engine has taken yet.",
                &["pool", "queue"],
            )?,
            unreadable_kept: gauge(
                "mayfly_dispatcher_unreadable_messages",
                "Unreadable messages in the queue mayfly.v1.unreadable. It keeps at most 1,000, for a week.",
            )?,
            unroutable: counter(
                "mayfly_dispatcher_unroutable_total",
                "Messages that RabbitMQ returned because it had no queue for them.",
            )?,
            unroutable_live: counter(
                "mayfly_dispatcher_unroutable_live_total",
                "Messages that RabbitMQ returned because it had no queue for them, and whose lease has not ended.",
            )?,
            delays_overridden: gauge(
                "mayfly_dispatcher_delays_overridden",
                "1 if the last probe found that something at RabbitMQ, such as a policy, overrides the delay levels; else 0.",
            )?,
            levels_absent: counter(
                "mayfly_dispatcher_delay_levels_absent_total",
                "Delay levels whose queue was absent. A dispatcher declares each again.",
            )?,
            refused,
            rows_refused: counters(
                "mayfly_dispatcher_store_rows_refused_total",
                "Reads of rows of the lease store whose authentication code is not valid under the master key.",
                &["table"],
            )?,
            broker_up: gauge(
                "mayfly_dispatcher_broker_up",
                "1 while the dispatcher is connected to RabbitMQ, else 0.",
            )?,
            store_up: gauge(
                "mayfly_dispatcher_store_up",
                "1 while the lease store is reached and its statements succeed. 0 for at least 15 s after a failure.",
            )?,
            store_failures,
            tls_reloaded: gauges(
                "mayfly_tls_last_reload_successful",
                "1 while a listener uses its present certificate files, or has none. 0 while these files cannot be used and the listener keeps the earlier certificate.",
                &["listener"],
            )?,
            leads: gauge(
                "mayfly_dispatcher_reconciler",
                "1 on the dispatcher that reconciles, 0 on the others with the same store.",
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

    /// The numbers of all pools, as they are now. A pool that is gone is not shown any more, and
    /// none is where the store cannot tell.
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
            // A counter that begins with its first event hides it from `rate`.
            for code in Code::of_a_read() {
                self.errors.with_label_values(&[pool, code.as_str()]);
            }
        }
    }

    /// The messages that wait for engines, of the pools of which it could be found out.
    pub(crate) fn waiting(&self, pools: &[(PoolName, Waiting)]) {
        self.waiting.reset();
        for (pool, waiting) in pools {
            for (queue, messages) in [("create", waiting.create), ("revoke", waiting.revoke)] {
                self.waiting
                    .with_label_values(&[pool.as_str(), queue])
                    .set(messages.into());
            }
        }
    }

    /// Sets the number of kept messages that nobody could read.
    pub(crate) fn unreadable_kept(&self, messages: u32) {
        self.unreadable_kept.set(messages.into());
    }

    /// Whether the delay levels were seen not to work.
    pub(crate) fn delays_overridden(&self, overridden: bool) {
        self.delays_overridden.set(overridden.into());
    }

    /// Adds to the number of delay levels found without a queue.
    pub(crate) fn levels_absent(&self, count: usize) {
        self.levels_absent
            .inc_by(u64::try_from(count).unwrap_or(u64::MAX));
    }

    /// A message came to nowhere; it may be of a lease that has not ended.
    pub(crate) fn unroutable(&self, is_live: bool) {
        self.unroutable.inc();
        if is_live {
            self.unroutable_live.inc();
        }
    }

    /// Tokens are looked for.
    pub(crate) fn token_lookup(&self) {
        self.token_lookups.inc();
    }

    /// A token was none, or has expired.
    pub(crate) fn token_refused(&self) {
        self.tokens_refused.inc();
    }

    /// A message from an engine was not believed or not understood.
    pub(crate) fn refused(&self, reason: &str) {
        self.refused.with_label_values(&[reason]).inc();
    }

    /// How many rows of the store were refused since the process began, by table.
    pub(crate) fn rows_refused(&self, refused: impl Iterator<Item = (&'static str, u64)>) {
        for (table, count) in refused {
            let counter = self.rows_refused.with_label_values(&[table]);
            counter.inc_by(count.saturating_sub(counter.get()));
        }
    }

    /// Whether the broker is connected.
    pub(crate) fn broker_up(&self, up: bool) {
        self.broker_up.set(i64::from(up));
    }

    /// Whether the store does what is asked of it.
    pub(crate) fn store_up(&self, up: bool) {
        self.store_up.set(i64::from(up));
    }

    /// How the certificates of the listeners are.
    pub(crate) fn tls(&self, listeners: &[(&str, Option<Tls>)]) {
        for (listener, tls) in listeners {
            let is_current = tls.as_ref().is_none_or(Tls::is_current);
            self.tls_reloaded
                .with_label_values(&[listener])
                .set(i64::from(is_current));
        }
    }

    /// How often something failed in the store since the process began, by cause.
    pub(crate) fn store_failures(&self, failures: impl Iterator<Item = (Cause, u64)>) {
        for (cause, count) in failures {
            let counter = self.store_failures.with_label_values(&[cause.as_str()]);
            counter.inc_by(count.saturating_sub(counter.get()));
        }
    }

    /// Whether this dispatcher reconciles.
    pub(crate) fn leads(&self, leads: bool) {
        self.leads.set(i64::from(leads));
    }

    /// All of them, in Prometheus' text format.
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
