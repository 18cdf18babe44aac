//! Parks the ends of all leases again after delay levels were lost with their messages.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use mayfly_common::broker::BrokerError;
use mayfly_common::fault;
use mayfly_protocol::names::LeaseId;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::app::App;
use crate::engines::outbox;
use crate::error::ApiError;
use crate::store::{Filter, StoreError};
use mayfly_protocol::lease::State;

/// Leases in one query.
const PAGE: usize = 500;
/// Between two tries to park an end again while store or broker is away.
const PAUSE: Duration = Duration::from_secs(2);

/// Parks the ends of all leases again on each request, until `stop`. A request that arrives meanwhile is done
/// afterwards, because ends that were just parked may be lost again.
pub(crate) async fn run(app: Arc<App>, stop: CancellationToken) {
    let mut may_mark = true;
    loop {
        let is_sure = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = app.park_again.notified() => true,
            () = app.see_parked.notified() => false,
        };
        if !is_sure {
            match app.broker.has_all_parked().await {
                Ok(false) if may_mark => {
                    info!("ends may be missing from the delay levels; all are parked again");
                }
                // The mark is checked again after the next connection, and each minute.
                Ok(_) | Err(_) => continue,
            }
        }
        let losses = app.broker.losses();
        if park_all(&app).await {
            let marked = app.broker.all_are_parked(losses).await;
            if let Err(error) = &marked {
                warn!(%error, "the mark that all ends are parked could not be set at the broker");
            }
            may_mark = !matches!(marked, Err(BrokerError::NotAllowed(_)));
        }
    }
}

/// Parks the ends of all leases that somebody holds once more: nobody can tell whose are
/// missing, and a second message finds nothing left to do. Store and broker are waited for, until the
/// dispatcher ends. Whether it came to the last one.
async fn park_all(app: &App) -> bool {
    let mut cursor = String::new();
    let mut parked = 0_u64;
    let filter = Filter {
        state: Some(State::Active),
        ..Filter::default()
    };
    while !app.draining.load(Ordering::Relaxed) {
        let page = app.store.leases(filter.clone(), cursor.clone(), PAGE).await;
        let page = match page {
            Ok(page) => page,
            Err(error) => {
                warn!(%error, "the ends of leases cannot be parked again yet; trying again");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let Some(last) = page.last() else { break };
        cursor = last.id.to_string();
        for lease in page {
            // The same lease again, so that no other gets a second message.
            while !app.draining.load(Ordering::Relaxed) {
                fault::point("levels", "parking").await;
                match park_again(app, lease.id).await {
                    Ok(was) => {
                        parked += u64::from(was);
                        break;
                    }
                    Err(error) => {
                        warn!(lease = %lease.id, reason = error.message, "the ends of leases cannot be parked again yet; trying again");
                        tokio::time::sleep(PAUSE).await;
                    }
                }
            }
        }
    }
    let is_done = !app.draining.load(Ordering::Relaxed);
    if is_done {
        info!(parked, "the ends of leases are parked again");
    }
    is_done
}

/// Parks one end again. Returns `false` if the lease has no end to park, or if its pool is distrusted.
///
/// # Errors
/// The store or the broker is away.
async fn park_again(app: &App, lease: LeaseId) -> Result<bool, ApiError> {
    let access = match app.store.lease_access(lease, 0).await {
        Ok(Some(access)) => access,
        Ok(None) => return Ok(false),
        Err(error @ StoreError::Unavailable(_)) if !app.store.is_reached() => {
            return Err(error.into());
        }
        // A row that cannot be read, or a pool that is distrusted, holds up no other lease.
        Err(error) => {
            warn!(%lease, %error, "the end of this lease is not parked again");
            return Ok(false);
        }
    };
    match outbox::park_rest(app, &access).await {
        Ok(()) => Ok(true),
        Err(error) => Err(ApiError::broker(&error)),
    }
}
