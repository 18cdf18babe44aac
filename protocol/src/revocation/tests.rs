//! What comes after each try to end an account.

use super::*;
use crate::fixtures::revocation;

fn task(window_ms: u64, copy: bool) -> Revoke {
    Revoke {
        window_ms,
        copy,
        ..revocation()
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
    // After these looks the message waits for the whole window, whether looks or failures raised the count.
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
                    if failure.code == FailureCode::DatabaseUnreachable && attempt < AWAY_TRIES =>
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
    // The second end is farther off than a `Duration` can express.
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

/// Only an account that was absent at its end may still appear before its create is over. The looks end when they
/// have taken the whole window.
#[test]
fn early_looks_are_for_absent_accounts_at_their_end() {
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
