//! Waits for a server in a transient condition, within the budget of a create.

use std::time::{Duration, Instant};

use mayfly_protocol::target::Target;
use mayfly_protocol::task::{Failure, FailureCode};
use mayfly_protocol::timing::timing;
use rand::RngExt;
use tracing::debug;

use super::servers::Servers;

/// First pause between two tries at a server in a transient condition: 100 ms, doubling, at most 1 s.
const CONDITION_PAUSE_FIRST: Duration = Duration::from_millis(100);
const CONDITION_PAUSE_MAX: Duration = Duration::from_secs(1);
/// How long creates wait for a server without a free connection slot. After this time they fail at once, so that
/// they do not use up places that tasks for other servers need.
const FULL_PATIENCE: Duration = Duration::from_secs(3);

/// Waits while a server is in a transient condition: a failover, a restart, too many connections.
pub(super) struct ServerWait<'t> {
    target: &'t Target,
    arrived: Instant,
    pause: Duration,
    /// Whether the next try needs a new connection.
    pub(super) reconnect: bool,
    waited_out: Option<Failure>,
}

impl<'t> ServerWait<'t> {
    pub(super) fn new(target: &'t Target, arrived: Instant) -> Self {
        Self {
            target,
            arrived,
            pause: CONDITION_PAUSE_FIRST,
            reconnect: false,
            waited_out: None,
        }
    }

    /// Returns when the next try may begin.
    ///
    /// # Errors
    /// The failure is not transient, or no time is left.
    pub(super) async fn out(&mut self, servers: &Servers, failure: Failure) -> Result<(), Failure> {
        let is_time_left = self.arrived.elapsed() + self.pause
            < timing().create_budget - timing().create_statement;
        let is_full = failure.full && servers.limits(self.target).full_for() > FULL_PATIENCE;
        if !failure.transient || !is_time_left || is_full {
            // The failure for which the task waited says more than a time-out.
            return Err(match self.waited_out.take() {
                Some(cause) if failure.code == FailureCode::PastDeadline => cause,
                _ => failure,
            });
        }
        debug!(
            reason = failure.message,
            "a create waits until the server is available"
        );
        self.waited_out = Some(failure);
        self.reconnect = true;
        let jitter = rand::rng().random_range(0.8..1.2);
        tokio::time::sleep(self.pause.mul_f64(jitter)).await;
        self.pause = (self.pause * 2).min(CONDITION_PAUSE_MAX);
        Ok(())
    }
}
