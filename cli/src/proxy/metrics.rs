//! What the proxy counts, for Prometheus. The help texts are the documentation.

use prometheus::{
    Encoder, Gauge, GaugeVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

/// Why a session did not begin: the label `reason`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    NoLease,
    Server,
    Unreachable,
    Password,
    Policy,
    Limit,
    Startup,
}

impl Reason {
    const ALL: [Self; 7] = [
        Self::NoLease,
        Self::Server,
        Self::Unreachable,
        Self::Password,
        Self::Policy,
        Self::Limit,
        Self::Startup,
    ];

    fn label(self) -> &'static str {
        match self {
            Self::NoLease => "no_lease",
            Self::Server => "server",
            Self::Unreachable => "unreachable",
            Self::Password => "password",
            Self::Policy => "policy",
            Self::Limit => "limit",
            Self::Startup => "startup",
        }
    }
}

/// The metrics of all listeners.
pub(super) struct Metrics {
    registry: Registry,
    connections: IntGaugeVec,
    opened: IntCounterVec,
    moved: IntCounterVec,
    swapped: IntCounterVec,
    cut: IntCounterVec,
    refused: IntCounterVec,
    leases: IntCounterVec,
    life_left: GaugeVec,
}

/// The metrics of one listener.
pub(super) struct Counted {
    current: IntGauge,
    earlier: IntGauge,
    pub(super) opened: IntCounter,
    pub(super) moved: IntCounter,
    pub(super) swapped: IntCounter,
    pub(super) cut: IntCounter,
    pub(super) leases: IntCounter,
    life_left: Gauge,
    refused: IntCounterVec,
    listener: String,
}

impl Metrics {
    /// All metrics, at 0.
    ///
    /// # Errors
    /// A name is used twice.
    pub(super) fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let counter = |name: &str, help: &str, labels: &[&str]| {
            let counter = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let connections = IntGaugeVec::new(
            Opts::new(
                "mayfly_proxy_connections",
                "Sessions, by account: that of the current lease, or that of an earlier lease.",
            ),
            &["listener", "lease"],
        )?;
        registry.register(Box::new(connections.clone()))?;
        let life_left = GaugeVec::new(
            Opts::new(
                "mayfly_proxy_lease_life_left_seconds",
                "Time to the end of the current lease, in seconds. 0 without a lease.",
            ),
            &["listener"],
        )?;
        registry.register(Box::new(life_left.clone()))?;
        Ok(Self {
            opened: counter(
                "mayfly_proxy_connections_total",
                "Sessions that have begun.",
                &["listener"],
            )?,
            moved: counter(
                "mayfly_proxy_moved_total",
                "Idle sessions that were ended, so that their clients connect again with a new account.",
                &["listener"],
            )?,
            swapped: counter(
                "mayfly_proxy_swapped_total",
                "How many times a session got a new account while its client stayed connected (--hold).",
                &["listener"],
            )?,
            cut: counter(
                "mayfly_proxy_cut_total",
                "Sessions that were in use at the end of their lease or of the drain, and were cut.",
                &["listener"],
            )?,
            refused: counter(
                "mayfly_proxy_logins_refused_total",
                "Sessions that did not begin, by reason.",
                &["listener", "reason"],
            )?,
            leases: counter(
                "mayfly_proxy_leases_total",
                "Leases that new sessions have used.",
                &["listener"],
            )?,
            connections,
            life_left,
            registry,
        })
    }

    /// The metrics of a listener.
    pub(super) fn of(&self, listener: &str) -> Counted {
        let one = [listener];
        for reason in Reason::ALL {
            self.refused.with_label_values(&[listener, reason.label()]);
        }
        Counted {
            current: self.connections.with_label_values(&[listener, "current"]),
            earlier: self.connections.with_label_values(&[listener, "earlier"]),
            opened: self.opened.with_label_values(&one),
            moved: self.moved.with_label_values(&one),
            swapped: self.swapped.with_label_values(&one),
            cut: self.cut.with_label_values(&one),
            leases: self.leases.with_label_values(&one),
            life_left: self.life_left.with_label_values(&one),
            refused: self.refused.clone(),
            listener: listener.to_owned(),
        }
    }

    /// All metrics in Prometheus' text format.
    pub(super) fn text(&self) -> String {
        let mut text = Vec::new();
        // Writing into memory does not fail.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        String::from_utf8_lossy(&text).into_owned()
    }
}

impl Counted {
    /// A session did not begin.
    pub(super) fn refused(&self, reason: Reason) {
        let labels = [self.listener.as_str(), reason.label()];
        self.refused.with_label_values(&labels).inc();
    }

    pub(super) fn measure(&self, current: usize, earlier: usize, life_left: f64) {
        let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.current.set(number(current));
        self.earlier.set(number(earlier));
        self.life_left.set(life_left);
    }
}
