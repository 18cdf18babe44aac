//! A read of a dynamic secret, from the lease row to the credential. In this order: the row is committed; the
//! end is parked and the create is published; an engine answers. The caller gets the credential only if the
//! end is confirmed and the lease still waits for it. If something fails after the row is committed, the end
//! of the lease has begun before the caller gets an error.

mod create;
mod record;

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use mayfly_common::fault;
use mayfly_common::trace::Span;
use mayfly_protocol::target::Target;
use tokio::sync::oneshot;
use tracing::{info, warn};

use self::record::Recorded;
use super::order::{Issued, Order};
use super::revoke::{revoke_now, send_what_follows};
use super::trials;
use crate::app::App;
use crate::app::turns::{Place, TooMany};
use crate::error::{ApiError, Code, Limit};
use crate::store::StoreError;
use mayfly_protocol::lease::{Lease, State};

/// Maximum time for which a read delays others of its caller and server.
const TURN: Duration = Duration::from_millis(500);
/// When a caller may try again if too many of its reads wait.
const RETRY_AFTER: SignedDuration = SignedDuration::from_secs(1);

/// Issues a lease. If the caller leaves, the work still comes to a defined end, and an account without a caller is
/// revoked at once. The span belongs to the trace of the request.
///
/// # Errors
/// The errors of the API (DESIGN §5).
pub(crate) async fn issue(
    app: &Arc<App>,
    order: Order,
    mut span: Span,
) -> Result<Issued, ApiError> {
    let (sender, answer) = oneshot::channel();
    let app = app.clone();
    app.clone().issues.spawn(async move {
        let begun = Instant::now();
        let (pool, trace) = (order.dynamic.pool.clone(), order.trace.trace());
        span.tag("mayfly.pool", &pool);
        span.tag("mayfly.path", &order.record.path);
        // Another read may use the lease: it is finished even if this caller has left.
        let is_kept = order.key.is_some() || order.dynamic.share;
        let mut sender = sender;
        let turn = tokio::select! {
            turn = wait_for_turn(&app, &order) => turn,
            // Nothing is recorded yet.
            () = sender.closed() => return,
        };
        let issued = match turn {
            Ok(place) => {
                let mut work = pin!(run(&app, order, begun));
                tokio::select! {
                    issued = &mut work => issued,
                    // A read that takes longer waits for something else than this server, so other reads need not
                    // wait for it.
                    () = tokio::time::sleep(TURN) => {
                        drop(place);
                        work.await
                    }
                }
            }
            Err(error) => Err(error),
        };
        app.metrics.issued(&pool, issued.as_ref().err().map(|error| error.code), begun.elapsed());
        match &issued {
            Ok(issued) => {
                span.tag("mayfly.lease", issued.lease);
                span.tag("mayfly.role", &issued.role);
            }
            Err(error) => span.fail(error.code.as_str()),
        }
        drop(span);
        if let Err(Ok(unclaimed)) = sender.send(issued)
            && !is_kept
        {
            info!(lease = %unclaimed.lease, trace, "the caller has left; its account is revoked");
            if let Err(error) = revoke_now(&app, unclaimed.lease).await {
                warn!(lease = %unclaimed.lease, trace, %error, "the account of a caller that has left is not revoked now; it ends at its TTL");
            }
        }
    });
    let lost = || ApiError::new(Code::StoreUnavailable, "the dispatcher is stopping");
    answer.await.map_err(|_| lost())?
}

/// Waits for the turn of a read.
async fn wait_for_turn(app: &App, order: &Order) -> Result<Place, ApiError> {
    let target = &order.base.target;
    let turn = app
        .fair
        .turn((target.host.clone(), target.port), order.who.clone());
    match tokio::time::timeout(app.limits.create_deadline, turn).await {
        Ok(Ok(place)) => Ok(place),
        Ok(Err(TooMany(waiting))) => Err(ApiError {
            retry_at: Some(Timestamp::now() + RETRY_AFTER),
            limit: Some(Limit::WaitingReads),
            ..ApiError::new(
                Code::Quota,
                format!(
                    "{waiting} reads of this caller wait for the database server already (limits.waiting_reads_per_caller); try again in a moment"
                ),
            )
        }),
        Err(_) => Err(ApiError::new(
            Code::Deadline,
            "other reads of this server used up the time limit",
        )),
    }
}

async fn run(app: &Arc<App>, order: Order, begun: Instant) -> Result<Issued, ApiError> {
    if let Err(error) = before_record(app, &order, begun).await {
        // A caller with a read token sees only the trace id.
        warn!(trace = order.trace.trace(), path = %order.record.path, pool = %order.dynamic.pool,
            code = error.code.as_str(), reason = error.message, "not issued");
        return Err(error);
    }
    let (lease, password, verifier) = match record::record(app, &order, begun).await? {
        Recorded::New(new) => *new,
        Recorded::Known(known) => return issued_again(app, order, *known).await,
    };

    fault::point("issue", "recorded").await;
    let end = create::create(app, &order, &lease, (&password, verifier)).await;
    let (event, warnings, error) = end.event();
    trials::after(app, &order, error.as_ref());
    fault::point("issue", "answered").await;
    let applied = app.store.apply_to(&lease, event, app.now()).await?;
    fault::point("issue", "decided").await;
    send_what_follows(app, &applied).await;
    let trace = order.trace.trace();
    if let Some(error) = error {
        warn!(lease = %lease.id, trace, path = %lease.path, pool = %lease.pool,
            code = error.code.as_str(), reason = error.message, "not issued");
        return Err(error);
    }
    let status = &applied.lease.status;
    let (State::Pending, State::Active, Some(expiration)) =
        (applied.before, status.state, status.expiration)
    else {
        return Err(ApiError::new(
            Code::InUse,
            "the lease was revoked before its account was ready",
        ));
    };
    info!(lease = %lease.id, trace, path = %lease.path, pool = %lease.pool, role = %lease.role,
        %expiration, warnings = warnings.join("; "), "issued");
    Ok(Issued {
        record: order.record,
        host: order.base.target.host,
        port: order.base.target.port,
        database: lease.database,
        username: order.dynamic.username_template.name(lease.role.as_str()),
        role: lease.role,
        password,
        ttl_seconds: order.ttl_seconds,
        expiration,
        lease: lease.id,
        again: false,
        warnings,
    })
}

/// Checks that refuse a read before anything is recorded.
async fn before_record(app: &App, order: &Order, begun: Instant) -> Result<(), ApiError> {
    let pool = &order.dynamic.pool;
    order.base.pool.recipient()?;
    match app.broker.engines_of(pool).await {
        Ok(0) => Err(ApiError::no_engine(pool)),
        Ok(_) => trials::before(app, order, begun).await,
        Err(error) => Err(ApiError::broker(&error)),
    }
}

async fn issued_again(
    app: &App,
    order: Order,
    (lease, target): (Lease, Target),
) -> Result<Issued, ApiError> {
    let seed = app
        .store
        .seed(lease.id)
        .await
        .map_err(|error| match error {
            StoreError::NotFound(_) => ApiError::new(
                Code::InUse,
                "the lease has just ended; read again, with a new Idempotency-Key if you sent one",
            ),
            other => other.into(),
        })?;
    info!(lease = %lease.id, trace = order.trace.trace(), path = %lease.path, "issued again");
    Ok(Issued {
        record: order.record,
        host: target.host,
        port: target.port,
        database: lease.database,
        username: order.dynamic.username_template.name(lease.role.as_str()),
        role: lease.role,
        password: seed.password(),
        ttl_seconds: lease.ttl_seconds,
        // An earlier lease is returned only if it has an expiration.
        expiration: lease.status.expiration.unwrap_or(lease.created),
        lease: lease.id,
        again: true,
        warnings: vec![],
    })
}
