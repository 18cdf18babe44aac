//! How long a read pauses before it asks a server again that had no free connection slot. This module decides; its
//! callers wait.

use std::time::Duration;

/// The first pause of a read. Each later pause is twice as long.
const FIRST: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_secs(2);
/// Minimum time that must be left for a create after a pause.
const CREATE_TAKES: Duration = Duration::from_secs(5);

/// The pauses of one read.
pub(super) struct SlotPause(Duration);

impl Default for SlotPause {
    fn default() -> Self {
        Self(FIRST)
    }
}

impl SlotPause {
    /// The next pause of a read. `left` is the time for which its caller still waits. `None`: a create after the
    /// pause would not have enough time.
    pub(super) fn next(&mut self, left: Duration) -> Option<Duration> {
        let pause = self.0;
        if left <= pause + CREATE_TAKES {
            return None;
        }
        self.0 = (pause * 2).min(LONGEST);
        Some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_and_leave_time_for_a_create() {
        let mut pauses = SlotPause::default();
        for (left_ms, pause_ms) in [
            (30_000, Some(500)),
            (29_000, Some(1_000)),
            (27_000, Some(2_000)),
            (24_000, Some(2_000)),
            (7_001, Some(2_000)),
            (7_000, None),
            (0, None),
        ] {
            let pause = pauses.next(Duration::from_millis(left_ms));
            assert_eq!(pause, pause_ms.map(Duration::from_millis), "{left_ms}");
        }
    }
}
