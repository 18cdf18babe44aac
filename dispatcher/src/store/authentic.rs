//! Rows that are authenticated. An attacker who can write the store's file or database, but does not have the master
//! key, must not become root by this. So each row has a column `mac`: an HMAC-SHA256 of the table's name and of all
//! authenticated columns, under a key that is derived from the master key. A row that was changed, swapped or
//! inserted from outside is never used. It is logged with its name and counted
//! (`mayfly_dispatcher_store_rows_refused_total`). Other rows stay usable.
//!
//! Every query that decides something goes through [`rows`] or [`sound_rows`]. A test fails on a query that does
//! not, and on a column that the lists below do not have.
//!
//! These columns are not authenticated, which is harmless:
//!
//! | table.column                  | somebody who writes it can, at most, …                          |
//! |-------------------------------|-----------------------------------------------------------------|
//! | `leases.next_reconcile`       | have a lease looked at early, late or not at all, as with the row deleted |
//! | `leases.reconcile_attempts`   | the same: it spaces those looks                                 |
//! | `leases.ends_here`            | falsify counts and alerts; a copy of `expiration` and `skew_ms` |
//! | `lease_counts`                | falsify counts, keep a pool from being deleted                  |
//! | `leaders`                     | have no dispatcher reconcile, or two, whose tasks are idempotent |
//! | `meta`: `touched`             | nothing: it is never read                                       |
//! | `meta`: `copied`, `timeline`  | have leases without an answer looked for longer before they count as gone |
//! | `refinery_schema_history`     | keep the dispatcher from starting                               |
//!
//! The code of a row does not show that a row was deleted, or that an earlier state of the row or of the whole store
//! was put back.

mod entry;
mod read;
mod write;

use std::sync::atomic::{AtomicU64, Ordering};

use super::sql::Cell;
pub(super) use entry::{Entry, Refused};
pub(super) use read::{found, looked_at, query, raw, row, rows, sound, sound_rows};
pub(super) use write::{disown, insert, put, put_as, recode, update, update_as};

/// A table whose rows are authenticated.
pub(super) struct Table {
    pub(super) name: &'static str,
    /// The columns that are authenticated, the primary key first.
    pub(super) columns: &'static [&'static str],
    /// The number of columns of the primary key; they come first.
    pub(super) keys: usize,
    /// The columns that are not authenticated, without `mac`.
    pub(super) free: &'static [&'static str],
    /// Number of rows that were refused since the process began.
    refused: AtomicU64,
}

impl Table {
    /// All columns but `mac`, in the order of an [`Entry`].
    pub(super) fn all(&self) -> impl Iterator<Item = &'static str> + use<> {
        self.columns.iter().chain(self.free).copied()
    }

    /// A row with these cells, one for each column of [`Table::all`].
    pub(super) fn entry(&'static self, cells: Vec<Cell>) -> Entry {
        debug_assert_eq!(cells.len(), self.all().count(), "{}", self.name);
        Entry { table: self, cells }
    }

    /// A row whose cells are not known yet.
    pub(super) fn blank(&'static self) -> Entry {
        self.entry(vec![Cell::Null; self.all().count()])
    }

    fn place(&self, column: &str) -> Option<usize> {
        self.all().position(|name| name == column)
    }

    /// `a = ?1 AND b = ?2` over the primary key.
    fn by_key(&self) -> String {
        let conditions: Vec<String> = self.columns[..self.keys]
            .iter()
            .enumerate()
            .map(|(n, column)| format!("{column} = ?{}", n + 1))
            .collect();
        conditions.join(" AND ")
    }
}

macro_rules! tables {
    ($($name:ident: $table:literal, keys [$($key:literal),*], columns [$($column:literal),*], free [$($free:literal),*];)*) => {
        $(pub(super) static $name: Table = Table {
            name: $table,
            columns: &[$($key,)* $($column),*],
            keys: [$($key),*].len(),
            free: &[$($free),*],
            refused: AtomicU64::new(0),
        };)*
        pub(super) static TABLES: &[&Table] = &[$(&$name),*];
    };
}

tables! {
    META: "meta", keys ["key"], columns ["value"], free [];
    POOLS: "pools", keys ["name"], columns [
        "public_key", "created", "next_key", "previous_key", "distrusted", "dispatcher_generation",
        "next_dispatcher_generation"
    ], free [];
    TOKENS: "tokens", keys ["id"], columns ["hash", "read", "created", "expiration", "max_leases"], free [];
    SECRETS: "secrets", keys ["id"], columns [
        "path", "kind", "attributes", "description", "data", "version", "linked", "pool",
        "created", "created_by", "last_modified", "last_modified_by"
    ], free [];
    BASE_VERSIONS: "base_versions", keys ["secret_id", "version"], columns ["target_sealed", "server"], free [];
    LEASES: "leases", keys ["id"], columns [
        "path", "pool", "role", "state", "base_secret_id", "base_version", "database", "owned_objects",
        "traceparent", "created", "created_by", "ttl_seconds", "create_deadline", "expiration", "server",
        "engine", "revoked_at", "revoked_by", "attempts", "last_error", "stuck", "secret_version",
        "max_ttl_seconds", "renewable_until", "objects", "next_try", "skew_ms", "nonce",
        "derivation"
    ], free ["next_reconcile", "reconcile_attempts", "ends_here"];
    READS: "reads", keys ["created_by", "path", "key"], columns ["lease"], free [];
    ROTATIONS: "rotations", keys ["secret_id"], columns [
        "version", "password_sealed", "pool", "started", "started_by", "settles_at",
        "over_there"
    ], free [];
    UNPROVEN: "unproven", keys ["secret_id"], columns ["version", "password_sealed", "since", "doubted"], free [];
    BASE_POOLS: "base_pools", keys ["secret_id"], columns ["pool", "version"], free [];
}

/// Rows of `meta` that are not authenticated; see the table above. A backup is marked without the
/// master key.
pub(super) const FREE_META: [&str; 3] = ["touched", "copied", "timeline"];

/// How many rows of each table were refused since the process began.
pub(crate) fn refused() -> impl Iterator<Item = (&'static str, u64)> {
    TABLES
        .iter()
        .map(|table| (table.name, table.refused.load(Ordering::Relaxed)))
}
