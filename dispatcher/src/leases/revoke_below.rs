//! Ends all leases of a path and those below. The caller is answered within a second. What is not marked by then
//! is marked in the background, in steps between which reads and outcomes are recorded. A dispatcher that
//! starts, or takes over, goes on with what the store has recorded.

use std::time::{Duration, Instant};

use mayfly_common::fault;
use mayfly_protocol::names::SecretPath;
use tracing::{info, warn};

use crate::app::App;
use crate::engines::outbox;
use crate::error::ApiError;
use crate::store::{Marked, RevokeBelow, StoreError};

/// Leases that one store job marks: 20 ms in SQLite, in which reads wait for their turn to write.
const BATCH: u32 = 200;
/// A caller waits this long for the marks.
const ANSWERED_WITHIN: Duration = Duration::from_millis(500);
/// The reconciler does this before its next round.
const ROUND: Duration = Duration::from_millis(500);

/// What a request has reached when its caller is answered.
pub(crate) struct Below {
    /// Leases that are being revoked.
    pub(crate) revoking: usize,
    /// More follow in the background.
    pub(crate) more: bool,
}

/// Revokes all leases of a path and those below, of one caller or of all.
///
/// # Errors
/// `store_unavailable`. What was marked by then is ended, and what was recorded goes on.
pub(crate) async fn revoke_below(
    app: &App,
    path: SecretPath,
    created_by: Option<String>,
    asked_by: String,
) -> Result<Below, ApiError> {
    let request = RevokeBelow::new(path, created_by, asked_by, app.now());
    let (revoking, rest) = mark_for(app, request, ANSWERED_WITHIN).await?;
    let more = rest.is_some();
    if more {
        app.reconcile.notify_one();
    }
    Ok(Below { revoking, more })
}

/// Goes on with the requests that the store has recorded. Returns whether more is left.
///
/// # Errors
/// The store is away.
pub(super) async fn go_on(app: &App) -> Result<bool, StoreError> {
    let mut more = false;
    for request in app.store.recorded_below().await? {
        let (path, by) = (request.path().to_string(), request.asked_by().to_owned());
        let before = request.marked();
        let (marked, rest) = match mark_for(app, request, ROUND).await {
            // It is tried again in the next round, and holds up nothing else.
            Err(StoreError::Unusable(why)) => {
                warn!(path, why, "the leases below a path are not ended now");
                continue;
            }
            done => done?,
        };
        more |= rest.is_some();
        if rest.is_none() {
            info!(
                path,
                revoking = before + marked,
                by,
                "all leases below a path are being revoked"
            );
        }
    }
    Ok(more)
}

/// Marks leases of a request and sends the engines their revocations, for this time. Returns how many were
/// marked, and what is left.
async fn mark_for(
    app: &App,
    request: RevokeBelow,
    time: Duration,
) -> Result<(usize, Option<RevokeBelow>), StoreError> {
    let begun = Instant::now();
    let (mut total, mut rest, mut to_send) = (0, Some(request), Vec::new());
    while let Some(request) = rest.take() {
        let marking = app.store.mark_below(request, BATCH, app.now());
        // The messages of one step are confirmed while the next one is marked.
        let (marked, ()) = tokio::join!(marking, outbox::copies(app, &to_send));
        let marked: Marked = marked?;
        fault::point("revoke_below", "marked").await;
        total += marked.count;
        (rest, to_send) = (marked.rest, marked.access);
        if begun.elapsed() >= time {
            break;
        }
    }
    outbox::copies(app, &to_send).await;
    Ok((total, rest))
}
