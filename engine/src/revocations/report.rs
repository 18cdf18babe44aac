//! The report of a revocation: the log, the outcome for the dispatcher, and its verdict. The results of a batch
//! that need no verdict go in one message.

use std::time::Duration;

use futures_util::future::join_all;
use mayfly_common::broker::{Address, Incoming};
use mayfly_common::fault;
use mayfly_protocol::names::{LeaseId, RoleName};
use mayfly_protocol::task::{
    Failure, FailureCode, Kind, LEASES_MAX, Outcome, OutcomeResult, Revoke, RevokeMode,
};
use tracing::{debug, info, warn};

use super::item::{Held, Item};
use super::settle::settle;
use crate::metrics::Ending;
use crate::verdicts;
use crate::work::Engine;
use mayfly_protocol::revocation::{Ended, Next, backoff, next};

/// Parks a revocation that this engine cannot open, because another engine may. Tries are at most 5 min apart. If
/// the dispatcher reports that it is not needed, it is settled.
pub(super) async fn not_understood(engine: &Engine, incoming: Incoming, reason: &str) {
    let mut held = Held::new(incoming);
    let attempt = held.head.attempt.saturating_add(1);
    let mut next = Next::Park {
        after: backoff(attempt),
        attempt,
        settling: held.head.settling,
    };
    // At most 8 revocations are reported at a time. Each waits for a verdict, and takes a place that another
    // revocation could use.
    if let Some(lease) = held.head.lease
        && let Ok(_place) = engine.unopened.try_acquire()
        && held.head.kind == Kind::Revoke
    {
        let failure = Failure::new(
            FailureCode::NotUnderstood,
            format!(
                "engine {} cannot open the revocation: {reason}",
                engine.name
            ),
        );
        let result = OutcomeResult::Failing(failure);
        let body = outcome(engine, &held, About::lease(lease), result, &next);
        tell(engine, &mut held, body, &mut next).await;
    }
    settle(engine, held, next, Ending::Refused).await;
}

/// Remembers that this engine has ended the lease. A later create of it is a recorded one, and is refused.
pub(super) fn remember(engine: &Engine, task: &Revoke) {
    let window = Duration::from_millis(task.window_ms);
    engine.ended.remember(task.lease, window);
}

/// The remaining work for a revocation: to report its outcome, and to settle it.
struct Reported {
    held: Held,
    /// The outcome to report. `None`: it was not tried, and nobody needs to know.
    outcome: Option<Outcome>,
    next: Next,
    ending: Ending,
}

/// Reports the result of a revocation, and settles its message.
pub(super) async fn report(engine: &Engine, item: Item, result: Result<Ended, Failure>) {
    let mut reported = reported(engine, item, result);
    if let Some(outcome) = reported.outcome.take() {
        let Reported { held, next, .. } = &mut reported;
        tell(engine, held, outcome, next).await;
        fault::point("revoke", "outcome_sent").await;
    }
    settle(engine, reported.held, reported.next, reported.ending).await;
}

/// Whether the result of a revocation may be reported together with others: it needs no verdict, and the dispatcher
/// can read such a report.
pub(super) fn goes_together(task: &Revoke, result: &Result<Ended, Failure>) -> bool {
    task.reads_batches
        && matches!(
            result,
            Ok(Ended::Dropped { .. } | Ended::Absent { .. } | Ended::NotDue { .. })
        )
}

/// Reports results that [`goes_together`] accepts, up to [`LEASES_MAX`] in one message, and settles their messages.
pub(super) async fn report_together(engine: &Engine, all: Vec<(Item, Result<Ended, Failure>)>) {
    let all = all.into_iter();
    let mut reported: Vec<Reported> = all
        .map(|(item, result)| reported(engine, item, result))
        .collect();
    for part in reported.chunks_mut(LEASES_MAX) {
        let trace = part
            .first()
            .map(|first| first.held.head.traceparent.clone())
            .unwrap_or_default();
        let mut outcomes = part.iter_mut().filter_map(|one| one.outcome.take());
        let Some(mut body) = outcomes.next() else {
            continue;
        };
        body.others = outcomes.collect();
        send(engine, &trace, &body).await;
        fault::point("revoke", "outcome_sent").await;
    }
    let settling = reported
        .into_iter()
        .map(|one| settle(engine, one.held, one.next, one.ending));
    join_all(settling).await;
}

/// Logs and counts a result, and decides what remains to be done.
fn reported(engine: &Engine, item: Item, result: Result<Ended, Failure>) -> Reported {
    let conclusive = item.is_conclusive();
    let Item { task, mut held } = item;
    let lease = task.lease;
    let mode = task.mode.as_str();
    if let Some(span) = held.span() {
        span.tag("mayfly.mode", mode);
        match &result {
            Ok(ended) => span.tag("mayfly.ended", ended.word()),
            Err(failure) => span.fail(failure.code.as_str()),
        }
    }
    let trace = &held.head.traceparent;
    let next = next(&task, held.head.attempt, held.head.settling, &result);
    let (ending, outcome_result) = match result {
        Ok(Ended::NotTried | Ended::Moved { .. }) => {
            engine.metrics.retried("server_busy");
            return Reported {
                held,
                outcome: None,
                next,
                ending: Ending::Retried,
            };
        }
        Ok(Ended::Dropped {
            at,
            server,
            late_seconds,
        }) => {
            if task.mode == RevokeMode::Expire {
                remember(engine, &task);
                engine.metrics.dropped(late_seconds);
            }
            info!(%lease, traceparent = trace, role = %task.role, mode, late_seconds, "ended an account");
            (
                Ending::Ok,
                OutcomeResult::Dropped {
                    at,
                    server,
                    conclusive,
                },
            )
        }
        Ok(Ended::Absent { at, server }) => {
            debug!(%lease, traceparent = trace, role = %task.role, mode, "the account is absent");
            (
                Ending::Ok,
                OutcomeResult::Absent {
                    at,
                    server,
                    conclusive,
                },
            )
        }
        Ok(Ended::NotDue { until, left }) => {
            debug!(%lease, traceparent = trace, role = %task.role, mode, %until, "not due yet");
            let left_ms = u64::try_from(left.as_millis()).ok();
            (Ending::Retried, OutcomeResult::NotDue { until, left_ms })
        }
        Err(failure) => {
            let attempt = held.head.attempt + 1;
            warn!(%lease, traceparent = trace, role = %task.role, mode, attempt, code = failure.code.as_str(), reason = failure.message, "an account could not be ended; it is tried again");
            engine.metrics.retried(failure.code.as_str());
            (Ending::Retried, OutcomeResult::Failing(failure))
        }
    };
    let was_found = matches!(outcome_result, OutcomeResult::Dropped { .. });
    let about = About {
        lease,
        found_at: was_found.then(|| task.target.address()),
        role: Some(task.role),
    };
    Reported {
        outcome: Some(outcome(engine, &held, about, outcome_result, &next)),
        held,
        next,
        ending,
    }
}

/// What an outcome is about.
struct About {
    lease: LeaseId,
    role: Option<RoleName>,
    /// The value of [`Outcome::found_at`].
    found_at: Option<String>,
}

impl About {
    /// A lease without any other data.
    fn lease(lease: LeaseId) -> Self {
        Self {
            lease,
            role: None,
            found_at: None,
        }
    }
}

fn outcome(
    engine: &Engine,
    held: &Held,
    about: About,
    result: OutcomeResult,
    next: &Next,
) -> Outcome {
    let again_ms = match next {
        Next::Done => None,
        Next::Park { after, .. } => Some(u64::try_from(after.as_millis()).unwrap_or(u64::MAX)),
    };
    Outcome {
        lease: about.lease,
        engine: engine.name.clone(),
        attempts: held.head.attempt.saturating_add(1),
        role: about.role,
        found_at: about.found_at,
        result,
        ticket: None,
        again_ms,
        others: vec![],
    }
}

/// Reports an outcome. If the dispatcher may know more, this waits for its verdict. `next` becomes [`Next::Done`] if
/// no more tries are needed. If the verdict has a new credential candidate, that revocation is parked.
async fn tell(engine: &Engine, held: &mut Held, mut body: Outcome, next: &mut Next) {
    let lease = body.lease;
    let awaited = match &body.result {
        OutcomeResult::Failing(failure)
            if body.again_ms.is_some()
                && verdicts::is_worth_asking(failure.code, held.head.attempt) =>
        {
            Some(engine.verdicts.await_one())
        }
        _ => None,
    };
    body.ticket = awaited.as_ref().map(|awaited| awaited.ticket);
    let is_sent = send(engine, &held.head.traceparent, &body).await;
    if let (true, Some(awaited)) = (is_sent, awaited) {
        let Some(verdict) = awaited.heard().await else {
            return;
        };
        if verdict.retire {
            debug!(%lease, "the dispatcher reports that this revocation is no longer needed");
            *next = Next::Done;
        } else if let Some(instead) = verdict.instead {
            debug!(%lease, "the dispatcher sent another credential candidate for this account");
            held.replace(&instead);
        }
    }
}

/// Publishes an outcome. Returns whether the broker has it.
async fn send(engine: &Engine, trace: &str, body: &Outcome) -> bool {
    let lease = body.lease;
    // The answers of creates use the same channels.
    let place = engine.reports.acquire().await;
    let sent = engine
        .send(Address::Outcomes, Kind::Outcome, Some(lease), trace, body)
        .await;
    drop(place);
    if let Err(error) = &sent {
        // The dispatcher sends the revocation again if it gets no outcome.
        debug!(%lease, leases = 1 + body.others.len(), %error, "the outcome was not sent");
    }
    sent.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::Timestamp;
    use mayfly_protocol::fixtures::revocation;

    /// A result that needs a verdict is reported alone, because its engine waits for it.
    #[test]
    fn results_that_are_final_for_now_go_together() {
        let (at, server) = (Timestamp::UNIX_EPOCH, "s".to_owned());
        for (result, expected) in [
            (
                Ok(Ended::Dropped {
                    at,
                    server: server.clone(),
                    late_seconds: 1.0,
                }),
                true,
            ),
            (
                Ok(Ended::Absent {
                    at,
                    server: server.clone(),
                }),
                true,
            ),
            (
                Ok(Ended::NotDue {
                    until: at,
                    left: Duration::ZERO,
                }),
                true,
            ),
            (Ok(Ended::NotTried), false),
            (Ok(Ended::Moved { server }), false),
            (Err(Failure::new(FailureCode::ObjectLocked, "x")), false),
        ] {
            let task = revocation();
            assert_eq!(goes_together(&task, &result), expected, "{result:?}");
            // A dispatcher of an earlier version reads one outcome in a message.
            let task = Revoke {
                reads_batches: false,
                ..task
            };
            assert!(!goes_together(&task, &result), "{result:?}");
        }
    }
}
