//! Decisions about a revocation: what an engine does with the role that it found, and what happens to the
//! message then. Nothing here connects to a server or a broker.

use std::time::Duration;

use crate::task::{Failure, FailureCode, Revoke, RevokeMode};
use crate::timing::timing;
use jiff::Timestamp;
use rand::RngExt;

const AWAY_TRIES: u32 = 25;
const FULL_TRIES: u32 = 30;

/// The result of a revocation that did not fail.
#[derive(Debug, Clone, PartialEq)]
pub enum Ended {
    /// The role existed and is gone.
    Dropped {
        /// When it was gone, by the server's clock.
        at: Timestamp,
        /// The identity of the server.
        server: String,
        /// Time since its `VALID UNTIL`, in seconds. Negative if the end was requested earlier.
        late_seconds: f64,
    },
    /// The role was absent.
    Absent {
        /// When it was looked for, by the server's clock.
        at: Timestamp,
        /// The identity of the server.
        server: String,
    },
    /// The account's `VALID UNTIL` has not passed.
    NotDue {
        /// The `VALID UNTIL` of the role.
        until: Timestamp,
        /// The time until then, by the server's clock.
        left: Duration,
    },
    /// The server's connections were busy with other tasks.
    NotTried,
    /// The role is on this server, but the task names another server. Nothing was done yet; see the engine's
    /// `moved.rs`.
    Moved {
        /// The identity of the server on which the role stands.
        server: String,
    },
}

impl Ended {
    /// The word in logs and metrics.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Dropped { .. } => "dropped",
            Self::Absent { .. } => "absent",
            Self::NotDue { .. } => "not_due",
            Self::NotTried => "not_tried",
            Self::Moved { .. } => "moved",
        }
    }
}

/// A role found in the catalog.
#[derive(Debug, Clone)]
pub struct Found {
    /// The role's oid in `pg_authid`.
    pub oid: u32,
    /// The role's comment names this installation and this lease.
    pub ours: bool,
    /// `VALID UNTIL`. `None`: the role has no end.
    pub until: Option<Timestamp>,
    /// Seconds until `VALID UNTIL`, by the server's clock. `None`: the role never ends by itself.
    pub left: Option<f64>,
    /// The server's clock at the look.
    pub now: Timestamp,
}

/// The conclusion from the catalog about the role.
#[derive(Debug, PartialEq)]
pub enum Verdict {
    /// The role is due: end it.
    Due,
    /// There is no such role.
    Absent,
    /// The role is not this lease's: leave it alone.
    Foreign,
    /// The role is not due: try later.
    NotDue {
        /// The `VALID UNTIL` of the role.
        until: Timestamp,
        /// The time until then, by the server's clock.
        left: Duration,
    },
}

/// Decides from the role in the catalog.
pub fn verdict(mode: RevokeMode, found: Option<&Found>) -> Verdict {
    let Some(found) = found else {
        return Verdict::Absent;
    };
    if !found.ours {
        return Verdict::Foreign;
    }
    match (mode, found.left) {
        (RevokeMode::Now, _) => Verdict::Due,
        (RevokeMode::Expire, Some(left)) if left <= 0.0 => Verdict::Due,
        (RevokeMode::Expire, Some(left)) => {
            let until = found.until.unwrap_or(found.now);
            // An end that is too far off counts as the longest time.
            let left = Duration::try_from_secs_f64(left).unwrap_or(Duration::MAX);
            let left = left.min(until.duration_since(found.now).unsigned_abs());
            Verdict::NotDue { until, left }
        }
        // Somebody removed the `VALID UNTIL` of Mayfly's role. The lease still has an end, so the account is due now.
        (RevokeMode::Expire, None) => Verdict::Due,
    }
}

/// What happens to the message.
#[derive(Debug, PartialEq)]
pub enum Next {
    /// The message is acked and not parked.
    Done,
    /// The revocation is parked and comes again.
    Park {
        /// The delay until it comes again.
        after: Duration,
        /// The number of failed tries that the message then names.
        attempt: u32,
        /// The next look is the last: the create can no longer commit.
        settling: bool,
    },
}

/// Whether the result of this revocation is final, because its create can no longer commit.
pub fn is_conclusive(task: &Revoke, settling: bool) -> bool {
    task.window_ms == 0 || settling
}

/// Decides what happens to a revocation. A copy that the reconciler sent is never parked: the reconciler sends the
/// next copy.
pub fn next(task: &Revoke, attempt: u32, settling: bool, result: &Result<Ended, Failure>) -> Next {
    if task.copy {
        return Next::Done;
    }
    match result {
        Ok(Ended::Dropped { .. } | Ended::Absent { .. }) => {
            // While its create could still commit, or be delivered again, the absence is not final.
            if is_conclusive(task, settling) {
                Next::Done
            } else if is_early(task, attempt, result) {
                Next::Park {
                    after: timing().look_again,
                    attempt: attempt.saturating_add(1),
                    settling: false,
                }
            } else {
                Next::Park {
                    after: Duration::from_millis(task.window_ms),
                    attempt: 0,
                    settling: true,
                }
            }
        }
        Ok(Ended::NotTried | Ended::Moved { .. }) => not_tried(task, attempt, settling),
        Ok(Ended::NotDue { left, .. }) => Next::Park {
            after: left.saturating_add(timing().due_margin),
            attempt: 0,
            settling,
        },
        Err(failure) => {
            let attempt = attempt.saturating_add(1);
            let after = if failure.full {
                // The server answers, and a slot may become free at any time.
                jitter(if attempt <= FULL_TRIES {
                    timing().full_pause
                } else {
                    timing().away_max
                })
            } else if failure.code == FailureCode::DatabaseUnreachable {
                backoff_away(attempt)
            } else {
                backoff(attempt)
            };
            Next::Park {
                after,
                attempt,
                settling,
            }
        }
    }
}

/// Whether to look again soon for an account that was absent at its end. The TTL may be shorter than the create
/// takes, and then the account is due when it appears. These looks end when together they took as long as the window.
/// After the last of them the engine still waits for a full window.
fn is_early(task: &Revoke, attempt: u32, result: &Result<Ended, Failure>) -> bool {
    let looked = timing().look_again.saturating_mul(attempt);
    task.mode == RevokeMode::Expire
        && matches!(result, Ok(Ended::Absent { .. }))
        && looked < Duration::from_millis(task.window_ms)
}

/// What happens to a revocation that was not tried.
pub fn not_tried(task: &Revoke, attempt: u32, settling: bool) -> Next {
    if task.copy {
        return Next::Done;
    }
    Next::Park {
        after: jitter(timing().server_busy),
        attempt,
        settling,
    }
}

/// Pause before the try with this number.
pub fn backoff(attempt: u32) -> Duration {
    jitter(doubled(attempt).min(timing().backoff_max))
}

/// [`backoff`] for an unreachable server.
fn backoff_away(attempt: u32) -> Duration {
    if attempt <= AWAY_TRIES {
        jitter(doubled(attempt).min(timing().away_max))
    } else {
        // The pauses are those of [`backoff`] from 8 s on.
        backoff(attempt - AWAY_TRIES + 3)
    }
}

fn doubled(attempt: u32) -> Duration {
    timing()
        .backoff_first
        .saturating_mul(1 << attempt.saturating_sub(1).min(16))
}

fn jitter(pause: Duration) -> Duration {
    pause
        .mul_f64(rand::rng().random_range(0.8..1.2))
        .min(timing().backoff_max)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
