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
/// Pause between two tries to park an end again while store or broker is unreachable.
const PAUSE: Duration = Duration::from_secs(2);
/// The states of leases whose end may be in a level, in the order of a lease's life. So a lease that changes its
/// state meanwhile is still found. The account of a pending lease may still be made, and engines park revocations
/// that have failed.
const STATES: [State; 3] = [State::Pending, State::Active, State::Revoking];

/// Parks the ends of all leases again on each request, until `stop`. A request that arrives during this work is
/// served afterwards, because ends that were just parked may be lost again.
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
                warn!(%error, "the broker did not store the mark that all ends are parked");
            }
            may_mark = !matches!(marked, Err(BrokerError::NotAllowed(_)));
        }
    }
}

/// Parks the ends of all unsettled leases once more. It is unknown which ends are missing, and a second message finds
/// nothing left to do. Waits for store and broker until the dispatcher ends. Returns whether all were parked.
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

/// Parks one end again. Waits for store and broker until the dispatcher ends. Returns whether the end is parked.
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
/// The store or the broker is unreachable.
async fn park_again(app: &App, lease: LeaseId) -> Result<bool, ApiError> {
    let access = match app.store.lease_access(lease, 0).await {
        Ok(Some(access)) => access,
        Ok(None) => return Ok(false),
        Err(error @ StoreError::Unavailable(_)) if !app.store.is_reached() => {
            return Err(error.into());
        }
        // An unreadable row or a distrusted pool must not hold up other leases.
        Err(error) => {
            warn!(%lease, %error, "the end of this lease is not parked again");
            return Ok(false);
        }
    };
    let parking = match access.lease.status.state {
        State::Pending => outbox::park_end(app, &access).await,
        State::Active => outbox::park_rest(app, &access).await,
        // An engine that cannot end the account yet, or whose create can still commit, parks the revocation again.
        State::Revoking => outbox::now(app, &access).await,
        State::Revoked | State::Failed => return Ok(false),
    };
    match parking {
        Ok(()) => Ok(true),
        Err(error) => Err(ApiError::broker(&error)),
    }
}
