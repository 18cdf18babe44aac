//! Distrusted pools, and leases that their pool cannot end. Another pool of the base secret ends such leases, or
//! they are shown as stuck.

use jiff::Timestamp;
use mayfly_protocol::names::{PoolName, SecretPath};

use super::authentic::{self, SECRETS};
use super::lease_row::Stored;
use super::pools::{self, Pool};
use super::sql::{Connection, params};
use super::{Lane, Store, StoreError, bases, secret_row};
use mayfly_protocol::lease::{BaseRef, Lease};

/// A pool that was distrusted, and the work that follows from it.
#[derive(Debug)]
pub(crate) struct Distrusted {
    pub(crate) pool: Pool,
    /// Base secrets whose admin passwords its engines had, as far as the store knows.
    pub(crate) bases: Vec<SecretPath>,
    /// Number of leases that other pools must end.
    pub(crate) leases: u64,
}

/// Whether a lease's pool must not or cannot end it. Either the pool is distrusted; or its tries with the earlier
/// credentials have failed, and it may not have the present ones.
fn is_out(connection: &Connection, lease: &Lease, pool: &Pool) -> Result<bool, StoreError> {
    if pool.distrusted.is_some() {
        return Ok(true);
    }
    if lease.status.attempts == 0 {
        return Ok(false);
    }
    let Some(version) = bases::newest_version(connection, &lease.base.id)? else {
        return Ok(false);
    };
    let id = lease.base.id.clone();
    Ok(version != lease.base.version
        && !bases::may_have(connection, &BaseRef { id, version }, &pool.name)?)
}

/// Gives a lease to another pool of its base secret if its own pool cannot end it. A pool with engines comes first.
/// Returns whether there is such a pool. If not, the lease's status says what helps. The caller writes the status.
pub(super) fn take_over(
    connection: &Connection,
    stored: &mut Stored,
    pool: &Pool,
    living: &[PoolName],
    now: Timestamp,
) -> Result<bool, StoreError> {
    let lease = &mut stored.lease;
    if !is_out(connection, lease, pool)? {
        return Ok(false);
    }
    let mut others = bases::linked_pools(connection, &lease.base.id)?;
    others.retain(|other| other.name != pool.name);
    let lives = others.iter().find(|other| living.contains(&other.name));
    let Some(other) = lives.or(others.first()) else {
        let why = match pool.distrusted {
            Some(_) => "is distrusted",
            None => "has only earlier credentials",
        };
        lease.status.abandoned(format!(
            "no_pool: pool `{}` {why}, and no dynamic secret of this base secret names another pool; create one that does, or give the account up with `mayfly lease revoke {} --detach`",
            pool.name, lease.id
        ));
        return Ok(false);
    };
    stored.move_to(connection, &other.name)?;
    stored.lease.status.taken_over(now);
    Ok(true)
}

/// Base secrets whose credentials a pool had: those of its dynamic secrets, of its leases, and of deleted secrets.
fn bases_of(connection: &Connection, pool: &PoolName) -> Result<Vec<SecretPath>, StoreError> {
    let which = "WHERE kind = 'base' AND (
             id IN (SELECT linked FROM secrets WHERE pool = ?1)
             OR id IN (SELECT secret_id FROM base_pools WHERE pool = ?1)
             OR id IN (SELECT base_secret_id FROM leases WHERE pool = ?1)) ORDER BY path";
    let rows = authentic::sound_rows(connection, &SECRETS, which, [pool.as_str()])?;
    rows.iter().map(secret_row::path_of).collect()
}

impl Store {
    /// Base secrets whose credentials a pool had, as far as the store knows.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn bases_of(&self, name: PoolName) -> Result<Vec<SecretPath>, StoreError> {
        self.read(Lane::Rows, move |connection| bases_of(connection, &name))
            .await
    }

    /// Distrusts a pool: nothing is sent to it any more, and its messages are refused. Its leases become due for
    /// [`Store::claim_due`], which gives them to other pools. A second call returns the same.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) async fn distrust_pool(
        &self,
        name: PoolName,
        now: Timestamp,
    ) -> Result<Distrusted, StoreError> {
        self.run(move |connection| {
            let pool = pools::distrust(connection, &name, now)?;
            let leases = connection.execute(
                "UPDATE leases SET next_reconcile = ?2, reconcile_attempts = 0
                 WHERE pool = ?1 AND next_reconcile IS NOT NULL",
                params![name.as_str(), now.as_millisecond()],
            )?;
            Ok(Distrusted {
                pool,
                bases: bases_of(connection, &name)?,
                leases: u64::try_from(leases).unwrap_or(u64::MAX),
            })
        })
        .await
    }
}
