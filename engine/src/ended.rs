//! Leases whose accounts this engine has ended, while a create of theirs could still be delivered. A create that
//! arrives after this is a recorded one, and is refused. The list is in memory only. At other engines the window,
//! and the revocation after it, protect against such creates.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use mayfly_protocol::names::LeaseId;
use mayfly_protocol::timing::timing;
use parking_lot::{Mutex, MutexGuard};

/// Longest window for which an ended account is remembered.
const AT_MOST: Duration = Duration::from_secs(3600);
/// Maximum number of leases remembered. This is more than an engine ends in `ended_memory`; beyond it only the window
/// protects.
const MOST: usize = 200_000;

/// Pause between two removals of old leases.
const CLEAN_EVERY: Duration = Duration::from_secs(5);

/// The remembered leases, each with its end.
#[derive(Debug, Default)]
pub(crate) struct Ended(Mutex<Memory>);

#[derive(Debug, Default)]
struct Memory {
    until: HashMap<LeaseId, Instant>,
    cleaned: Option<Instant>,
}

impl Ended {
    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.0.lock()
    }

    /// Remembers a lease whose create can still be delivered for `window`.
    pub(crate) fn remember(&self, lease: LeaseId, window: Duration) {
        let now = Instant::now();
        let until = now + window.clamp(timing().ended_memory, AT_MOST);
        let mut memory = self.memory();
        if memory
            .cleaned
            .is_none_or(|at| now.duration_since(at) >= CLEAN_EVERY)
        {
            memory.until.retain(|_, until| *until > now);
            memory.cleaned = Some(now);
        }
        if memory.until.len() < MOST {
            let kept = memory.until.entry(lease).or_insert(until);
            *kept = until.max(*kept);
        }
    }

    /// Whether the lease is remembered.
    pub(crate) fn has(&self, lease: LeaseId) -> bool {
        let until = self.memory().until.get(&lease).copied();
        until.is_some_and(|until| until > Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_ended_is_remembered_within_bounds() {
        let ended = Ended::default();
        let (one, other) = (LeaseId::random(), LeaseId::random());
        ended.remember(one, Duration::ZERO);
        assert!(ended.has(one) && !ended.has(other));
        for _ in 0..MOST + 10 {
            ended.remember(LeaseId::random(), Duration::MAX);
        }
        assert!(ended.has(one));
        assert_eq!(ended.memory().until.len(), MOST);
    }
}
