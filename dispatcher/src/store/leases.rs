//! Leases in the store. [`mayfly_protocol::lease::next`] decides what an event changes. This module loads, changes
//! and writes the lease in one job.

use jiff::Timestamp;
use mayfly_protocol::names::{LeaseId, PoolName, SecretPath};
use mayfly_protocol::task::FailureCode;

use super::authentic::{self, LEASES};
use super::candidates::{LeaseAccess, lease_access};
use super::lease_row::{self, Stored, load, load_stored, select, select_page};
use super::sealer::Sealer;
use super::sql::{Cell, Connection, Query, params};
use super::{Lane, Store, StoreError, bases, onward, unproven};
use mayfly_protocol::lease::{self, Event, Lease, State, ToSend};

/// The result of an event.
#[derive(Debug)]
pub(crate) struct Applied {
    /// The lease after the event.
    pub(crate) lease: Lease,
    pub(crate) before: State,
    pub(crate) send: ToSend,
    /// What the messages need. `None`: nothing is to be sent, or it cannot be sent any more.
    pub(crate) access: Option<LeaseAccess>,
}

/// Leases of a path for [`Store::end_some`].
#[derive(Debug, Clone, Copy)]
pub(crate) enum OfState {
    /// Leases that somebody holds or is about to get.
    Live,
    Revoking,
}

impl OfState {
    /// The condition for these leases. It does not read the history of the path.
    fn which(self) -> &'static str {
        match self {
            Self::Live => {
                "INDEXED BY leases_live_path WHERE path = ?1 AND id > ?2 AND state IN ('pending', 'active')
                 ORDER BY id LIMIT ?3"
            }
            Self::Revoking => {
                "INDEXED BY leases_state WHERE path = ?1 AND id > ?2 AND state = 'revoking' ORDER BY id LIMIT ?3"
            }
        }
    }
}

/// The result of one job of [`Store::end_some`].
#[derive(Debug)]
pub(crate) struct EndedSome {
    /// Number of leases to which the event was applied.
    pub(crate) count: usize,
    /// Number of leases whose rows are not authentic.
    pub(crate) refused: usize,
    /// The id after which the next job begins. `None`: this was the last job.
    pub(crate) after: Option<String>,
}

pub(super) fn apply(
    connection: &Connection,
    sealer: &Sealer,
    stored: &mut Stored,
    event: Event,
    now: Timestamp,
) -> Result<Applied, StoreError> {
    let lease = &mut stored.lease;
    // In every job the rows of `base_versions` are locked before those of `unproven`.
    match &event {
        Event::Created(created, _) => {
            bases::saw_server(connection, &lease.base, &created.server)?;
            unproven::proven(connection, &lease.base, lease.created)?;
        }
        Event::Failing { failure, .. } if failure.code == FailureCode::DatabaseRefusedLogin => {
            unproven::doubt(connection, &lease.base, now)?;
        }
        _ => {}
    }
    let before = lease.status.state;
    let change = lease::next(lease, event, now);
    if change.status != lease.status {
        lease.status = change.status;
        stored.write(connection)?;
    }
    let lease = &stored.lease;
    let access = match change.send {
        ToSend::Nothing => Ok(None),
        // These use the most likely candidate, whatever the earlier results were.
        ToSend::RevokeNow | ToSend::Copy | ToSend::Retry => {
            lease_access(connection, sealer, lease, 0)
        }
        // The first candidate has just failed.
        ToSend::OtherCredentials => lease_access(connection, sealer, lease, lease.status.attempts),
    };
    let access = match access {
        // The event is recorded in any case. The reconciler sends the message when the row is usable again.
        Err(StoreError::Unusable(_)) => None,
        access => access?,
    };
    Ok(Applied {
        lease: lease.clone(),
        before,
        send: change.send,
        access,
    })
}

impl Store {
    /// The leases with these ids that this store has.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn leases_of(&self, ids: Vec<LeaseId>) -> Result<Vec<Lease>, StoreError> {
        self.read(Lane::Pages, move |connection| {
            let mut found = Vec::new();
            for id in ids {
                found.extend(select(connection, "WHERE id = ?1", [id.to_string()])?);
            }
            Ok(found)
        })
        .await
    }

    /// Active leases of a base secret and pool, in the order of their roles. It begins after the role `after`
    /// (empty: from the first). Rows that are not authentic are skipped. Also returns the role after which the next
    /// page begins; `None`: this was the last page.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn active_by_role(
        &self,
        base: String,
        pool: PoolName,
        after: String,
        limit: u32,
    ) -> Result<(Vec<Lease>, Option<String>), StoreError> {
        self.read(Lane::Pages, move |connection| {
            let rest = "INDEXED BY leases_active_role
                 WHERE base_secret_id = ?1 AND pool = ?2 AND state = 'active' AND role > ?3 ORDER BY role LIMIT ?4";
            let values = params![base, pool.as_str(), &after, limit];
            let looked = authentic::looked_at(connection, &LEASES, rest, values)?;
            let last = match looked.last() {
                Some(Ok(row)) => Some(row.get("role")?),
                Some(Err(refused)) => Some(onward(refused.get("role")?)),
                None => None,
            };
            let last = last.filter(|last| *last > after);
            let is_full = looked.len() >= limit as usize;
            let sound = looked.iter().flatten().map(lease_row::from_entry);
            Ok((sound.collect::<Result<_, _>>()?, last.filter(|_| is_full)))
        })
        .await
    }

    /// Applies an event to a lease.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) async fn apply(
        &self,
        id: LeaseId,
        event: Event,
        now: Timestamp,
    ) -> Result<Applied, StoreError> {
        self.apply_after(|| vec![lease_row::asked(id)], id, event, now)
            .await
    }

    /// Applies an event to a lease that the caller has recorded. With a store in PostgreSQL this takes fewer round
    /// trips than [`Store::apply`].
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) async fn apply_to(
        &self,
        lease: &Lease,
        event: Event,
        now: Timestamp,
    ) -> Result<Applied, StoreError> {
        let ahead = || vec![lease_row::asked(lease.id), bases::seen_asked(&lease.base)];
        self.apply_after(ahead, lease.id, event, now).await
    }

    async fn apply_after(
        &self,
        ahead: impl FnOnce() -> Vec<Query>,
        id: LeaseId,
        event: Event,
        now: Timestamp,
    ) -> Result<Applied, StoreError> {
        self.run_beside(ahead, move |connection| {
            let mut stored = load_stored(connection, id)?;
            apply(connection, connection.sealer()?, &mut stored, event, now)
        })
        .await
    }

    /// Loads a lease by its id.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) async fn lease(&self, id: LeaseId) -> Result<Lease, StoreError> {
        self.read(Lane::Rows, move |connection| load(connection, id))
            .await
    }

    /// Ids of leases in a recorded state, the newest first. The shown state can be another one
    /// ([`crate::store::shown`]). It begins after `cursor` (an id; empty: from the newest) and reads at most `limit`
    /// rows. Also returns the cursor of the next page. Rows that are not authentic are skipped.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn in_state(
        &self,
        state: State,
        cursor: String,
        limit: usize,
    ) -> Result<(Vec<LeaseId>, Option<String>), StoreError> {
        self.read(Lane::Pages, move |connection| {
            let mut values = vec![Cell::Text(state.as_str().to_owned())];
            let mut rest = String::from("INDEXED BY leases_state WHERE state = ?");
            if !cursor.is_empty() {
                rest.push_str(" AND id < ?");
                values.push(Cell::Text(cursor));
            }
            rest.push_str(" ORDER BY id DESC LIMIT ?");
            values.push(Cell::Int(i64::try_from(limit).unwrap_or(i64::MAX)));
            let page = select_page(connection, &rest, values)?;
            let ids = page.found.iter().map(|stored| stored.lease.id);
            Ok((ids.collect(), page.last.map(|(_, id)| id)))
        })
        .await
    }

    /// Applies an event to at most `limit` leases of a path, in the order of their ids. It begins after the id
    /// `after` (empty: from the first). The leases are to be revoked, and the reconciler does this at once, or they
    /// are detached. Rows that are not authentic are skipped.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn end_some(
        &self,
        path: SecretPath,
        state: OfState,
        event: Event,
        after: String,
        limit: u32,
        now: Timestamp,
    ) -> Result<EndedSome, StoreError> {
        self.run_later(move |connection| {
            let values = params![path.as_str(), &after, limit];
            let page = select_page(connection, state.which(), values)?;
            let last = page.last.map(|(_, id)| onward(id));
            let some = EndedSome {
                count: page.found.len(),
                refused: page.rows - page.found.len(),
                after: last.filter(|last| page.rows == limit as usize && *last > after),
            };
            for mut stored in page.found {
                // The reconciler sends the revocation.
                let change = lease::next(&stored.lease, event.clone(), now);
                stored.lease.status = change.status;
                if !stored.lease.status.state.is_settled() {
                    stored.lease.status.next_reconcile = Some(now);
                }
                stored.write(connection)?;
            }
            Ok(some)
        })
        .await
    }
}
