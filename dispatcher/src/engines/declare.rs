//! Declares deleted queues again. Requests that the ends that were lost with them are parked again.

use std::time::{Duration, Instant};

use mayfly_common::broker::{Address, BrokerError, Message};
use mayfly_common::fault;
use mayfly_protocol::names::PoolName;
use mayfly_protocol::timing::timing;
use mayfly_protocol::topology::LEVELS;
use tracing::{error, warn};

use crate::app::App;

/// Pause between two tries to park after a level was declared again.
const PARK_PAUSE: Duration = Duration::from_millis(250);

/// Publishes a message to park. If the queue of its level is absent, it waits until the queue exists again: a
/// message counts as parked only when a level has taken it.
///
/// # Errors
/// See [`mayfly_common::broker::Broker::publish`].
pub(super) async fn publish(app: &App, message: Message) -> Result<(), BrokerError> {
    if !matches!(message.to, Address::Delayed(..)) {
        return app.broker.publish(message).await;
    }
    let begun = Instant::now();
    loop {
        let sent = app.broker.publish(message.clone()).await;
        if sent != Err(BrokerError::Unroutable) || begun.elapsed() >= timing().publish_limit {
            return sent;
        }
        mend(app).await;
        tokio::time::sleep(PARK_PAUSE).await;
    }
}

/// Declares everything again. If a delay level was lost, requests that all ends are parked again.
pub(crate) async fn mend(app: &App) {
    match app.broker.redeclare().await {
        Ok(absent) => {
            if !absent.is_empty() {
                fault::point("levels", "declared").await;
            }
            lost(app, &absent);
        }
        Err(error) => {
            warn!(%error, "a queue or exchange was not declared; the next connection declares it")
        }
    }
}

/// Handles what a new connection found. If no level existed, the broker is new or was wiped, and the ends of
/// live leases are lost.
pub(crate) fn connected(app: &App) {
    let absent = app.broker.found_absent();
    if u32::try_from(absent.len()).is_ok_and(|count| count >= LEVELS) {
        app.park_again.notify_one();
    } else {
        lost(app, &absent);
        // A dispatcher may have died before it parked the ends again.
        app.see_parked.notify_one();
    }
}

fn lost(app: &App, absent: &[u32]) {
    if absent.is_empty() {
        return;
    }
    app.metrics.levels_absent(absent.len());
    error!(
        levels = ?absent,
        "delay levels had no queue: somebody deleted it, or a policy of RabbitMQ lets it expire. It is declared again, and the ends of all leases are parked again"
    );
    app.park_again.notify_one();
}

/// Declares again what every pool needs, such as a lost binding. Only the `first` call declares absent queues. Later
/// [`crate::upkeep::count_queues`] does: somebody may have just deleted a queue, and its consumers may not know that
/// yet.
pub(crate) async fn declare_pools(app: &App, first: bool) {
    let pools = match app.store.all_pools().await {
        Ok(pools) => pools,
        Err(error) => return warn!(%error, "the queues of pools are not declared"),
    };
    for pool in pools {
        if first || matches!(app.broker.waiting(&pool.name).await, Ok(Some(_))) {
            declare_pool(app, &pool.name).await;
        }
    }
}

pub(crate) async fn declare_pool(app: &App, pool: &PoolName) {
    if let Err(error) = app.broker.declare_pool(pool).await {
        warn!(%pool, %error, "the queues of a pool are not declared; trying again");
    }
}
