//! Chooses the pool whose engine is asked about the server of a base secret.

use crate::app::App;
use crate::error::{ApiError, Code};
use crate::store::{Base, Pool};

/// The first pool that has an engine, among those of the base secret's dynamic secrets.
///
/// # Errors
/// `no_engine`, which says what is missing; `broker_unavailable`.
pub(crate) async fn pool_of<'b>(app: &App, base: &'b Base) -> Result<&'b Pool, ApiError> {
    let path = &base.record.path;
    let pools: Vec<&Pool> = match base.linked.as_slice() {
        [] => base.last.iter().collect(),
        linked => linked.iter().collect(),
    };
    for pool in &pools {
        match app.broker.engines_of(&pool.name).await {
            Ok(0) => {}
            Ok(_) => return Ok(pool),
            Err(error) => return Err(ApiError::broker(&error)),
        }
    }
    let names: Vec<&str> = pools.iter().map(|pool| pool.name.as_str()).collect();
    Err(match names.as_slice() {
        [] => ApiError::new(
            Code::NoEngine,
            format!("no dynamic secret is linked to `{path}`, so its server has no pool"),
        ),
        [_] => ApiError::no_engine(&pools[0].name),
        names => ApiError::new(
            Code::NoEngine,
            format!("no engine of the pools {} is running", names.join(", ")),
        ),
    })
}
