//! Ends all leases of a path and those below. One job marks some of them. If more live, the same job records the
//! request, and the dispatcher that reconciles continues it, also after a crash.
//!
//! The record is an authenticated row of `meta`. Somebody who can write the store can delete the row, which delays
//! these ends. They can also put back an earlier state of the row; then leases end whose end an entitled caller had
//! requested before.

use std::time::Duration;

use jiff::Timestamp;
use mayfly_protocol::names::{SecretPath, random_text};
use serde::{Deserialize, Serialize};
use tracing::error;

use super::authentic::{self, META};
use super::candidates::{AccessCache, LeaseAccess};
use super::lease_pages::Filter;
use super::lease_row::{Stored, select_page};
use super::sql::{Cell, Connection, NONE};
use super::{Lane, Store, StoreError, onward, open};
use mayfly_protocol::lease::{self, Event};

/// Prefix of a request's key in `meta`.
const KEY: &str = "revoke-below:";
const ALL: &str = "WHERE key >= 'revoke-below:' AND key < 'revoke-below;' ORDER BY key";
/// Minimum number of accounts that engines end in a second. The reconciler sends the end of the n-th lease again n /
/// 1,000 s later than usual, so that it does not repeat ends that wait in the queue.
const ENDED_PER_SECOND: u64 = 1000;
/// Maximum of this additional delay: if the broker was unreachable, the reconciler's message is the first.
const WAITS_MAX: Duration = Duration::from_secs(10);

/// A request to end the leases of a path and those below.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RevokeBelow {
    id: String,
    path: SecretPath,
    /// Only leases of this caller.
    created_by: Option<String>,
    /// When the request was made. Leases that are recorded later are not included.
    asked: Timestamp,
    asked_by: String,
    /// Path and id of the last lease that was handled.
    after: Option<(String, String)>,
    /// Number of leases that were marked.
    marked: usize,
}

impl RevokeBelow {
    pub(crate) fn new(
        path: SecretPath,
        created_by: Option<String>,
        asked_by: String,
        asked: Timestamp,
    ) -> Self {
        Self {
            id: random_text(16),
            path,
            created_by,
            asked,
            asked_by,
            after: None,
            marked: 0,
        }
    }

    /// The request includes the leases of this path and those below.
    pub(crate) fn path(&self) -> &SecretPath {
        &self.path
    }

    /// The caller of the request, for the log.
    pub(crate) fn asked_by(&self) -> &str {
        &self.asked_by
    }

    /// Number of leases that were marked.
    pub(crate) fn marked(&self) -> usize {
        self.marked
    }

    #[cfg(test)]
    pub(super) fn set_marked(&mut self, marked: usize) {
        self.marked = marked;
    }

    fn key(&self) -> String {
        format!("{KEY}{}", self.id)
    }

    fn filter(&self) -> Filter {
        Filter {
            path: Some(self.path.clone()),
            created_by: self.created_by.clone(),
            ..Filter::default()
        }
    }

    /// The query for its next leases. It names the index of live leases by path: few of all leases below a path may
    /// live, and few of all live leases may be below the path.
    fn sql(&self, limit: u32) -> String {
        let (sql, _) = self.filter().sql();
        format!(
            "INDEXED BY leases_live_path {sql} AND (path, id) > (?, ?) AND created <= ?
             AND state IN ('pending', 'active') ORDER BY path, id LIMIT {limit}"
        )
    }

    fn values(&self) -> Vec<Cell> {
        let (_, mut values) = self.filter().sql();
        let (path, id) = self.after.clone().unwrap_or_default();
        values.extend([
            Cell::Text(path),
            Cell::Text(id),
            Cell::Int(self.asked.as_millisecond()),
        ]);
        values
    }
}

/// Marks leases to be revoked. `before` is the number of leases that were marked before.
fn mark(
    connection: &Connection,
    found: Vec<Stored>,
    before: usize,
    now: Timestamp,
) -> Result<Vec<LeaseAccess>, StoreError> {
    let sealer = connection.sealer()?;
    let (mut access, mut cache) = (Vec::with_capacity(found.len()), AccessCache::default());
    for (n, mut stored) in found.into_iter().enumerate() {
        stored.lease.status = lease::next(&stored.lease, Event::RevokeAsked, now).status;
        let waits = Duration::from_millis((before + n) as u64 * 1000 / ENDED_PER_SECOND);
        let waits = waits.min(WAITS_MAX);
        let again = &mut stored.lease.status.next_reconcile;
        *again = again.map(|at| at + waits);
        stored.write(connection)?;
        access.extend(cache.access(connection, sealer, &stored.lease, 0)?);
    }
    Ok(access)
}

/// The result of one job for a request.
#[derive(Debug)]
pub(crate) struct Marked {
    /// The rest of the request. `None`: all its leases are being revoked.
    pub(crate) rest: Option<RevokeBelow>,
    /// Number of leases that this job has marked.
    pub(crate) count: usize,
    /// What revocations of these leases need.
    pub(crate) access: Vec<LeaseAccess>,
}

impl Store {
    /// Marks up to `limit` leases of a request to be revoked. Records the request if more leases may live.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn mark_below(
        &self,
        mut request: RevokeBelow,
        limit: u32,
        now: Timestamp,
    ) -> Result<Marked, StoreError> {
        self.run_later(move |connection| {
            let page = select_page(connection, &request.sql(limit), request.values())?;
            let (count, before) = (page.found.len(), request.marked);
            let access = mark(connection, page.found, before, now)?;
            let last = page.last.map(|(path, id)| match onward(path.clone()) {
                same if same == path => (path, onward(id)),
                next => (next, String::new()),
            });
            let more = page.rows >= limit as usize && last > request.after;
            let was_recorded = request.after.is_some();
            request.after = last;
            request.marked += count;
            if more {
                let text = serde_json::to_vec(&request).map_err(|_| super::unreadable("meta"))?;
                open::put(connection, &request.key(), &text)?;
            } else if was_recorded {
                connection.execute("DELETE FROM meta WHERE key = ?1", [request.key()])?;
            }
            Ok(Marked {
                rest: more.then_some(request),
                count,
                access,
            })
        })
        .await
    }

    /// The recorded requests, which must be continued.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn recorded_below(&self) -> Result<Vec<RevokeBelow>, StoreError> {
        self.read(Lane::Rows, move |connection| {
            let rows = authentic::sound_rows(connection, &META, ALL, NONE)?;
            let mut requests = Vec::new();
            for row in rows {
                let text: Vec<u8> = row.get("value")?;
                match serde_json::from_slice(&text) {
                    Ok(request) => requests.push(request),
                    Err(_) => error!(row = row.name(), "a revocation below a path is unreadable"),
                }
            }
            Ok(requests)
        })
        .await
    }
}
