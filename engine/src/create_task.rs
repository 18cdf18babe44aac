//! Create tasks: delivery, deadline, PostgreSQL, reply, ack. Run twice, the second finds the role
//! and answers the same.

use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use mayfly_common::broker::Incoming;
use mayfly_common::task::{Create, Failure, FailureCode, Kind, ReplyResult};
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;
use tracing::{Instrument, info, info_span, warn};

use crate::metrics::Ending;
use crate::pg;
use crate::work::Engine;

/// Creates worked on at a time: all that may be unsettled, so none waits here.
pub(crate) const PREFETCH: u16 = 8;
/// How far the clocks of dispatcher and engine may differ. The deadline on them only ends the
/// use of a recorded task; what bounds an honest one is its expiry in the queue and
/// [`mayfly_common::task::CREATE_BUDGET`], neither of which compares two clocks.
const CLOCK_ALLOWANCE: SignedDuration = SignedDuration::from_secs(60);

/// Works on creates until the source ends.
pub(crate) async fn run(
    engine: Arc<Engine>,
    mut creates: mpsc::Receiver<Incoming>,
    tasks: TaskTracker,
) {
    while let Some(incoming) = creates.recv().await {
        let engine = engine.clone();
        tasks.spawn(async move {
            let lease = incoming
                .head
                .lease
                .map(|id| id.to_string())
                .unwrap_or_default();
            let span = info_span!("create", lease, traceparent = incoming.head.traceparent);
            handle(&engine, incoming).instrument(span).await;
        });
    }
}

async fn handle(engine: &Engine, incoming: Incoming) {
    engine.metrics.begun(Kind::Create);
    let arrived = incoming.arrived;
    let (ending, result) = work(engine, &incoming).await;
    engine.reply(&incoming, result).await;
    incoming.ack().await;
    engine
        .metrics
        .ended(Kind::Create, ending, arrived.elapsed().as_secs_f64());
}

async fn work(engine: &Engine, incoming: &Incoming) -> (Ending, ReplyResult) {
    let refuse = |reason: &str, code, message: String| {
        engine.metrics.refused(reason);
        warn!(reason, "a create was refused");
        (
            Ending::Refused,
            ReplyResult::Failed(Failure::new(code, message)),
        )
    };
    let late = incoming
        .head
        .deadline
        .is_none_or(|deadline| Timestamp::now().duration_since(deadline) > CLOCK_ALLOWANCE);
    if late {
        return refuse(
            "past_deadline",
            FailureCode::PastDeadline,
            format!(
                "engine {} takes the task for long overdue; do the clocks of dispatcher and engine agree?",
                engine.name
            ),
        );
    }
    let opened: Result<Create, _> =
        incoming
            .head
            .open(&engine.pool_key, &engine.dispatcher_key, &incoming.body);
    let task = match opened {
        Ok(task) if Some(task.lease) == incoming.head.lease => task,
        Ok(_) => {
            return refuse(
                "not_authentic",
                FailureCode::NotUnderstood,
                "the task names two leases".to_owned(),
            );
        }
        Err(error) => {
            return refuse(
                error.reason(),
                FailureCode::NotUnderstood,
                format!("engine {}: {error}", engine.name),
            );
        }
    };
    let mut notes = pg::Notes::default();
    let created = pg::create(
        &engine.servers,
        &engine.grant_roles,
        &task,
        incoming.arrived,
        &mut notes,
    )
    .await;
    for reason in &notes.retries {
        engine.metrics.retried(reason);
    }
    if let Some(skipped) = notes.skipped {
        engine.metrics.skipped(skipped);
    }
    if let Some(skew) = notes.clock_skew {
        engine.metrics.clock_skew(skew);
    }
    match created {
        Ok(created) => {
            info!(role = %task.role, expiration = %created.expiration, "made an account");
            (Ending::Ok, ReplyResult::Created(created))
        }
        Err(failure) => {
            warn!(role = %task.role, code = failure.code.as_str(), reason = failure.message, "an account could not be made");
            (Ending::Failed, ReplyResult::Failed(failure))
        }
    }
}
