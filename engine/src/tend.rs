//! Periodic work of an engine: heartbeats, idle connections, standbys, waiting grants, and looks at grant roles.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mayfly_common::panics::caught;
use mayfly_protocol::timing::timing;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::work::Engine;

/// The queue of certificate authorities is read every 5 s.
const AUTHORITIES_EVERY: Duration = Duration::from_secs(5);
/// Idle connections, kept connections and standbys are checked every 0.5 s.
const CONNECTIONS_EVERY: Duration = Duration::from_millis(500);
/// Missing grants of grant roles are tried every 0.5 s.
const GRANTS_EVERY: Duration = Duration::from_millis(500);

/// Starts the periodic work. The flag is set after the first heartbeat: the dispatcher then knows this engine.
pub(crate) fn start(
    engine: &Arc<Engine>,
    tasks: &TaskTracker,
    stop: &CancellationToken,
    close: &CancellationToken,
) -> Arc<AtomicBool> {
    let is_announced = Arc::new(AtomicBool::new(false));
    let one = || engine.clone();
    tasks.spawn(every(timing().heartbeat_every, stop.clone(), {
        let (engine, announced) = (one(), is_announced.clone());
        async move || {
            if engine.broker.up().await && engine.send_heartbeat(false).await {
                announced.store(true, Ordering::Relaxed);
            }
        }
    }));
    tasks.spawn(every(CONNECTIONS_EVERY, close.clone(), {
        let engine = one();
        async move || {
            engine.servers.close_idle();
            engine.grant_roles.forget_unused();
        }
    }));
    tasks.spawn(every(CONNECTIONS_EVERY, close.clone(), {
        let engine = one();
        async move || engine.servers.tend_kept().await
    }));
    tasks.spawn(every(CONNECTIONS_EVERY, close.clone(), {
        let engine = one();
        async move || engine.servers.tend_standbys().await
    }));
    tasks.spawn(every(AUTHORITIES_EVERY, close.clone(), {
        let engine = one();
        async move || {
            if engine.broker.up().await {
                engine.tend_authorities().await;
            }
        }
    }));
    tasks.spawn(every(GRANTS_EVERY, stop.clone(), {
        let (engine, stop) = (one(), stop.clone());
        async move || {
            tokio::select! {
                () = stop.cancelled() => {}
                () = engine.grant_roles.go_on(&engine.servers) => {}
            }
        }
    }));
    tasks.spawn({
        let (engine, stop) = (one(), stop.clone());
        async move {
            let skipped = |pairs| engine.metrics.skipped(pairs);
            tokio::select! {
                () = stop.cancelled() => {}
                () = engine.grant_roles.look_beside(&engine.servers, skipped) => {}
            }
        }
    });
    is_announced
}

/// Acts every `period` until `stop`, the first time at once.
async fn every(period: Duration, stop: CancellationToken, mut act: impl AsyncFnMut()) {
    let mut ticks = tokio::time::interval(period);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => drop(caught("a periodic task", act()).await),
        }
    }
}
