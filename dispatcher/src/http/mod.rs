//! The HTTP API: routes, and serving them. Only this directory names axum. Each resource has one file; each
//! handler authenticates, parses, acts and answers.

mod acts;
mod auth;
mod connection;
mod credential;
mod engines;
mod errors;
mod leases;
mod pools;
mod request;
mod secrets;
mod status;
mod tokens;

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use jiff::Timestamp;
use mayfly_common::serve::{self, Refusal, Room, Tls};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use self::errors::Refused;
use crate::app::App;
use crate::error::{ApiError, Code};

/// Largest body of a request.
const BODY_LIMIT_BYTES: usize = 1024 * 1024;

fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/secrets", get(secrets::list))
        .route(
            "/v1/secrets/{*path}",
            get(secrets::read)
                .post(acts::post)
                .put(secrets::update)
                .delete(secrets::delete),
        )
        .route("/v1/pools", get(pools::list).post(pools::create))
        .route("/v1/pools/{name}", get(pools::read).delete(pools::delete))
        .route("/v1/pools/{name}/rotate-key", post(pools::rotate_key))
        .route("/v1/pools/{name}/distrust", post(pools::distrust))
        .route("/v1/engines", get(engines::list))
        .route("/v1/engines/{name}", get(engines::read))
        .route("/v1/engines/{name}/ping", post(engines::ping))
        .route("/v1/leases", get(leases::list).delete(leases::revoke_below))
        .route("/v1/leases/{id}", get(leases::read).delete(leases::revoke))
        .route("/v1/leases/{id}/renew", post(leases::renew))
        .route("/v1/leases/{id}/retry", post(leases::retry))
        .route("/v1/leases/reconcile", post(leases::reconcile))
        .route("/v1/tokens", get(tokens::list).post(tokens::create))
        .route("/v1/tokens/{id}", get(tokens::read).delete(tokens::delete))
        .route("/v1/status", get(status::read))
        .fallback(async || ApiError::new(Code::NotFound, "there is no such endpoint"))
        .method_not_allowed_fallback(async || {
            ApiError::new(Code::MethodNotAllowed, "method not allowed")
        })
        .layer(DefaultBodyLimit::max(BODY_LIMIT_BYTES))
        .layer(middleware::from_fn_with_state(app.clone(), counted))
        .with_state(app)
}

/// Counts a request, and how long it takes.
async fn counted(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>();
    let counting = app
        .metrics
        .request(route.map(MatchedPath::as_str), request.method().as_str());
    let response = next.run(request).await;
    let refused = response.extensions().get::<Refused>();
    counting.answered(
        response.status().as_u16(),
        refused.map(|Refused(reason)| *reason),
    );
    response
}

/// Serves the API until `stop`, then finishes the requests in progress.
pub(crate) async fn serve(
    app: Arc<App>,
    listener: TcpListener,
    tls: Option<Tls>,
    room: Room,
    stop: CancellationToken,
) {
    let metrics = app.clone();
    let refused = move |refusal: Refusal| metrics.metrics.http_refused(refusal.as_str());
    serve::serve(listener, tls, router(app), room, Arc::new(refused), stop).await;
}

/// A timestamp in an answer: RFC 3339, UTC with `Z`. It has no fraction of a second, because clients of the
/// compatible product cannot parse one. The fraction is cut off, so no lease seems to live longer than it does.
fn date(at: Timestamp) -> String {
    let whole = Timestamp::from_second(at.as_second()).unwrap_or(at);
    format!("{whole:.0}")
}

/// The answer to a create that shows a secret once. No cache may store it.
fn created_with_secret(shown: Value) -> Response {
    let headers = [(header::CACHE_CONTROL, "no-store")];
    (StatusCode::CREATED, headers, Json(shown)).into_response()
}
