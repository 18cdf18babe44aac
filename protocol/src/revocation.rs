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
    /// Its `VALID UNTIL` has not passed.
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
    /// Its row in `pg_authid`.
    pub oid: u32,
    /// The role's comment names this installation and this lease.
    pub ours: bool,
    /// `VALID UNTIL`; none if the role has none.
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
            // A date that is too far off counts as the longest time.
            let left = Duration::try_from_secs_f64(left).unwrap_or(Duration::MAX);
            let left = left.min(until.duration_since(found.now).unsigned_abs());
            Verdict::NotDue { until, left }
        }
        // Somebody removed the `VALID UNTIL` of our role. The lease still has an end, and it is now.
        (RevokeMode::Expire, None) => Verdict::Due,
    }
}

/// What happens to the message.
#[derive(Debug, PartialEq)]
pub enum Next {
    /// It is done with.
    Done,
    /// It is parked and comes again.
    Park {
        /// The delay until it comes again.
        after: Duration,
        /// The number of failed tries that the message then names.
        attempt: u32,
        /// The look after this one is the last: the create can no longer commit.
        settling: bool,
    },
}

/// Whether the result of this revocation is final, because its create can no longer commit.
pub fn is_conclusive(task: &Revoke, settling: bool) -> bool {
    task.window_ms == 0 || settling
}

/// Decides what happens to a revocation. A copy of the reconciler is never parked: the reconciler sends the
/// next one.
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

/// Whether to look again soon for an account that was absent at its date. The TTL may be shorter than the
/// create takes, and then the account is due when it appears. The number of looks is limited. The window may
/// then be partly over, but it is waited for in full.
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
        // From 8 s on.
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
mod tests {
    use super::*;
    use crate::grant::OwnedObjects;
    use crate::names::{InstallationId, LeaseId};
    use crate::secret::Secret;
    use crate::target::{SslMode, Target};

    fn task(window_ms: u64, copy: bool) -> Revoke {
        Revoke {
            lease: LeaseId::random(),
            installation: InstallationId::random(),
            target: Target {
                host: "h".into(),
                port: 1,
                database: "d".into(),
                username: "u".into(),
                password: Secret::new("p"),
                sslmode: SslMode::Disable,
                auth: Default::default(),
                channel_binding: None,
                sslrootcert: None,
                sslcert: None,
                sslkey: None,
            },
            role: "r".parse().unwrap(),
            mode: RevokeMode::Expire,
            owned_objects: OwnedObjects::Reassign,
            server: None,
            place: None,
            window_ms,
            copy,
            asked: false,
            reads_batches: true,
            others: vec![],
        }
    }

    fn absent() -> Result<Ended, Failure> {
        Ok(Ended::Absent {
            at: Timestamp::UNIX_EPOCH,
            server: "1".into(),
        })
    }

    #[test]
    fn gone_is_final_only_after_the_create_window() {
        assert_eq!(next(&task(0, false), 0, false, &absent()), Next::Done);
        let now = Revoke {
            mode: RevokeMode::Now,
            ..task(7_000, false)
        };
        assert_eq!(
            next(&now, 3, false, &absent()),
            Next::Park {
                after: Duration::from_secs(7),
                attempt: 0,
                settling: true
            }
        );
        assert_eq!(next(&now, 0, true, &absent()), Next::Done);
    }

    #[test]
    fn an_account_that_may_still_be_made_is_looked_for() {
        let task = task(7_000, false);
        for attempt in [0, 1] {
            let look = Next::Park {
                after: timing().look_again,
                attempt: attempt + 1,
                settling: false,
            };
            assert_eq!(next(&task, attempt, false, &absent()), look);
        }
        // Then the message waits for the whole window, whether looks or failures raised the count.
        for attempt in [2, 3, u32::MAX] {
            let wait = Next::Park {
                after: Duration::from_secs(7),
                attempt: 0,
                settling: true,
            };
            assert_eq!(next(&task, attempt, false, &absent()), wait);
        }
        assert_eq!(next(&task, 0, true, &absent()), Next::Done);
    }

    #[test]
    fn what_is_not_due_comes_again_when_it_is() {
        let left = Duration::from_secs(30);
        let result = Ok(Ended::NotDue {
            until: Timestamp::UNIX_EPOCH,
            left,
        });
        assert_eq!(
            next(&task(0, false), 5, false, &result),
            Next::Park {
                after: left + timing().due_margin,
                attempt: 0,
                settling: false
            }
        );
    }

    #[test]
    fn failures_come_again_for_ever_and_copies_never() {
        let failed = Err(Failure::new(FailureCode::StatementFailed, "held"));
        let away = Err(Failure::new(FailureCode::DatabaseUnreachable, "away"));
        for attempt in [0, 1, 10, 40, u32::MAX] {
            for result in [&failed, &away] {
                let Next::Park {
                    after,
                    attempt: then,
                    ..
                } = next(&task(0, false), attempt, false, result)
                else {
                    panic!("given up at attempt {attempt}");
                };
                assert!(then > attempt || attempt == u32::MAX);
                let most = match result {
                    Err(failure)
                        if failure.code == FailureCode::DatabaseUnreachable
                            && attempt < AWAY_TRIES =>
                    {
                        timing().away_max
                    }
                    _ => timing().backoff_max,
                };
                let most = most.mul_f64(1.2).min(timing().backoff_max);
                assert!(after >= timing().backoff_first.mul_f64(0.8) && after <= most);
            }
        }
        for result in [failed, away, absent()] {
            assert_eq!(next(&task(9_000, true), 0, false, &result), Next::Done);
        }
    }

    #[test]
    fn a_full_server_is_tried_soon_and_by_other_engines() {
        let full = Err(Failure {
            full: true,
            ..Failure::new(FailureCode::DatabaseUnreachable, "full")
        });
        let mut waited = Duration::ZERO;
        for attempt in 0..1000 {
            let Next::Park { after, .. } = next(&task(0, false), attempt, false, &full) else {
                panic!("given up at attempt {attempt}");
            };
            assert!(after <= timing().away_max.mul_f64(1.2));
            if attempt < 10 {
                waited += after;
            }
        }
        assert!(waited < Duration::from_secs(4), "{waited:?}");
    }

    #[test]
    fn what_was_not_tried_keeps_its_count() {
        let Next::Park {
            after,
            attempt: 7,
            settling: true,
        } = not_tried(&task(0, false), 7, true)
        else {
            panic!("not as it was")
        };
        assert!(after <= timing().server_busy.mul_f64(1.2));
        assert_eq!(not_tried(&task(0, true), 0, false), Next::Done);
    }

    #[test]
    fn only_what_is_ours_and_due_is_ended() {
        use RevokeMode::{Expire, Now};
        let until = Timestamp::UNIX_EPOCH + Duration::from_secs(2);
        let found = |ours, left| Found {
            oid: 1,
            ours,
            until: Some(until),
            left,
            now: Timestamp::UNIX_EPOCH,
        };
        assert_eq!(verdict(Expire, None), Verdict::Absent);
        assert_eq!(verdict(Expire, Some(&found(true, Some(0.0)))), Verdict::Due);
        assert_eq!(verdict(Now, Some(&found(true, Some(99.0)))), Verdict::Due);
        // The second date is farther off than a `Duration` holds.
        for left in [2.0, 1e12] {
            assert_eq!(
                verdict(Expire, Some(&found(true, Some(left)))),
                Verdict::NotDue {
                    until,
                    left: Duration::from_secs(2)
                }
            );
        }
        assert_eq!(verdict(Expire, Some(&found(true, None))), Verdict::Due);
        for mode in [Expire, Now] {
            assert_eq!(
                verdict(mode, Some(&found(false, Some(-1.0)))),
                Verdict::Foreign
            );
        }
    }

    #[test]
    fn results_have_the_words_of_the_metrics() {
        let (at, server) = (Timestamp::UNIX_EPOCH, String::new);
        let not_due = Ended::NotDue {
            until: at,
            left: Duration::ZERO,
        };
        let dropped = Ended::Dropped {
            at,
            server: server(),
            late_seconds: 0.0,
        };
        let moved = Ended::Moved { server: server() };
        for (result, word) in [
            (dropped, "dropped"),
            (absent().unwrap(), "absent"),
            (not_due, "not_due"),
            (Ended::NotTried, "not_tried"),
            (moved, "moved"),
        ] {
            assert_eq!(result.word(), word);
        }
    }

    /// Only an account that was absent at its date may still appear before its create is over. The looks end when
    /// they have taken the whole window.
    #[test]
    fn early_looks_are_for_absent_accounts_at_their_date() {
        let settling = |window_ms| Next::Park {
            after: Duration::from_millis(window_ms),
            attempt: 0,
            settling: true,
        };
        let dropped = Ok(Ended::Dropped {
            at: Timestamp::UNIX_EPOCH,
            server: "1".into(),
            late_seconds: 1.0,
        });
        let expire = task(7_000, false);
        assert_eq!(next(&expire, 0, false, &dropped), settling(7_000));
        let now = Revoke {
            mode: RevokeMode::Now,
            ..task(7_000, false)
        };
        assert_eq!(next(&now, 0, false, &absent()), settling(7_000));
        // Two looks, 4 s apart, take exactly the window.
        let exact = task(8_000, false);
        assert_eq!(next(&exact, 2, false, &absent()), settling(8_000));
    }

    #[test]
    fn pauses_double_from_one_second_and_again_from_eight_when_a_server_stays_away() {
        let pause = |code, attempt| {
            let failed = Err(Failure::new(code, "no"));
            match next(&task(0, false), attempt, false, &failed) {
                Next::Park { after, .. } => after,
                Next::Done => panic!("given up at attempt {attempt}"),
            }
        };
        // The number of earlier tries, and the pause in seconds, ±20 %.
        for (code, attempt, seconds) in [
            (FailureCode::StatementFailed, 0, 1),
            (FailureCode::StatementFailed, 1, 2),
            (FailureCode::StatementFailed, 5, 32),
            (FailureCode::DatabaseUnreachable, 0, 1),
            (FailureCode::DatabaseUnreachable, 5, 4),
            (FailureCode::DatabaseUnreachable, 24, 4),
            (FailureCode::DatabaseUnreachable, 25, 8),
            (FailureCode::DatabaseUnreachable, 26, 16),
            (FailureCode::DatabaseUnreachable, 27, 32),
        ] {
            let (after, middle) = (pause(code, attempt), Duration::from_secs(seconds));
            assert!(
                after >= middle.mul_f64(0.8) && after <= middle.mul_f64(1.2),
                "{code:?} after {attempt}: {after:?}"
            );
        }
    }

    #[test]
    fn a_full_server_is_tried_thirty_times_in_quick_succession() {
        let full = Err(Failure {
            full: true,
            ..Failure::new(FailureCode::DatabaseUnreachable, "full")
        });
        for (attempt, pause) in [
            (0, timing().full_pause),
            (29, timing().full_pause),
            (30, timing().away_max),
        ] {
            let Next::Park { after, .. } = next(&task(0, false), attempt, false, &full) else {
                panic!("given up at attempt {attempt}");
            };
            assert!(
                after >= pause.mul_f64(0.8) && after <= pause.mul_f64(1.2),
                "after {attempt}: {after:?}"
            );
        }
    }
}
