//! Revoke tasks: gathered into batches for one database server, done, reported as outcomes, and
//! where it is not over yet parked again. What happens next is decided by [`next`]; the message is
//! settled last, after whatever replaces it has been confirmed.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use mayfly_common::broker::{Address, BrokerError, Incoming, Message};
use mayfly_common::names::LeaseId;
use mayfly_common::task::{Failure, FailureCode, Kind, Outcome, OutcomeResult, Revoke, RevokeMode};
use rand::RngExt;
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;
use tracing::{debug, error, info, warn};

use crate::metrics::Ending;
use crate::pg::{self, Ended};
use crate::verdicts;
use crate::work::Engine;

/// Revocations delivered and not settled, at most.
pub(crate) const PREFETCH: u16 = 256;
/// Revocations in one batch, at most.
const BATCH_MAX: usize = 200;
/// How long the first of a batch waits for others.
const GATHER: Duration = Duration::from_millis(3);
/// Between two tries: 1 s, doubling, at most 5 minutes, ±20 %.
const BACKOFF_FIRST: Duration = Duration::from_secs(1);
const BACKOFF_MAX: Duration = Duration::from_secs(300);
/// At a server that is away the first tries, of about a minute and a half, come no further apart:
/// it is mostly back by then, and the breaker makes them cheap.
const AWAY_MAX: Duration = Duration::from_secs(4);
const AWAY_TRIES: u32 = 25;
/// How long revocations wait for a server that is slow before they are parked ...
const PATIENCE: Duration = Duration::from_secs(1);
/// ... for so long, ±20 %, without having been tried.
const SERVER_BUSY: Duration = Duration::from_secs(1);
/// Added to what a lease has left, so that it is due when the message comes again.
const DUE_MARGIN: Duration = Duration::from_millis(250);
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
            tasks.spawn(async move { admit(&engine, batch).await });
        }
    }
}

/// Goes back through the delay levels, for an engine that understands it; unless the dispatcher
/// knows that it is not needed.
async fn not_understood(engine: &Engine, incoming: Incoming, reason: &str) {
    let attempt = incoming.head.attempt.saturating_add(1);
    let mut next = Next::Park {
        after: backoff(attempt),
        attempt,
        settling: incoming.head.settling,
    };
    if let Some(lease) = incoming.head.lease {
        let failure = Failure::new(
            FailureCode::NotUnderstood,
            format!(
                "engine {} cannot open the revocation: {reason}",
                engine.name
            ),
        );
        tell(
            engine,
            &incoming,
            lease,
            OutcomeResult::Failing(failure),
            &mut next,
        )
        .await;
    }
    settle(engine, incoming, next, Ending::Refused).await;
}

type Batch = Vec<(Incoming, Revoke)>;

/// Opens the tasks and groups them by server. What cannot be opened goes back through the delay
/// levels: a newer engine may live.
fn batches(
    engine: &Arc<Engine>,
    gathered: impl Iterator<Item = Incoming>,
    tasks: &TaskTracker,
) -> Vec<Batch> {
    let mut by_target: HashMap<(String, bool), Batch> = HashMap::new();
    for incoming in gathered {
        engine.metrics.begun(Kind::Revoke);
        match engine.open::<Revoke>(&incoming) {
            Ok(task) if Some(task.lease) == incoming.head.lease => {
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

/// Lets a batch to its server. While that is not known to be well only some go, as scouts; the
/// others wait a moment for their news, and then make room for the tasks of other servers.
async fn admit(engine: &Engine, mut batch: Batch) {
    let Some((_, first)) = batch.first() else {
        return;
    };
    let door = engine.servers.door(&first.target);
    if first.asked || door.is_well() {
        return work(engine, &door, batch).await;
    }
    let scouts = door.scouts(batch.len());
    let others = batch.split_off(scouts.as_ref().map_or(0, pg::Place::num_permits));
    tokio::join!(
        async {
            if scouts.is_some() {
                work(engine, &door, batch).await;
                drop(scouts);
            }
        },
        async {
            if others.is_empty() {
            } else if door.becomes_well(PATIENCE).await {
                work(engine, &door, others).await;
            } else {
                make_room(engine, others).await;
            }
        },
    );
}

/// Does a batch, when it is its turn at the server.
async fn work(engine: &Engine, door: &pg::Door, batch: Batch) {
    // A person does not wait in line.
    let is_asked = batch.first().is_some_and(|(_, task)| task.asked);
    let place = door.batch(PATIENCE).await;
    if place.is_none() && !is_asked {
        return make_room(engine, batch).await;
    }
    engine.metrics.batch(batch.len());
    let tasks: Vec<&Revoke> = batch.iter().map(|(_, task)| task).collect();
    let results = pg::revoke(&engine.servers, &tasks).await;
    drop(place);
    let reports = batch
        .into_iter()
        .zip(results)
        .map(|((incoming, task), result)| async {
            report(engine, incoming, task, result).await;
        });
    futures_join(reports).await;
}

/// Parks revocations that were not tried, since their server is busy or hangs.
async fn make_room(engine: &Engine, batch: Batch) {
    let parked = batch.into_iter().map(|(incoming, task)| async move {
        engine.metrics.retried("server_busy");
        debug!(lease = %task.lease, "the server does not answer; the revocation waits outside");
        let next = not_tried(&task, incoming.head.attempt, incoming.head.settling);
        settle(engine, incoming, next, Ending::Retried).await;
    });
    futures_join(parked).await;
}

/// Waits for all, side by side.
async fn futures_join(all: impl Iterator<Item = impl Future<Output = ()>>) {
    let mut all: Vec<_> = all.map(Box::pin).collect();
    std::future::poll_fn(move |context| {
        all.retain_mut(|one| one.as_mut().poll(context).is_pending());
        if all.is_empty() {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
}

async fn report(engine: &Engine, incoming: Incoming, task: Revoke, result: Result<Ended, Failure>) {
    let lease = task.lease;
    let mode = task.mode.as_str();
    let trace = incoming.head.traceparent.clone();
    let mut next = next(
        &task,
        incoming.head.attempt,
        incoming.head.settling,
        &result,
    );
    let (ending, outcome) = match result {
        Ok(Ended::Dropped {
            at,
            server,
            late_seconds,
        }) => {
            if task.mode == RevokeMode::Expire {
                engine.metrics.dropped(late_seconds);
            }
            info!(%lease, traceparent = trace, role = %task.role, mode, late_seconds, "ended an account");
            (Ending::Ok, OutcomeResult::Dropped { at, server })
        }
        Ok(Ended::Absent { at, server }) => {
            debug!(%lease, traceparent = trace, role = %task.role, mode, "the account is absent");
            (Ending::Ok, OutcomeResult::Absent { at, server })
        }
        Ok(Ended::NotDue { until, .. }) => {
            debug!(%lease, traceparent = trace, role = %task.role, mode, %until, "not due yet");
            (Ending::Retried, OutcomeResult::NotDue { until })
        }
        Err(failure) => {
            let attempt = incoming.head.attempt + 1;
            warn!(%lease, traceparent = trace, role = %task.role, mode, attempt, code = failure.code.as_str(), reason = failure.message, "an account could not be ended; it is tried again");
            engine.metrics.retried(failure.code.as_str());
            (Ending::Retried, OutcomeResult::Failing(failure))
        }
    };
    tell(engine, &incoming, lease, outcome, &mut next).await;
    settle(engine, incoming, next, ending).await;
}

/// Reports what came of a revocation. Where the dispatcher may know that it needs no more tries,
/// its verdict is waited for, and `next` becomes [`Next::Done`] if it says so.
async fn tell(
    engine: &Engine,
    incoming: &Incoming,
    lease: LeaseId,
    result: OutcomeResult,
    next: &mut Next,
) {
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
        result,
        ticket: awaited.as_ref().map(|awaited| awaited.ticket),
        again_ms,
    };
    let sent = engine
        .send(
            Engine::outcomes(),
            Kind::Outcome,
            Some(lease),
            None,
            &incoming.head.traceparent,
            &body,
        )
        .await;
    match (sent, awaited) {
        (Ok(()), Some(awaited)) => {
            if awaited.retired().await {
                debug!(%lease, "the dispatcher says that this revocation is not needed any more");
                *next = Next::Done;
            }
        }
        (Ok(()), None) => {}
        // The dispatcher asks again for what it has not heard of.
        (Err(error), _) => {
            debug!(%lease, %error, "the outcome was not sent");
            if error == BrokerError::Unroutable {
                let _ = engine.broker.redeclare().await;
            }
        }
    }
}

/// What becomes of the message.
#[derive(Debug, PartialEq)]
enum Next {
    /// It is done with.
    Done,
    /// It comes again.
    Park {
        after: Duration,
        attempt: u32,
        settling: bool,
    },
}

/// Decides what becomes of a revocation. A reconciler's copy is never parked: it comes by itself.
fn next(task: &Revoke, attempt: u32, settling: bool, result: &Result<Ended, Failure>) -> Next {
    if task.copy {
        return Next::Done;
    }
    match result {
        Ok(Ended::Dropped { .. } | Ended::Absent { .. }) => {
            // While its create could still commit, or be delivered once more, gone is not final.
            if task.window_ms > 0 && !settling {
                Next::Park {
                    after: Duration::from_millis(task.window_ms),
                    attempt: 0,
                    settling: true,
                }
            } else {
                Next::Done
            }
        }
        Ok(Ended::NotDue { left, .. }) => Next::Park {
            after: left.saturating_add(DUE_MARGIN),
            attempt: 0,
            settling,
        },
        Err(failure) => {
            let attempt = attempt.saturating_add(1);
            let after = if failure.code == FailureCode::DatabaseUnreachable {
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

/// What becomes of a revocation that was not tried.
fn not_tried(task: &Revoke, attempt: u32, settling: bool) -> Next {
    if task.copy {
        return Next::Done;
    }
    Next::Park {
        after: jitter(SERVER_BUSY),
        attempt,
        settling,
    }
}

fn backoff(attempt: u32) -> Duration {
    jitter(doubled(attempt).min(BACKOFF_MAX))
}

/// [`backoff`] for a server that is away.
fn backoff_away(attempt: u32) -> Duration {
    if attempt <= AWAY_TRIES {
        jitter(doubled(attempt).min(AWAY_MAX))
    } else {
        // From 8 s on.
        backoff(attempt - AWAY_TRIES + 3)
    }
}

fn doubled(attempt: u32) -> Duration {
    BACKOFF_FIRST.saturating_mul(1 << attempt.saturating_sub(1).min(16))
}

fn jitter(pause: Duration) -> Duration {
    pause.mul_f64(rand::rng().random_range(0.8..1.2))
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
            match engine.broker.publish(message).await {
                Ok(()) => break,
                Err(error) => {
                    warn!(lease = ?head.lease, %error, "a revocation could not be parked yet");
                    if error == BrokerError::Unroutable || engine.broker.is_up() {
                        let _ = engine.broker.redeclare().await;
                    }
                    tokio::time::sleep(PARK_AGAIN).await;
                }
            }
        }
    }
    incoming.ack().await;
    engine.metrics.ended(Kind::Revoke, ending, seconds);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use jiff::Timestamp;
    use mayfly_common::grant::OwnedObjects;
    use mayfly_common::names::InstallationId;
    use mayfly_common::secret::Secret;
    use mayfly_common::target::{SslMode, Target};

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
                sslrootcert: None,
                sslcert: None,
                sslkey: None,
            },
            role: "r".parse().unwrap(),
            mode: RevokeMode::Expire,
            owned_objects: OwnedObjects::Reassign,
            server: None,
            window_ms,
            copy,
            asked: false,
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
        assert_eq!(
            next(&task(7_000, false), 3, false, &absent()),
            Next::Park {
                after: Duration::from_secs(7),
                attempt: 0,
                settling: true
            }
        );
        assert_eq!(next(&task(7_000, false), 0, true, &absent()), Next::Done);
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
                after: left + DUE_MARGIN,
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
                        AWAY_MAX
                    }
                    _ => BACKOFF_MAX,
                };
                assert!(after >= BACKOFF_FIRST.mul_f64(0.8) && after <= most.mul_f64(1.2));
            }
        }
        for result in [failed, away, absent()] {
            assert_eq!(next(&task(9_000, true), 0, false, &result), Next::Done);
        }
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
        assert!(after <= SERVER_BUSY.mul_f64(1.2));
        assert_eq!(not_tried(&task(0, true), 0, false), Next::Done);
    }
}
