//! How a server is reached: the connection settings that a client needs besides a credential.

use axum::Json;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use mayfly_protocol::names::SecretPath;
use serde_json::{Value, json};

use super::auth::Caller;
use super::request::malformed;
use crate::app::App;
use crate::error::ApiError;
use crate::store::StoreError;

/// GET /v1/secrets/{path}::connection of a dynamic secret, for callers who may read it. It issues no lease and shows
/// no secret: `host`, `port`, `sslmode`, `auth`, `channelBinding` and `sslrootcert` of the base secret.
pub(super) async fn read(
    app: &App,
    caller: &Caller,
    path: SecretPath,
) -> Result<Response, ApiError> {
    caller.check_read(&path)?;
    let Some(base) = app.store.read_secret(path).await?.base else {
        return Err(malformed("only a dynamic secret has a `::connection`"));
    };
    let target = base.target;
    let roots = target.sslrootcert.as_ref().map(|roots| roots.pem());
    let roots = roots.transpose().map_err(StoreError::Unavailable)?;
    let shown: Value = json!({
        "host": target.host,
        "port": target.port,
        "sslmode": target.sslmode,
        "auth": target.auth,
        "channelBinding": target.channel_binding,
        "sslrootcert": roots,
    });
    Ok(([(header::CACHE_CONTROL, "no-store")], Json(shown)).into_response())
}
