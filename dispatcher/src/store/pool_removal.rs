//! Deletes a pool, but only when nothing needs its engines any more.

use jiff::Timestamp;
use mayfly_protocol::names::PoolName;
use mayfly_protocol::timing::timing;

use super::sql::Connection;
use super::{Store, StoreError, exists, lease_row, rotations};

/// Why a pool cannot be deleted although all its accounts are gone: some creates can still commit, and only the
/// pool's engines can look for these accounts again.
fn settling(
    connection: &Connection,
    name: &PoolName,
    now: Timestamp,
) -> Result<StoreError, StoreError> {
    let last = lease_row::select(
        connection,
        "WHERE pool = ?1 AND state = 'revoking' AND revoked_at IS NOT NULL ORDER BY create_deadline DESC LIMIT 1",
        [name.as_str()],
    )?;
    let until = last
        .first()
        .map_or(now, |lease| lease.settles_at() + timing().reconcile_grace);
    Ok(match last.first() {
        Some(lease) if until <= now => StoreError::InUse(format!(
            "the account of lease {} of pool `{name}` is gone, but no engine could look for it once more since; give it up with `mayfly lease revoke {} --detach`",
            lease.id, lease.id
        )),
        _ => StoreError::InUseUntil {
            message: format!(
                "all accounts of pool `{name}` are gone, but a create could still commit, and only the pool's engines could end that account; delete the pool after {until:.0}"
            ),
            until,
        },
    })
}

impl Store {
    /// Removes a pool.
    ///
    /// # Errors
    /// `NotFound`; `InUse` while a lease of it lives or a dynamic secret names it; `InUseUntil` while the
    /// create of an ended lease could still commit.
    pub(crate) async fn delete_pool(
        &self,
        name: PoolName,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        self.run(move |connection| {
            // A refused row counts too: the operator can only repair it by deleting the pool.
            if !exists(connection, "SELECT 1 FROM pools WHERE name = ?1", name.as_str())? {
                return Err(StoreError::NotFound(format!("pool `{name}`")));
            }
            connection.write_counts()?;
            let count = |sql: &str| -> Result<u64, StoreError> {
                Ok(connection
                    .prepare(sql)?
                    .query_row([name.as_str()], |row| row.get(0))?)
            };
            let open = count("SELECT CAST(coalesce(sum(n), 0) AS BIGINT) FROM lease_counts WHERE pool = ?1 AND state IN ('pending', 'active', 'revoking')")?;
            let gone = count("SELECT count(*) FROM leases WHERE pool = ?1 AND state = 'revoking' AND revoked_at IS NOT NULL")?;
            if open > gone {
                return Err(StoreError::InUse(format!(
                    "leases of pool `{name}` are not revoked yet; only its engines can end them"
                )));
            }
            if gone > 0 {
                return Err(settling(connection, &name, now)?);
            }
            if exists(connection, "SELECT 1 FROM secrets WHERE pool = ?1", name.as_str())? {
                return Err(StoreError::InUse(format!("a dynamic secret names pool `{name}`")));
            }
            rotations::check_pool(connection, &name)?;
            // No engine is left that could make these accounts or look for them again.
            connection.execute(
                "UPDATE leases SET next_reconcile = NULL WHERE pool = ?1 AND next_reconcile IS NOT NULL",
                [name.as_str()],
            )?;
            connection.execute("DELETE FROM pools WHERE name = ?1", [name.as_str()])?;
            Ok(())
        })
        .await
    }
}
