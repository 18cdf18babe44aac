//! Renews a lease: moves its end in the database, which decides, and then in the store. No other message is
//! sent: the parked revocation finds the new date.

use std::time::Instant;

use jiff::SignedDuration;
use mayfly_common::fault;
use mayfly_protocol::task::{GrantsOf, Renew, Renewed};
use tracing::info;

use crate::app::App;
use crate::engines::call;
use crate::error::{ApiError, Code, Problems};
use crate::leases::trace_of;
use crate::store::shown;
use mayfly_protocol::lease::{Event, Lease, State};

/// How many times a renewal begins again because another one has moved the end meanwhile.
const MOVED_MOST: u32 = 5;

/// Moves a lease's end to `increment_seconds` from now. A second run of the same request also succeeds:
/// nothing moves back.
///
/// # Errors
/// `in_use` for a lease that is not active or is past its end, `invalid` beyond its maximum, and
/// those of [`call::call`]. After `deadline` it may have been done.
pub(crate) async fn renew(
    app: &App,
    lease: Lease,
    increment_seconds: u64,
) -> Result<Lease, ApiError> {
    let pool = lease.pool.clone();
    let renewed = move_end(app, lease, increment_seconds).await;
    let error = renewed.as_ref().err().map(|error| error.code);
    app.metrics.renewed(&pool, error);
    renewed
}

async fn move_end(app: &App, lease: Lease, increment_seconds: u64) -> Result<Lease, ApiError> {
    if lease.status.state != State::Active {
        return Err(not_active(&lease));
    }
    let not_after = lease.renewable_until();
    // The engine decides by the database's clock; this only saves a request that must fail.
    if increment_seconds > lease.max_ttl_seconds {
        return Err(beyond(app, &lease));
    }
    let of = grants_of(app, &lease).await;
    let mut turn = 0;
    let mut moved = 0;
    let mut from = lease.status.expiration;
    let begun = Instant::now();
    loop {
        let pool = app.store.pool(lease.pool.clone()).await?;
        pool.recipient()?;
        let kept = app.store.lease_access(lease.id, turn).await?;
        let access =
            kept.ok_or_else(|| ApiError::not_found("base secret of this lease any more"))?;
        let place = Some(access.place());
        let renew = Renew {
            lease: lease.id,
            installation: app.identity.installation,
            target: access.target,
            server: access.server,
            place,
            role: lease.role.clone(),
            increment_seconds,
            not_after,
            from,
            of: of.clone(),
        };
        // The limit is for all candidates together.
        let patience = app.limits.create_deadline.saturating_sub(begun.elapsed());
        match call::call(app, &pool, &renew, &lease.traceparent, patience).await {
            Ok(Renewed::Until(until)) => {
                fault::point("renew", "answered").await;
                let applied = app
                    .store
                    .apply(lease.id, Event::Renewed(until), app.now())
                    .await?;
                if applied.lease.status.state != State::Active {
                    return Err(not_active(&applied.lease));
                }
                info!(lease = %lease.id, trace = trace_of(&lease), expiration = %until, "renewed");
                return Ok(applied.lease);
            }
            // By a renewal whose answer was lost, or by another at the same moment.
            Ok(Renewed::Moved(until)) if moved < MOVED_MOST => {
                moved += 1;
                from = Some(until);
                let event = Event::Renewed(until);
                let applied = app.store.apply(lease.id, event, app.now()).await?;
                if applied.lease.status.state != State::Active {
                    return Err(not_active(&applied.lease));
                }
            }
            Ok(Renewed::Moved(_)) => {
                let reason =
                    "other renewals moved the end of this lease 5 times meanwhile; try again";
                return Err(ApiError::new(Code::InUse, reason));
            }
            Err(error) if error.code == Code::Invalid => return Err(beyond(app, &lease)),
            // The base secret has changed since.
            Err(error) if turn + 1 < access.candidates && is_of_the_candidate(&error) => turn += 1,
            Err(error) => return Err(error),
        }
    }
}

/// What the lease's secret grants now, where it is still there. Accounts from before a change of the
/// grants are members of another grant role, which the engine leaves alone.
async fn grants_of(app: &App, lease: &Lease) -> Option<GrantsOf> {
    let reading = app.store.read_secret(lease.path.clone()).await.ok()?;
    let dynamic = reading.record.dynamic().ok()?;
    Some(dynamic.grants_at(&reading.base?.target.database))
}

fn is_of_the_candidate(error: &ApiError) -> bool {
    matches!(
        error.code,
        Code::DatabaseUnreachable
            | Code::DatabaseRefusedLogin
            | Code::AdminLacksRights
            // Another server answers at that address.
            | Code::StatementFailed
    )
}

fn not_active(lease: &Lease) -> ApiError {
    let what = match shown::state(&lease.status) {
        State::Pending => "its account is still being made",
        State::Revoking => "it is being revoked",
        State::Active | State::Revoked | State::Failed => "it has ended",
    };
    ApiError::new(Code::InUse, format!("the lease cannot be renewed: {what}"))
}

/// Refused, never cut: names what can be reached.
fn beyond(app: &App, lease: &Lease) -> ApiError {
    let end = lease.renewable_until();
    let left = lease.status.to_store_clock(end).duration_since(app.now());
    let left = left.max(SignedDuration::ZERO);
    let reason = format!(
        "exceeds the lease's maximum (maxTtl), {end:.0}: at most about {} s from now",
        left.as_secs()
    );
    ApiError::invalid(Problems::from([("increment".to_owned(), vec![reason])]))
}
