//! The state that all parts of the dispatcher share: store, broker, identity, memory and limits. The other
//! modules work on it.

pub(crate) mod bundles;
pub(crate) mod clocks;
pub(crate) mod failed_reads;
pub(crate) mod registry;
pub(crate) mod replies;
pub(crate) mod tidy_queue;
pub(crate) mod token_lookup;
pub(crate) mod turns;

use std::sync::atomic::{AtomicBool, Ordering};

use jiff::Timestamp;
use mayfly_common::broker::Broker;
use mayfly_protocol::names::PoolName;
use tokio::sync::Notify;
use tokio_util::task::TaskTracker;

use crate::app::bundles::Bundles;
use crate::app::clocks::Clocks;
use crate::app::failed_reads::FailedReads;
use crate::app::registry::Registry;
use crate::app::replies::Replies;
use crate::app::tidy_queue::TidyQueue;
use crate::app::token_lookup::Tokens;
use crate::app::turns::Fair;
use crate::metrics::Metrics;
use crate::settings::Limits;
use crate::store::{Identity, Store};

pub(crate) struct App {
    pub(crate) store: Store,
    pub(crate) broker: Broker,
    /// The installation's id and keys.
    pub(crate) identity: Identity,
    pub(crate) registry: Registry,
    /// Requests in progress, with the callers that wait for their answers.
    pub(crate) replies: Replies,
    /// Reads that wait for their turn at a server.
    pub(crate) fair: Fair,
    /// Differences between the databases' clocks and the store's.
    pub(crate) clocks: Clocks,
    /// Tokens that were looked up recently.
    pub(crate) tokens: Tokens,
    pub(crate) metrics: Metrics,
    /// Limits from the settings.
    pub(crate) limits: Limits,
    /// Issues in progress. They are finished before the process ends.
    pub(crate) issues: TaskTracker,
    /// Notifies the reconciler that something is due.
    pub(crate) reconcile: Notify,
    /// Servers that may have roles that nothing needs.
    pub(crate) tidying: TidyQueue,
    /// Name of this dispatcher among those with the same store.
    pub(crate) name: String,
    /// Whether this dispatcher is the one that reconciles.
    pub(crate) leads: AtomicBool,
    /// Requests that the ends of all leases are parked again, because the broker lost some.
    pub(crate) park_again: Notify,
    /// Requests a check whether all ends are parked.
    pub(crate) see_parked: Notify,
    /// Secrets whose last read failed.
    pub(crate) failed_reads: FailedReads,
    /// Bundles of certificate authorities at the broker.
    pub(crate) authorities: Bundles,
    /// A probe of the delay levels arrived at a wrong queue.
    pub(crate) probe_astray: Notify,
    /// Whether this dispatcher takes no new work.
    pub(crate) draining: AtomicBool,
}

impl App {
    /// The clock that decides about the status of leases: the store's.
    pub(crate) fn now(&self) -> Timestamp {
        self.store.now()
    }

    /// Whether this dispatcher can serve requests.
    ///
    /// # Errors
    /// The reason why not, as a message for operators.
    pub(crate) fn ready(&self) -> Result<(), String> {
        if self.draining.load(Ordering::Relaxed) {
            Err("draining".to_owned())
        } else if let Some(taken) = self.broker.taken() {
            Err(taken.to_string())
        } else if !self.broker.was_tried() {
            // Otherwise the first reads in a rolling update would be refused. An unreachable broker does not count.
            Err("connecting to the broker".to_owned())
        } else {
            self.store.ready()
        }
    }

    /// Number of engines of a pool: consumers of its queue, or live engines by their heartbeats while the broker is
    /// unreachable.
    pub(crate) async fn engines_of(&self, pool: &PoolName) -> usize {
        match self.broker.engines_of(pool).await {
            Ok(n) => usize::try_from(n).unwrap_or(usize::MAX),
            Err(_) => self.registry.count(pool),
        }
    }
}
