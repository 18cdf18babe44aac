//! Read tokens. The token itself is shown once, at the create; the store keeps its SHA-256.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use jiff::SignedDuration;
use mayfly_protocol::names::{PathGlob, random_text};
use mayfly_protocol::secret::Secret;
use serde_json::{Value, json};
use tracing::info;

use super::auth::Caller;
use super::request::{Asked, Body, Named, Nothing, PageAsked, only_known};
use super::{created_with_secret, date};
use crate::app::App;
use crate::error::{ApiError, Problems};
use crate::secrets::Object;
use crate::store::Token;

/// Maximum number of globs of one token.
const MAX_GLOBS: usize = 64;
/// Longest life of a token: a year.
const MAX_TTL_SECONDS: i64 = 31_536_000;

fn view(token: &Token) -> Value {
    json!({
        "id": token.id,
        "read": token.read,
        "maxLeases": token.max_leases,
        "created": date(token.created),
        "expiration": date(token.expiration),
    })
}

/// GET /v1/tokens: the read tokens.
pub(super) async fn list(
    State(app): State<Arc<App>>,
    caller: Caller,
    Asked(asked): Asked<PageAsked>,
) -> Result<Json<Value>, ApiError> {
    caller.root_only()?;
    let page = asked.page()?;
    let found = app
        .store
        .tokens(page.after.clone(), page.look_for())
        .await?;
    Ok(Json(page.show(
        "tokens",
        found,
        |token| token.id.clone(),
        view,
    )))
}

/// GET /v1/tokens/{id}: one read token.
pub(super) async fn read(
    State(app): State<Arc<App>>,
    caller: Caller,
    Named(id): Named,
    Asked(Nothing {}): Asked<Nothing>,
) -> Result<Json<Value>, ApiError> {
    caller.root_only()?;
    Ok(Json(view(&app.store.token(id).await?)))
}

/// POST /v1/tokens: makes a read token.
pub(super) async fn create(
    State(app): State<Arc<App>>,
    caller: Caller,
    Asked(Nothing {}): Asked<Nothing>,
    Body(body): Body,
) -> Result<Response, ApiError> {
    caller.root_only()?;
    let Asking {
        read,
        ttl,
        max_leases,
    } = parse(&body).map_err(ApiError::invalid)?;
    let now = app.now();
    let token = Token {
        id: random_text(16),
        read,
        created: now,
        expiration: now + ttl,
        max_leases,
    };
    let secret = Secret::new(BASE64_URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>()));
    app.store.create_token(token.clone(), &secret).await?;
    info!(token = token.id, expiration = %token.expiration, "read token created");
    let mut shown = view(&token);
    shown["token"] = json!(secret.expose());
    Ok(created_with_secret(shown))
}

struct Asking {
    read: Vec<PathGlob>,
    ttl: SignedDuration,
    max_leases: Option<u64>,
}

fn parse(body: &Object) -> Result<Asking, Problems> {
    let mut problems = Problems::new();
    only_known(&mut problems, body, &["read", "ttl", "maxLeases"]);
    let mut refuse =
        |field: String, reason: String| problems.entry(field).or_default().push(reason);
    let mut read = Vec::new();
    match body.get("read").and_then(Value::as_array) {
        Some(list) if (1..=MAX_GLOBS).contains(&list.len()) => {
            for (n, glob) in list.iter().enumerate() {
                match glob.as_str().unwrap_or_default().parse::<PathGlob>() {
                    Ok(glob) => read.push(glob),
                    Err(error) => refuse(format!("read.{n}"), error.to_string()),
                }
            }
        }
        Some(_) | None => refuse(
            "read".to_owned(),
            format!("must be a list of 1 to {MAX_GLOBS} paths, which may contain `*`"),
        ),
    }
    let ttl = body
        .get("ttl")
        .and_then(Value::as_i64)
        .filter(|ttl| (1..=MAX_TTL_SECONDS).contains(ttl));
    if ttl.is_none() {
        refuse(
            "ttl".to_owned(),
            format!("is needed: an integer from 1 to {MAX_TTL_SECONDS}, in seconds"),
        );
    }
    let max_leases = body
        .get("maxLeases")
        .map(|most| most.as_u64().filter(|n| *n > 0));
    if max_leases == Some(None) {
        refuse(
            "maxLeases".to_owned(),
            "must be an integer, 1 or more".to_owned(),
        );
    }
    match ttl {
        Some(ttl) if problems.is_empty() => Ok(Asking {
            read,
            ttl: SignedDuration::from_secs(ttl),
            max_leases: max_leases.flatten(),
        }),
        _ => Err(problems),
    }
}

/// DELETE /v1/tokens/{id}. Its leases live on.
pub(super) async fn delete(
    State(app): State<Arc<App>>,
    caller: Caller,
    Named(id): Named,
    Asked(Nothing {}): Asked<Nothing>,
) -> Result<StatusCode, ApiError> {
    caller.root_only()?;
    app.store.delete_token(id.clone()).await?;
    info!(token = id, "read token deleted");
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_token_needs_globs_and_an_end() {
        let parse = |value: Value| parse(value.as_object().unwrap());
        assert_eq!(
            parse(json!({"read": ["db:app:*"], "ttl": 60}))
                .unwrap()
                .read
                .len(),
            1
        );
        let wrong = parse(json!({"read": ["a", "a::b", 1], "ttl": 0, "write": [], "maxLeases": 0}))
            .err()
            .unwrap();
        assert_eq!(
            wrong.into_keys().collect::<Vec<_>>(),
            ["maxLeases", "read.1", "read.2", "ttl", "write"]
        );
        assert!(parse(json!({"read": [], "ttl": 60})).is_err());
    }
}
