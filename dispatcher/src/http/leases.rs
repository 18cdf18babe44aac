//! Leases: listing, renewing and ending them. A read token sees only its own.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use jiff::Timestamp;
use mayfly_protocol::names::{LeaseId, SecretPath};
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::{info, warn};

use super::auth::Caller;
use super::date;
use super::request::{Asked, Body, Named, Nothing, Page, malformed, only_known};
use crate::app::App;
use crate::error::{ApiError, Code, Problems};
use crate::leases::revoke_below::{self, Below};
use crate::leases::{compare, renew, revoke};
use crate::store::shown;
use crate::store::{Filter, OfState};
use mayfly_protocol::lease::{Event, Lease, State as LeaseState, Status};

/// Leases that one store job marks. It takes 20 ms in SQLite, during which no read can write.
const BATCH: u32 = 200;

fn view(caller: &Caller, lease: &Lease) -> Value {
    let status = &lease.status;
    // The error names the server, its admin and objects of the database.
    let (last_error, objects) = match (caller, &status.last_error) {
        (Caller::Root, error) => (error.clone(), status.objects.as_slice()),
        (Caller::Reader(_), None) => (None, [].as_slice()),
        (Caller::Reader(_), Some(_)) => {
            let words = "its revocation failed and is tried again; the operator can see the reason";
            (Some(words.to_owned()), [].as_slice())
        }
    };
    json!({
        "id": lease.id.to_string(),
        "path": lease.path,
        "pool": lease.pool,
        "role": lease.role,
        "state": shown::state(status).as_str(),
        "stuck": shown::is_stuck(status),
        "created": date(lease.created),
        "createdBy": lease.created_by,
        "expiration": status.expiration.map(date),
        "maxExpiration": status.expiration.map(|_| date(lease.renewable_until())),
        "engine": status.engine,
        "revokedAt": status.revoked_at.map(date),
        "revokedBy": status.revoked_by,
        "attempts": status.attempts,
        "lastError": last_error,
        "objects": objects,
        "nextTry": next_try(status).map(date),
    })
}

/// When engines or the reconciler try a failed revocation again.
fn next_try(status: &Status) -> Option<Timestamp> {
    status.last_error.as_ref()?;
    if shown::state(status).is_settled() {
        return None;
    }
    let tries = [status.next_try, status.next_reconcile];
    tries.into_iter().flatten().min()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ListAsked {
    path: Option<String>,
    pool: Option<String>,
    state: Option<String>,
    role: Option<String>,
    limit: Option<String>,
    cursor: Option<String>,
}

/// GET /v1/leases, the newest first.
pub(super) async fn list(
    State(app): State<Arc<App>>,
    caller: Caller,
    Asked(asked): Asked<ListAsked>,
) -> Result<Json<Value>, ApiError> {
    let page = Page::parse(asked.limit.as_deref(), asked.cursor.as_deref())?;
    let stuck = asked.state.as_deref() == Some("stuck");
    let state = match asked.state.as_deref().filter(|_| !stuck) {
        None => None,
        Some(word) => Some(LeaseState::parse(word).ok_or_else(|| {
            malformed("state must be pending, active, revoking, revoked, failed or stuck")
        })?),
    };
    let filter = Filter {
        path: asked
            .path
            .map(|text| text.parse().map_err(malformed))
            .transpose()?,
        pool: asked
            .pool
            .map(|text| text.parse().map_err(malformed))
            .transpose()?,
        state,
        stuck,
        role: asked
            .role
            .map(|text| text.parse().map_err(malformed))
            .transpose()?,
        created_by: caller.only_leases_of(),
    };
    let found = app
        .store
        .leases(filter, page.after.clone(), page.look_for())
        .await?;
    Ok(Json(page.show(
        "leases",
        found,
        |lease| lease.id.to_string(),
        |lease| view(&caller, lease),
    )))
}

/// The lease, if it exists and this caller may see it.
async fn find(app: &App, caller: &Caller, name: &str) -> Result<Lease, ApiError> {
    let gone = || ApiError::not_found(format!("lease `{name}`"));
    let id: LeaseId = name.parse().map_err(|_| gone())?;
    let lease = app.store.lease(id).await?;
    match caller.only_leases_of() {
        Some(who) if who != lease.created_by => Err(gone()),
        Some(_) | None => Ok(lease),
    }
}

/// GET /v1/leases/{id}: one lease.
pub(super) async fn read(
    State(app): State<Arc<App>>,
    caller: Caller,
    Named(name): Named,
    Asked(Nothing {}): Asked<Nothing>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(view(&caller, &find(&app, &caller, &name).await?)))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RevokeAsked {
    detach: Option<bool>,
}

/// DELETE /v1/leases/{id}: requests the end of the lease and answers its status. `?detach=true` gives it up
/// without its account, for a server that is gone for good.
pub(super) async fn revoke(
    State(app): State<Arc<App>>,
    caller: Caller,
    Named(name): Named,
    Asked(asked): Asked<RevokeAsked>,
) -> Result<Json<Value>, ApiError> {
    let id = find(&app, &caller, &name).await?.id;
    if asked.detach == Some(true) {
        caller.root_only()?;
        let by = caller.name();
        let detached = app
            .store
            .apply(id, Event::Detached { by }, app.now())
            .await?;
        warn!(lease = %id, role = %detached.lease.role, by = caller.name(), "lease detached; its account may still exist");
        return Ok(Json(view(&caller, &detached.lease)));
    }
    let lease = revoke::revoke_now(&app, id).await?;
    info!(lease = %id, trace = crate::leases::trace_of(&lease), by = caller.name(), "revocation requested");
    Ok(Json(view(&caller, &lease)))
}

/// POST /v1/leases/{id}/renew: `{"increment": SECONDS}`, from now on.
pub(super) async fn renew(
    State(app): State<Arc<App>>,
    caller: Caller,
    Named(name): Named,
    Asked(Nothing {}): Asked<Nothing>,
    Body(body): Body,
) -> Result<Json<Value>, ApiError> {
    let mut problems = Problems::new();
    only_known(&mut problems, &body, &["increment"]);
    let increment = body
        .get("increment")
        .and_then(Value::as_u64)
        .filter(|seconds| *seconds > 0);
    if increment.is_none() {
        let reason = "is needed: an integer, 1 or more, in seconds from now".to_owned();
        problems.insert("increment".to_owned(), vec![reason]);
    }
    let increment = match increment {
        Some(increment) if problems.is_empty() => increment,
        _ => return Err(ApiError::invalid(problems)),
    };
    let lease = find(&app, &caller, &name).await?;
    let (id, trace) = (lease.id, crate::leases::trace_of(&lease));
    let renewed = renew::renew(&app, lease, increment).await.map_err(|error| {
        info!(lease = %id, trace, code = error.code.as_str(), reason = error.message, "not renewed");
        caller.hears(error, &trace)
    })?;
    Ok(Json(view(&caller, &renewed)))
}

/// POST /v1/leases/{id}/retry: a revocation that failed is tried now.
pub(super) async fn retry(
    State(app): State<Arc<App>>,
    caller: Caller,
    Named(name): Named,
    Asked(Nothing {}): Asked<Nothing>,
) -> Result<Json<Value>, ApiError> {
    let lease = find(&app, &caller, &name).await?;
    let status = &lease.status;
    let state = shown::state(status);
    let due = match state {
        LeaseState::Revoking => true,
        // The revocation has failed, or the lease is overdue.
        LeaseState::Active => {
            status.last_error.is_some()
                || status
                    .expiration
                    .is_some_and(|end| status.to_store_clock(end) < app.now())
        }
        LeaseState::Pending | LeaseState::Revoked | LeaseState::Failed => false,
    };
    if !due {
        return Err(ApiError::new(
            Code::InUse,
            format!(
                "the lease is {}: no revocation of it waits for a retry",
                state.as_str()
            ),
        ));
    }
    let applied = app
        .store
        .apply(lease.id, Event::RetryAsked, app.now())
        .await?;
    revoke::send_what_follows(&app, &applied).await;
    info!(lease = %lease.id, trace = crate::leases::trace_of(&lease), by = caller.name(), "a try was requested");
    Ok(Json(view(&caller, &applied.lease)))
}

/// POST /v1/leases/reconcile: `{"dryRun": true}` only shows what differs.
pub(super) async fn reconcile(
    State(app): State<Arc<App>>,
    caller: Caller,
    Asked(Nothing {}): Asked<Nothing>,
    Body(body): Body,
) -> Result<Json<Value>, ApiError> {
    caller.root_only()?;
    let unknown = body.keys().any(|member| member != "dryRun");
    let dry_run = match body.get("dryRun") {
        None => false,
        Some(Value::Bool(dry)) if !unknown => *dry,
        Some(_) => {
            let reason = "must be true or false, and the only field".to_owned();
            return Err(ApiError::invalid(Problems::from([(
                "dryRun".to_owned(),
                vec![reason],
            )])));
        }
    };
    let found = compare::reconcile(&app, dry_run).await?;
    let differences: Vec<Value> = found
        .differences
        .iter()
        .map(|found| {
            json!({
                "kind": found.kind,
                "path": found.path,
                "pool": found.pool,
                "role": found.role,
                "lease": found.lease.map(|id| id.to_string()),
                "installation": found.installation.map(|id| id.to_string()),
                "storeExpiration": found.store_expiration.map(date),
                "databaseExpiration": found.database_expiration.map(date),
                "action": found.action,
            })
        })
        .collect();
    let unreachable: Vec<Value> = found.unreachable.iter().map(|(path, pool, error)| {
        json!({"path": path, "pool": pool, "error": error.code.as_str(), "message": error.message})
    }).collect();
    Ok(Json(json!({
        "dryRun": dry_run,
        "roles": found.roles,
        "leases": found.leases,
        "messages": found.messages,
        "messagesMissing": found.messages_missing,
        "differences": differences,
        "differencesTotal": found.differences_total,
        "unreachable": unreachable,
    })))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BelowAsked {
    path: Option<String>,
}

/// DELETE /v1/leases?path=PREFIX: ends all live leases of a path and those below. It answers within a second with
/// the number of leases that are being revoked by then, and whether more follow.
pub(super) async fn revoke_below(
    State(app): State<Arc<App>>,
    caller: Caller,
    Asked(asked): Asked<BelowAsked>,
) -> Result<Json<Value>, ApiError> {
    let prefix = asked
        .path
        .ok_or_else(|| malformed("path is needed: it selects the secrets whose leases end"))?;
    let path = prefix.parse().map_err(malformed)?;
    let (by, only) = (caller.name(), caller.only_leases_of());
    let Below { revoking, more } = revoke_below::revoke_below(&app, path, only, by.clone()).await?;
    info!(path = prefix, revoking, more, by, "revocations requested");
    Ok(Json(json!({"revoking": revoking, "more": more})))
}

/// Applies an event to all leases of a path in these states. The reconciler sends the messages at once.
pub(super) async fn end_all(
    app: &App,
    path: &SecretPath,
    states: &[OfState],
    event: &Event,
) -> Result<usize, ApiError> {
    let (mut total, mut refused) = (0, 0);
    for state in states {
        let mut next = Some(String::new());
        while let Some(after) = next {
            let (path, event, now) = (path.clone(), event.clone(), app.now());
            let some = app.store.end_some(path, *state, event, after, BATCH, now);
            let some = some.await?;
            total += some.count;
            refused += some.refused;
            next = some.after;
            app.reconcile.notify_one();
        }
    }
    if refused > 0 {
        warn!(%path, refused, "leases whose rows are not authentic were skipped; their accounts end with their TTL");
    }
    Ok(total)
}
