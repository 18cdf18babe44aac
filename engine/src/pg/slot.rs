//! A place among the engine's connections to one server.

use std::sync::Arc;
use std::time::Instant;

use super::budget::{CROWDED_FOR, May, Use};
use super::limits::ServerLimits;

/// A place for a connection. It is free again when this is dropped.
pub(super) struct Slot {
    limits: Arc<ServerLimits>,
    /// The use of the connection. `None`: it is idle.
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
        match counts.may_open(budget.most(), wanted, Instant::now()) {
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

    /// Whether it is a place at this server.
    pub(super) fn is_of(&self, limits: &Arc<ServerLimits>) -> bool {
        Arc::ptr_eq(&self.limits, limits)
    }

    /// Marks its connection as used again.
    pub(super) fn wake(&mut self, wanted: Use) {
        self.change(Some(wanted));
    }

    /// Marks its connection as idle. Returns `false` if the connection should be closed, because others need the
    /// place.
    pub(super) fn rest(&mut self) -> bool {
        let was_beside = self.used == Some(Use::Beside);
        self.change(None);
        !(was_beside && self.limits.budget.is_crowded())
    }

    /// Records that the server has no room for this connection. Returns `true` if the engine has other connections
    /// there; for 5 s it uses only those.
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
