//! Binds leases to a server that has moved. After a major upgrade, a restore or a change of the address, a person
//! states that the base secret still names the same server. Then the leases of the secret are bound to the server
//! that answers now: they are ended there, and their absence counts there.
//!
//! Each pool is asked which server it reaches: an answer of one pool's engines does not count for the leases of
//! another.

use mayfly_protocol::names::SecretPath;
use tracing::{info, warn};

use crate::app::App;
use crate::engines::{call, outbox};
use crate::error::ApiError;
use crate::store::LeaseAccess;
use mayfly_protocol::lease::State;

/// Leases that one job of the store binds.
const PAGE: u32 = 500;

/// Binds the open leases of a base secret to the server that it names now. Their ends are parked again with the new
/// address. A second call does the same. Returns the number of leases.
///
/// # Errors
/// `no_engine` if no engine of a pool with such leases runs; the failure of the server. The leases of the pools
/// before that one are bound by then.
pub(crate) async fn bind(app: &App, path: &SecretPath) -> Result<usize, ApiError> {
    let base = app.store.base(path.clone()).await?;
    let mut bound = 0;
    for pool in base.linked.iter().chain(&base.last) {
        let open = app
            .store
            .open_of_base(base.record.id.clone(), pool.name.clone());
        if !open.await? {
            continue;
        }
        let seen = call::look_at_server(app, pool, &base.target).await;
        let server = seen.map(|seen| seen.server).map_err(|error| ApiError {
            message: format!(
                "the leases of pool `{}` are not bound to the server of `{path}`: {}; repeat the update",
                pool.name, error.message
            ),
            ..error
        })?;
        let mut after = String::new();
        let mut of_pool = 0;
        loop {
            let (page, last) = app
                .store
                .bind_leases(
                    path.clone(),
                    base.record.version,
                    pool.name.clone(),
                    server.clone(),
                    after,
                    PAGE,
                    app.now(),
                )
                .await?;
            of_pool += page.len();
            for access in &page {
                send(app, access).await;
            }
            let Some(last) = last else { break };
            after = last;
        }
        info!(%path, pool = %pool.name, server, leases = of_pool, "leases are bound to the server that answers now");
        bound += of_pool;
    }
    Ok(bound)
}

/// Sends the end of a lease to its present address. The reconciler repeats what fails here.
async fn send(app: &App, access: &LeaseAccess) {
    let lease = &access.lease;
    let sent = match lease.status.state {
        State::Active => outbox::park_rest(app, access).await,
        State::Pending | State::Revoking | State::Revoked | State::Failed => {
            outbox::copy(app, access).await
        }
    };
    if let Err(error) = sent {
        warn!(lease = %lease.id, %error, "a revocation was not published; the reconciler publishes it");
    }
}
