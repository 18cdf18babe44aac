//! The age of the last look at a grant role, and what a create does with it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mayfly_protocol::task::Failure;
use parking_lot::Mutex;

/// A younger look is used, and no other look begins.
const FRESH_FOR: Duration = Duration::from_secs(1);
/// A younger look is used while the next look runs. So a create finds objects that are at least 2 s old.
const USED_FOR: Duration = Duration::from_secs(2);

/// What a create does with the last look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// The create uses the look.
    Use,
    /// The create uses the look, and the next look begins.
    UseAndLook,
    /// The create waits for the next look.
    Wait,
}

/// The looks at one role.
#[derive(Default)]
pub(super) struct Looks {
    pub(super) last: Mutex<LastLook>,
    /// Locked during a look.
    pub(super) turn: Arc<tokio::sync::Mutex<()>>,
}

/// The last look at a role.
#[derive(Debug, Default)]
pub(super) struct LastLook {
    /// The end of the last look that found that the grants are possible. `None`: there was no such look, or the role
    /// is gone.
    pub(super) at: Option<Instant>,
    /// The oid of the role at that look.
    pub(super) oid: Option<u32>,
    /// Time and reason of a failure after that look.
    pub(super) failed: Option<(Instant, Failure)>,
}

impl LastLook {
    /// A look at the role with this oid that has just ended.
    pub(super) fn now(oid: u32) -> Self {
        Self {
            at: Some(Instant::now()),
            oid: Some(oid),
            failed: None,
        }
    }

    /// Whether no other look is needed.
    pub(super) fn is_fresh(&self, now: Instant) -> bool {
        self.is_younger(FRESH_FOR, now)
    }

    /// Decides what a create does at this time. After a failed look it waits for another look, because the grants
    /// may be impossible now.
    pub(super) fn step(&self, now: Instant) -> Step {
        if self.is_fresh(now) {
            Step::Use
        } else if self.failed.is_none() && self.is_younger(USED_FOR, now) {
            Step::UseAndLook
        } else {
            Step::Wait
        }
    }

    /// [`LastLook::step`], and the oid of the role that the look found.
    pub(super) fn seen(&self, now: Instant) -> (Step, Option<u32>) {
        (self.step(now), self.oid)
    }

    fn is_younger(&self, than: Duration, now: Instant) -> bool {
        self.at
            .is_some_and(|at| now.saturating_duration_since(at) < than)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mayfly_protocol::task::FailureCode;

    #[test]
    fn the_age_of_the_last_look_decides_whether_a_create_waits() {
        let at = Instant::now();
        for (age_ms, has_failed, step) in [
            (Some(0), false, Step::Use),
            (Some(999), false, Step::Use),
            (Some(1_000), false, Step::UseAndLook),
            (Some(1_999), false, Step::UseAndLook),
            (Some(2_000), false, Step::Wait),
            (Some(60_000), false, Step::Wait),
            (None, false, Step::Wait),
            // The look beside a create has failed: the next create looks itself.
            (Some(1_000), true, Step::Wait),
            (Some(1_999), true, Step::Wait),
            (None, true, Step::Wait),
        ] {
            let failure = Failure::new(FailureCode::NoSuchObject, "x");
            let look = LastLook {
                at: age_ms.map(|_| at),
                oid: age_ms.map(|_| 7),
                failed: has_failed.then_some((at, failure)),
            };
            let now = at + Duration::from_millis(age_ms.unwrap_or(0));
            assert_eq!(look.step(now), step, "{age_ms:?} {has_failed}");
        }
    }
}
