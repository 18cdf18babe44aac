//! Pages of leases, the newest first. A page costs about the same with 1,000,000 ended leases as with none: each
//! part of it is read from an index that has the order of the page.

use mayfly_protocol::lease::{Lease, State};
use mayfly_protocol::names::{PoolName, RoleName, SecretPath};

use super::lease_row::select;
use super::sql::Cell;
use super::{Lane, Store, StoreError, after_children};

/// Greater than every id.
const FROM_THE_NEWEST: &str = "~";

/// Which leases to list.
#[derive(Debug, Clone, Default)]
pub(crate) struct Filter {
    /// Only leases of this path and those below.
    pub(crate) path: Option<SecretPath>,
    pub(crate) pool: Option<PoolName>,
    /// Only leases that are shown in this state, see [`crate::store::shown`].
    pub(crate) state: Option<State>,
    /// Only leases that are shown as stuck.
    pub(crate) stuck: bool,
    pub(crate) role: Option<RoleName>,
    pub(crate) created_by: Option<String>,
}

/// Conditions for the leases that are shown in a state. Each part has its own index.
fn shown_in(state: Option<State>) -> &'static [&'static str] {
    match state {
        None => &[""],
        Some(State::Pending) => &[" AND state = 'pending'"],
        Some(State::Active) => &[" AND state = 'active'"],
        Some(State::Revoking) => &[" AND state = 'revoking' AND revoked_at IS NULL"],
        Some(State::Revoked) => &[
            ENDED,
            " AND state = 'revoking' AND revoked_at IS NOT NULL AND expiration IS NOT NULL",
        ],
        Some(State::Failed) => &[
            " AND state = 'failed'",
            " AND state = 'revoking' AND revoked_at IS NOT NULL AND expiration IS NULL",
        ],
    }
}

/// The condition for ended leases: almost all of the 30 days that are kept.
const ENDED: &str = " AND state = 'revoked'";

/// Whether a part of [`shown_in`] finds ended leases of the history. The others find leases that live or failed in
/// the last 10 min.
fn is_of_history(part: &str) -> bool {
    part.is_empty() || part == ENDED
}

impl Filter {
    /// The index for a part of [`shown_in`], if SQLite could choose one that also has the history, and the purpose
    /// of that index. A list of live leases must not read all leases of 30 days.
    fn index(&self, part: &str) -> (&'static str, &'static str) {
        let is_of_live = part.contains("'pending'") || part.contains("'active'");
        if self.role.is_some() || self.stuck {
            ("", "")
        } else if is_of_live && self.path.is_some() {
            (
                "INDEXED BY leases_live_path ",
                " AND state IN ('pending', 'active')",
            )
        } else if !is_of_history(part) {
            ("INDEXED BY leases_state ", "")
        } else if self.created_by.is_some() {
            ("INDEXED BY leases_created_by ", "")
        } else if self.pool.is_some() && self.path.is_none() {
            ("INDEXED BY leases_pool ", "")
        } else {
            ("", "")
        }
    }

    /// All conditions except the state, and their values.
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
        if let Some(path) = &self.path {
            // The path itself, or `path:…`. Between the two sort only texts that continue `path` with a character
            // below `:`. The second condition excludes them.
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

    /// A part of [`shown_in`] that one index has in the right order, and the values.
    fn listed(&self, part: &str, cursor: &str, limit: i64) -> (String, Vec<Cell>) {
        let (mut sql, mut values) = self.sql();
        if !cursor.is_empty() {
            sql.push_str(" AND id < ?");
            values.push(Cell::from(cursor));
        }
        values.push(Cell::Int(limit));
        let (index, of_index) = self.index(part);
        let rest = format!("{index}{sql}{part}{of_index} ORDER BY id DESC LIMIT ?");
        (rest, values)
    }

    /// The path below which a part of [`shown_in`] is listed path by path. No index has the history of several paths
    /// in the order of the page. The leases of one caller have an index by caller.
    fn lists_below(&self, part: &str) -> Option<&SecretPath> {
        let is_found_otherwise =
            self.stuck || self.role.is_some() || self.created_by.is_some() || !is_of_history(part);
        self.path.as_ref().filter(|_| !is_found_otherwise)
    }

    /// A part of [`shown_in`] below `path`, and the values. The query steps from path to path in the index
    /// `leases_path`. In each path it begins with the newest lease. It reads one index entry for each path and for
    /// each lease of the page; in PostgreSQL a page of leases for each path.
    fn below(
        &self,
        path: &SecretPath,
        (part, is_postgresql): (&str, bool),
        cursor: &str,
        limit: i64,
    ) -> (String, Vec<Cell>) {
        let mut values = vec![
            Cell::from(path.as_str()),
            Cell::from(format!("{path}:")),
            Cell::from(after_children(path.as_str())),
            Cell::Int(limit),
            Cell::from(match cursor {
                "" => FROM_THE_NEWEST,
                cursor => cursor,
            }),
        ];
        // The condition is written so that no index fits it and PostgreSQL does not expect few rows. Otherwise
        // PostgreSQL would read all leases of a state for each path, or sort all leases of each path.
        let only = |condition: &str| format!(" AND coalesce(l.{condition}, FALSE)");
        let mut conditions = match part {
            ENDED => only("state = 'revoked'"),
            _ => String::new(),
        };
        if let Some(pool) = &self.pool {
            values.push(Cell::from(pool.as_str()));
            conditions.push_str(&only("pool = ?6"));
        }
        let leases = "FROM leases AS l INDEXED BY leases_path WHERE";
        let paths = format!(
            "WITH RECURSIVE with_paths (path) AS (
               SELECT (SELECT l.path {leases} l.path >= ?2 AND l.path < ?3 ORDER BY l.path LIMIT 1)
               UNION ALL
               SELECT (SELECT l.path {leases} l.path > w.path AND l.path < ?3 ORDER BY l.path LIMIT 1)
               FROM with_paths AS w WHERE w.path IS NOT NULL),
             with_all (path) AS (
               SELECT (SELECT l.path {leases} l.path = ?1 LIMIT 1) UNION ALL SELECT path FROM with_paths)"
        );
        let newest = |path: &str, before: &str, limit: &str| {
            format!(
                "SELECT l.id {leases} l.path = {path} AND l.id < {before}{conditions} ORDER BY l.id DESC LIMIT {limit}"
            )
        };
        let rest = if is_postgresql {
            let of_path = newest("p.path", "?5", "?4");
            format!(
                "WHERE id = ANY (ARRAY({paths}
                   SELECT x.id FROM with_all AS p CROSS JOIN LATERAL ({of_path}) AS x ORDER BY x.id DESC LIMIT ?4))"
            )
        } else {
            // SQLite takes the rows of a recursive query in the given order, so the next path is always the one
            // whose next lease is newest.
            let (first, next) = (newest("p.path", "?5", "1"), newest("w.path", "w.id", "1"));
            format!(
                "WHERE id IN ({paths},
                 with_leases (path, id) AS (
                   SELECT p.path, ({first}) FROM with_all AS p
                   UNION ALL
                   SELECT w.path, ({next}) FROM with_leases AS w WHERE w.id IS NOT NULL
                   ORDER BY 2 DESC LIMIT ?4)
                 SELECT id FROM with_leases WHERE id IS NOT NULL)"
            )
        };
        (rest, values)
    }
}

impl Store {
    /// At most `limit` leases after `cursor` (an id, or empty), the newest first.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn leases(
        &self,
        filter: Filter,
        cursor: String,
        limit: usize,
    ) -> Result<Vec<Lease>, StoreError> {
        self.read(Lane::Pages, move |connection| {
            let most = i64::try_from(limit).unwrap_or(i64::MAX);
            let mut found = Vec::new();
            for part in shown_in(filter.state) {
                let (rest, values) = match filter.lists_below(part) {
                    Some(path) => filter.below(path, (part, connection.is_shared()), &cursor, most),
                    None => filter.listed(part, &cursor, most),
                };
                found.extend(select(connection, &rest, values)?);
            }
            found.sort_by_key(|lease| std::cmp::Reverse(lease.id));
            found.truncate(limit);
            Ok(found)
        })
        .await
    }
}
