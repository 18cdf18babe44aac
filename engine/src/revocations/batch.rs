//! A batch at its server: admitted, done together, and one by one if necessary.

use std::time::Duration;

use futures_util::future::join_all;
use mayfly_common::fault;
use mayfly_common::panics::caught;
use mayfly_protocol::task::{Failure, Revoke, RevokeMode};
use tracing::debug;

use super::Batch;
use super::item::{Item, items};
use super::moved;
use super::report::{goes_together, remember, report, report_together};
use super::settle::settle;
use crate::metrics::Ending;
use crate::pg;
use crate::work::Engine;
use mayfly_protocol::revocation::{Ended, not_tried};

/// How long revocations wait for a slow server before they are parked.
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

/// Does a batch when the server has a place for it.
async fn work(engine: &Engine, limits: &pg::ServerLimits, batch: Batch) {
    // A revocation that a person requested does not wait for its turn.
    let is_asked = batch.first().is_some_and(|(_, task)| task.asked);
    let place = limits.batch(PATIENCE).await;
    if place.is_none() && !is_asked {
        return make_room(engine, batch).await;
    }
    let items = items(batch);
    engine.metrics.batch(items.len());
    fault::point("revoke", "delivered").await;
    let tasks: Vec<(&Revoke, bool)> = items
        .iter()
        .map(|one| (&one.task, one.is_conclusive()))
        .collect();
    for (task, _) in tasks
        .iter()
        .filter(|(task, _)| task.mode == RevokeMode::Now)
    {
        remember(engine, task);
    }
    // If a batch panics, its revocations are done one by one, because one of them is the cause.
    let revoking = caught(
        "a batch of revocations",
        pg::revoke(&engine.servers, &tasks),
    );
    let results = revoking.await.unwrap_or_else(|| vec![None; tasks.len()]);
    let results = moved::follow(engine, &items, results).await;
    drop(place);
    let (mut together, mut each) = (Vec::new(), Vec::new());
    for (item, result) in items.into_iter().zip(results) {
        match result {
            Some(result) if goes_together(&item.task, &result) => together.push((item, result)),
            result => each.push((item, result)),
        }
    }
    let each = each.into_iter().map(|(item, result)| async {
        let result = match result {
            Some(result) => result,
            None => alone(engine, limits, &item).await,
        };
        caught("a revocation", report(engine, item, result)).await;
    });
    let together = caught("a batch of reports", report_together(engine, together));
    tokio::join!(join_all(each), together);
}

/// Does one revocation alone, because it would delay the others of its batch.
async fn alone(engine: &Engine, limits: &pg::ServerLimits, item: &Item) -> Result<Ended, Failure> {
    let place = limits.hard(ALONE_PATIENCE).await;
    if place.is_none() && !item.task.asked {
        return Ok(Ended::NotTried);
    }
    let revoking = caught("a revocation", async {
        let ended = pg::revoke_alone(&engine.servers, &item.task, item.is_conclusive()).await;
        moved::follow_alone(engine, item, ended).await
    });
    revoking.await.unwrap_or_else(|| Err(engine.mistaken()))
}

/// Parks revocations that were not tried, because their server is busy or does not answer.
async fn make_room(engine: &Engine, batch: Batch) {
    let parked = items(batch)
        .into_iter()
        .map(|Item { task, held }| async move {
            engine.metrics.retried("server_busy");
            debug!(lease = %task.lease, "the server does not answer; the revocation is parked");
            let next = not_tried(&task, held.head.attempt, held.head.settling);
            settle(engine, held, next, Ending::Retried).await;
        });
    join_all(parked).await;
}
