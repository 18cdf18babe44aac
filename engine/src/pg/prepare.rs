//! Does every step before an account is made, but does not make it. A trial before a lease uses this.

use std::time::Instant;

use mayfly_protocol::task::Failure;
use mayfly_protocol::timing::timing;

use super::create::not_in_time;
use super::grant_role::GrantRoles;
use super::grant_set::GrantSet;
use super::server_wait::ServerWait;
use super::servers::Servers;

/// Does every step before an account is made, but does not make it: connects, grants what the grant role lacks, and
/// queries the server. Waits for the server as a create does.
///
/// # Errors
/// The failure that a create would have.
pub(crate) async fn prepare(
    servers: &Servers,
    grant_roles: &GrantRoles,
    set: &GrantSet<'_>,
    arrived: Instant,
) -> Result<(), Failure> {
    let limit = tokio::time::Instant::from_std(arrived + timing().create_budget);
    let work = async {
        let mut waiting = ServerWait::new(set.target, arrived);
        loop {
            match prepare_once(servers, grant_roles, set, arrived).await {
                Ok(()) => return Ok(()),
                Err(failure) => waiting.out(servers, failure).await?,
            }
        }
    };
    match tokio::time::timeout_at(limit, work).await {
        Ok(done) => done,
        Err(_) => Err(not_in_time()),
    }
}

async fn prepare_once(
    servers: &Servers,
    grant_roles: &GrantRoles,
    set: &GrantSet<'_>,
    arrived: Instant,
) -> Result<(), Failure> {
    servers.keep_one(set.target).await?;
    grant_roles.ensure(servers, set, arrived).await?;
    let target = set.target;
    // A kept connection proves nothing about the server's present state.
    let home = servers.fresh_session(target, &target.database).await?;
    home.release();
    Ok(())
}
