//! The report of a revocation: the log, the outcome for the dispatcher, and its verdict.

use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use mayfly_common::broker::{Address, Incoming};
use mayfly_common::fault;
use mayfly_protocol::names::{LeaseId, RoleName};
use mayfly_protocol::task::{
    Failure, FailureCode, Kind, Outcome, OutcomeResult, Revoke, RevokeMode,
};
use tracing::{debug, info, warn};

use super::settle::settle;
use crate::metrics::Ending;
use crate::verdicts;
use crate::work::Engine;
use mayfly_protocol::revocation::{Ended, Next, backoff, is_conclusive, next};

/// Parks a revocation that this engine cannot open: another engine may. Tries are at most 5 min apart. If the
/// dispatcher reports that it is not needed, it is done.
pub(super) async fn not_understood(engine: &Engine, mut incoming: Incoming, reason: &str) {
    let attempt = incoming.head.attempt.saturating_add(1);
    let mut next = Next::Park {
        after: backoff(attempt),
        attempt,
        settling: incoming.head.settling,
    };
    // At most 8 at a time are reported: each waits for a verdict, in the place of one that can be opened.
    if let Some(lease) = incoming.head.lease
        && let Ok(_place) = engine.unopened.try_acquire()
        && incoming.head.kind == Kind::Revoke
    {
        let failure = Failure::new(
            FailureCode::NotUnderstood,
            format!(
                "engine {} cannot open the revocation: {reason}",
                engine.name
            ),
        );
        tell(
            engine,
            &mut incoming,
            About {
                lease,
                role: None,
                found_at: None,
            },
            OutcomeResult::Failing(failure),
            &mut next,
        )
        .await;
    }
    settle(engine, incoming, next, Ending::Refused).await;
}

/// Remembers that this engine has ended the lease. A create of it that comes later is a recorded one, and is
/// refused.
pub(super) fn remember(engine: &Engine, task: &Revoke) {
    let window = Duration::from_millis(task.window_ms);
    engine.ended.remember(task.lease, window);
}

/// Reports the result of a revocation, and settles its message.
pub(super) async fn report(
    engine: &Engine,
    mut incoming: Incoming,
    task: Revoke,
    result: Result<Ended, Failure>,
) {
    let lease = task.lease;
    let mode = task.mode.as_str();
    if let Some(span) = &mut incoming.span {
        span.tag("mayfly.mode", mode);
        match &result {
            Ok(ended) => span.tag("mayfly.ended", ended.word()),
            Err(failure) => span.fail(failure.code.as_str()),
        }
    }
    let trace = incoming.head.traceparent.clone();
    let settling = incoming.head.settling;
    let conclusive = is_conclusive(&task, settling);
    let mut next = next(&task, incoming.head.attempt, settling, &result);
    let (ending, outcome) = match result {
        Ok(Ended::NotTried | Ended::Moved { .. }) => {
            engine.metrics.retried("server_busy");
            return settle(engine, incoming, next, Ending::Retried).await;
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
            let attempt = incoming.head.attempt + 1;
            warn!(%lease, traceparent = trace, role = %task.role, mode, attempt, code = failure.code.as_str(), reason = failure.message, "an account could not be ended; it is tried again");
            engine.metrics.retried(failure.code.as_str());
            (Ending::Retried, OutcomeResult::Failing(failure))
        }
    };
    let was_found = matches!(outcome, OutcomeResult::Dropped { .. });
    let found_at = was_found.then(|| task.target.address());
    let about = About {
        lease,
        role: Some(task.role.clone()),
        found_at,
    };
    tell(engine, &mut incoming, about, outcome, &mut next).await;
    fault::point("revoke", "outcome_sent").await;
    settle(engine, incoming, next, ending).await;
}

/// What an outcome is about.
struct About {
    lease: LeaseId,
    role: Option<RoleName>,
    /// The value of [`Outcome::found_at`].
    found_at: Option<String>,
}

/// Reports the result of a revocation. If the dispatcher may know better, this waits for its verdict: `next`
/// becomes [`Next::Done`] if no more tries are needed; with a new credential candidate, that revocation is
/// parked.
async fn tell(
    engine: &Engine,
    incoming: &mut Incoming,
    about: About,
    result: OutcomeResult,
    next: &mut Next,
) {
    let lease = about.lease;
    let again_ms = match next {
        Next::Done => None,
        Next::Park { after, .. } => Some(u64::try_from(after.as_millis()).unwrap_or(u64::MAX)),
    };
    let awaited = match &result {
        OutcomeResult::Failing(failure)
            if again_ms.is_some()
                && verdicts::is_worth_asking(failure.code, incoming.head.attempt) =>
        {
            Some(engine.verdicts.await_one())
        }
        _ => None,
    };
    let body = Outcome {
        lease,
        engine: engine.name.clone(),
        attempts: incoming.head.attempt.saturating_add(1),
        role: about.role,
        found_at: about.found_at,
        result,
        ticket: awaited.as_ref().map(|awaited| awaited.ticket),
        again_ms,
    };
    // The answers of creates go through the same channels.
    let place = engine.reports.acquire().await;
    let sent = engine
        .send(
            Address::Outcomes,
            Kind::Outcome,
            Some(lease),
            &incoming.head.traceparent,
            &body,
        )
        .await;
    drop(place);
    match (sent, awaited) {
        (Ok(()), Some(awaited)) => {
            let Some(verdict) = awaited.heard().await else {
                return;
            };
            if verdict.retire {
                debug!(%lease, "the dispatcher reports that this revocation is no longer needed");
                *next = Next::Done;
            } else if let Some(instead) = verdict.instead
                && let Ok(body) = BASE64_STANDARD.decode(&instead.body)
            {
                debug!(%lease, "the dispatcher sent another credential candidate for this account");
                incoming.head.issued = instead.issued;
                incoming.body = body;
            }
        }
        (Ok(()), None) => {}
        // The dispatcher sends the revocation again if it gets no outcome.
        (Err(error), _) => debug!(%lease, %error, "the outcome was not sent"),
    }
}
