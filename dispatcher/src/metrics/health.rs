//! Metrics of a dispatcher's health: its store, its certificates, and whether it leads.

use mayfly_common::serve::Tls;
use prometheus::{IntCounterVec, IntGauge, IntGaugeVec};

use super::{Declare, Metrics};
use crate::store::Cause;

#[derive(Clone)]
pub(super) struct Health {
    rows_refused: IntCounterVec,
    store_up: IntGauge,
    store_failures: IntCounterVec,
    leads: IntGauge,
    tls_reloaded: IntGaugeVec,
}

impl Health {
    pub(super) fn new(declare: &Declare) -> Result<Self, prometheus::Error> {
        let store_failures = declare.counters(
            "mayfly_dispatcher_store_failures_total",
            "Statements of the lease store that failed because of its disk or its server. cause: full; io; read_only; damaged; away; other.",
            &["cause"],
        )?;
        for cause in Cause::ALL {
            store_failures.with_label_values(&[cause.as_str()]);
        }
        Ok(Self {
            rows_refused: declare.counters(
                "mayfly_dispatcher_store_rows_refused_total",
                "Reads of rows of the lease store whose authentication code is not valid under the master key.",
                &["table"],
            )?,
            store_up: declare.gauge(
                "mayfly_dispatcher_store_up",
                "1 while the lease store is reachable and its statements succeed. 0 for at least 15 s after a failure.",
            )?,
            store_failures,
            leads: declare.gauge(
                "mayfly_dispatcher_reconciler",
                "1 on the dispatcher that reconciles, 0 on the others with the same store.",
            )?,
            tls_reloaded: declare.gauges(
                "mayfly_tls_last_reload_successful",
                "1 while a listener uses its present certificate files, or has none. 0 while these files cannot be used and the listener keeps the earlier certificate.",
                &["listener"],
            )?,
        })
    }
}

impl Metrics {
    /// How many rows of the store were refused since the process began, by table.
    pub(crate) fn rows_refused(&self, refused: impl Iterator<Item = (&'static str, u64)>) {
        for (table, count) in refused {
            let counter = self.health.rows_refused.with_label_values(&[table]);
            counter.inc_by(count.saturating_sub(counter.get()));
        }
    }

    /// Whether the store answers and its statements succeed.
    pub(crate) fn store_up(&self, up: bool) {
        self.health.store_up.set(i64::from(up));
    }

    /// Whether the listeners use their present certificate files.
    pub(crate) fn tls(&self, listeners: &[(&str, Option<Tls>)]) {
        for (listener, tls) in listeners {
            let is_current = tls.as_ref().is_none_or(Tls::is_current);
            self.health
                .tls_reloaded
                .with_label_values(&[listener])
                .set(i64::from(is_current));
        }
    }

    /// How often something failed in the store since the process began, by cause.
    pub(crate) fn store_failures(&self, failures: impl Iterator<Item = (Cause, u64)>) {
        for (cause, count) in failures {
            let counter = self
                .health
                .store_failures
                .with_label_values(&[cause.as_str()]);
            counter.inc_by(count.saturating_sub(counter.get()));
        }
    }

    /// Whether this dispatcher reconciles.
    pub(crate) fn leads(&self, leads: bool) {
        self.health.leads.set(i64::from(leads));
    }
}
