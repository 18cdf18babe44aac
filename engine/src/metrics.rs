//! The engine's metrics, all of them in one struct (the only file that names prometheus). The
//! help texts are the documentation.

use std::sync::{Mutex, PoisonError};

use mayfly_common::serve::Tls;
use mayfly_protocol::names::PoolName;
use mayfly_protocol::task::Kind;

/// Kinds of message an engine takes.
const KINDS: [Kind; 10] = [
    Kind::Create,
    Kind::Renew,
    Kind::Rotate,
    Kind::Check,
    Kind::Tidy,
    Kind::Sweep,
    Kind::Refresh,
    Kind::Revoke,
    Kind::Ping,
    Kind::Verdict,
];
use prometheus::core::{AtomicF64, GenericGauge};
use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

const SECONDS: &[f64] = &[
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
];
const LATENESS_SECONDS: &[f64] = &[0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0];
const BATCH: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0];

/// Why a message is refused that does not even say what it is.
const UNREADABLE: &str = "unreadable";

/// How a task ended, as the label says it.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Ending {
    /// It was done as asked.
    Ok,
    /// It was not done, and the reply says so.
    Failed,
    /// Not understood or too late.
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

/// What others count, since the process began, or know.
#[derive(Default)]
pub(crate) struct Elsewhere {
    /// Messages that cannot be read.
    pub(crate) unreadable: u64,
    /// Connections to the broker after the first.
    pub(crate) reconnects: u64,
    /// By how much this machine's clock differs from the databases'.
    pub(crate) clock_skew_seconds: f64,
    /// Objects taken from grant roles.
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
    /// The number of unreadable messages that the counter has.
    unreadable: Mutex<u64>,
}

impl Metrics {
    /// Registers everything, with every label that is known beforehand at 0.
    ///
    /// # Errors
    /// A metric is declared wrongly.
    pub(crate) fn new(pool: &PoolName) -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let pool = pool.to_string();
        let with_pool = |name: &str, help: &str, buckets: &[f64]| {
            HistogramOpts::new(name, help)
                .const_label("pool", pool.clone())
                .buckets(buckets.to_vec())
        };
        let metrics = Self {
            tasks: IntCounterVec::new(
                Opts::new(
                    "mayfly_engine_tasks_total",
                    "Finished tasks, by kind and outcome. outcome: ok; failed; refused (not begun); retried (parked again).",
                ),
                &["pool", "kind", "outcome"],
            )?,
            duration: HistogramVec::new(
                HistogramOpts::new(
                    "mayfly_engine_task_duration_seconds",
                    "Time from the delivery of a task until it is settled, in seconds.",
                )
                .buckets(SECONDS.to_vec()),
                &["pool", "kind"],
            )?,
            in_flight: IntGaugeVec::new(
                Opts::new("mayfly_engine_tasks_in_flight", "Tasks in progress."),
                &["pool", "kind"],
            )?,
            lateness: Histogram::with_opts(with_pool(
                "mayfly_engine_revoke_lateness_seconds",
                "Time from an account's VALID UNTIL to its drop, in seconds, by the database's clock.",
                LATENESS_SECONDS,
            ))?,
            batch: Histogram::with_opts(with_pool(
                "mayfly_engine_revoke_batch_size",
                "Number of revocations that an engine does together on one database server.",
                BATCH,
            ))?,
            reconnects: IntCounterVec::new(
                Opts::new(
                    "mayfly_engine_broker_reconnects_total",
                    "Connections to RabbitMQ that were opened after the first.",
                ),
                &["pool"],
            )?,
            retries: IntCounterVec::new(
                Opts::new(
                    "mayfly_engine_retries_total",
                    "Retries of tasks, by reason.",
                ),
                &["pool", "reason"],
            )?,
            refused: IntCounterVec::new(
                Opts::new(
                    "mayfly_engine_tasks_refused_total",
                    "Tasks that were refused before they began, by reason. docs/runbook.md (MayflyTasksRefused) explains each.",
                ),
                &["pool", "reason"],
            )?,
            skipped: IntGaugeVec::new(
                Opts::new(
                    "mayfly_engine_grants_skipped",
                    "Pairs of object and privilege that grant patterns skipped at the last look: the admin may not grant them, or nobody can.",
                ),
                &["pool"],
            )?,
            waiting: IntGaugeVec::new(
                Opts::new(
                    "mayfly_engine_grants_waiting",
                    "Pairs of object and privilege that grant roles get later: another transaction holds the object, or the time for granting was over.",
                ),
                &["pool"],
            )?,
            clock_skew: GenericGauge::with_opts(Opts::new(
                "mayfly_clock_skew_seconds",
                "The engine's clock minus the database's, in seconds. Of several servers it is the largest difference in the last 10 min.",
            ))?,
            quarantined: IntCounterVec::new(
                Opts::new(
                    "mayfly_engine_left_objects_total",
                    "Objects that grant roles owned and that were given to the quarantine role (PostgreSQL 14 and 15).",
                ),
                &["pool"],
            )?,
            tls_reloaded: IntGaugeVec::new(
                Opts::new(
                    "mayfly_tls_last_reload_successful",
                    "1 while a listener uses its present certificate files, or has none. 0 while these files cannot be used and the listener keeps the earlier certificate.",
                ),
                &["listener"],
            )?,
            unreadable: Mutex::default(),
            registry,
            pool,
        };
        let info = IntGaugeVec::new(
            Opts::new(
                "mayfly_build_info",
                "Always 1. The label has the version of this program.",
            ),
            &["version"],
        )?;
        info.with_label_values(&[mayfly_common::VERSION]).set(1);
        let registry = &metrics.registry;
        registry.register(Box::new(info))?;
        registry.register(Box::new(metrics.tasks.clone()))?;
        registry.register(Box::new(metrics.duration.clone()))?;
        registry.register(Box::new(metrics.in_flight.clone()))?;
        registry.register(Box::new(metrics.lateness.clone()))?;
        registry.register(Box::new(metrics.batch.clone()))?;
        registry.register(Box::new(metrics.retries.clone()))?;
        registry.register(Box::new(metrics.refused.clone()))?;
        registry.register(Box::new(metrics.skipped.clone()))?;
        registry.register(Box::new(metrics.waiting.clone()))?;
        registry.register(Box::new(metrics.clock_skew.clone()))?;
        registry.register(Box::new(metrics.quarantined.clone()))?;
        registry.register(Box::new(metrics.tls_reloaded.clone()))?;
        metrics.quarantined.with_label_values(&[&metrics.pool]);
        registry.register(Box::new(metrics.reconnects.clone()))?;
        metrics.reconnects.with_label_values(&[&metrics.pool]);
        for kind in KINDS {
            for ending in [Ending::Ok, Ending::Failed, Ending::Refused, Ending::Retried] {
                metrics
                    .tasks
                    .with_label_values(&[&metrics.pool, kind.as_str(), ending.label()]);
            }
            metrics
                .duration
                .with_label_values(&[&metrics.pool, kind.as_str()]);
            metrics
                .in_flight
                .with_label_values(&[&metrics.pool, kind.as_str()]);
        }
        for reason in [
            "past_deadline",
            "unknown_version",
            "other_key",
            "not_authentic",
            UNREADABLE,
        ] {
            metrics.refused.with_label_values(&[&metrics.pool, reason]);
        }
        for reason in ["conflict", "connection", "replica_lag", "server_busy"] {
            metrics.retries.with_label_values(&[&metrics.pool, reason]);
        }
        metrics.skipped.with_label_values(&[&metrics.pool]);
        metrics.waiting.with_label_values(&[&metrics.pool]);
        Ok(metrics)
    }

    /// A task is begun.
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
        KINDS
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

    /// A try beyond the first.
    pub(crate) fn retried(&self, reason: &str) {
        self.retries.with_label_values(&[&self.pool, reason]).inc();
    }

    /// A task was not begun.
    pub(crate) fn refused(&self, reason: &str) {
        self.refused.with_label_values(&[&self.pool, reason]).inc();
    }

    /// Grant patterns passed over so much.
    pub(crate) fn skipped(&self, pairs: usize) {
        self.skipped
            .with_label_values(&[&self.pool])
            .set(i64::try_from(pairs).unwrap_or(i64::MAX));
    }

    /// Grant roles lack so much for now.
    pub(crate) fn waiting(&self, pairs: usize) {
        self.waiting
            .with_label_values(&[&self.pool])
            .set(i64::try_from(pairs).unwrap_or(i64::MAX));
    }

    /// How the certificate of the admin listener is.
    pub(crate) fn tls(&self, admin: Option<&Tls>) {
        self.tls_reloaded
            .with_label_values(&["admin"])
            .set(i64::from(admin.is_none_or(Tls::is_current)));
    }

    /// All of it, in Prometheus' text format.
    pub(crate) fn text(&self, elsewhere: &Elsewhere) -> String {
        self.clock_skew.set(elsewhere.clock_skew_seconds);
        let left = self.quarantined.with_label_values(&[&self.pool]);
        left.inc_by(elsewhere.quarantined.saturating_sub(left.get()));
        let reconnects = self.reconnects.with_label_values(&[&self.pool]);
        reconnects.inc_by(elsewhere.reconnects.saturating_sub(reconnects.get()));
        let refused = self.refused.with_label_values(&[&self.pool, UNREADABLE]);
        let mut counted = self
            .unreadable
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
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
