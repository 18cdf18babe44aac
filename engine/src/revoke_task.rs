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
            tasks.spawn(async move { work(&engine, batch).await });
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
    let mut by_target: HashMap<String, Batch> = HashMap::new();
    for incoming in gathered {
        engine.metrics.begun(Kind::Revoke);
        match engine.open::<Revoke>(&incoming) {
            Ok(task) if Some(task.lease) == incoming.head.lease => {
                by_target
                    .entry(pg::target_key(&task.target))
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

async fn work(engine: &Engine, batch: Batch) {
    engine.metrics.batch(batch.len());
    let tasks: Vec<&Revoke> = batch.iter().map(|(_, task)| task).collect();
    let results = pg::revoke(&engine.servers, &tasks).await;
    let reports = batch
        .into_iter()
        .zip(results)
        .map(|((incoming, task), result)| async {
            report(engine, incoming, task, result).await;
        });
    futures_join(reports).await;
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
        Err(_) => {
            let attempt = attempt.saturating_add(1);
            Next::Park {
                after: backoff(attempt),
                attempt,
                settling,
            }
        }
    }
}

fn backoff(attempt: u32) -> Duration {
    let base = BACKOFF_FIRST
        .saturating_mul(1 << attempt.saturating_sub(1).min(16))
        .min(BACKOFF_MAX);
    base.mul_f64(rand::rng().random_range(0.8..1.2))
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
        let failed = Err(Failure::new(FailureCode::DatabaseUnreachable, "away"));
        for attempt in [0, 1, 10, u32::MAX] {
            let Next::Park {
                after,
                attempt: then,
                ..
            } = next(&task(0, false), attempt, false, &failed)
            else {
                panic!("given up at attempt {attempt}");
            };
            assert!(then > attempt || attempt == u32::MAX);
            assert!(after >= BACKOFF_FIRST.mul_f64(0.8) && after <= BACKOFF_MAX.mul_f64(1.2));
        }
        for result in [failed, absent()] {
            assert_eq!(next(&task(9_000, true), 0, false, &result), Next::Done);
        }
    }
}
