//! Binds leases to another server. An operator states that it is the server on which they were made, with another
//! address or identity.

use jiff::Timestamp;
use mayfly_protocol::names::{PoolName, SecretPath};

use super::candidates::{LeaseAccess, lease_access};
use super::lease_row::{Stored, select, select_page};
use super::sql::{Connection, params};
use super::{Lane, Store, StoreError, bases, onward, secret_row};
use mayfly_protocol::lease::BaseRef;

/// Condition for the leases of a base secret and pool that may still have an account.
const OPEN: &str =
    "WHERE base_secret_id = ?1 AND pool = ?2 AND next_reconcile IS NOT NULL AND state <> 'pending'
     AND id > ?3 ORDER BY id LIMIT ?4";

fn bind(
    connection: &Connection,
    stored: &mut Stored,
    base: &BaseRef,
    server: &str,
    now: Timestamp,
) -> Result<(), StoreError> {
    stored.lease.status.bound_to(server.to_owned(), now);
    match stored.lease.base.version == base.version {
        true => stored.write(connection),
        false => stored.write_with_base(connection, base),
    }
}

impl Store {
    /// Whether a base secret has leases of this pool that may still have an account.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn open_of_base(
        &self,
        base: String,
        pool: PoolName,
    ) -> Result<bool, StoreError> {
        self.read(Lane::Rows, move |connection| {
            let found = select(connection, OPEN, params![base, pool.as_str(), "", 1_u64])?;
            Ok(!found.is_empty())
        })
        .await
    }

    /// Binds leases of a base secret and pool to a server and to the present version of the secret, with which they
    /// are ended from now on. It begins after `after` (an id, or empty) and takes at most `limit`. Also returns the
    /// id of the last row; `None`: there are no more.
    ///
    /// # Errors
    /// `InUse` if `version` is not the present version any more.
    #[allow(clippy::too_many_arguments, reason = "a page of one job")]
    pub(crate) async fn bind_leases(
        &self,
        path: SecretPath,
        version: u64,
        pool: PoolName,
        server: String,
        after: String,
        limit: u32,
        now: Timestamp,
    ) -> Result<(Vec<LeaseAccess>, Option<String>), StoreError> {
        let sealer = self.sealer.clone();
        self.run(move |connection| {
            let record = secret_row::load(connection, &path)?;
            if record.version != version {
                return Err(StoreError::InUse(format!("`{path}` was changed just now")));
            }
            let base = BaseRef {
                id: record.id,
                version,
            };
            bases::saw_server(connection, &base, &server)?;
            let page = select_page(
                connection,
                OPEN,
                params![base.id, pool.as_str(), &after, limit],
            )?;
            let last = page.last.map(|(_, id)| onward(id));
            let mut bound = Vec::new();
            for mut stored in page.found {
                bind(connection, &mut stored, &base, &server, now)?;
                bound.extend(lease_access(connection, &sealer, &stored.lease, 0)?);
            }
            Ok((bound, last.filter(|last| *last > after)))
        })
        .await
    }
}
