//! The engine's metrics, all of them in one struct. Only this file names prometheus. The help texts are the
//! documentation.

use mayfly_common::serve::Tls;
use mayfly_protocol::names::PoolName;
use mayfly_protocol::task::Kind;
use parking_lot::Mutex;

use prometheus::core::{AtomicF64, Collector, GenericGauge};
use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

const SECONDS: &[f64] = &[
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
];
const LATENESS_SECONDS: &[f64] = &[0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0];
const BATCH: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0];

/// Why a message without a readable head is refused.
const UNREADABLE: &str = "unreadable";

/// The result of a task: the value of the label.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Ending {
    /// The task was done as requested.
    Ok,
    /// The task was not done, and the reply says so.
    Failed,
    /// The task was not understood, or came too late.
    Refused,
    /// Parked to be done later.
    Retried,
}

impl Ending {
    fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::Refused => "refused",
            Self::Retried => "retried",
        }
    }
}

/// Values that other modules count, since the start of the process.
#[derive(Default)]
pub(crate) struct Elsewhere {
    /// Messages that cannot be read.
    pub(crate) unreadable: u64,
    /// Connections to the broker after the first.
    pub(crate) reconnects: u64,
    /// By how much this machine's clock differs from the databases'.
    pub(crate) clock_skew_seconds: f64,
    /// Objects that were moved from grant roles to the quarantine role.
    pub(crate) quarantined: u64,
}

/// Everything the engine counts.
pub(crate) struct Metrics {
    registry: Registry,
    pool: String,
    tasks: IntCounterVec,
    duration: HistogramVec,
    in_flight: IntGaugeVec,
    lateness: Histogram,
    batch: Histogram,
    reconnects: IntCounterVec,
    retries: IntCounterVec,
    refused: IntCounterVec,
    skipped: IntGaugeVec,
    waiting: IntGaugeVec,
    clock_skew: GenericGauge<AtomicF64>,
    quarantined: IntCounterVec,
    tls_reloaded: IntGaugeVec,
    info: IntGaugeVec,
    /// How many unreadable messages the counter shows already.
    unreadable: Mutex<u64>,
}

impl Metrics {
    /// Registers all metrics. Each known label begins at 0.
    ///
    /// # Errors
    /// A metric is declared wrongly.
    pub(crate) fn new(pool: &PoolName) -> Result<Self, prometheus::Error> {
        let metrics = Self::declared(pool.to_string())?;
        metrics.register()?;
        metrics.begin_at_zero();
        Ok(metrics)
    }

    /// All metrics, with their help texts.
    fn declared(pool: String) -> Result<Self, prometheus::Error> {
        let counters =
            |name, help, labels: &[&str]| IntCounterVec::new(Opts::new(name, help), labels);
        let gauges = |name, help, labels: &[&str]| IntGaugeVec::new(Opts::new(name, help), labels);
        let (duration, lateness, batch) = Self::histograms(&pool)?;
        Ok(Self {
            tasks: counters(
                "mayfly_engine_tasks_total",
                "Finished tasks, by kind and outcome. outcome: ok; failed; refused (not begun); retried (parked again).",
                &["pool", "kind", "outcome"],
            )?,
            duration,
            in_flight: gauges(
                "mayfly_engine_tasks_in_flight",
                "Tasks in progress.",
                &["pool", "kind"],
            )?,
            lateness,
            batch,
            reconnects: counters(
                "mayfly_engine_broker_reconnects_total",
                "Connections to RabbitMQ that were opened after the first.",
                &["pool"],
            )?,
            retries: counters(
                "mayfly_engine_retries_total",
                "Retries of tasks, by reason.",
                &["pool", "reason"],
            )?,
            refused: counters(
                "mayfly_engine_tasks_refused_total",
                "Tasks that were refused before they began, by reason. docs/runbook.md (MayflyTasksRefused) explains each.",
                &["pool", "reason"],
            )?,
            skipped: gauges(
                "mayfly_engine_grants_skipped",
                "Pairs of object and privilege that grant patterns skipped at the last check: the admin may not grant them, or nobody can.",
                &["pool"],
            )?,
            waiting: gauges(
                "mayfly_engine_grants_waiting",
                "Pairs of object and privilege that grant roles get later: another transaction holds the object, or the time for granting was over.",
                &["pool"],
            )?,
            clock_skew: GenericGauge::with_opts(Opts::new(
                "mayfly_clock_skew_seconds",
                "The engine's clock minus the database's, in seconds. Of several servers it is the largest difference in the last 10 min.",
            ))?,
            quarantined: counters(
                "mayfly_engine_left_objects_total",
                "Objects that grant roles owned and that were given to the quarantine role (PostgreSQL 14 and 15).",
                &["pool"],
            )?,
            tls_reloaded: gauges(
                "mayfly_tls_last_reload_successful",
                "1 while a listener uses its present certificate files, or has none. 0 while these files cannot be used and the listener keeps the earlier certificate.",
                &["listener"],
            )?,
            info: gauges(
                "mayfly_build_info",
                "Always 1. The label has the version of this program.",
                &["version"],
            )?,
            unreadable: Mutex::default(),
            registry: Registry::new(),
            pool,
        })
    }

    /// The time of a task, the lateness of a drop, and the size of a batch.
    fn histograms(pool: &str) -> Result<(HistogramVec, Histogram, Histogram), prometheus::Error> {
        let of_pool = |name: &str, help: &str, buckets: &[f64]| {
            let opts = HistogramOpts::new(name, help).const_label("pool", pool);
            Histogram::with_opts(opts.buckets(buckets.to_vec()))
        };
        let duration = HistogramVec::new(
            HistogramOpts::new(
                "mayfly_engine_task_duration_seconds",
                "Time from the delivery of a task until it is settled, in seconds.",
            )
            .buckets(SECONDS.to_vec()),
            &["pool", "kind"],
        )?;
        let lateness = of_pool(
            "mayfly_engine_revoke_lateness_seconds",
            "Time from an account's VALID UNTIL to its drop, in seconds, by the database's clock.",
            LATENESS_SECONDS,
        )?;
        let batch = of_pool(
            "mayfly_engine_revoke_batch_size",
            "Number of revocations that an engine does together on one database server.",
            BATCH,
        )?;
        Ok((duration, lateness, batch))
    }

    fn register(&self) -> Result<(), prometheus::Error> {
        let all: [Box<dyn Collector>; 14] = [
            Box::new(self.info.clone()),
            Box::new(self.tasks.clone()),
            Box::new(self.duration.clone()),
            Box::new(self.in_flight.clone()),
            Box::new(self.lateness.clone()),
            Box::new(self.batch.clone()),
            Box::new(self.retries.clone()),
            Box::new(self.refused.clone()),
            Box::new(self.skipped.clone()),
            Box::new(self.waiting.clone()),
            Box::new(self.clock_skew.clone()),
            Box::new(self.quarantined.clone()),
            Box::new(self.tls_reloaded.clone()),
            Box::new(self.reconnects.clone()),
        ];
        for one in all {
            self.registry.register(one)?;
        }
        Ok(())
    }

    /// Sets every known label to 0.
    fn begin_at_zero(&self) {
        let pool = self.pool.as_str();
        self.info
            .with_label_values(&[mayfly_common::VERSION])
            .set(1);
        self.quarantined.with_label_values(&[pool]);
        self.reconnects.with_label_values(&[pool]);
        self.skipped.with_label_values(&[pool]);
        self.waiting.with_label_values(&[pool]);
        for kind in Kind::TO_ENGINES.iter().map(|kind| kind.as_str()) {
            for ending in [Ending::Ok, Ending::Failed, Ending::Refused, Ending::Retried] {
                self.tasks.with_label_values(&[pool, kind, ending.label()]);
            }
            self.duration.with_label_values(&[pool, kind]);
            self.in_flight.with_label_values(&[pool, kind]);
        }
        for reason in [
            "past_deadline",
            "unknown_version",
            "other_key",
            "not_authentic",
            UNREADABLE,
        ] {
            self.refused.with_label_values(&[pool, reason]);
        }
        for reason in ["conflict", "connection", "replica_lag", "server_busy"] {
            self.retries.with_label_values(&[pool, reason]);
        }
    }

    /// Counts a task when it begins.
    pub(crate) fn begun(&self, kind: Kind) {
        self.in_flight
            .with_label_values(&[&self.pool, kind.as_str()])
            .inc();
    }

    /// Counts a settled task. `seconds`: the time since its delivery.
    pub(crate) fn ended(&self, kind: Kind, ending: Ending, seconds: f64) {
        self.in_flight
            .with_label_values(&[&self.pool, kind.as_str()])
            .dec();
        self.tasks
            .with_label_values(&[&self.pool, kind.as_str(), ending.label()])
            .inc();
        self.duration
            .with_label_values(&[&self.pool, kind.as_str()])
            .observe(seconds);
    }

    /// Tasks in flight, of all kinds.
    pub(crate) fn in_flight(&self) -> u32 {
        Kind::TO_ENGINES
            .iter()
            .map(|kind| {
                self.in_flight
                    .with_label_values(&[&self.pool, kind.as_str()])
                    .get()
            })
            .sum::<i64>()
            .try_into()
            .unwrap_or(0)
    }

    /// Counts a dropped account. `late_seconds`: the time since its `VALID UNTIL`.
    pub(crate) fn dropped(&self, late_seconds: f64) {
        self.lateness.observe(late_seconds.max(0.0));
    }

    /// Counts a batch of `size` revocations.
    pub(crate) fn batch(&self, size: usize) {
        self.batch.observe(size as f64);
    }

    /// Counts a second or later try, by its reason.
    pub(crate) fn retried(&self, reason: &str) {
        self.retries.with_label_values(&[&self.pool, reason]).inc();
    }

    /// Counts a task that was refused before it began, by the reason.
    pub(crate) fn refused(&self, reason: &str) {
        self.refused.with_label_values(&[&self.pool, reason]).inc();
    }

    /// Adds to the number of pairs that grant patterns skipped.
    pub(crate) fn skipped(&self, pairs: usize) {
        self.skipped
            .with_label_values(&[&self.pool])
            .set(i64::try_from(pairs).unwrap_or(i64::MAX));
    }

    /// Sets the number of pairs that grant roles lack at present.
    pub(crate) fn waiting(&self, pairs: usize) {
        self.waiting
            .with_label_values(&[&self.pool])
            .set(i64::try_from(pairs).unwrap_or(i64::MAX));
    }

    /// Sets whether the certificate of the admin listener is current.
    pub(crate) fn tls(&self, admin: Option<&Tls>) {
        self.tls_reloaded
            .with_label_values(&["admin"])
            .set(i64::from(admin.is_none_or(Tls::is_current)));
    }

    /// All metrics in Prometheus' text format.
    pub(crate) fn text(&self, elsewhere: &Elsewhere) -> String {
        self.clock_skew.set(elsewhere.clock_skew_seconds);
        let left = self.quarantined.with_label_values(&[&self.pool]);
        left.inc_by(elsewhere.quarantined.saturating_sub(left.get()));
        let reconnects = self.reconnects.with_label_values(&[&self.pool]);
        reconnects.inc_by(elsewhere.reconnects.saturating_sub(reconnects.get()));
        let refused = self.refused.with_label_values(&[&self.pool, UNREADABLE]);
        let mut counted = self.unreadable.lock();
        refused.inc_by(elsewhere.unreadable.saturating_sub(*counted));
        *counted = elsewhere.unreadable;
        drop(counted);
        let mut text = Vec::new();
        if TextEncoder::new()
            .encode(&self.registry.gather(), &mut text)
            .is_err()
        {
            text.clear();
        }
        String::from_utf8(text).unwrap_or_default()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_never_happened_is_reported_as_zero() {
        let text = Metrics::new(&"pool1".parse().unwrap())
            .unwrap()
            .text(&Elsewhere::default());
        for line in [
            r#"mayfly_engine_tasks_total{kind="create",outcome="ok",pool="pool1"} 0"#,
            r#"mayfly_engine_tasks_in_flight{kind="revoke",pool="pool1"} 0"#,
            r#"mayfly_engine_revoke_lateness_seconds_count{pool="pool1"} 0"#,
            r#"mayfly_engine_revoke_batch_size_count{pool="pool1"} 0"#,
            r#"mayfly_engine_broker_reconnects_total{pool="pool1"} 0"#,
            r#"mayfly_engine_tasks_refused_total{pool="pool1",reason="past_deadline"} 0"#,
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
