//! Leases in the store. What an event makes of one is decided by [`mayfly_protocol::lease::next`]; here
//! it is loaded, changed and written in one job.

use jiff::Timestamp;
use mayfly_protocol::names::{LeaseId, PoolName, RoleName, SecretPath};
use mayfly_protocol::task::FailureCode;

use super::candidates::{LeaseAccess, lease_access};
use super::lease_row::{self, Stored, load, load_stored, select, select_page, select_stored};
use super::sealer::Sealer;
use super::sql::{Cell, Connection, Query, params};
use super::{Lane, Store, StoreError, after_children, bases, unproven};
use mayfly_protocol::lease::{self, Event, Lease, State, ToSend};

/// What an event made of a lease.
#[derive(Debug)]
pub(crate) struct Applied {
    /// The lease as it is now.
    pub(crate) lease: Lease,
    pub(crate) before: State,
    pub(crate) send: ToSend,
    /// With what; there when something is to be sent and still can be.
    pub(crate) access: Option<LeaseAccess>,
}

/// Which leases to list.
#[derive(Debug, Clone, Default)]
pub(crate) struct Filter {
    /// Of this path and those below.
    pub(crate) path: Option<SecretPath>,
    /// Of this path alone.
    pub(crate) exact_path: Option<SecretPath>,
    pub(crate) pool: Option<PoolName>,
    /// Shown in this state, see [`crate::store::shown`].
    pub(crate) state: Option<State>,
    /// Only those that are shown as stuck.
    pub(crate) stuck: bool,
    pub(crate) role: Option<RoleName>,
    pub(crate) created_by: Option<String>,
}

/// Which leases are shown in a state, in parts of which each is found by its own index.
fn shown_in(state: Option<State>) -> &'static [&'static str] {
    match state {
        None => &[""],
        Some(State::Pending) => &[" AND state = 'pending'"],
        Some(State::Active) => &[" AND state = 'active'"],
        Some(State::Revoking) => &[" AND state = 'revoking' AND revoked_at IS NULL"],
        Some(State::Revoked) => &[
            " AND state = 'revoked'",
            " AND state = 'revoking' AND revoked_at IS NOT NULL AND expiration IS NOT NULL",
        ],
        Some(State::Failed) => &[
            " AND state = 'failed'",
            " AND state = 'revoking' AND revoked_at IS NOT NULL AND expiration IS NULL",
        ],
    }
}

impl Filter {
    /// The index for a part of [`shown_in`], where SQLite could choose one that also has the history; and what
    /// that index is for. A list of live leases must not look at those of 30 days.
    fn index(&self, part: &str) -> (&'static str, &'static str) {
        let is_of_live = part.contains("'pending'") || part.contains("'active'");
        if self.role.is_some() || self.stuck {
            ("", "")
        } else if is_of_live && (self.path.is_some() || self.exact_path.is_some()) {
            (
                "INDEXED BY leases_live_path ",
                " AND state IN ('pending', 'active')",
            )
        } else if is_of_live || part.contains("'revoking'") {
            ("INDEXED BY leases_state ", "")
        } else {
            ("", "")
        }
    }

    /// Conditions but for the state, and their values.
    pub(super) fn sql(&self) -> (String, Vec<Cell>) {
        let (mut sql, mut values) = (String::from("WHERE 1 = 1"), Vec::new());
        let mut add = |condition: &str, value: String| {
            sql.push_str(" AND ");
            sql.push_str(condition);
            values.push(Cell::Text(value));
        };
        if let Some(pool) = &self.pool {
            add("pool = ?", pool.to_string());
        }
        if let Some(role) = &self.role {
            add("role = ?", role.to_string());
        }
        if let Some(who) = &self.created_by {
            add("created_by = ?", who.clone());
        }
        if let Some(path) = &self.exact_path {
            add("path = ?", path.to_string());
        }
        if let Some(path) = &self.path {
            // The path itself or `path:…`; nothing sorts between the two but `path` with a
            // character below `:`, which the second condition takes out.
            add("path >= ?", path.to_string());
            add("path < ?", after_children(path.as_str()));
            add("(path = ?", path.to_string());
            sql.push_str(" OR path >= ?)");
            values.push(Cell::Text(format!("{path}:")));
        }
        if self.stuck {
            sql.push_str(" AND stuck = 1 AND revoked_at IS NULL");
        }
        (sql, values)
    }
}

pub(super) fn apply(
    connection: &Connection,
    sealer: &Sealer,
    stored: &mut Stored,
    event: Event,
    now: Timestamp,
) -> Result<Applied, StoreError> {
    let lease = &mut stored.lease;
    // Rows of `base_versions` are locked before those of `unproven`, in every job.
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
        ToSend::Nothing => None,
        // The candidate that most likely works, regardless of the results of earlier ones.
        ToSend::RevokeNow | ToSend::Copy | ToSend::Retry => {
            lease_access(connection, sealer, lease, 0)?
        }
        // The first way failed just now.
        ToSend::OtherCredentials => lease_access(connection, sealer, lease, lease.status.attempts)?,
    };
    Ok(Applied {
        lease: lease.clone(),
        before,
        send: change.send,
        access,
    })
}

impl Store {
    /// Those of the leases that this store has.
    ///
    /// # Errors
    /// The store is away.
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

    /// Leases of a base secret and pool that somebody holds, after `cursor` (an id, or empty).
    ///
    /// # Errors
    /// The store is away.
    pub(crate) async fn active_of_base(
        &self,
        base: String,
        pool: PoolName,
        cursor: String,
        limit: u32,
    ) -> Result<Vec<Lease>, StoreError> {
        self.read(Lane::Pages, move |connection| {
            select(
                connection,
                "WHERE base_secret_id = ?1 AND pool = ?2 AND state = 'active' AND next_reconcile IS NOT NULL AND id > ?3
                 ORDER BY id LIMIT ?4",
                params![base, pool.as_str(), cursor, limit],
            )
        })
        .await
    }

    /// Lets an event happen to a lease.
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

    /// Lets an event happen to a lease that the caller has recorded. With a store in PostgreSQL this takes fewer
    /// round trips than [`Store::apply`].
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

    /// A lease.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) async fn lease(&self, id: LeaseId) -> Result<Lease, StoreError> {
        self.read(Lane::Rows, move |connection| load(connection, id))
            .await
    }

    /// Leases, the newest first, those after `cursor` (an id, or empty), at most `limit`.
    ///
    /// # Errors
    /// The store is away.
    pub(crate) async fn leases(
        &self,
        filter: Filter,
        cursor: String,
        limit: usize,
    ) -> Result<Vec<Lease>, StoreError> {
        self.read(Lane::Pages, move |connection| {
            let (mut sql, mut values) = filter.sql();
            if !cursor.is_empty() {
                sql.push_str(" AND id < ?");
                values.push(Cell::Text(cursor));
            }
            values.push(Cell::Int(i64::try_from(limit).unwrap_or(i64::MAX)));
            let mut found = Vec::new();
            for part in shown_in(filter.state) {
                let (index, of_index) = filter.index(part);
                let rest = format!("{index}{sql}{part}{of_index} ORDER BY id DESC LIMIT ?");
                found.extend(select(connection, &rest, values.clone())?);
            }
            found.sort_by_key(|lease| std::cmp::Reverse(lease.id));
            found.truncate(limit);
            Ok(found)
        })
        .await
    }

    /// Ids of leases in a state of their own, which is not always the one shown ([`crate::store::shown`]): the newest
    /// first, those before `cursor` (an id; empty for all), from at most `limit` rows. Also gives the cursor of the
    /// next page. Rows that are not authentic are skipped.
    ///
    /// # Errors
    /// The store is away.
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

    /// Lets an event happen to up to `limit` leases of those in a state it is for: to be revoked,
    /// for the reconciler to do at once, or detached. Returns how many.
    ///
    /// # Errors
    /// The store is away.
    pub(crate) async fn end_matching(
        &self,
        filter: Filter,
        event: Event,
        limit: u32,
        now: Timestamp,
    ) -> Result<usize, StoreError> {
        self.run_later(move |connection| {
            let (sql, values) = filter.sql();
            let rest = match event {
                // Few of all the leases below a path live, or few of all that live are below it.
                Event::RevokeAsked => format!(
                    "INDEXED BY leases_live_path {sql} AND state IN ('pending', 'active') LIMIT {limit}"
                ),
                _ => format!("{sql} AND state IN ('pending', 'active', 'revoking') LIMIT {limit}"),
            };
            let found = select_stored(connection, &rest, values)?;
            let count = found.len();
            for mut stored in found {
                // The reconciler sends what follows.
                let change = lease::next(&stored.lease, event.clone(), now);
                stored.lease.status = change.status;
                if !stored.lease.status.state.is_settled() {
                    stored.lease.status.next_reconcile = Some(now);
                }
                stored.write(connection)?;
            }
            Ok(count)
        })
        .await
    }
}
