//! A batch at its server: admitted, done together, and one by one where it needs that.

use std::time::Duration;

use futures_util::future::join_all;
use mayfly_common::broker::Incoming;
use mayfly_common::fault;
use mayfly_common::panics::caught;
use mayfly_protocol::task::{Failure, Revoke, RevokeMode};
use tracing::debug;

use super::Batch;
use super::moved;
use super::report::{remember, report};
use super::settle::settle;
use crate::metrics::Ending;
use crate::pg;
use crate::work::Engine;
use mayfly_protocol::revocation::{Ended, is_conclusive, not_tried};

/// How long revocations wait for a server that is slow before they are parked.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long a revocation that cannot be done within its batch waits for its turn.
const ALONE_PATIENCE: Duration = Duration::from_secs(2);

/// Admits a batch to its server. While the server is not known to be healthy, only some are tried. The others
/// wait at most 1 s for the result, and are then parked, to make room for the tasks of other servers.
pub(super) async fn admit(engine: &Engine, mut batch: Batch) {
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
    // A revocation that a person asked for does not wait for its turn.
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
    // A batch that panics is done again one by one: one revocation is the cause.
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

/// Does one revocation alone that would delay the others of its batch.
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
        debug!(lease = %task.lease, "the server does not answer; the revocation is parked");
        let next = not_tried(&task, incoming.head.attempt, incoming.head.settling);
        settle(engine, incoming, next, Ending::Retried).await;
    });
    join_all(parked).await;
}
