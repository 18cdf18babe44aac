//! Declaring queues again that somebody deleted, and asking for the ends to be parked again that were lost
//! with them.

use std::time::{Duration, Instant};

use mayfly_common::broker::{Address, BrokerError, Message};
use mayfly_common::fault;
use mayfly_protocol::names::PoolName;
use mayfly_protocol::timing::timing;
use mayfly_protocol::topology::LEVELS;
use tracing::{error, warn};

use crate::app::App;

/// Between two tries to park where a level has just been declared again.
const PARK_PAUSE: Duration = Duration::from_millis(250);

/// Publishes, in a level whose queue is missing once that is there again: only what a level has taken
/// counts as parked.
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

/// Declares everything again, and has the ends parked again that were lost with a level.
pub(crate) async fn mend(app: &App) {
    match app.broker.redeclare().await {
        Ok(absent) => {
            if !absent.is_empty() {
                fault::point("levels", "declared").await;
            }
            lost(app, &absent);
        }
        Err(error) => warn!(%error, "not declared; the next connection does it"),
    }
}

/// What a new connection has found. Where no level was there at all the broker is new, or was emptied:
/// a lease that somebody holds has its end there no more.
pub(crate) fn connected(app: &App) {
    let absent = app.broker.found_absent();
    if u32::try_from(absent.len()).is_ok_and(|count| count >= LEVELS) {
        app.park_again.notify_one();
    } else {
        lost(app, &absent);
        // A dispatcher may have died before it had parked them again.
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

/// Declares again what every pool needs, as a binding that was lost. A queue that is absent is left
/// to [`crate::upkeep::count_queues`], but for the `first` time: maybe somebody deleted it at this moment, and its
/// consumers have not heard of it yet.
pub(crate) async fn declare_pools(app: &App, first: bool) {
    let pools = match app.store.all_pools().await {
        Ok(pools) => pools,
        Err(error) => return warn!(%error, "pools are not declared"),
    };
    for pool in pools {
        if first || matches!(app.broker.waiting(&pool.name).await, Ok(Some(_))) {
            declare_pool(app, &pool.name).await;
        }
    }
}

pub(crate) async fn declare_pool(app: &App, pool: &PoolName) {
    if let Err(error) = app.broker.declare_pool(pool).await {
        warn!(%pool, %error, "not declared; it is tried again");
    }
}
