//! The limit on an engine's concurrent connections to one server, for all admins and databases together. If a task
//! needs a connection, an idle connection may be closed for it. A task that gets no connection waits for one.
//!
//! A task may need a second connection, to another database. One place is reserved for second connections. Otherwise
//! tasks that wait for a second connection could hold all places.
//!
//! The connection that is kept for revocations ([`super::kept`]) is not counted.

use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

/// How long an engine uses fewer connections after the server had no free slot, or a limit of the admin or the
/// database was reached.
pub(super) const CROWDED_FOR: Duration = Duration::from_secs(5);

/// Maximum number of connections to one server (`engine.connections_per_server`), 2 to 200.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
            _ => Err("engine.connections_per_server must be 2 to 200".to_owned()),
        }
    }
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    /// The first connection of a task.
    First,
    /// The second connection of a task.
    Beside,
}

/// The connections to one server.
pub(super) struct Budget {
    most: usize,
    counts: Mutex<Counts>,
    /// Notified when a place has become free, or a connection idle.
    pub(super) changed: Notify,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Counts {
    /// Connections in use, and idle ones.
    pub(super) open: usize,
    /// Connections in use as the first of a task.
    pub(super) first: usize,
    /// A temporary lower limit on `first`, with its end.
    pub(super) crowded: Option<(usize, Instant)>,
}

/// Whether a connection may be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum May {
    /// The connection may be opened now.
    Open,
    /// The connection may be opened once an idle connection is closed.
    IfOneGivesWay,
    /// A place must become free first.
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

    /// Whether a task may use one more connection of this kind.
    fn may_use(&self, most: usize, wanted: Use, now: Instant) -> bool {
        wanted == Use::Beside || self.first < self.most_first(most, now)
    }

    pub(super) fn may_open(&self, most: usize, wanted: Use, now: Instant) -> May {
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

    pub(super) fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock()
    }

    /// The limit on connections.
    pub(super) fn most(&self) -> usize {
        self.most
    }

    /// Whether tasks wait for each other's connections now, or did within the last 5 s.
    pub(super) fn is_short(&self) -> bool {
        !self.may_use(Use::First) || self.is_crowded()
    }

    /// Whether a task may use an idle connection for this.
    pub(super) fn may_use(&self, wanted: Use) -> bool {
        self.counts().may_use(self.most, wanted, Instant::now())
    }

    /// Whether the server had no free slot, or a limit there was reached. Then no idle connections are kept.
    pub(super) fn is_crowded(&self) -> bool {
        let crowded = self.counts().crowded;
        crowded.is_some_and(|(_, until)| Instant::now() < until)
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
        // The lower limit expires.
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
