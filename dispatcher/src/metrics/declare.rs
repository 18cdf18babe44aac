//! Declares metrics and registers them in one step.

use prometheus::core::Collector;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry,
};

/// Declares metrics in a registry. Each method fails if the name is not valid or already registered; a test finds
/// that.
pub(super) struct Declare<'a>(pub(super) &'a Registry);

type Declared<M> = Result<M, prometheus::Error>;

impl Declare<'_> {
    pub(super) fn counter(&self, name: &str, help: &str) -> Declared<IntCounter> {
        self.register(IntCounter::new(name, help)?)
    }

    pub(super) fn counters(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Declared<IntCounterVec> {
        self.register(IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    pub(super) fn gauge(&self, name: &str, help: &str) -> Declared<IntGauge> {
        self.register(IntGauge::new(name, help)?)
    }

    pub(super) fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> Declared<IntGaugeVec> {
        self.register(IntGaugeVec::new(Opts::new(name, help), labels)?)
    }

    pub(super) fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Declared<Histogram> {
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        self.register(Histogram::with_opts(options)?)
    }

    pub(super) fn histograms(
        &self,
        name: &str,
        help: &str,
        buckets: &[f64],
        labels: &[&str],
    ) -> Declared<HistogramVec> {
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        self.register(HistogramVec::new(options, labels)?)
    }

    fn register<M: Collector + Clone + 'static>(&self, metric: M) -> Declared<M> {
        self.0.register(Box::new(metric.clone()))?;
        Ok(metric)
    }
}
