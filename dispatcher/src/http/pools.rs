//! Pools of engines. The engine key is in the answer to the create only and is not stored.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use mayfly_common::broker::BrokerError;
use mayfly_protocol::names::PoolName;
use mayfly_protocol::seal::{EngineKey, KeyPair, PublicKey};
use serde_json::{Value, json};
use tracing::{info, warn};

use super::auth::Caller;
use super::request::{Asked, Body, Named, Nothing, PageAsked, only_known};
use super::{created_with_secret, date};
use crate::app::App;
use crate::error::{ApiError, Code, Problems};
use crate::store::Generation;
use crate::store::Pool;

fn named(name: &str) -> Result<PoolName, ApiError> {
    // No pool has an invalid name.
    name.parse()
        .map_err(|_| ApiError::not_found(format!("pool `{name}`")))
}

/// GET /v1/pools: all pools, by name.
pub(super) async fn list(
    State(app): State<Arc<App>>,
    caller: Caller,
    Asked(asked): Asked<PageAsked>,
) -> Result<Json<Value>, ApiError> {
    caller.root_only()?;
    let page = asked.page()?;
    let mut found = Vec::new();
    for pool in app.store.pools(page.after.clone(), page.look_for()).await? {
        let engines = app.engines_of(&pool.name).await;
        found.push((pool, engines));
    }
    Ok(Json(page.show(
        "pools",
        found,
        |(pool, _)| pool.name.to_string(),
        |(pool, engines)| view(pool, *engines),
    )))
}

fn view(pool: &Pool, engines: usize) -> Value {
    json!({
        "name": pool.name,
        "created": date(pool.created),
        "engines": engines,
        "distrusted": pool.distrusted.map(date),
    })
}

/// A pool, with the base secrets whose admin passwords were sealed to it.
async fn view_with_bases(app: &App, pool: &Pool) -> Result<Value, ApiError> {
    let mut shown = view(pool, app.engines_of(&pool.name).await);
    shown["baseSecrets"] = json!(app.store.bases_of(pool.name.clone()).await?);
    Ok(shown)
}

/// GET /v1/pools/{name}: one pool.
pub(super) async fn read(
    State(app): State<Arc<App>>,
    caller: Caller,
    Named(name): Named,
    Asked(Nothing {}): Asked<Nothing>,
) -> Result<Json<Value>, ApiError> {
    caller.root_only()?;
    let pool = app.store.pool(named(&name)?).await?;
    let engines = app.engines_of(&pool.name).await;
    Ok(Json(view(&pool, engines)))
}

/// POST /v1/pools: adds a pool.
pub(super) async fn create(
    State(app): State<Arc<App>>,
    caller: Caller,
    Asked(Nothing {}): Asked<Nothing>,
    Body(body): Body,
) -> Result<Response, ApiError> {
    caller.root_only()?;
    let name = parse(&body).map_err(ApiError::invalid)?;
    let keys = KeyPair::generate();
    let (generation, dispatcher) = dispatcher_keys(&app).await?;
    // The new pool has a new key, so no message of an earlier pool with this name reaches it.
    let newest = dispatcher.get(..1).unwrap_or_default();
    let engine_key = engine_key(&name, &keys, newest);
    let pool = Pool::new(name, keys.public().clone(), generation, Timestamp::now());
    app.store.create_pool(pool.clone()).await?;
    match app.broker.declare_pool(&pool.name).await {
        Ok(()) => {}
        Err(error) => {
            warn!(pool = %pool.name, %error, "the pool's queues are not declared yet; the next connection to the broker declares them")
        }
    }
    info!(pool = %pool.name, "pool created");
    let shown = json!({
        "name": pool.name,
        "created": date(pool.created),
        "publicKey": pool.public_key.to_base64(),
        "engineKey": engine_key,
    });
    Ok(created_with_secret(shown))
}

/// The dispatcher's public keys, the newest first, and its generation. They are read from the store.
async fn dispatcher_keys(app: &App) -> Result<(Generation, Vec<PublicKey>), ApiError> {
    app.identity.keys.renew(app.store.keys(false).await?);
    Ok(app.identity.keys.public())
}

/// The key file of the pool's engines, as text. It is shown once and never stored.
fn engine_key(pool: &PoolName, keys: &KeyPair, dispatcher: &[PublicKey]) -> String {
    let mut dispatcher = dispatcher.iter().map(PublicKey::to_base64);
    let key = EngineKey {
        version: 1,
        pool: pool.clone(),
        private_key: keys.to_base64(),
        previous_keys: vec![],
        dispatcher_key: dispatcher.next().unwrap_or_default(),
        previous_dispatcher_keys: dispatcher.collect(),
    };
    serde_json::to_string_pretty(&key)
        .unwrap_or_else(|error| unreachable!("an engine key cannot be serialized: {error}"))
}

/// POST /v1/pools/{name}/rotate-key: begins a rotation and shows the new key once. With `{"finish": true}` tasks are
/// sealed to the new key from now on. With `{"giveUp": true}` the new key is forgotten. Until then both keys are
/// valid.
pub(super) async fn rotate_key(
    State(app): State<Arc<App>>,
    caller: Caller,
    Named(name): Named,
    Asked(Nothing {}): Asked<Nothing>,
    Body(body): Body,
) -> Result<Response, ApiError> {
    caller.root_only()?;
    let name = named(&name)?;
    let mut problems = Problems::new();
    let mut wish = |member: &str| match body.get(member) {
        None => false,
        Some(Value::Bool(wish)) => *wish,
        Some(_) => {
            problems.insert(member.to_owned(), vec!["must be true or false".to_owned()]);
            false
        }
    };
    let (finish, give_up) = (wish("finish"), wish("giveUp"));
    only_known(&mut problems, &body, &["finish", "giveUp"]);
    if finish && give_up {
        problems.insert("giveUp".to_owned(), vec!["or finish, not both".to_owned()]);
    }
    if !problems.is_empty() {
        return Err(ApiError::invalid(problems));
    }
    if !finish && !give_up {
        let keys = KeyPair::generate();
        let (generation, dispatcher) = dispatcher_keys(&app).await?;
        app.store
            .begin_key_rotation(name.clone(), keys.public().clone(), generation)
            .await?;
        info!(pool = %name, by = caller.name(), "a rotation of the pool's key begins");
        let shown = json!({
            "name": name,
            "publicKey": keys.public().to_base64(),
            "engineKey": engine_key(&name, &keys, &dispatcher),
        });
        return Ok(created_with_secret(shown));
    }
    if finish {
        let consuming = app.broker.engines_of(&name).await;
        let consuming = consuming.map_err(|error| ApiError::broker(&error))?;
        let heard = app.registry.count(&name);
        if usize::try_from(consuming).unwrap_or(usize::MAX) > heard {
            return Err(ApiError::new(
                Code::InUse,
                format!(
                    "only {heard} of {consuming} engines have reported which key they have; try again in a few seconds"
                ),
            ));
        }
        // Engines that have only the old key cannot open messages that are sealed to the new key.
        let behind = app
            .registry
            .with_another_key(&name, &app.store.pool(name.clone()).await?);
        if !behind.is_empty() {
            return Err(ApiError::new(
                Code::InUse,
                format!(
                    "these engines run without the new key: {}; give them the new key file first",
                    behind.join(", ")
                ),
            ));
        }
    }
    let pool = app.store.end_key_rotation(name, finish).await?;
    info!(pool = %pool.name, finish, by = caller.name(), "the rotation of the pool's key ends");
    app.replies.retire_keys(&pool);
    Ok(Json(view_with_bases(&app, &pool).await?).into_response())
}

/// POST /v1/pools/{name}/distrust: nothing is sealed to the pool any more, its messages are refused, and
/// other pools end its leases. This cannot be undone: the pool needs a new key.
pub(super) async fn distrust(
    State(app): State<Arc<App>>,
    caller: Caller,
    Named(name): Named,
    Asked(Nothing {}): Asked<Nothing>,
) -> Result<Json<Value>, ApiError> {
    caller.root_only()?;
    let distrusted = app.store.distrust_pool(named(&name)?, app.now()).await?;
    let pool = &distrusted.pool;
    warn!(pool = %pool.name, leases = distrusted.leases, by = caller.name(), "the pool is distrusted");
    app.replies.retire_keys(pool);
    app.reconcile.notify_one();
    let mut shown = view(pool, app.engines_of(&pool.name).await);
    shown["baseSecrets"] = json!(distrusted.bases);
    shown["leases"] = json!(distrusted.leases);
    Ok(Json(shown))
}

fn parse(body: &crate::secrets::Object) -> Result<PoolName, Problems> {
    let mut problems = Problems::new();
    only_known(&mut problems, body, &["name"]);
    let name = match body
        .get("name")
        .and_then(Value::as_str)
        .map(str::parse::<PoolName>)
    {
        Some(Ok(name)) => Some(name),
        Some(Err(error)) => {
            problems.insert("name".to_owned(), vec![error.to_string()]);
            None
        }
        None => {
            problems.insert("name".to_owned(), vec!["must be a string".to_owned()]);
            None
        }
    };
    match name {
        Some(name) if problems.is_empty() => Ok(name),
        _ => Err(problems),
    }
}

/// DELETE /v1/pools/{name}: removes a pool and its queues.
pub(super) async fn delete(
    State(app): State<Arc<App>>,
    caller: Caller,
    Named(name): Named,
    Asked(Nothing {}): Asked<Nothing>,
) -> Result<StatusCode, ApiError> {
    caller.root_only()?;
    let name = named(&name)?;
    if !app.broker.is_up() {
        return Err(ApiError::broker(&BrokerError::Down));
    }
    app.store.delete_pool(name.clone(), app.now()).await?;
    if let Err(error) = app.broker.delete_pool(&name).await {
        warn!(pool = %name, %error, "the pool is deleted; its queues remain at the broker");
    }
    info!(pool = %name, "pool deleted");
    Ok(StatusCode::NO_CONTENT)
}
