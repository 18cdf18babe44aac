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
use crate::store::StoreError;
use mayfly_protocol::lease::State;

/// Leases in one query.
const PAGE: usize = 500;
/// Between two tries to park an end again while store or broker is away.
const PAUSE: Duration = Duration::from_secs(2);
/// The states of leases whose end may be in a level, in the order of a life: a lease that goes on to the next
/// state meanwhile is found there. An account may still be made for a pending one, and engines park what they
/// could not end yet.
const STATES: [State; 3] = [State::Pending, State::Active, State::Revoking];

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

/// Parks the ends of all unsettled leases once more: nobody can tell whose are missing, and a second message
/// finds nothing left to do. Store and broker are waited for, until the dispatcher ends. Returns whether it came
/// to the last one.
async fn park_all(app: &App) -> bool {
    let mut parked = 0_u64;
    for state in STATES {
        let mut cursor = String::new();
        while !app.draining.load(Ordering::Relaxed) {
            let page = app.store.in_state(state, cursor.clone(), PAGE).await;
            let (leases, next) = match page {
                Ok(page) => page,
                Err(error) => {
                    warn!(%error, "the ends of leases cannot be parked again yet; trying again");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            let Some(next) = next else { break };
            cursor = next;
            for lease in leases {
                parked += u64::from(park_until_done(app, lease).await);
            }
        }
    }
    let is_done = !app.draining.load(Ordering::Relaxed);
    if is_done {
        info!(parked, "the ends of leases are parked again");
    }
    is_done
}

/// Parks one end again, and waits for store and broker, until the dispatcher ends. Returns whether it is parked.
async fn park_until_done(app: &App, lease: LeaseId) -> bool {
    while !app.draining.load(Ordering::Relaxed) {
        fault::point("levels", "parking").await;
        match park_again(app, lease).await {
            Ok(was) => return was,
            Err(error) => {
                warn!(%lease, reason = error.message, "the ends of leases cannot be parked again yet; trying again");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    false
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
    let parking = match access.lease.status.state {
        State::Pending => outbox::park_end(app, &access).await,
        State::Active => outbox::park_rest(app, &access).await,
        // The engine parks it again itself if it cannot end it, or if its create could still commit.
        State::Revoking => outbox::now(app, &access).await,
        State::Revoked | State::Failed => return Ok(false),
    };
    match parking {
        Ok(()) => Ok(true),
        Err(error) => Err(ApiError::broker(&error)),
    }
}
