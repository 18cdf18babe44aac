//! Reads of a secret whose last read failed: the server is unreachable, refuses the login, or a grant is impossible.
//! The end of an account is parked with its create, and a parked message cannot be taken back. So before the next
//! read records or parks anything, an engine is asked whether an account could be made now: a thousand reads of a
//! dead server leave no more messages than the first.

use std::time::{Duration, Instant};

use mayfly_protocol::lease::BaseRef;
use mayfly_protocol::task::{Check, CheckWhat};
use tracing::warn;

use crate::app::App;
use crate::engines::call;
use crate::error::{ApiError, Code};
use crate::leases::order::Order;
use crate::leases::slot_pause::SlotPause;

/// Maximum time of a trial; the rest of the caller's time is for the read. An engine that knows the request
/// answers within 10 s.
const PATIENCE: Duration = Duration::from_secs(15);

/// Whether a read failed because of its server's condition or its grants.
fn is_of_the_server(error: &ApiError) -> bool {
    matches!(
        error.code,
        Code::DatabaseUnreachable
            | Code::DatabaseRefusedLogin
            | Code::NoSuchObject
            | Code::AmbiguousObject
            | Code::ObjectLocked
            | Code::GrantRefused
            | Code::AdminLacksRights
            | Code::StatementFailed
    )
}

/// Remembers whether a read failed.
pub(crate) fn after(app: &App, order: &Order, error: Option<&ApiError>) {
    match error {
        None => app.failed_reads.remember(&order.record.path, false),
        Some(error) if is_of_the_server(error) => {
            app.failed_reads.remember(&order.record.path, true)
        }
        Some(_) => {}
    }
}

/// Makes a trial for a secret whose last read failed. The caller has waited since `begun`.
///
/// # Errors
/// The failure that a create would have now. If an engine does not understand the trial, or does not answer,
/// the read continues.
pub(crate) async fn before(app: &App, order: &Order, begun: Instant) -> Result<(), ApiError> {
    if !app.failed_reads.has(&order.record.path) {
        return Ok(());
    }
    let target = &order.base.target;
    let database = order.dynamic.database.as_ref();
    let check = Check {
        installation: app.identity.installation,
        target: target.clone(),
        what: CheckWhat::Ready {
            database: database.unwrap_or(&target.database).clone(),
            grants: order.dynamic.grants.clone(),
        },
    };
    let left = || app.limits.create_deadline.saturating_sub(begun.elapsed());
    let mut pauses = SlotPause::default();
    loop {
        let patience = left().min(PATIENCE);
        let trace = order.trace.to_string();
        let asked = call::try_call(app, &order.base.pool, &check, &trace, patience).await;
        let Ok(Err(failure)) = asked else {
            // If something is wrong, the read that follows reports it.
            return Ok(());
        };
        // A read waits for a connection slot in the same way.
        if failure.full
            && let Some(pause) = pauses.next(left())
        {
            tokio::time::sleep(pause).await;
            continue;
        }
        let error = ApiError::from(failure);
        if !is_of_the_server(&error) {
            return Ok(());
        }
        app.failed_reads.remember(&order.record.path, true);
        doubt_password(app, &order.base.base, &error).await;
        return Err(error);
    }
}

/// Requests a test of the other password, if an admin's login was refused and two passwords may be right.
pub(super) async fn doubt_password(app: &App, base: &BaseRef, error: &ApiError) {
    if error.code == Code::DatabaseRefusedLogin
        && let Err(error) = app.store.doubt_password(base.clone(), app.now()).await
    {
        warn!(base = %base.id, %error, "the other password of the admin is not tried");
    }
}
