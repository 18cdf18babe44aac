//! How long a request can still have an effect. Engine and dispatcher take their numbers from
//! here, so that an engine begins no create after the moment at which its absence is called final.
//!
//! A request carries its deadline, by the dispatcher's clock. An honest one leaves its queue at
//! that deadline. A recorded one can be sent again at any time, and only the engine's own clock
//! stops it. So the window allows for a clock that is behind, and an engine whose clock is farther
//! off refuses the requests of now, which shows it.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::task::CREATE_BUDGET;

/// How far the clocks of dispatcher and engine may differ, either way, in seconds.
const CLOCKS_SECONDS: u64 = 4;
/// How far the clocks of dispatcher and engine may differ, either way.
pub const CLOCK_ALLOWANCE: SignedDuration = SignedDuration::from_secs(CLOCKS_SECONDS as i64);
/// Longest time a publish is waited for. A request may reach the broker this long after its start.
pub const PUBLISH_LIMIT: Duration = Duration::from_secs(5);
/// A create that was taken in time has begun to make its account by so much after its deadline.
pub const BEGUN_AFTER: Duration =
    Duration::from_secs(PUBLISH_LIMIT.as_secs() + CREATE_BUDGET.as_secs());
/// For what the broker and a COMMIT take, in seconds.
const MARGIN_SECONDS: u64 = 2;

/// This long after its deadline nothing of a request can happen any more, and an engine that says
/// by its own clock that it has looked since then has. An engine whose clock is behind by the
/// allowance begins a request until twice the allowance after the deadline, and commits within
/// [`CREATE_BUDGET`]; one whose clock is ahead says too early by the allowance that it is over.
pub const OVER_AFTER: Duration =
    Duration::from_secs(3 * CLOCKS_SECONDS + CREATE_BUDGET.as_secs() + MARGIN_SECONDS);

// What begins by then is committed within the budget's last part.
const _: () = assert!(BEGUN_AFTER.as_secs() + 4 <= OVER_AFTER.as_secs());
// An honest request that was published late is delivered no later than one by a slow clock.
const _: () = assert!(PUBLISH_LIMIT.as_secs() <= 2 * CLOCKS_SECONDS);

/// What an engine thinks of the dates of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timing {
    /// It may begin.
    InTime,
    /// Its deadline is too long ago.
    Late,
    /// It is of the future: the engine's clock is behind by more than [`CLOCK_ALLOWANCE`], and
    /// could not tell an old request from a new one.
    OfTheFuture,
}

/// Judges a request that was sealed at `issued` and ends at `deadline`, both by the dispatcher's
/// clock, at `now` by the engine's clock. A request without a deadline is late.
pub fn judge(issued: Timestamp, deadline: Option<Timestamp>, now: Timestamp) -> Timing {
    if issued.duration_since(now) > CLOCK_ALLOWANCE {
        Timing::OfTheFuture
    } else if deadline.is_none_or(|deadline| now.duration_since(deadline) > CLOCK_ALLOWANCE) {
        Timing::Late
    } else {
        Timing::InTime
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn at(ms: i64) -> Timestamp {
        Timestamp::from_millisecond(1_000_000_000 + ms).unwrap()
    }

    #[test]
    fn what_an_engine_begins_is_over_before_absence_is_final() {
        let deadline = at(30_000);
        let allowed = i64::try_from(CLOCK_ALLOWANCE.as_millis()).unwrap();
        let over = i64::try_from((OVER_AFTER - CREATE_BUDGET).as_millis()).unwrap();
        for skew in -allowed..=allowed {
            if skew % 100 != 0 {
                continue;
            }
            for after in (-30_000..60_000).step_by(100) {
                let engine = at(30_000 + after + skew);
                let begins = judge(at(0), Some(deadline), engine) == Timing::InTime;
                // Another engine may take it for over, by a clock that is ahead.
                assert!(
                    !begins || after < over - allowed,
                    "skew {skew}, {after} ms after"
                );
                assert!(
                    begins || after > 0,
                    "an honest one is refused: skew {skew}, {after}"
                );
            }
        }
    }

    #[test]
    fn a_clock_that_is_farther_off_shows() {
        let past = at(-1) - CLOCK_ALLOWANCE;
        assert_eq!(judge(at(0), Some(at(30_000)), past), Timing::OfTheFuture);
        assert_eq!(judge(at(0), None, at(0)), Timing::Late);
    }
}
