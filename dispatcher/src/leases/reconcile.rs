//! The reconciler publishes again what the usual messages did not finish. It reads this from the lease store.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::StreamExt;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{revoke_below, trace_of};
use crate::app::App;
use crate::engines::outbox;
use crate::store::{LeaseAccess, StoreError};

const ROUND_EVERY: Duration = Duration::from_secs(1);
/// Maximum number of leases of one pool in a round and in one store job. If there are more, the next round begins at
/// once.
const BATCH: u32 = 200;
/// Maximum number of concurrent publishes. It is half of the connection's publisher channels, so that a read finds a
/// free one.
const AT_ONCE: usize = 16;

/// Reconciles until `stop`, the first time at once. Of several dispatchers only one does. This dispatcher took no
/// request before `begun`.
pub(crate) async fn run(app: Arc<App>, begun: Timestamp, stop: CancellationToken) {
    let mut abandoned_before = Some(begun);
    while !stop.is_cancelled() {
        let more = match lead_and_look(&app, &mut abandoned_before).await {
            Ok(more) => more,
            Err(error) => {
                warn!(%error, "the reconciler waits for the store");
                app.leads.store(false, Ordering::Relaxed);
                app.metrics.leads(false);
                false
            }
        };
        if more {
            continue;
        }
        tokio::select! {
            () = stop.cancelled() => {}
            () = app.reconcile.notified() => {}
            () = tokio::time::sleep(ROUND_EVERY) => {}
        }
    }
}

/// Does one round if this dispatcher leads. Returns whether more is due than one round takes. In the first round the
/// leases from before `abandoned_before` are due too.
async fn lead_and_look(
    app: &App,
    abandoned_before: &mut Option<Timestamp>,
) -> Result<bool, StoreError> {
    let leads = app.store.lead(app.name.clone(), app.now()).await?;
    let led = app.leads.swap(leads, Ordering::Relaxed);
    app.metrics.leads(leads);
    if !leads {
        return Ok(false);
    }
    if !led {
        info!("this dispatcher reconciles");
        // Leases that an earlier process, or another dispatcher, had postponed.
        app.store.wake_put_off(app.now()).await?;
        if let Some(begun) = abandoned_before.take() {
            app.store.requeue_abandoned(begun, app.now()).await?;
        }
    }
    // This step comes first, so that the round does not send again what this step marks.
    let goes_on = revoke_below::go_on(app).await?;
    Ok(round(app).await? || goes_on)
}

/// Looks at every pool once. Returns whether more is due than one round takes.
async fn round(app: &App) -> Result<bool, StoreError> {
    let mut more = false;
    // Most rounds find nothing. Such a round writes nothing, so no other dispatcher waits.
    let with_due = app.store.pools_with_due(app.now()).await?;
    if with_due.is_empty() {
        return Ok(false);
    }
    let pools = app.store.all_pools().await?;
    // Nothing is sent to a pool without engines: messages would only accumulate.
    let mut living = Vec::new();
    for pool in pools.iter().filter(|pool| pool.distrusted.is_none()) {
        let engines = app.broker.engines_of(&pool.name).await;
        if engines.is_ok_and(|engines| engines > 0) {
            living.push(pool.name.clone());
        }
    }
    for pool in with_due {
        let due = app
            .store
            .claim_due(pool, living.clone(), BATCH, app.now(), rand::random())
            .await?;
        more |= due.len() == BATCH as usize;
        let (taken_over, due): (Vec<_>, Vec<_>) = due.into_iter().partition(|due| due.taken_over);
        send(app, &due).await;
        futures_util::stream::iter(&taken_over)
            .for_each_concurrent(AT_ONCE, async |due| send_taken_over(app, due).await)
            .await;
    }
    Ok(more)
}

async fn send(app: &App, due: &[LeaseAccess]) {
    for due in due {
        let lease = &due.lease;
        debug!(lease = %lease.id, trace = trace_of(lease), state = lease.status.state.as_str(), "sent again");
    }
    // The store has already set the next try of those that fail.
    outbox::copies(app, due).await;
}

async fn send_taken_over(app: &App, due: &LeaseAccess) {
    let lease = &due.lease;
    info!(lease = %lease.id, trace = trace_of(lease), pool = %lease.pool, "the lease is taken over by another pool");
    if let Err(error) = outbox::taken_over(app, due).await {
        warn!(lease = %lease.id, trace = trace_of(lease), %error, "a revocation was not sent; it is sent later");
    }
}
