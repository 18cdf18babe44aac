//! Ends all leases of a path and those below. The caller is answered within a second. The rest is marked in the
//! background, in small steps, so that reads and outcomes are recorded in between. A dispatcher that starts or
//! becomes the leader continues the requests that the store has recorded.

use std::time::{Duration, Instant};

use mayfly_common::fault;
use mayfly_protocol::names::SecretPath;
use tracing::{info, warn};

use crate::app::App;
use crate::engines::outbox;
use crate::error::ApiError;
use crate::store::{Marked, RevokeBelow, StoreError};

/// Leases that one store job marks. It takes 20 ms in SQLite, during which no read can write.
const BATCH: u32 = 200;
/// Maximum time for which a caller waits for the marks.
const ANSWERED_WITHIN: Duration = Duration::from_millis(500);
/// Maximum time of this work before a round of the reconciler.
const ROUND: Duration = Duration::from_millis(500);

/// The progress of a request when its caller is answered.
pub(crate) struct Below {
    /// Leases that are being revoked.
    pub(crate) revoking: usize,
    /// Whether more revocations follow in the background.
    pub(crate) more: bool,
}

/// Revokes all leases of a path and those below, of one caller or of all.
///
/// # Errors
/// `store_unavailable`. Leases that were marked before the error are ended, and a recorded request continues.
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

/// Continues the requests that the store has recorded. Returns whether there is more to do.
///
/// # Errors
/// The store is unreachable.
pub(super) async fn go_on(app: &App) -> Result<bool, StoreError> {
    let mut more = false;
    for request in app.store.recorded_below().await? {
        let (path, by) = (request.path().to_string(), request.asked_by().to_owned());
        let before = request.marked();
        let (marked, rest) = match mark_for(app, request, ROUND).await {
            // The next round tries this request again. Other requests do not wait for it.
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

/// Marks leases of a request and sends their revocations to the engines, for at most this time. Returns how many
/// were marked, and what is left.
async fn mark_for(
    app: &App,
    request: RevokeBelow,
    time: Duration,
) -> Result<(usize, Option<RevokeBelow>), StoreError> {
    let begun = Instant::now();
    let (mut total, mut rest, mut to_send) = (0, Some(request), Vec::new());
    while let Some(request) = rest.take() {
        let marking = app.store.mark_below(request, BATCH, app.now());
        // The messages of one step are confirmed while the next step is marked.
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
