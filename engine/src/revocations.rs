//! Revoke tasks: gathered into batches for one database server, done, reported as outcomes, and
//! where it is not over yet parked again. What happens next is decided by [`next`]; the message is
//! settled last, after whatever replaces it has been confirmed.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use mayfly_common::broker::{Address, Incoming, Message};
use mayfly_common::fault;
use mayfly_common::panics::caught;
use mayfly_protocol::names::{LeaseId, RoleName};
use mayfly_protocol::seal::is_sealed;
use mayfly_protocol::task::{
    Failure, FailureCode, Kind, Outcome, OutcomeResult, Revoke, RevokeMode,
};
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;
use tracing::{debug, error, info, warn};

use crate::metrics::Ending;
use crate::moved;
use crate::pg;
use crate::verdicts;
use crate::work::Engine;
use futures_util::future::join_all;
use mayfly_protocol::revocation::{Ended, Next, backoff, is_conclusive, next, not_tried};

/// Revocations delivered and not settled, at most.
pub(crate) const PREFETCH: u16 = 256;
/// Revocations that cannot be opened, of which the dispatcher is asked at a time.
pub(crate) const UNOPENED: usize = 8;
/// Revocations in one batch, at most.
const BATCH_MAX: usize = 200;
/// How long the first of a batch waits for others.
const GATHER: Duration = Duration::from_millis(3);
/// How long revocations wait for a server that is slow before they are parked.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long a revocation that needs more than its batch waits for its turn.
const ALONE_PATIENCE: Duration = Duration::from_secs(2);
/// Between two tries to park.
const PARK_AGAIN: Duration = Duration::from_secs(1);

/// Works on revocations until the source ends.
pub(crate) async fn run(
    engine: Arc<Engine>,
    mut revokes: mpsc::Receiver<Incoming>,
    tasks: TaskTracker,
) {
    let mut gathered = Vec::new();
    while revokes.recv_many(&mut gathered, BATCH_MAX).await > 0 {
        if gathered.len() < BATCH_MAX {
            tokio::time::sleep(GATHER).await;
            while gathered.len() < BATCH_MAX {
                let Ok(more) = revokes.try_recv() else { break };
                gathered.push(more);
            }
        }
        for batch in batches(&engine, gathered.drain(..), &tasks) {
            let engine = engine.clone();
            tasks.spawn(async move {
                let _ = caught("a batch", admit(&engine, batch)).await;
            });
        }
    }
}

/// Goes back through the delay levels, for an engine that understands it, up to 5 min apart; unless the dispatcher
/// knows that it is not needed.
async fn not_understood(engine: &Engine, mut incoming: Incoming, reason: &str) {
    let attempt = incoming.head.attempt.saturating_add(1);
    let mut next = Next::Park {
        after: backoff(attempt),
        attempt,
        settling: incoming.head.settling,
    };
    // Of a flood of them only some are reported: each waits for a word, in a place of good ones.
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

pub(crate) type Batch = Vec<(Incoming, Revoke)>;

/// Opens the tasks and groups them by server. What cannot be opened goes back through the delay
/// levels: a newer engine may live.
fn batches(
    engine: &Arc<Engine>,
    gathered: impl Iterator<Item = Incoming>,
    tasks: &TaskTracker,
) -> Vec<Batch> {
    let mut by_target: HashMap<(String, bool), Batch> = HashMap::new();
    for incoming in gathered {
        if !is_sealed(&incoming.body) {
            let engine = engine.clone();
            tasks.spawn(async move { engine.broker.set_aside(incoming).await });
            continue;
        }
        engine.metrics.begun(Kind::Revoke);
        match engine.open::<Revoke>(&incoming) {
            _ if incoming.head.kind == Kind::Unknown => {
                engine.metrics.refused("unknown_version");
                let engine = engine.clone();
                tasks.spawn(
                    async move { not_understood(&engine, incoming, "unknown_version").await },
                );
            }
            Ok(mut task) if Some(task.lease) == incoming.head.lease => {
                if !engine.authorities.fill(&mut task.target) {
                    let engine = engine.clone();
                    tasks.spawn(async move {
                        let _ = caught("a batch", look_up(&engine, incoming, task)).await;
                    });
                    continue;
                }
                by_target
                    .entry((pg::target_key(&task.target), task.asked))
                    .or_default()
                    .push((incoming, task));
            }
            other => {
                let reason = other.map_or_else(|error| error.reason(), |_| "not_authentic");
                engine.metrics.refused(reason);
                error!(lease = ?incoming.head.lease, reason, "a revocation cannot be opened; it is tried again later");
                let engine = engine.clone();
                tasks.spawn(async move { not_understood(&engine, incoming, reason).await });
            }
        }
    }
    by_target.into_values().collect()
}

/// Does a revocation whose certificate authorities are still to be read from the broker.
async fn look_up(engine: &Engine, incoming: Incoming, mut task: Revoke) {
    match engine.find_authorities(&mut task.target).await {
        Ok(()) => admit(engine, vec![(incoming, task)]).await,
        Err(failure) => {
            let reason = "authorities_missing";
            engine.metrics.refused(reason);
            error!(lease = %task.lease, reason, "a revocation cannot be done: {failure}; it is tried again later");
            not_understood(engine, incoming, reason).await;
        }
    }
}

/// Lets a batch to its server. While the server is not known to be healthy only some go, as trials; the
/// others wait a moment for their news, and then make room for the tasks of other servers.
async fn admit(engine: &Engine, mut batch: Batch) {
    let Some((_, first)) = batch.first() else {
        return;
    };
    let limits = engine.servers.limits(&first.target);
    if first.asked || limits.is_healthy() {
        return work(engine, &limits, batch).await;
    }
    let trials = limits.trial_permits(batch.len());
    let others = batch.split_off(trials.as_ref().map_or(0, pg::Permit::num_permits));
    tokio::join!(
        async {
            if trials.is_some() {
                work(engine, &limits, batch).await;
                drop(trials);
            }
        },
        async {
            if others.is_empty() {
            } else if limits.becomes_healthy(PATIENCE).await {
                work(engine, &limits, others).await;
            } else {
                make_room(engine, others).await;
            }
        },
    );
}

/// Does a batch, when it is its turn at the server.
async fn work(engine: &Engine, limits: &pg::ServerLimits, batch: Batch) {
    // A person does not wait in line.
    let is_asked = batch.first().is_some_and(|(_, task)| task.asked);
    let place = limits.batch(PATIENCE).await;
    if place.is_none() && !is_asked {
        return make_room(engine, batch).await;
    }
    engine.metrics.batch(batch.len());
    fault::point("revoke", "delivered").await;
    let is_final =
        |(incoming, task): &(Incoming, Revoke)| is_conclusive(task, incoming.head.settling);
    let tasks: Vec<(&Revoke, bool)> = batch.iter().map(|one| (&one.1, is_final(one))).collect();
    for (_, task) in batch
        .iter()
        .filter(|(_, task)| task.mode == RevokeMode::Now)
    {
        remember(engine, task);
    }
    // A batch that panics is done again one by one: one of them is the cause.
    let revoking = caught(
        "a batch of revocations",
        pg::revoke(&engine.servers, &tasks),
    );
    let results = revoking.await.unwrap_or_else(|| vec![None; tasks.len()]);
    let results = moved::follow(engine, &batch, results).await;
    drop(place);
    let reports = batch
        .into_iter()
        .zip(results)
        .map(|((incoming, task), result)| async {
            let result = match result {
                Some(result) => result,
                None => alone(engine, limits, &incoming, &task).await,
            };
            caught("a revocation", report(engine, incoming, task, result)).await;
        });
    join_all(reports).await;
}

/// Does a revocation that would hold up others of its batch, by itself.
async fn alone(
    engine: &Engine,
    limits: &pg::ServerLimits,
    incoming: &Incoming,
    task: &Revoke,
) -> Result<Ended, Failure> {
    let place = limits.hard(ALONE_PATIENCE).await;
    if place.is_none() && !task.asked {
        return Ok(Ended::NotTried);
    }
    let conclusive = is_conclusive(task, incoming.head.settling);
    let revoking = caught("a revocation", async {
        let ended = pg::revoke_alone(&engine.servers, task, conclusive).await;
        moved::follow_alone(engine, incoming, task, ended).await
    });
    revoking.await.unwrap_or_else(|| Err(engine.mistaken()))
}

/// Parks revocations that were not tried, since their server is busy or hangs.
async fn make_room(engine: &Engine, batch: Batch) {
    let parked = batch.into_iter().map(|(incoming, task)| async move {
        engine.metrics.retried("server_busy");
        debug!(lease = %task.lease, "the server does not answer; the revocation waits outside");
        let next = not_tried(&task, incoming.head.attempt, incoming.head.settling);
        settle(engine, incoming, next, Ending::Retried).await;
    });
    join_all(parked).await;
}

/// From now on a create of this lease is a recorded one, and is refused here.
fn remember(engine: &Engine, task: &Revoke) {
    let window = Duration::from_millis(task.window_ms);
    engine.ended.remember(task.lease, window);
}

async fn report(
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
    /// See [`Outcome::found_at`].
    found_at: Option<String>,
}

/// Reports what came of a revocation. Where the dispatcher may know better, its verdict is waited
/// for: `next` becomes [`Next::Done`] where no more tries are needed, and where there is a better
/// way that is what is parked.
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
    let sent = engine
        .send(
            Address::Outcomes,
            Kind::Outcome,
            Some(lease),
            &incoming.head.traceparent,
            &body,
        )
        .await;
    match (sent, awaited) {
        (Ok(()), Some(awaited)) => {
            let Some(verdict) = awaited.heard().await else {
                return;
            };
            if verdict.retire {
                debug!(%lease, "the dispatcher says that this revocation is not needed any more");
                *next = Next::Done;
            } else if let Some(instead) = verdict.instead
                && let Ok(body) = BASE64_STANDARD.decode(&instead.body)
            {
                debug!(%lease, "the dispatcher says how else to end this account");
                incoming.head.issued = instead.issued;
                incoming.body = body;
            }
        }
        (Ok(()), None) => {}
        // The dispatcher asks again for what it has not heard of.
        (Err(error), _) => debug!(%lease, %error, "the outcome was not sent"),
    }
}

/// Parks what comes again, then acknowledges. Never acknowledges what is not safe elsewhere.
async fn settle(engine: &Engine, incoming: Incoming, next: Next, ending: Ending) {
    let seconds = incoming.arrived.elapsed().as_secs_f64();
    if let Next::Park {
        after,
        attempt,
        settling,
    } = next
    {
        let mut head = incoming.head.clone();
        head.attempt = attempt;
        head.settling = settling;
        loop {
            if incoming.is_stale() {
                // The broker has it back and delivers it again; a copy would make two.
                engine.metrics.ended(Kind::Revoke, ending, seconds);
                return;
            }
            let message = Message {
                to: Address::Delayed(after, engine.pool.clone()),
                head: head.clone(),
                body: incoming.body.clone(),
                reply_as: None,
                answers: None,
                expires: None,
            };
            let parked = match head.kind {
                // What this version cannot read entirely stays as it came.
                Kind::Unknown => {
                    let pool = &engine.pool;
                    engine.broker.park_again(&incoming, after, pool).await
                }
                _ => engine.broker.publish(message).await,
            };
            match parked {
                Ok(()) => {
                    fault::point("revoke", "parked").await;
                    break;
                }
                Err(error) => {
                    // What is missing at the broker a dispatcher declares again.
                    warn!(lease = ?head.lease, %error, "a revocation could not be parked yet");
                    tokio::time::sleep(PARK_AGAIN).await;
                }
            }
        }
    }
    incoming.ack().await;
    engine.metrics.ended(Kind::Revoke, ending, seconds);
}
