//! Tests of the life cycle: a table of every state with every event, and what must hold for any
//! order of events.
#![allow(clippy::unwrap_used)]
#![allow(clippy::too_many_lines, reason = "tables")]

use super::*;
use crate::fixtures::*;
use crate::task::FailureCode;
use proptest::prelude::*;

#[test]
fn every_state_meets_every_event() {
    use State::*;
    let login = FailureCode::DatabaseRefusedLogin;
    let table: [(State, Event, i64, State, ToSend); 55] = [
        (Pending, created(), 1, Active, ToSend::Nothing),
        (Active, created(), 1, Active, ToSend::Nothing),
        (Revoking, created(), 1, Revoking, ToSend::RevokeNow),
        (Revoked, created(), 1, Revoked, ToSend::RevokeNow),
        (Failed, created(), 1, Failed, ToSend::RevokeNow),
        (Pending, Event::NothingMade, 1, Failed, ToSend::Nothing),
        (Active, Event::NothingMade, 1, Active, ToSend::Nothing),
        (Revoking, Event::NothingMade, 1, Revoking, ToSend::Nothing),
        (Pending, Event::GivenUp, 1, Revoking, ToSend::RevokeNow),
        (Active, Event::GivenUp, 1, Active, ToSend::Nothing),
        (Revoked, Event::GivenUp, 1, Revoked, ToSend::Nothing),
        (Pending, Event::RevokeAsked, 1, Revoking, ToSend::RevokeNow),
        (Active, Event::RevokeAsked, 1, Revoking, ToSend::RevokeNow),
        (Revoking, Event::RevokeAsked, 1, Revoking, ToSend::Copy),
        (Revoked, Event::RevokeAsked, 1, Revoked, ToSend::Nothing),
        (Failed, Event::RevokeAsked, 1, Failed, ToSend::Nothing),
        (Pending, gone("here"), 10, Pending, ToSend::Nothing),
        (Pending, gone("here"), 54, Failed, ToSend::Nothing),
        (Active, gone("here"), 10, Revoked, ToSend::Nothing),
        // A report from before the account was made, received late.
        (
            Active,
            found_gone("here", 59, false),
            99,
            Active,
            ToSend::Nothing,
        ),
        (
            Active,
            found_gone("here", 60, false),
            62,
            Revoked,
            ToSend::Nothing,
        ),
        (
            Active,
            found_gone("here", 55, true),
            56,
            Revoked,
            ToSend::Nothing,
        ),
        (
            Pending,
            found_gone("here", 61, false),
            99,
            Pending,
            ToSend::Nothing,
        ),
        (
            Revoking,
            found_gone("here", 61, false),
            99,
            Revoking,
            ToSend::Nothing,
        ),
        // An early report that falsely claims to be conclusive, and is held back until the window is over.
        (
            Pending,
            found_gone("here", 2, true),
            99,
            Pending,
            ToSend::Nothing,
        ),
        (
            Active,
            found_gone("here", 2, true),
            99,
            Active,
            ToSend::Nothing,
        ),
        (
            Revoking,
            found_gone("here", 2, true),
            99,
            Revoking,
            ToSend::Nothing,
        ),
        (Active, gone("there"), 61, Active, ToSend::OtherCredentials),
        (Revoking, gone("here"), 53, Revoking, ToSend::Nothing),
        (Revoking, gone("here"), 54, Revoked, ToSend::Nothing),
        (
            Revoking,
            gone("there"),
            54,
            Revoking,
            ToSend::OtherCredentials,
        ),
        (Failed, gone("here"), 54, Failed, ToSend::Nothing),
        (Active, not_due(90), 61, Active, ToSend::Nothing),
        (Revoking, not_due(90), 61, Revoking, ToSend::Nothing),
        (Revoked, not_due(90), 61, Revoked, ToSend::RevokeNow),
        (Active, failing(login), 61, Active, ToSend::OtherCredentials),
        (
            Revoking,
            failing(FailureCode::DatabaseUnreachable),
            61,
            Revoking,
            ToSend::OtherCredentials,
        ),
        (
            Revoking,
            failing(FailureCode::StatementFailed),
            61,
            Revoking,
            ToSend::Nothing,
        ),
        (Pending, Event::MaybeHeld, 700, Active, ToSend::Nothing),
        (Active, Event::MaybeHeld, 700, Active, ToSend::Nothing),
        (Revoking, Event::MaybeHeld, 700, Revoking, ToSend::Nothing),
        (Active, Event::Renewed(at(90)), 50, Active, ToSend::Nothing),
        (
            Pending,
            Event::Renewed(at(90)),
            50,
            Pending,
            ToSend::Nothing,
        ),
        (
            Revoking,
            Event::Renewed(at(90)),
            50,
            Revoking,
            ToSend::Nothing,
        ),
        (
            Revoked,
            Event::Renewed(at(90)),
            50,
            Revoked,
            ToSend::Nothing,
        ),
        (Pending, Event::RetryAsked, 61, Pending, ToSend::Nothing),
        (Active, Event::RetryAsked, 61, Active, ToSend::Retry),
        (Revoking, Event::RetryAsked, 61, Revoking, ToSend::Retry),
        (Revoked, Event::RetryAsked, 61, Revoked, ToSend::Nothing),
        (Pending, detached(), 61, Failed, ToSend::Nothing),
        (Active, detached(), 61, Revoked, ToSend::Nothing),
        (Revoking, detached(), 61, Revoked, ToSend::Nothing),
        (Failed, detached(), 61, Failed, ToSend::Nothing),
        (Revoked, failing(login), 61, Revoked, ToSend::Nothing),
        (Pending, failing(login), 61, Pending, ToSend::Nothing),
    ];
    for (from, event, second, to, send) in table {
        let words = format!("{from:?} {event:?} at {second}");
        let change = next(&lease(from), event, at(second));
        assert_eq!((change.status.state, change.send), (to, send), "{words}");
    }
}

#[test]
fn a_doubtful_lease_is_left_to_its_date() {
    let mut lease = lease(State::Pending);
    let soon = lease.unanswered(false, at(600));
    assert!(matches!(soon, Event::GivenUp));
    assert!(matches!(lease.unanswered(true, at(31)), Event::MaybeHeld));
    assert!(matches!(lease.unanswered(false, at(630)), Event::MaybeHeld));
    lease.status = next(&lease, Event::MaybeHeld, at(630)).status;
    assert_eq!(lease.status.expiration, Some(at(90)), "a guess");
    // The database's end replaces the guess, also if it is earlier.
    lease.status = next(&lease, not_due(85), at(631)).status;
    assert_eq!(lease.status.expiration, Some(at(85)));
    assert_eq!(
        next(&lease, gone("here"), at(700)).status.state,
        State::Revoked
    );
}

#[test]
fn a_failure_says_what_is_in_the_way_and_when_it_is_tried_again() {
    let lease = lease(State::Active);
    let mut failure = Failure::new(FailureCode::StatementFailed, "held");
    failure.objects = vec!["table t".to_owned()];
    let event = Event::Failing {
        failure,
        attempts: 2,
        again: Some(Duration::from_secs(4)),
    };
    let status = next(&lease, event, at(61)).status;
    assert_eq!(status.objects, ["table t"]);
    assert_eq!(status.next_try, Some(at(65)));
    let again = Lease { status, ..lease };
    let status = next(&again, gone("here"), at(66)).status;
    assert_eq!((status.next_try, status.stuck), (None, false));
}

#[test]
fn an_early_end_is_noted_and_waited_out() {
    let change = next(&lease(State::Revoking), gone("here"), at(10));
    assert_eq!(change.status.revoked_at, Some(at(61)));
    assert_eq!(change.status.revoked_by, Some(engine()));
    assert_eq!(
        change.status.next_reconcile,
        Some(at(59)),
        "final at 54, and the grace"
    );
}

/// What was found gone may have been looked for before it was made.
#[test]
fn an_account_made_after_it_was_found_gone_is_not_gone() {
    let status = next(&lease(State::Revoking), gone("here"), at(10)).status;
    let gone_once = Lease {
        status,
        ..lease(State::Revoking)
    };
    let change = next(&gone_once, created(), at(12));
    assert_eq!(change.status.state, State::Revoking);
    assert_eq!(change.status.revoked_at, None);
    assert_eq!(change.status.revoked_by, None);
    assert_eq!(change.send, ToSend::RevokeNow);
    let made = Lease {
        status: change.status,
        ..gone_once
    };
    let again = next(&made, gone("here"), at(14)).status;
    assert!(again.revoked_at.is_some());
}

#[test]
fn what_was_seen_to_be_gone_is_not_called_unseen_when_detached() {
    let status = next(&lease(State::Revoking), gone("here"), at(10)).status;
    let gone_once = Lease {
        status,
        ..lease(State::Revoking)
    };
    assert_eq!(next(&gone_once, detached(), at(11)).status.last_error, None);
    let unseen = next(&lease(State::Revoking), detached(), at(11)).status;
    assert!(unseen.last_error.unwrap().contains("may still exist"));
}

#[test]
fn an_account_nobody_got_ends_as_failed() {
    let mut never = lease(State::Pending);
    never.status = next(&never, Event::GivenUp, at(30)).status;
    assert_eq!(
        next(&never, gone("here"), at(54)).status.state,
        State::Failed
    );
}

#[test]
fn an_end_that_is_not_conclusive_is_looked_at_once_more() {
    let mut lease = lease(State::Active);
    lease.status = next(&lease, found_gone("here", 60, false), at(40)).status;
    assert_eq!(
        (lease.status.state, lease.status.next_reconcile),
        (State::Revoked, Some(at(59)))
    );
    lease.status = next(&lease, found_gone("here", 61, false), at(50)).status;
    assert_eq!(lease.status.next_reconcile, Some(at(59)));
    lease.status = next(&lease, found_gone("here", 62, true), at(63)).status;
    assert_eq!(lease.status.next_reconcile, None);
}

#[test]
fn three_failures_are_stuck_and_an_end_clears_it() {
    let mut lease = lease(State::Active);
    for stuck in [false, false, true] {
        lease.status = next(&lease, failing(FailureCode::DatabaseUnreachable), at(70)).status;
        assert_eq!(lease.status.stuck, stuck);
    }
    let settled = next(&lease, gone("here"), at(80)).status;
    assert_eq!((settled.state, settled.stuck), (State::Revoked, false));
    let other = next(&lease, gone("there"), at(80)).status;
    assert!(other.stuck && other.last_error.unwrap().starts_with("other_server"));
}

#[test]
fn not_due_corrects_the_row() {
    let status = next(&lease(State::Active), not_due(90), at(66)).status;
    assert_eq!(
        (status.expiration, status.next_reconcile),
        (Some(at(90)), Some(at(95)))
    );
}

#[test]
fn nothing_anybody_says_is_too_much() {
    let moments = [
        Timestamp::MIN,
        Timestamp::UNIX_EPOCH,
        at(60),
        Timestamp::MAX,
    ];
    let spans = [Duration::ZERO, Duration::from_secs(60), Duration::MAX];
    for state in State::ALL {
        for moment in moments {
            let made = Created {
                expiration: moment,
                server: "here".to_owned(),
                warnings: vec![],
            };
            let mut events = vec![
                Event::Created(made, engine()),
                Event::Renewed(moment),
                Event::NotDue {
                    until: moment,
                    left: None,
                },
            ];
            for span in spans {
                events.push(Event::NotDue {
                    until: moment,
                    left: Some(span),
                });
                events.push(Event::Failing {
                    failure: Failure::new(FailureCode::StatementFailed, "held"),
                    attempts: u32::MAX,
                    again: Some(span),
                });
            }
            // After any event the next event can be processed without an overflow.
            let mut lease = lease(state);
            for event in events {
                lease.status = next(&lease, event, at(50)).status;
                let _ = (lease.renewable_until(), lease.window_ms(at(50)));
                lease.status = next(&lease, Event::RetryAsked, at(50)).status;
            }
        }
    }
}

#[test]
fn a_second_wish_for_a_try_is_the_first_one() {
    let mut lease = lease(State::Revoking);
    for (second, send) in [
        (60, ToSend::Retry),
        (62, ToSend::Nothing),
        (63, ToSend::Retry),
    ] {
        let change = next(&lease, Event::RetryAsked, at(second));
        assert_eq!(change.send, send, "at {second}");
        lease.status = change.status;
    }
}

#[test]
fn copies_become_rarer() {
    assert_eq!(reconcile_after(0, 0.0), Duration::from_secs(5));
    assert_eq!(reconcile_after(1, 0.0), Duration::from_secs(10));
    assert_eq!(reconcile_after(40, 0.0), Duration::from_secs(300));
    assert_eq!(reconcile_after(40, 1.0), Duration::from_secs(240));
}

proptest! {
    #[test]
    fn what_holds_for_any_life(steps in prop::collection::vec((any_event(), 0i64..10), 0..40)) {
        let mut lease = lease(State::Pending);
        let mut now = 0;
        for (event, passed) in steps {
            now += passed;
            let before = lease.status.clone();
            let after = next(&lease, event, at(now)).status;
            if before.state.is_settled() {
                let looked_after = Status { next_reconcile: before.next_reconcile, ..after.clone() };
                prop_assert_eq!(&looked_after, &before, "a settled lease never changes");
                prop_assert!(after.next_reconcile.is_none() || after == before);
            }
            if before.state == State::Revoking {
                prop_assert!(after.state != State::Active && after.state != State::Pending);
            }
            if after.state == State::Active {
                prop_assert!(before.state == State::Pending || before.state == State::Active);
                prop_assert!(after.expiration.is_some());
            }
            prop_assert!(after.next_reconcile.is_some() || after.state.is_settled(), "what lives is looked after");
            prop_assert_eq!(after.state == State::Revoked, after.state.is_settled() && after.expiration.is_some());
            prop_assert!(!(after.stuck && after.state.is_settled()));
            lease.status = after;
        }
    }
}
