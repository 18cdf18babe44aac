//! The living engines, and pinging one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use mayfly_common::broker::BrokerError;
use mayfly_common::names::{EngineName, random_text};
use mayfly_common::task::ReplyResult;
use serde_json::{Value, json};

use super::auth::Caller;
use super::date;
use super::request::{Asked, Named, Nothing, PageAsked};
use crate::app::App;
use crate::error::{ApiError, Code};
use crate::registry::Seen;

/// How long an engine may take to answer a ping.
const PATIENCE: Duration = Duration::from_secs(5);

fn view(seen: &Seen) -> Value {
    let beat = &seen.heartbeat;
    json!({
        "name": beat.engine,
        "poolName": beat.pool,
        "version": beat.version,
        "started": date(beat.started),
        "lastHeartbeat": date(seen.at),
        "inFlight": beat.in_flight,
    })
}

fn find(app: &App, name: &str) -> Result<Seen, ApiError> {
    name.parse::<EngineName>()
        .ok()
        .and_then(|name| app.registry.get(&name))
        .ok_or_else(|| ApiError::not_found(format!("living engine `{name}`")))
}

/// GET /v1/engines
pub(super) async fn list(
    State(app): State<Arc<App>>,
    caller: Caller,
    Asked(asked): Asked<PageAsked>,
) -> Result<Json<Value>, ApiError> {
    caller.root_only()?;
    let page = asked.page()?;
    let mut found = app.registry.all();
    found.retain(|seen| seen.heartbeat.engine.as_str() > page.after.as_str());
    found.truncate(page.look_for());
    Ok(Json(page.show(
        "engines",
        found,
        |seen| seen.heartbeat.engine.to_string(),
        view,
    )))
}

/// GET /v1/engines/{name}
pub(super) async fn read(
    State(app): State<Arc<App>>,
    caller: Caller,
    Named(name): Named,
    Asked(Nothing {}): Asked<Nothing>,
) -> Result<Json<Value>, ApiError> {
    caller.root_only()?;
    Ok(Json(view(&find(&app, &name)?)))
}

/// POST /v1/engines/{name}/ping: there and back through the broker.
pub(super) async fn ping(
    State(app): State<Arc<App>>,
    caller: Caller,
    Named(name): Named,
    Asked(Nothing {}): Asked<Nothing>,
) -> Result<Json<Value>, ApiError> {
    caller.root_only()?;
    let seen = find(&app, &name)?;
    let engine = seen.heartbeat.engine;
    let pool = app.store.pool(seen.heartbeat.pool).await?;
    let request = format!("ping-{}", random_text(20));
    let recipient = pool.recipient()?;
    let mut reply = app
        .replies
        .expect(request.clone(), pool.name.clone(), pool.keys());
    let begun = Instant::now();
    let silent = || {
        ApiError::new(
            Code::Deadline,
            format!("engine `{engine}` did not answer within 5 s"),
        )
    };
    match app
        .send_ping(&engine, pool.name, &recipient, request, PATIENCE)
        .await
    {
        Ok(()) => {}
        Err(BrokerError::Unroutable) => {
            return Err(ApiError::new(
                Code::NoEngine,
                format!("engine `{engine}` has just gone"),
            ));
        }
        Err(error) => return Err(ApiError::broker(&error)),
    }
    let answer = tokio::time::timeout(PATIENCE, reply.answer())
        .await
        .map_err(|_| silent())?;
    match answer.ok_or_else(silent)?.result {
        ReplyResult::Pong(beat) => Ok(Json(json!({
            "name": beat.engine,
            "poolName": beat.pool,
            "version": beat.version,
            "roundTripMs": (begun.elapsed().as_secs_f64() * 1e5).round() / 100.0,
        }))),
        ReplyResult::Failed(failure) => Err(failure.into()),
        ReplyResult::Created(_)
        | ReplyResult::Renewed(_)
        | ReplyResult::Ledger(_)
        | ReplyResult::Rotated(_)
        | ReplyResult::Checked(_)
        | ReplyResult::Tidied(_) => Err(silent()),
    }
}
