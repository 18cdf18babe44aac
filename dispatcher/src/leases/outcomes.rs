//! Records an engine's report about a lease: an outcome of a revocation, or an answer whose caller has left.
//! A report may arrive twice: the second changes nothing.

use std::time::Duration;

use jiff::Timestamp;
use mayfly_protocol::names::{LeaseId, PoolName};
use mayfly_protocol::task::{FailureCode, Instead, Outcome, OutcomeResult, Verdict};
use tracing::{debug, info, warn};

use super::revoke::send_what_follows;
use super::trace_of;
use crate::app::App;
use crate::engines::inbox::storable;
use crate::engines::outbox;
use crate::store::{Found, Heard, Report, StoreError};
use mayfly_protocol::lease::{Event, Lease};

/// Objects of a failure that are kept. An engine names 10.
const OBJECTS_MAX: usize = 20;

/// Why a report is not accepted: the metric's label, and a message for operators.
pub(crate) struct Disbelieved(pub(crate) &'static str, pub(crate) &'static str);

/// Applies each event of a message whose lease belongs to the message's pool. Returns for each the lease after the
/// event; `None`: the lease is unknown, or is not decided yet. An inner error: the report is not accepted.
///
/// # Errors
/// The store's errors. Then nothing was applied.
pub(crate) async fn hear(
    app: &App,
    reports: Vec<(LeaseId, Report)>,
) -> Result<Vec<Result<Option<Lease>, Disbelieved>>, StoreError> {
    let ids: Vec<LeaseId> = reports.iter().map(|(id, _)| *id).collect();
    let all = app.store.hear(reports, app.now()).await?;
    let mut leases = Vec::with_capacity(ids.len());
    for (id, heard) in ids.into_iter().zip(all) {
        leases.push(follow(app, id, heard).await);
    }
    Ok(leases)
}

/// Logs what a report has changed, and sends the messages that follow from it.
async fn follow(app: &App, id: LeaseId, heard: Heard) -> Result<Option<Lease>, Disbelieved> {
    let applied = match heard {
        Heard::Applied(applied) => *applied,
        Heard::NotYet => return Ok(None),
        Heard::Unknown => {
            debug!(lease = %id, "a message is about a lease that this store does not have");
            return Ok(None);
        }
        Heard::OtherPool => {
            return Err(Disbelieved(
                "other_pool",
                "an engine sent an outcome for a lease of another pool",
            ));
        }
        Heard::OtherRole => {
            return Err(Disbelieved(
                "other_role",
                "an engine sent an outcome for a role that is not the lease's",
            ));
        }
    };
    let status = &applied.lease.status;
    let trace = trace_of(&applied.lease);
    if applied.before != status.state {
        info!(lease = %id, trace, from = applied.before.as_str(), to = status.state.as_str(), "lease");
    }
    if status.stuck && !status.state.is_settled() {
        warn!(lease = %id, trace, attempts = status.attempts, last_error = status.last_error,
            "a revocation is stuck; it is tried again");
    }
    send_what_follows(app, &applied).await;
    Ok(Some(applied.lease))
}

/// The event of an outcome of this pool that its engine sealed at `issued`.
pub(crate) fn report(pool: PoolName, issued: Timestamp, outcome: &Outcome) -> Report {
    let found = match (&outcome.result, &outcome.found_at) {
        (
            OutcomeResult::Dropped { server, .. } | OutcomeResult::Moved { server },
            Some(address),
        ) => Some(Found {
            address: address.clone(),
            server: storable(server),
        }),
        _ => None,
    };
    let event = match &outcome.result {
        OutcomeResult::Dropped {
            at,
            server,
            conclusive,
        }
        | OutcomeResult::Absent {
            at,
            server,
            conclusive,
        } => Event::Gone {
            at: *at,
            server: storable(server),
            by: outcome.engine.clone(),
            conclusive: *conclusive,
            seen: issued,
        },
        OutcomeResult::NotDue { until, left_ms } => Event::NotDue {
            until: *until,
            left: left_ms.map(Duration::from_millis),
        },
        // The engine will end it there.
        OutcomeResult::Moved { .. } => Event::Found,
        OutcomeResult::Failing(failure) => {
            let mut failure = failure.clone();
            failure.message = storable(&failure.message);
            failure.objects.truncate(OBJECTS_MAX);
            for object in &mut failure.objects {
                *object = storable(object);
            }
            Event::Failing {
                failure,
                attempts: outcome.attempts,
                again: again(outcome),
            }
        }
    };
    Report {
        pool,
        role: outcome.role.clone(),
        found,
        event,
        late: false,
    }
}

/// When the engine tries again by itself.
fn again(outcome: &Outcome) -> Option<Duration> {
    outcome.again_ms.map(Duration::from_millis)
}

/// The verdict on an outcome of this pool, if its engine waits for one. `lease` is the lease after the
/// outcome; `None`: [`hear`] did not find it, or the report was not accepted.
///
/// # Errors
/// The errors of the store.
pub(crate) async fn verdict(
    app: &App,
    pool: &PoolName,
    outcome: &Outcome,
    lease: Option<&Lease>,
) -> Result<Option<Verdict>, StoreError> {
    let Some(ticket) = outcome.ticket else {
        return Ok(None);
    };
    let mut verdict = Verdict {
        ticket,
        retire: false,
        instead: None,
    };
    // A restored store may lack a lease, so an unknown lease gets no verdict.
    if let Some(lease) = lease {
        verdict.retire = needs_no_more_tries(lease);
        if !lease.status.state.is_settled() {
            verdict.instead = next_candidate(app, lease, outcome).await?;
        }
    } else {
        verdict.retire = is_of_another_pool(app, pool, outcome.lease).await?;
    }
    Ok(Some(verdict))
}

/// Whether another pool ends the lease, as after a takeover. Then this pool's message is not needed, and the
/// reconciler sends the end to the other pool.
async fn is_of_another_pool(app: &App, pool: &PoolName, id: LeaseId) -> Result<bool, StoreError> {
    match app.store.lease(id).await {
        Ok(lease) => Ok(lease.pool != *pool),
        Err(StoreError::NotFound(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether the message of a failed revocation is not needed any more.
fn needs_no_more_tries(lease: &Lease) -> bool {
    // A lease whose account will be looked for once more may need the message.
    lease.status.state.is_settled() && lease.status.next_reconcile.is_none()
}

/// The revocation with the next credential candidate, which the engine parks instead of the failed one.
/// `None` if no engine waits.
async fn next_candidate(
    app: &App,
    lease: &Lease,
    outcome: &Outcome,
) -> Result<Option<Instead>, StoreError> {
    let Some(access) = app.store.lease_access(lease.id, outcome.attempts).await? else {
        return Ok(None);
    };
    if !helps(access.candidates, access.new_key, outcome) {
        return Ok(None);
    }
    // If a key is refused, `again` has logged the reason.
    let after = again(outcome).unwrap_or(Duration::ZERO);
    Ok(outbox::instead(app, &access, after).ok())
}

/// Whether another message may succeed where the present message failed: with another credential candidate, sealed to
/// a new key, or with the authorities that the engine lacks.
fn helps(candidates: u32, new_key: bool, outcome: &Outcome) -> bool {
    candidates > 1 || new_key || is_unread(outcome)
}

/// Whether the engine could not read the revocation. The message may name authorities that the broker no
/// longer has; the new message contains them.
fn is_unread(outcome: &Outcome) -> bool {
    matches!(&outcome.result, OutcomeResult::Failing(failure) if failure.code == FailureCode::NotUnderstood)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use mayfly_protocol::fixtures::{at, engine, lease};
    use mayfly_protocol::lease::State;
    use mayfly_protocol::task::Failure;

    fn outcome(result: OutcomeResult) -> Outcome {
        Outcome {
            lease: LeaseId::random(),
            engine: engine(),
            attempts: 3,
            role: None,
            found_at: Some("db 5432".to_owned()),
            result,
            ticket: None,
            again_ms: Some(4000),
            others: vec![],
        }
    }

    fn failing(code: FailureCode) -> Outcome {
        outcome(OutcomeResult::Failing(Failure::new(code, "bad\0text")))
    }

    fn reported(outcome: &Outcome) -> Report {
        report("pool1".parse().unwrap(), at(70), outcome)
    }

    #[test]
    fn an_outcome_is_the_event_that_it_reports() {
        let server = || "s\0".to_owned();
        let dropped = outcome(OutcomeResult::Dropped {
            at: at(60),
            server: server(),
            conclusive: true,
        });
        let report = reported(&dropped);
        // A text with NUL could not be stored.
        let found = report.found.unwrap();
        assert_eq!(
            (found.address.as_str(), found.server.as_str()),
            ("db 5432", "s\u{fffd}")
        );
        match report.event {
            Event::Gone {
                at: gone,
                server,
                by,
                conclusive,
                seen,
            } => {
                assert_eq!((gone, server.as_str(), by), (at(60), "s\u{fffd}", engine()));
                // Only the time at which the engine sealed the outcome counts.
                assert!(conclusive && seen == at(70));
            }
            other => panic!("{other:?}"),
        }
        // An outcome that found no account does not show which server answered.
        let absent = outcome(OutcomeResult::Absent {
            at: at(60),
            server: server(),
            conclusive: false,
        });
        let report = reported(&absent);
        assert!(report.found.is_none());
        assert!(matches!(
            report.event,
            Event::Gone {
                conclusive: false,
                ..
            }
        ));
        let moved = reported(&outcome(OutcomeResult::Moved { server: server() }));
        assert!(moved.found.is_some() && matches!(moved.event, Event::Found));
        let later = reported(&outcome(OutcomeResult::NotDue {
            until: at(90),
            left_ms: Some(1500),
        }));
        assert!(
            matches!(later.event, Event::NotDue { left: Some(left), .. } if left.as_millis() == 1500)
        );
        match reported(&failing(FailureCode::ObjectLocked)).event {
            Event::Failing {
                failure,
                attempts,
                again,
            } => {
                assert_eq!((failure.message.as_str(), attempts), ("bad\u{fffd}text", 3));
                assert_eq!(again, Some(Duration::from_secs(4)));
            }
            other => panic!("{other:?}"),
        }
    }

    /// A rogue engine reports long texts about the leases of its pool. A list of leases has them in memory.
    #[test]
    fn what_an_engine_says_is_kept_up_to_a_limit() {
        let long = "é".repeat(100_000);
        let mut failure = Failure::new(FailureCode::ObjectLocked, &long);
        failure.objects = vec![long.clone(); 1000];
        let report = reported(&outcome(OutcomeResult::Failing(failure)));
        let Event::Failing { failure, .. } = report.event else {
            panic!("{:?}", report.event);
        };
        assert_eq!(failure.message.len(), 4 * 1024);
        assert_eq!(failure.objects.len(), OBJECTS_MAX);
        assert!(
            failure
                .objects
                .iter()
                .all(|object| object.len() == 4 * 1024)
        );
        let gone = reported(&outcome(OutcomeResult::Dropped {
            at: at(60),
            server: long,
            conclusive: true,
        }));
        assert_eq!(gone.found.unwrap().server.len(), 4 * 1024);
    }

    #[test]
    fn a_message_goes_only_when_its_lease_needs_it_no_more() {
        for (state, is_looked_after, expected) in [
            (State::Active, true, false),
            (State::Revoking, true, false),
            // The account is looked for once more, when its create can no longer commit.
            (State::Revoked, true, false),
            (State::Revoked, false, true),
            (State::Failed, false, true),
        ] {
            let mut lease = lease(state);
            lease.status.next_reconcile = is_looked_after.then(|| at(90));
            assert_eq!(needs_no_more_tries(&lease), expected, "{state:?}");
        }
    }

    #[test]
    fn another_message_is_given_only_if_it_can_do_more() {
        let refused = failing(FailureCode::DatabaseRefusedLogin);
        let unread = failing(FailureCode::NotUnderstood);
        for (candidates, new_key, outcome, expected) in [
            (1, false, &refused, false),
            (2, false, &refused, true),
            (1, true, &refused, true),
            (1, false, &unread, true),
        ] {
            assert_eq!(helps(candidates, new_key, outcome), expected);
        }
    }
}
