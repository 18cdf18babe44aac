//! Leases of a pool that are due together: whether there are many, and the data with which engines end them.

use jiff::Timestamp;
use mayfly_protocol::names::PoolName;

use super::authentic::{self, LEASES};
use super::candidates::{AccessCache, LeaseAccess};
use super::lease_row::from_entry;
use super::sql::{Connection, params};
use super::{Lane, Store, StoreError, onward, pools};

/// Pools with at least ?3 accounts that are due after ?1 and until ?2.
const POOLS: &str = "SELECT name FROM pools WHERE (SELECT count(*) FROM
      (SELECT 1 FROM leases INDEXED BY leases_overdue WHERE leases.pool = pools.name
         AND next_reconcile IS NOT NULL AND revoked_at IS NULL AND ends_here > ?1 AND ends_here <= ?2 LIMIT ?3) AS due) >= ?3
    ORDER BY name";
const DUE: &str = "INDEXED BY leases_overdue WHERE pool = ?1 AND next_reconcile IS NOT NULL AND revoked_at IS NULL
    AND ends_here >= ?2 AND ends_here <= ?4 AND (ends_here, id) > (?2, ?3) AND state = 'active'
    ORDER BY ends_here, id LIMIT ?5";
/// Greater than every id.
const AFTER_ALL: &str = "~";

/// A place in the order of ends: an end by the store's clock in ms, and a lease id.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct AfterEnd(i64, String);

impl AfterEnd {
    /// The place after all leases that end at that time.
    pub(crate) fn all_of(end: Timestamp) -> Self {
        Self(end.as_millisecond(), AFTER_ALL.to_owned())
    }
}

/// A page of leases that are due.
pub(crate) struct Due {
    /// What revocations of these leases need.
    pub(crate) access: Vec<LeaseAccess>,
    /// Where the next page begins. `None`: this was the last page.
    pub(crate) next: Option<AfterEnd>,
}

fn page(
    connection: &Connection,
    pool: &PoolName,
    from: &AfterEnd,
    until: Timestamp,
    limit: u32,
) -> Result<Due, StoreError> {
    let values = params![pool.as_str(), from.0, from.1, until.as_millisecond(), limit];
    let looked = authentic::looked_at(connection, &LEASES, DUE, values)?;
    let last = match looked.last() {
        Some(Ok(row)) => Some(AfterEnd(row.get("ends_here")?, row.get("id")?)),
        Some(Err(refused)) => {
            let id = onward(refused.get("id")?);
            Some(AfterEnd(refused.get("ends_here")?, id))
        }
        None => None,
    };
    let is_full = looked.len() >= limit as usize;
    let (sealer, mut cache, mut access) =
        (connection.sealer()?, AccessCache::default(), Vec::new());
    for row in looked.into_iter().flatten() {
        access.extend(cache.access(connection, sealer, &from_entry(&row)?, 0)?);
    }
    Ok(Due {
        access,
        next: last.filter(|last| is_full && last > from),
    })
}

impl Store {
    /// Pools of which at least `many` accounts are due after `since` and until `until`.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn pools_with_many_due(
        &self,
        since: Timestamp,
        until: Timestamp,
        many: u32,
    ) -> Result<Vec<PoolName>, StoreError> {
        self.read(Lane::Pages, move |connection| {
            let values = params![since.as_millisecond(), until.as_millisecond(), many];
            let names = connection.prepare(POOLS)?.query(values)?;
            pools::names(&names)
        })
        .await
    }

    /// Up to `limit` leases of a pool that are due from that place on, at the latest at `until`. Rows that are not
    /// authentic are skipped.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn due_together(
        &self,
        pool: PoolName,
        from: AfterEnd,
        until: Timestamp,
        limit: u32,
    ) -> Result<Due, StoreError> {
        self.read(Lane::Pages, move |connection| {
            page(connection, &pool, &from, until, limit)
        })
        .await
    }
}
