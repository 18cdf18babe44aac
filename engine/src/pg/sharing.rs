//! How tasks share the engine's connections to a server, within its [`super::budget`].

use std::sync::Arc;
use std::time::{Duration, Instant};

use mayfly_protocol::task::{Failure, FailureCode};

use super::budget::{May, Use};
use super::connect::{Connected, Names};
use super::limits::ServerLimits;
use super::servers::Servers;
use super::slot::Slot;
use super::target_key::Key;

/// How long an unused connection is kept.
const IDLE_KEEP: Duration = Duration::from_secs(1);
/// How long a task waits for one of the engine's connections.
pub(super) const SLOT_PATIENCE: Duration = Duration::from_secs(2);

/// An idle connection, with its place.
pub(super) struct Resting {
    since: Instant,
    pub(super) connected: Connected,
    pub(super) slot: Slot,
}

impl Resting {
    pub(super) fn new(connected: Connected, slot: Slot) -> Self {
        Self {
            since: Instant::now(),
            connected,
            slot,
        }
    }

    pub(super) fn is_good(&self) -> bool {
        self.since.elapsed() < IDLE_KEEP && !self.connected.client.is_closed()
    }
}

/// The kind of connection that a task wants.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    /// Which names it is for.
    pub(super) names: Names,
    /// The use of the connection. `None`: it is for the kept connection.
    pub(super) used: Option<Use>,
    /// Whether a new connection is wanted, not an idle one.
    pub(super) fresh: bool,
    /// Whether a person requested it: then it is tried even if the circuit breaker is open.
    pub(super) asked: bool,
}

impl Wanted {
    /// The need of a task without another connection.
    pub(super) fn first(names: Names) -> Self {
        Self {
            names,
            used: Some(Use::First),
            fresh: false,
            asked: false,
        }
    }
}

impl Wanted {
    /// The need of a task that already has a connection to the server.
    pub(super) fn beside(names: Names) -> Self {
        Self {
            used: Some(Use::Beside),
            ..Self::first(names)
        }
    }
}

/// The source of a connection.
pub(super) enum Place {
    /// An idle connection is used.
    Resting(Box<Resting>),
    /// A new connection must be opened.
    New(Slot),
}

impl Servers {
    /// Finds an idle connection, or a place for a new connection. Waits for it until the given time.
    ///
    /// # Errors
    /// `database_unreachable`, as if the server were full.
    pub(super) async fn place(
        &self,
        limits: &Arc<ServerLimits>,
        key: &Key,
        (used, wanted): (Use, Wanted),
        until: tokio::time::Instant,
    ) -> Result<Place, Failure> {
        loop {
            // The wait is registered before the checks, so that no change after them is missed.
            let mut changed = std::pin::pin!(limits.budget.changed.notified());
            changed.as_mut().enable();
            if !wanted.fresh
                && limits.budget.may_use(used)
                && let Some(mut resting) = self.take_idle(key, wanted.names)
            {
                resting.slot.wake(used);
                return Ok(Place::Resting(Box::new(resting)));
            }
            match Slot::take(limits, used) {
                Ok(slot) => return Ok(Place::New(slot)),
                Err(May::IfOneGivesWay) if self.close_one_idle_at(limits) => continue,
                Err(_) => {}
            }
            if tokio::time::timeout_at(until, changed).await.is_err() {
                return Err(Failure {
                    transient: true,
                    full: true,
                    ..Failure::new(
                        FailureCode::DatabaseUnreachable,
                        limits.all_in_use(SLOT_PATIENCE),
                    )
                });
            }
        }
    }

    fn take_idle(&self, key: &Key, names: Names) -> Option<Resting> {
        let mut idle = self.idle();
        let list = idle.get_mut(key)?;
        list.retain(Resting::is_good);
        let newest = list.iter().rposition(|one| one.connected.serves(names))?;
        Some(list.remove(newest))
    }

    /// Closes the connection to a server that has been idle the longest. Returns `false` if none is idle.
    fn close_one_idle_at(&self, limits: &Arc<ServerLimits>) -> bool {
        let mut idle = self.idle();
        let oldest = idle
            .iter()
            .filter_map(|(key, list)| {
                let place = list.iter().position(|one| one.slot.is_of(limits))?;
                Some((list[place].since, place, key.clone()))
            })
            .min_by_key(|(since, ..)| *since);
        let Some((_, place, key)) = oldest else {
            return false;
        };
        idle.get_mut(&key).map(|list| list.remove(place)).is_some()
    }

    /// Closes all idle connections to a server.
    pub(super) fn close_idle_at(&self, limits: &Arc<ServerLimits>) {
        for list in self.idle().values_mut() {
            list.retain(|one| !one.slot.is_of(limits));
        }
    }
}
