//! Leases: seeing and ending them. A read token sees only those it made.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use jiff::Timestamp;
use mayfly_common::names::LeaseId;
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::info;

use super::auth::Caller;
use super::date;
use super::request::{Asked, Named, Nothing, Page, malformed};
use crate::app::App;
use crate::error::ApiError;
use crate::issue;
use crate::lease::{Lease, State as LeaseState};
use crate::store::Filter;

/// Leases marked in one job of the store.
const BATCH: u32 = 500;

fn view(lease: &Lease) -> Value {
    let course = &lease.course;
    json!({
        "id": lease.id.to_string(),
        "path": lease.path,
        "pool": lease.pool,
        "role": lease.role,
        "state": course.state.as_str(),
        "stuck": course.stuck,
        "created": date(lease.created),
        "createdBy": lease.created_by,
        "expiration": course.expiration.map(date),
        "engine": course.engine,
        "revokedAt": course.revoked_at.map(date),
        "revokedBy": course.revoked_by,
        "attempts": course.attempts,
        "lastError": course.last_error,
    })
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
            malformed("state is pending, active, revoking, revoked, failed or stuck")
        })?),
    };
    let filter = Filter {
        path: asked
            .path
            .map(|text| text.parse().map_err(malformed))
            .transpose()?,
        exact_path: None,
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
        view,
    )))
}

/// The lease, if it is one and this caller's to see.
async fn find(app: &App, caller: &Caller, name: &str) -> Result<Lease, ApiError> {
    let gone = || ApiError::not_found(format!("lease `{name}`"));
    let id: LeaseId = name.parse().map_err(|_| gone())?;
    let lease = app.store.lease(id).await?;
    match caller.only_leases_of() {
        Some(who) if who != lease.created_by => Err(gone()),
        Some(_) | None => Ok(lease),
    }
}

/// GET /v1/leases/{id}
pub(super) async fn read(
    State(app): State<Arc<App>>,
    caller: Caller,
    Named(name): Named,
    Asked(Nothing {}): Asked<Nothing>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(view(&find(&app, &caller, &name).await?)))
}

/// DELETE /v1/leases/{id}: answers the lease, on its way to its end or there already.
pub(super) async fn revoke(
    State(app): State<Arc<App>>,
    caller: Caller,
    Named(name): Named,
    Asked(Nothing {}): Asked<Nothing>,
) -> Result<Json<Value>, ApiError> {
    let id = find(&app, &caller, &name).await?.id;
    let lease = issue::revoke_now(&app, id).await?;
    info!(lease = %id, trace = crate::app::trace_of(&lease), by = caller.name(), "revocation asked for");
    Ok(Json(view(&lease)))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BelowAsked {
    path: Option<String>,
}

/// DELETE /v1/leases?path=PREFIX: all live leases of a path and those below.
pub(super) async fn revoke_below(
    State(app): State<Arc<App>>,
    caller: Caller,
    Asked(asked): Asked<BelowAsked>,
) -> Result<Json<Value>, ApiError> {
    let prefix = asked
        .path
        .ok_or_else(|| malformed("path is needed: the leases of which secrets?"))?;
    let filter = Filter {
        path: Some(prefix.parse().map_err(malformed)?),
        created_by: caller.only_leases_of(),
        ..Filter::default()
    };
    let revoking = revoke_all(&app, filter).await?;
    info!(
        path = prefix,
        revoking,
        by = caller.name(),
        "revocations asked for"
    );
    Ok(Json(json!({"revoking": revoking})))
}

/// Marks all that match; the reconciler sends the revocations at once.
pub(super) async fn revoke_all(app: &App, filter: Filter) -> Result<usize, ApiError> {
    let mut total = 0;
    loop {
        let marked = app
            .store
            .revoke_matching(filter.clone(), BATCH, Timestamp::now())
            .await?;
        total += marked;
        app.reconcile.notify_one();
        if marked < BATCH as usize {
            return Ok(total);
        }
    }
}
