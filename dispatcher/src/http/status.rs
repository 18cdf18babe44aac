//! The status of broker, pools, engines and leases.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use mayfly_common::VERSION;
use serde_json::{Map, Value, json};

use super::auth::Caller;
use super::request::{Asked, Nothing};
use crate::app::App;
use crate::error::ApiError;
use mayfly_protocol::lease::State as LeaseState;

/// GET /v1/status: counts of leases, pools and engines.
pub(super) async fn read(
    State(app): State<Arc<App>>,
    caller: Caller,
    Asked(Nothing {}): Asked<Nothing>,
) -> Result<Json<Value>, ApiError> {
    caller.root_only()?;
    let mut pools = Vec::new();
    for count in app.store.pool_counts(app.now()).await? {
        let leases: Map<String, Value> = LeaseState::ALL
            .into_iter()
            .zip(count.leases)
            .filter(|(state, _)| !state.is_settled())
            .map(|(state, n)| (state.as_str().to_owned(), json!(n)))
            .collect();
        pools.push(json!({
            "name": count.pool,
            "engines": app.engines_of(&count.pool).await,
            "leases": leases,
            "settling": count.settling,
            "stuck": count.stuck,
            "overdue": count.overdue,
        }));
    }
    Ok(Json(json!({
        "version": VERSION,
        "broker": if app.broker.is_up() { "up" } else { "down" },
        "installation": app.identity.installation.to_string(),
        "pools": pools,
    })))
}
