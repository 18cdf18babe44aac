//! Periodic work: declares the queues of pools after each connection, counts messages, refreshes gauges, loads
//! renewed keys, and forgets old rows.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mayfly_protocol::names::PoolName;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::app::App;
use crate::engines::declare;
use crate::store::{self, Generation, StoreError};

const GAUGES_EVERY: Duration = Duration::from_secs(1);
const COUNT_QUEUES_EVERY: Duration = Duration::from_secs(5);
/// Pause between two test writes to the store.
const TOUCH_EVERY: Duration = Duration::from_secs(5);
const FORGET_EVERY: Duration = Duration::from_secs(600);
/// A dispatcher that does not reconcile checks after this time whether it does now, so that forgetting begins soon
/// after a start.
const FORGET_LOOK: Duration = Duration::from_secs(5);
/// Pause between two jobs that forget, if there is more to forget. So at most 1,000 leases are forgotten in a
/// second.
const FORGET_MORE: Duration = Duration::from_millis(200);
/// Pause between two looks for renewed keys.
const KEYS_EVERY: Duration = Duration::from_secs(1);
/// Minimum time from a new derivation key to the deletion of the earlier one. By then the other dispatchers have the
/// new key.
const FORGET_KEYS_AFTER: Duration = Duration::from_secs(10);
const BROKER_LOOK: Duration = Duration::from_millis(250);

/// Declares the pools after each connection, and shows whether the broker is connected, until `stop`.
pub(crate) async fn watch_broker(app: Arc<App>, stop: CancellationToken) {
    let (mut was_up, mut first) = (false, true);
    info!("the API is available; waiting for the broker");
    while !stop.is_cancelled() {
        let up = app.broker.is_up();
        app.metrics.broker_up(up);
        if up && !was_up {
            declare::connected(&app);
            declare::declare_pools(&app, first).await;
            first = false;
            app.reconcile.notify_one();
        }
        was_up = up;
        tokio::select! {
            () = stop.cancelled() => {}
            () = tokio::time::sleep(BROKER_LOOK) => {}
        }
    }
}

/// Counts the messages in the pools' queues and the unreadable ones, until `stop`. A queue that was absent twice is
/// declared again. The exchanges to which engines publish are declared each time. Engines may declare neither.
pub(crate) async fn count_queues(app: Arc<App>, stop: CancellationToken) {
    let mut every = tokio::time::interval(COUNT_QUEUES_EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut absent: Vec<PoolName> = Vec::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = every.tick() => {}
        }
        // A queue that cannot be counted is not shown. Broker and store have their own metrics.
        let mut counted = Vec::new();
        let mut absent_now = Vec::new();
        for pool in app.store.all_pools().await.unwrap_or_default() {
            match app.broker.waiting(&pool.name).await {
                Ok(Some(waiting)) => counted.push((pool.name, waiting)),
                Ok(None) => absent_now.push(pool.name),
                Err(_) => {}
            }
        }
        app.metrics.waiting(&counted);
        let unreadable = app.broker.unreadable_kept().await.ok().flatten();
        app.metrics.unreadable_kept(unreadable.unwrap_or(0));
        if app.broker.is_up() && app.broker.declare_entrances().await.is_err() {
            declare::mend(&app).await;
        }
        for pool in absent_now.iter().filter(|pool| absent.contains(*pool)) {
            warn!(%pool, "queues are absent; all queues are declared again");
            declare::mend(&app).await;
            declare::declare_pool(&app, pool).await;
        }
        absent = absent_now;
    }
}

/// Loads keys that another dispatcher or `--rekey` has changed. `newest` is the newest derivation key, and since
/// when this dispatcher has it.
async fn take_up_keys(app: &App, newest: &mut (Generation, Instant)) -> Result<(), StoreError> {
    let forgets = newest.1.elapsed() >= FORGET_KEYS_AFTER && app.leads.load(Ordering::Relaxed);
    let ring = app.store.keys(forgets).await?;
    if ring.derivation.0 != newest.0 {
        *newest = (ring.derivation.0, Instant::now());
    }
    app.identity.keys.renew(ring);
    for pool in app.store.all_pools().await? {
        app.replies.retire_keys(&pool);
    }
    Ok(())
}

/// Refreshes the gauges and forgets old rows, until `stop`.
pub(crate) async fn housekeeping(app: Arc<App>, stop: CancellationToken) {
    let mut gauges = tokio::time::interval(GAUGES_EVERY);
    let mut forget = tokio::time::interval(FORGET_EVERY);
    let mut touch = tokio::time::interval(TOUCH_EVERY);
    let mut keys = tokio::time::interval(KEYS_EVERY);
    let mut newest = (app.identity.keys.derivation().0, Instant::now());
    loop {
        let done = tokio::select! {
            () = stop.cancelled() => return,
            _ = gauges.tick() => {
                let counts = app.store.pool_counts(app.now()).await;
                let known = counts.as_ref().ok().map(Vec::as_slice);
                app.metrics.pools(known, |pool| app.registry.count(pool));
                app.metrics.rows_refused(store::refused_rows());
                app.metrics.reconnects(app.broker.reconnects());
                counts.map(drop)
            }
            _ = keys.tick() => take_up_keys(&app, &mut newest).await,
            _ = touch.tick() => app.store.touch(app.now()).await,
            _ = forget.tick() => match app.leads.load(Ordering::Relaxed) {
                true => app.store.forget(app.now(), app.limits.history).await.map(|more| {
                    // Each job forgets a few rows, so that nobody waits for it.
                    if more {
                        forget.reset_after(FORGET_MORE);
                    }
                }),
                false => {
                    forget.reset_after(FORGET_LOOK);
                    Ok(())
                }
            },
        };
        if let Err(error) = done {
            warn!(%error, "housekeeping waits for the store");
        }
    }
}
