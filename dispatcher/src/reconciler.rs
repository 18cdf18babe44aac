//! The reconciler: what the ordinary messages did not bring to its end is published again from
//! the lease store. Also the other things done again and again: declaring pools after each
//! connection, the gauges, forgetting.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use jiff::Timestamp;
use mayfly_common::names::PoolName;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::app::{App, trace_of};
use crate::delays;
use crate::keys::Generation;
use crate::store::{self, Revocation, StoreError};

const ROUND_EVERY: Duration = Duration::from_secs(1);
/// Leases of one pool in a round; where there were more, the next round begins at once.
const BATCH: u32 = 500;
/// Publishes under way at a time.
const AT_ONCE: usize = 8;
const GAUGES_EVERY: Duration = Duration::from_secs(1);
const COUNT_QUEUES_EVERY: Duration = Duration::from_secs(5);
/// How often it is tried whether the store can be written.
const TOUCH_EVERY: Duration = Duration::from_secs(5);
const FORGET_EVERY: Duration = Duration::from_secs(600);
/// One that does not reconcile looks again whether it does, so that a start does not wait ten minutes.
const FORGET_LOOK: Duration = Duration::from_secs(5);
const FORGET_MORE: Duration = Duration::from_secs(1);
/// How often it is looked whether a key was renewed.
const KEYS_EVERY: Duration = Duration::from_secs(1);
/// A derivation key is forgotten no sooner than so long after there is a newer one: other dispatchers
/// have that one by then.
const FORGET_KEYS_AFTER: Duration = Duration::from_secs(10);
const BROKER_LOOK: Duration = Duration::from_millis(250);

/// Reconciles until `stop`, the first time at once; of several dispatchers only one does. This
/// one took no request before `begun`.
pub(crate) async fn run(app: Arc<App>, begun: Timestamp, stop: CancellationToken) {
    let mut forsaken = Some(begun);
    while !stop.is_cancelled() {
        let more = match lead_and_look(&app, &mut forsaken).await {
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

/// A round, if this is the dispatcher that reconciles. Whether more is due than one takes.
/// The first time, what was made before `forsaken` is looked at too.
async fn lead_and_look(app: &App, forsaken: &mut Option<Timestamp>) -> Result<bool, StoreError> {
    let leads = app.store.lead(app.name.clone(), app.now()).await?;
    let led = app.leads.swap(leads, Ordering::Relaxed);
    app.metrics.leads(leads);
    if !leads {
        return Ok(false);
    }
    if !led {
        info!("this dispatcher reconciles");
        // What an earlier life, or another dispatcher, had put off.
        app.store.wake_put_off(app.now()).await?;
        if let Some(begun) = forsaken.take() {
            app.store.requeue_abandoned(begun, app.now()).await?;
        }
    }
    round(app).await
}

/// One look at every pool. Whether more is due than one round takes.
async fn round(app: &App) -> Result<bool, StoreError> {
    let mut more = false;
    let pools = app.store.all_pools().await?;
    // Into an empty pool nothing is sent: it would only pile up.
    let mut living = Vec::new();
    for pool in pools.iter().filter(|pool| pool.distrusted.is_none()) {
        let engines = app.broker.engines_of(&pool.name).await;
        if engines.is_ok_and(|engines| engines > 0) {
            living.push(pool.name.clone());
        }
    }
    for pool in pools {
        let due = app
            .store
            .claim_due(pool.name, living.clone(), BATCH, app.now(), rand::random())
            .await?;
        more |= due.len() == BATCH as usize;
        futures_util::stream::iter(&due)
            .for_each_concurrent(AT_ONCE, async |due| send(app, due).await)
            .await;
    }
    Ok(more)
}

async fn send(app: &App, due: &Revocation) {
    let lease = &due.lease;
    let sent = if due.taken_over {
        info!(lease = %lease.id, trace = trace_of(lease), pool = %lease.pool, "taken over by another pool");
        app.send_taken_over(due).await
    } else {
        app.send_copy(due).await
    };
    match sent {
        Ok(()) => {
            debug!(lease = %lease.id, trace = trace_of(lease), state = lease.status.state.as_str(), "sent again")
        }
        // Its next chance is already set.
        Err(error) => warn!(lease = %lease.id, trace = trace_of(lease), %error, "not sent again"),
    }
}

/// Declares again what every pool needs, as a binding that was lost. A queue that is absent is left
/// to [`count_queues`], but for the `first` time: maybe somebody deleted it at this moment, and its
/// consumers have not heard of it yet.
pub(crate) async fn declare_pools(app: &App, first: bool) {
    let pools = match app.store.all_pools().await {
        Ok(pools) => pools,
        Err(error) => return warn!(%error, "pools are not declared"),
    };
    for pool in pools {
        if first || matches!(app.broker.waiting(&pool.name).await, Ok(Some(_))) {
            declare(app, &pool.name).await;
        }
    }
}

async fn declare(app: &App, pool: &PoolName) {
    if let Err(error) = app.broker.declare_pool(pool).await {
        warn!(%pool, %error, "not declared; it is tried again");
    }
}

/// Declares the pools after each connection, and shows whether there is one, until `stop`.
pub(crate) async fn watch_broker(app: Arc<App>, stop: CancellationToken) {
    let (mut was_up, mut first) = (false, true);
    info!("the API answers; waiting for the broker");
    while !stop.is_cancelled() {
        let up = app.broker.is_up();
        app.metrics.broker_up(up);
        if up && !was_up {
            delays::connected(&app);
            declare_pools(&app, first).await;
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

/// Counts the messages that wait in the pools' queues and those that could not be read, until `stop`.
/// Queues seen absent twice are declared again, and what engines publish to is each time: engines
/// may declare neither.
pub(crate) async fn count_queues(app: Arc<App>, stop: CancellationToken) {
    let mut every = tokio::time::interval(COUNT_QUEUES_EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut absent: Vec<PoolName> = Vec::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = every.tick() => {}
        }
        // What cannot be counted is not shown; broker and store have metrics of their own.
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
            delays::mend(&app).await;
        }
        for pool in absent_now.iter().filter(|pool| absent.contains(*pool)) {
            warn!(%pool, "queues are absent; everything is declared again");
            delays::mend(&app).await;
            declare(&app, pool).await;
        }
        absent = absent_now;
    }
}

/// Takes up what was done with keys by another dispatcher, or by `--rekey`. `newest` is the newest
/// derivation key, and since when this dispatcher knows it.
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

/// Refreshes the gauges and forgets what is old, until `stop`.
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
                true => app.store.forget(app.now()).await.map(|more| {
                    // A little at a time, so that nobody waits for it.
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
