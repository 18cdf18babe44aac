//! How many connections an engine has to one server at a time, whatever admins and databases they are
//! for. Connections that rest give way to those that are needed; who finds none free waits for one.
//!
//! A task may need a second connection beside its first, to another database. One place is kept for
//! those: else all places could be held by tasks that wait for a second.
//!
//! The connection that is kept for revocations ([`super::kept`]) is not counted.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Deserialize;
use tokio::sync::Notify;

use super::limits::ServerLimits;

/// How long an engine gets along with fewer connections, after it saw that the server, or a limit of
/// the admin or the database, leaves none for others.
const CROWDED_FOR: Duration = Duration::from_secs(5);

/// Most connections to one server (`engine.connections_per_server`), 2 to 200.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "usize")]
pub(crate) struct Connections(usize);

impl Default for Connections {
    fn default() -> Self {
        Self(16)
    }
}

impl TryFrom<usize> for Connections {
    type Error = String;

    fn try_from(number: usize) -> Result<Self, String> {
        match number {
            2..=200 => Ok(Self(number)),
            _ => Err("engine.connections_per_server is 2 to 200".to_owned()),
        }
    }
}

impl std::fmt::Display for Connections {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    /// A task that has no other.
    First,
    /// A task that has one and needs a second.
    Beside,
}

/// The connections to one server.
pub(super) struct Budget {
    most: usize,
    counts: Mutex<Counts>,
    /// A place has become free, or a connection has come to rest.
    pub(super) changed: Notify,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Counts {
    /// Those in use and those that rest.
    open: usize,
    /// Those in use as a task's first.
    first: usize,
    /// No more of these, until then.
    crowded: Option<(usize, Instant)>,
}

/// Whether a connection may be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum May {
    /// It may.
    Open,
    /// Once one of those that rest is closed.
    IfOneGivesWay,
    /// Not now.
    Wait,
}

impl Counts {
    fn most_first(&self, most: usize, now: Instant) -> usize {
        let most = most.saturating_sub(1).max(1);
        match self.crowded {
            Some((crowded, until)) if now < until => most.min(crowded),
            _ => most,
        }
    }

    /// Whether another may be in use so.
    fn may_use(&self, most: usize, wanted: Use, now: Instant) -> bool {
        wanted == Use::Beside || self.first < self.most_first(most, now)
    }

    fn may_open(&self, most: usize, wanted: Use, now: Instant) -> May {
        if !self.may_use(most, wanted, now) {
            May::Wait
        } else if self.open < most {
            May::Open
        } else {
            May::IfOneGivesWay
        }
    }
}

impl Budget {
    pub(super) fn new(most: Connections) -> Self {
        Self {
            most: most.0,
            counts: Mutex::default(),
            changed: Notify::new(),
        }
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The limit.
    pub(super) fn most(&self) -> usize {
        self.most
    }

    /// Whether tasks wait for one another's connections, or had to a moment ago.
    pub(super) fn is_short(&self) -> bool {
        !self.may_use(Use::First) || self.is_crowded()
    }

    /// Whether a connection that rests may be used.
    pub(super) fn may_use(&self, wanted: Use) -> bool {
        self.counts().may_use(self.most, wanted, Instant::now())
    }

    /// The server, or a limit there, has no room: connections that rest are not kept.
    fn is_crowded(&self) -> bool {
        let crowded = self.counts().crowded;
        crowded.is_some_and(|(_, until)| Instant::now() < until)
    }
}

/// A place for a connection; free again when dropped.
pub(super) struct Slot {
    limits: Arc<ServerLimits>,
    /// None: it rests.
    used: Option<Use>,
}

impl Slot {
    /// Takes a place for a new connection.
    ///
    /// # Errors
    /// What has to happen first.
    pub(super) fn take(limits: &Arc<ServerLimits>, wanted: Use) -> Result<Self, May> {
        let budget = &limits.budget;
        let mut counts = budget.counts();
        match counts.may_open(budget.most, wanted, Instant::now()) {
            May::Open => {}
            not_now => return Err(not_now),
        }
        counts.open += 1;
        counts.first += usize::from(wanted == Use::First);
        drop(counts);
        Ok(Self {
            limits: limits.clone(),
            used: Some(wanted),
        })
    }

    /// Whether it is of this server.
    pub(super) fn is_of(&self, limits: &Arc<ServerLimits>) -> bool {
        Arc::ptr_eq(&self.limits, limits)
    }

    /// Its connection is used again.
    pub(super) fn wake(&mut self, wanted: Use) {
        self.change(Some(wanted));
    }

    /// Its connection rests. False: it had better be closed, since others need the room.
    pub(super) fn rest(&mut self) -> bool {
        let was_beside = self.used == Some(Use::Beside);
        self.change(None);
        !(was_beside && self.limits.budget.is_crowded())
    }

    /// Says that the server has no room for this one. Where the engine has others there, it gets along
    /// with those for a while.
    pub(super) fn gives_way(&self) -> bool {
        if self.used != Some(Use::First) {
            return false;
        }
        let mut counts = self.limits.budget.counts();
        let others = counts.first.saturating_sub(1);
        if others == 0 {
            return false;
        }
        counts.crowded = Some((others, Instant::now() + CROWDED_FOR));
        true
    }

    fn change(&mut self, to: Option<Use>) {
        let mut counts = self.limits.budget.counts();
        counts.first -= usize::from(self.used == Some(Use::First));
        counts.first += usize::from(to == Some(Use::First));
        self.used = to;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.change(None);
        self.limits.budget.counts().open -= 1;
        self.limits.budget.changed.notify_waiters();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn counts(open: usize, first: usize, crowded: Option<usize>) -> (Counts, Instant) {
        let now = Instant::now();
        let crowded = crowded.map(|most| (most, now + CROWDED_FOR));
        (
            Counts {
                open,
                first,
                crowded,
            },
            now,
        )
    }

    #[test]
    fn the_last_place_is_for_a_second_connection() {
        for (open, first, crowded, wanted, may) in [
            (0, 0, None, Use::First, May::Open),
            (2, 2, None, Use::First, May::Open),
            (3, 3, None, Use::First, May::Wait),
            (3, 3, None, Use::Beside, May::Open),
            (4, 3, None, Use::Beside, May::IfOneGivesWay),
            (4, 1, None, Use::First, May::IfOneGivesWay),
            (1, 1, Some(1), Use::First, May::Wait),
            (1, 0, Some(1), Use::First, May::Open),
            (1, 1, Some(1), Use::Beside, May::Open),
        ] {
            let (counts, now) = counts(open, first, crowded);
            assert_eq!(counts.may_open(4, wanted, now), may, "{counts:?}");
        }
        // It does not last.
        let (counts, now) = counts(1, 1, Some(1));
        assert_eq!(counts.may_open(4, Use::First, now + CROWDED_FOR), May::Open);
    }

    #[test]
    fn an_engine_always_has_one() {
        let (none, now) = counts(0, 0, None);
        assert_eq!(none.most_first(2, now), 1);
        assert!(Connections::try_from(1).is_err() && Connections::try_from(2).is_ok());
    }
}
