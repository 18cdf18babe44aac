//! Accounts that are due together. Each of them has its own message in the delay levels, and for many messages the
//! broker needs longer than the engines need for the accounts. If many accounts of a pool are due, the dispatcher
//! that reconciles also sends copies that name 200 of them each. The messages that arrive after that find nothing to
//! do. Nothing depends on these copies: they are not recorded, and not sent again.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use jiff::Timestamp;
use mayfly_protocol::task::LEASES_MAX;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use crate::app::App;
use crate::engines::outbox;
use crate::store::{AfterEnd, StoreError};

/// Pause between two queries for accounts that are due.
const EVERY: Duration = Duration::from_millis(250);
/// Time between the end of an account and the look for it: the clocks of store and database differ.
const AFTER_END: Duration = Duration::from_millis(100);
/// Older ends are left to the reconciler, for example after a pause of this process.
const NOT_OLDER: Duration = Duration::from_secs(3);
/// Minimum number of due accounts of a pool in one query (200/s). Fewer accounts end as fast by their own messages.
const MANY: u32 = 50;

/// Looks for accounts that are due together, until `stop`. Of several dispatchers only one does.
pub(crate) async fn run(app: Arc<App>, stop: CancellationToken) {
    let mut looks = tokio::time::interval(EVERY);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut seen_until = app.now() - AFTER_END;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = looks.tick() => {}
        }
        let until = app.now() - AFTER_END;
        let since = seen_until.max(until - NOT_OLDER);
        // The store's clock may be set back. No account is sent twice.
        seen_until = seen_until.max(until);
        if since >= until || !app.leads.load(Ordering::Relaxed) {
            continue;
        }
        if let Err(error) = send(&app, since, until).await {
            debug!(%error, "accounts that are due together end by their own messages");
        }
    }
}

async fn send(app: &App, since: Timestamp, until: Timestamp) -> Result<(), StoreError> {
    for pool in app.store.pools_with_many_due(since, until, MANY).await? {
        // Earlier engines read only messages of one lease.
        if !outbox::ends_batches(app, &pool).await {
            continue;
        }
        let (mut next, mut leases) = (Some(AfterEnd::all_of(since)), 0);
        while let Some(from) = next {
            let limit = u32::try_from(LEASES_MAX).unwrap_or(MANY);
            let page = app.store.due_together(pool.clone(), from, until, limit);
            let page = page.await?;
            leases += page.access.len();
            outbox::copies(app, &page.access).await;
            next = page.next;
        }
        info!(%pool, leases, "sent copies of the ends of accounts that are due together");
    }
    Ok(())
}
