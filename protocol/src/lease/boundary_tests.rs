//! Boundaries of the life cycle: comparisons and fields that the table of all states and events does not reach.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::fixtures::*;
use crate::task::FailureCode;

#[test]
fn words_of_states_stand_in_rows_and_never_change() {
    let words = State::ALL.map(State::as_str);
    assert_eq!(
        words,
        ["pending", "active", "revoking", "revoked", "failed"]
    );
    for state in State::ALL {
        assert_eq!(State::parse(state.as_str()), Some(state));
    }
    assert_eq!(State::parse("ACTIVE"), None);
    assert_eq!(WITH_NONCE, 1_099_511_627_776, "rows contain it");
}

#[test]
fn the_window_is_what_is_left_until_absence_is_final() {
    let lease = lease(State::Active);
    assert_eq!(lease.settles_at(), at(54));
    for (second, left) in [(50, 4_000), (53, 1_000), (54, 0), (55, 0)] {
        assert_eq!(lease.window_ms(at(second)), left, "at {second}");
    }
}

#[test]
fn a_taken_over_lease_is_looked_at_after_its_end_or_soon() {
    for (state, end, second, look) in [
        // The new pool gets the revocation from the delay levels. The reconciler looks after the end.
        (State::Active, Some(60), 20, 65),
        (State::Active, Some(60), 59, 65),
        // The end has come: a parked message for the earlier pool does not help.
        (State::Active, Some(60), 60, 65),
        (State::Active, Some(60), 70, 75),
        (State::Active, None, 20, 25),
        (State::Revoking, Some(60), 20, 25),
    ] {
        let mut status = lease(state).status;
        status.expiration = end.map(at);
        status.reconcile_attempts = 3;
        status.stuck = true;
        status.attempts = 5;
        status.taken_over(at(second));
        assert_eq!(
            status.next_reconcile,
            Some(at(look)),
            "{state:?} at {second}"
        );
        assert_eq!(
            (status.reconcile_attempts, status.attempts, status.stuck),
            (0, 0, false)
        );
    }
}

#[test]
fn a_bound_lease_has_the_server_and_is_tried_again() {
    let mut status = lease(State::Revoking).status;
    status.stuck = true;
    status.bound_to("there".to_owned(), at(20));
    assert_eq!(status.server.as_deref(), Some("there"));
    assert_eq!((status.stuck, status.next_reconcile), (false, Some(at(25))));
}

#[test]
fn a_lease_that_no_pool_can_end_is_stuck_unless_it_is_settled() {
    for state in State::ALL {
        let mut status = lease(state).status;
        status.next_try = Some(at(20));
        status.abandoned("no pool".to_owned());
        let is_open = !state.is_settled();
        assert_eq!(status.stuck, is_open, "{state:?}");
        assert_eq!(
            status.last_error.as_deref(),
            is_open.then_some("no pool"),
            "{state:?}"
        );
        assert_eq!(status.next_try.is_none(), is_open, "{state:?}");
    }
}

#[test]
fn an_end_that_moves_clears_the_earlier_failure() {
    let mut lease = lease(State::Active);
    let mut failure = Failure::new(FailureCode::StatementFailed, "held");
    failure.objects = vec!["table t".to_owned()];
    let event = Event::Failing {
        failure,
        attempts: 7,
        again: Some(Duration::from_secs(4)),
    };
    lease.status = next(&lease, event, at(61)).status;
    assert!(lease.status.stuck && lease.status.attempts == 7);
    let status = next(&lease, not_due(90), at(62)).status;
    assert_eq!((status.attempts, status.stuck), (0, false));
    assert_eq!((status.last_error, status.next_try), (None, None));
    assert!(status.objects.is_empty());
}

#[test]
fn a_create_names_the_engine_and_the_server_of_the_first_answer() {
    let mut lease = lease(State::Pending);
    lease.status = next(&lease, created(), at(0)).status;
    assert_eq!(lease.status.server.as_deref(), Some("here"));
    assert_eq!(lease.status.engine, Some(engine()));
    let second = Event::Created(
        Created {
            expiration: at(60),
            server: "there".to_owned(),
            warnings: vec![],
        },
        "e2".parse().unwrap(),
    );
    let status = next(&lease, second, at(1)).status;
    assert_eq!(status.server.as_deref(), Some("here"));
    assert_eq!(status.engine, Some(engine()));
}

/// A report from before the account was made brings the next look forward, and never back.
#[test]
fn a_report_that_came_late_brings_the_look_forward_only() {
    let mut lease = lease(State::Active);
    for (next_look, looked_at) in [
        (Some(65), (59, 0)),
        (Some(59), (59, 3)),
        (Some(50), (50, 3)),
        (None, (59, 0)),
    ] {
        lease.status.next_reconcile = next_look.map(at);
        lease.status.reconcile_attempts = 3;
        let status = next(&lease, found_gone("here", 20, false), at(25)).status;
        assert_eq!(status.state, State::Active);
        assert_eq!(
            (status.next_reconcile.unwrap(), status.reconcile_attempts),
            (at(looked_at.0), looked_at.1),
            "{next_look:?}"
        );
    }
}

#[test]
fn only_a_final_look_at_the_right_server_ends_the_last_look() {
    let mut lease = lease(State::Active);
    lease.status = next(&lease, found_gone("here", 60, false), at(40)).status;
    assert_eq!(lease.status.state, State::Revoked);
    for (event, is_over) in [
        (gone("there"), false),
        (found_gone("here", 62, false), false),
        (gone("here"), true),
    ] {
        let words = format!("{event:?}");
        let status = next(&lease, event, at(63)).status;
        assert_eq!(status.next_reconcile.is_none(), is_over, "{words}");
    }
}

/// The first three failures each ask the dispatcher for other credentials. Later failures are left to the reconciler.
#[test]
fn other_credentials_are_tried_three_times_at_once() {
    type Fails = fn() -> Event;
    let at_login: Fails = || failing(FailureCode::DatabaseRefusedLogin);
    let elsewhere: Fails = || gone("there");
    for fails in [at_login, elsewhere] {
        let mut lease = lease(State::Active);
        for number in 1..=5 {
            let change = next(&lease, fails(), at(61));
            let expected = match number {
                1..=3 => ToSend::OtherCredentials,
                _ => ToSend::Nothing,
            };
            assert_eq!(change.send, expected, "failure {number}");
            lease.status = change.status;
        }
    }
}

#[test]
fn an_operator_reads_what_failed_and_what_helps() {
    let lease = lease(State::Active);
    let (id, server) = (lease.id.to_string(), "--same-server");
    for (code, begins, contains) in [
        (FailureCode::StatementFailed, "statement_failed: no", ""),
        (
            FailureCode::AdminLacksRights,
            "admin_lacks_rights: no",
            "mayfly secret check",
        ),
        (FailureCode::OtherServer, "other_server: no", server),
        (FailureCode::OtherServer, "other_server: no", id.as_str()),
    ] {
        let status = next(&lease, failing(code), at(61)).status;
        let text = status.last_error.unwrap();
        assert!(
            text.starts_with(begins) && text.contains(contains),
            "{text}"
        );
    }
    let text = next(&lease, gone("there"), at(61)).status.last_error;
    assert!(text.unwrap().contains(server));
}

#[test]
fn only_some_failures_may_pass_with_other_credentials() {
    for (code, may) in [
        (FailureCode::DatabaseRefusedLogin, true),
        (FailureCode::NotUnderstood, true),
        (FailureCode::StatementFailed, false),
    ] {
        assert_eq!(may_work_otherwise(code), may, "{code:?}");
    }
}

#[test]
fn a_failure_that_no_try_can_mend_is_stuck_at_once() {
    for (code, is_stuck) in [
        (FailureCode::OtherServer, true),
        (FailureCode::ForeignRole, true),
        (FailureCode::DatabaseUnreachable, false),
    ] {
        let status = next(&lease(State::Active), failing(code), at(61)).status;
        assert_eq!(status.stuck, is_stuck, "{code:?}");
    }
}
