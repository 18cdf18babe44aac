//! Actions on a secret: `::check`, `::rotate` and `::tidy` after its path. Only the root token may use them.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use mayfly_common::trace::Span;
use mayfly_protocol::names::{PoolName, SecretPath};
use mayfly_protocol::task::Finding;
use serde_json::{Value, json};
use tracing::info;

use super::auth::Caller;
use super::request::{Asked, Body, Named, Nothing, Raw, malformed, only_known};
use super::secrets;
use crate::app::App;
use crate::error::{ApiError, Problems};
use crate::secrets::{Kind, Object, parse_object};
use crate::servers::check::{self, TRIAL_TTL_SECONDS};
use crate::servers::pool::pool_of;
use crate::servers::rotate;
use crate::servers::tidy;
use crate::store::{Base, Pool};

/// POST /v1/secrets/{path}: an action if the path ends with one, else a new secret.
pub(super) async fn post(
    State(app): State<Arc<App>>,
    caller: Caller,
    Named(name): Named,
    Asked(nothing): Asked<Nothing>,
    headers: HeaderMap,
    Raw(text): Raw,
) -> Result<Response, ApiError> {
    let Some((name, act)) = name.rsplit_once("::") else {
        let body = Body(parse_object(&text)?);
        return secrets::create(State(app), caller, Named(name), Asked(nothing), body).await;
    };
    caller.root_only()?;
    let path: SecretPath = name.parse().map_err(malformed)?;
    let body = match text.is_empty() {
        true => Object::new(),
        false => parse_object(&text)?,
    };
    match act {
        "check" => check(&app, &caller, path, &body, &headers).await,
        "rotate" => {
            known(&body, &[])?;
            let record = rotate::rotate(&app, path, caller.name()).await?;
            Ok(Json(secrets::view(&record)).into_response())
        }
        "tidy" => {
            known(&body, &["pool"])?;
            let base = app.store.base(path).await?;
            let pool = choose(&app, &base, &body).await?;
            let tidied = tidy::tidy(&app, &pool, &base.target).await?;
            let kept: Vec<Value> = tidied
                .kept
                .iter()
                .map(|kept| json!({"role": kept.role, "reason": kept.reason, "inUse": kept.in_use}))
                .collect();
            let answer = json!({"path": base.record.path, "removed": tidied.removed, "kept": kept});
            Ok((StatusCode::OK, Json(answer)).into_response())
        }
        other => Err(malformed(format!(
            "unknown action `::{other}`; known: ::check, ::rotate, ::tidy"
        ))),
    }
}

/// Refuses a body with other members than these.
fn known(body: &Object, members: &[&str]) -> Result<(), ApiError> {
    let mut problems = Problems::new();
    only_known(&mut problems, body, members);
    match problems.is_empty() {
        true => Ok(()),
        false => Err(ApiError::invalid(problems)),
    }
}

/// Chooses the named pool, or else a pool of the base secret that has an engine.
async fn choose(app: &App, base: &Base, body: &Object) -> Result<Pool, ApiError> {
    match body.get("pool") {
        None => pool_of(app, base).await.cloned(),
        Some(value) => {
            let name: PoolName = value
                .as_str()
                .unwrap_or_default()
                .parse()
                .map_err(|error| {
                    ApiError::invalid(Problems::from([(
                        "pool".to_owned(),
                        vec![format!("{error}")],
                    )]))
                })?;
            Ok(app.store.pool(name).await?)
        }
    }
}

async fn check(
    app: &Arc<App>,
    caller: &Caller,
    path: SecretPath,
    body: &Object,
    headers: &HeaderMap,
) -> Result<Response, ApiError> {
    known(body, &["pool"])?;
    let read = app.store.read_secret(path.clone()).await?;
    let (pool, findings) = match (read.record.kind, read.base) {
        (Kind::Dynamic, Some(facts)) => {
            known(body, &[])?;
            let traceparent = headers
                .get("traceparent")
                .and_then(|value| value.to_str().ok());
            let span = Span::serve("check", traceparent);
            let trace = span.context().clone();
            let pool = facts.pool.name.clone();
            let mut order = secrets::order(app, caller, read.record, facts, None, trace)?;
            order.ttl_seconds = order.ttl_seconds.min(TRIAL_TTL_SECONDS);
            // The lease of the check is ended, so it must not be shared with another caller.
            order.for_trial = true;
            order.dynamic.share = false;
            (pool, check::dynamic(app, order, span).await?)
        }
        _ => {
            let base = app.store.base(path.clone()).await?;
            let pool = choose(app, &base, body).await?;
            let findings = check::base(app, &pool, &base.target).await?;
            (pool.name, findings)
        }
    };
    let ok = findings.iter().all(|found| found.ok);
    let failing: Vec<&str> = findings
        .iter()
        .filter(|found| !found.ok)
        .map(|found| found.topic.as_str())
        .collect();
    info!(%path, ok, ?failing, by = caller.name(), "secret checked");
    let shown: Vec<Value> = findings.iter().map(shown).collect();
    let answer = json!({"path": path, "pool": pool, "ok": ok, "findings": shown});
    Ok(Json(answer).into_response())
}

fn shown(found: &Finding) -> Value {
    json!({"check": found.topic, "ok": found.ok, "message": found.message, "fix": found.fix})
}
