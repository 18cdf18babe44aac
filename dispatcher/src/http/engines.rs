//! The living engines, and pinging one.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::State;
use mayfly_protocol::names::EngineName;
use serde_json::{Value, json};

use super::auth::Caller;
use super::date;
use super::request::{Asked, Named, PageAsked};
use crate::app::App;
use crate::app::registry::Seen;
use crate::engines::ping;
use crate::error::ApiError;

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

/// The pool of the engine: names are unique only within a pool.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PoolAsked {
    pool: Option<String>,
}

fn find(app: &App, name: &str, asked: &PoolAsked) -> Result<Seen, ApiError> {
    let found = name.parse::<EngineName>();
    let mut found = found.map_or_else(|_| Vec::new(), |name| app.registry.named(&name));
    if let Some(pool) = &asked.pool {
        found.retain(|seen| seen.heartbeat.pool.as_str() == pool);
    }
    if found.len() > 1 {
        let pools: Vec<&str> = found
            .iter()
            .map(|seen| seen.heartbeat.pool.as_str())
            .collect();
        let reason = format!(
            "the pools {} each have an engine `{name}`; choose one with ?pool=NAME (mayfly engine … --pool NAME)",
            pools.join(", ")
        );
        return Err(ApiError::invalid(
            [("pool".to_owned(), vec![reason])].into_iter().collect(),
        ));
    }
    found
        .pop()
        .ok_or_else(|| ApiError::not_found(format!("living engine `{name}`")))
}

/// The key that distinguishes engines in a list. No name contains a `/`.
fn key(seen: &Seen) -> String {
    format!("{}/{}", seen.heartbeat.engine, seen.heartbeat.pool)
}

/// GET /v1/engines: the living engines.
pub(super) async fn list(
    State(app): State<Arc<App>>,
    caller: Caller,
    Asked(asked): Asked<PageAsked>,
) -> Result<Json<Value>, ApiError> {
    caller.root_only()?;
    let page = asked.page()?;
    let mut found = app.registry.all();
    found.sort_by_key(key);
    found.retain(|seen| key(seen) > page.after);
    found.truncate(page.look_for());
    Ok(Json(page.show("engines", found, key, view)))
}

/// GET /v1/engines/{name}?pool=: one living engine.
pub(super) async fn read(
    State(app): State<Arc<App>>,
    caller: Caller,
    Named(name): Named,
    Asked(asked): Asked<PoolAsked>,
) -> Result<Json<Value>, ApiError> {
    caller.root_only()?;
    Ok(Json(view(&find(&app, &name, &asked)?)))
}

/// POST /v1/engines/{name}/ping?pool=: measures a message to the engine and its answer, through the broker.
pub(super) async fn ping(
    State(app): State<Arc<App>>,
    caller: Caller,
    Named(name): Named,
    Asked(asked): Asked<PoolAsked>,
) -> Result<Json<Value>, ApiError> {
    caller.root_only()?;
    let engine = find(&app, &name, &asked)?.heartbeat;
    let pool = app.store.pool(engine.pool).await?;
    let begun = Instant::now();
    let beat = ping::ping(&app, &engine.engine, &pool).await?;
    Ok(Json(json!({
        "name": beat.engine,
        "poolName": beat.pool,
        "version": beat.version,
        "roundTripMs": (begun.elapsed().as_secs_f64() * 1e5).round() / 100.0,
    })))
}
