//! The living engines, and pinging one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use mayfly_common::broker::BrokerError;
use mayfly_common::names::{EngineName, random_text};
use mayfly_common::task::{Kind, ReplyResult};
use serde_json::{Value, json};

use super::auth::Caller;
use super::date;
use super::request::{Asked, Named, PageAsked};
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

/// Which of the engines of a name is meant: names are unique within a pool only.
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
            "engines called `{name}` live in the pools {}; say which one with ?pool=NAME (mayfly engine … --pool NAME)",
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

/// What tells engines apart in a list; no name has a `/`.
fn key(seen: &Seen) -> String {
    format!("{}/{}", seen.heartbeat.engine, seen.heartbeat.pool)
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
    found.sort_by_key(key);
    found.retain(|seen| key(seen) > page.after);
    found.truncate(page.look_for());
    Ok(Json(page.show("engines", found, key, view)))
}

/// GET /v1/engines/{name}?pool=
pub(super) async fn read(
    State(app): State<Arc<App>>,
    caller: Caller,
    Named(name): Named,
    Asked(asked): Asked<PoolAsked>,
) -> Result<Json<Value>, ApiError> {
    caller.root_only()?;
    Ok(Json(view(&find(&app, &name, &asked)?)))
}

/// POST /v1/engines/{name}/ping?pool=: there and back through the broker.
pub(super) async fn ping(
    State(app): State<Arc<App>>,
    caller: Caller,
    Named(name): Named,
    Asked(asked): Asked<PoolAsked>,
) -> Result<Json<Value>, ApiError> {
    caller.root_only()?;
    let seen = find(&app, &name, &asked)?;
    let engine = seen.heartbeat.engine;
    let pool = app.store.pool(seen.heartbeat.pool).await?;
    let request = format!("ping-{}", random_text(20));
    let recipient = pool.recipient()?;
    let mut reply = app
        .replies
        .expect(Kind::Ping, request.clone(), pool.name.clone(), pool.keys());
    let named = (request, reply.request());
    let begun = Instant::now();
    let silent = || {
        ApiError::new(
            Code::Deadline,
            format!("engine `{engine}` did not answer within 5 s"),
        )
    };
    match app
        .send_ping(&engine, pool.name.clone(), &recipient, named, PATIENCE)
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
        // Another engine of its pool cannot answer for it.
        ReplyResult::Pong(beat) if beat.engine == engine && beat.pool == pool.name => {
            Ok(Json(json!({
                "name": beat.engine,
                "poolName": beat.pool,
                "version": beat.version,
                "roundTripMs": (begun.elapsed().as_secs_f64() * 1e5).round() / 100.0,
            })))
        }
        ReplyResult::Failed(failure) => Err(failure.into()),
        _ => Err(silent()),
    }
}
