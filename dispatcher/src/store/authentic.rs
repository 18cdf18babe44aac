//! Rows that are authenticated. Who can write the store's file or database, but has not the master
//! key, must not become root by it: the column `mac` of each row is an HMAC-SHA256, under a key
//! derived from the master key, of the table's name and of every column below. A row that was
//! changed, swapped or put in from outside is refused by its name, counted
//! (`mayfly_dispatcher_store_rows_refused_total`) and never used; the others go on working.
//!
//! Every query that decides something goes through [`rows`] or [`sound_rows`]; a test fails on one
//! that does not, and on a column of the database about which nothing is decided here.
//!
//! What is not authenticated, and why that is harmless:
//!
//! | table.column                  | who writes it can, at most, …                                   |
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
//! What a row's own code cannot tell: that a row was deleted, or that an earlier state of the same
//! row, or of the whole store, was put back.

use std::sync::atomic::{AtomicU64, Ordering};

use tracing::error;

use super::StoreError;
use super::sealer::Sealing;
use super::sql::{Cell, Connection, FromCell, Params, Query, SqlError};

/// A table whose rows are authenticated.
pub(super) struct Table {
    pub(super) name: &'static str,
    /// The columns that are authenticated, the primary key first.
    pub(super) columns: &'static [&'static str],
    /// The number of columns of the primary key; they come first.
    pub(super) keys: usize,
    /// The others but `mac`.
    pub(super) free: &'static [&'static str],
    /// Number of rows that were refused since the process began.
    refused: AtomicU64,
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

/// A row, with all columns of its table but `mac`.
#[derive(Clone)]
pub(super) struct Entry {
    table: &'static Table,
    cells: Vec<Cell>,
}

impl Table {
    /// All columns but `mac`, in the order of an [`Entry`].
    pub(super) fn all(&self) -> impl Iterator<Item = &'static str> + use<> {
        self.columns.iter().chain(self.free).copied()
    }

    /// A row of these cells, one for each column; see [`Table::all`].
    pub(super) fn entry(&'static self, cells: Vec<Cell>) -> Entry {
        debug_assert_eq!(cells.len(), self.all().count(), "{}", self.name);
        Entry { table: self, cells }
    }

    /// A row of which nothing is known yet.
    pub(super) fn blank(&'static self) -> Entry {
        self.entry(vec![Cell::Null; self.all().count()])
    }

    fn place(&self, column: &str) -> Option<usize> {
        self.all().position(|name| name == column)
    }
}

impl Entry {
    pub(super) fn get<T: FromCell>(&self, column: &'static str) -> Result<T, SqlError> {
        let place = self.table.place(column);
        place
            .and_then(|place| T::from_cell(self.cells.get(place)?))
            .ok_or(SqlError::Column(column))
    }

    pub(super) fn set(&mut self, column: &str, value: impl Into<Cell>) {
        match self.table.place(column) {
            Some(place) => self.cells[place] = value.into(),
            None => debug_assert!(false, "{column} of {}", self.table.name),
        }
    }

    pub(super) fn table(&self) -> &'static Table {
        self.table
    }

    /// All its cells, in the order of [`Table::all`].
    pub(super) fn cells(&self) -> &[Cell] {
        &self.cells
    }

    pub(super) fn key(&self) -> &[Cell] {
        &self.cells[..self.table.keys]
    }

    /// The row's primary key, in words.
    pub(super) fn name(&self) -> String {
        let words: Vec<String> = self
            .key()
            .iter()
            .map(|cell| match cell {
                Cell::Text(text) => text.clone(),
                Cell::Int(number) => number.to_string(),
                Cell::Null | Cell::Blob(_) => String::new(),
            })
            .collect();
        words.join(" ")
    }

    /// What is authenticated: the table, and each column that is not null by its name, its type and
    /// its bytes, each with its length before it. A column that a later version adds leaves the
    /// codes of rows that do not use it as they are.
    fn bytes(&self) -> Vec<u8> {
        fn put(out: &mut Vec<u8>, bytes: &[u8]) {
            out.extend_from_slice(&(bytes.len() as u64).to_be_bytes());
            out.extend_from_slice(bytes);
        }
        let mut out = Vec::with_capacity(1024);
        put(&mut out, self.table.name.as_bytes());
        for (column, cell) in self.table.columns.iter().zip(&self.cells) {
            let number;
            let (kind, bytes) = match cell {
                Cell::Null => continue,
                Cell::Int(int) => {
                    number = int.to_be_bytes();
                    (b'i', &number[..])
                }
                Cell::Text(text) => (b't', text.as_bytes()),
                Cell::Blob(bytes) => (b'b', &bytes[..]),
            };
            put(&mut out, column.as_bytes());
            out.push(kind);
            put(&mut out, bytes);
        }
        out
    }

    /// The row's code under these keys.
    pub(super) fn mac(&self, sealing: &Sealing) -> Vec<u8> {
        sealing.keys.mac(&self.bytes())
    }

    /// Whether the row is accepted: its code is valid, or an upgrade is in progress.
    pub(super) fn is_authentic(&self, sealing: &Sealing, mac: &Cell) -> bool {
        sealing.upgrade_until.is_some() || self.is_free() || self.has_mac(sealing, mac)
    }

    /// Whether the row is as this program wrote it.
    pub(super) fn has_mac(&self, sealing: &Sealing, mac: &Cell) -> bool {
        matches!(mac, Cell::Blob(mac) if sealing.keys.is_mac(&self.bytes(), mac))
    }

    fn is_free(&self) -> bool {
        self.table.name == META.name
            && matches!(&self.cells[0], Cell::Text(key) if FREE_META.contains(&key.as_str()))
    }
}

/// A row that is refused; its key.
pub(super) struct Refused {
    entry: Entry,
}

impl Refused {
    /// The row's primary key.
    pub(super) fn key(&self) -> &[Cell] {
        self.entry.key()
    }

    /// A column, for paging over rows in which this one stands, and nothing else.
    pub(super) fn get<T: FromCell>(&self, column: &'static str) -> Result<T, SqlError> {
        self.entry.get(column)
    }

    /// The refusal, for who asked for this row.
    fn error(&self) -> StoreError {
        StoreError::Unavailable(format!(
            "{} row {} is not authentic: it was not written by a dispatcher with this master key",
            self.entry.table.name,
            self.entry.name()
        ))
    }
}

/// The rows that `SELECT … FROM table {rest}` finds, each looked at.
pub(super) fn looked_at(
    connection: &Connection,
    table: &'static Table,
    rest: &str,
    values: impl Params,
) -> Result<Vec<Result<Entry, Refused>>, StoreError> {
    judged(connection, table, query(table, rest, values))
}

fn judged(
    connection: &Connection,
    table: &'static Table,
    query: Query,
) -> Result<Vec<Result<Entry, Refused>>, StoreError> {
    let sealing = connection.sealing()?;
    let found = raw_of(connection, table, query)?;
    let looked = found.into_iter().map(|(entry, mac)| {
        if entry.is_authentic(&sealing, &mac) {
            return Ok(entry);
        }
        table.refused.fetch_add(1, Ordering::Relaxed);
        let refused = Refused { entry };
        error!(
            table = table.name,
            row = refused.entry.name(),
            "{}",
            refused.error()
        );
        Err(refused)
    });
    Ok(looked.collect())
}

/// The rows as they are, with their codes: for what gives rows a code, and nothing else.
pub(super) fn raw(
    connection: &Connection,
    table: &'static Table,
    rest: &str,
    values: impl Params,
) -> Result<Vec<(Entry, Cell)>, StoreError> {
    raw_of(connection, table, query(table, rest, values))
}

fn raw_of(
    connection: &Connection,
    table: &'static Table,
    query: Query,
) -> Result<Vec<(Entry, Cell)>, StoreError> {
    let found = connection.ask(query)?;
    let apart = found.into_iter().map(|mut row| {
        let mac = row.0.pop().unwrap_or(Cell::Null);
        (
            Entry {
                table,
                cells: row.0,
            },
            mac,
        )
    });
    Ok(apart.collect())
}

/// The query of [`rows`] and its kin.
pub(super) fn query(table: &'static Table, rest: &str, values: impl Params) -> Query {
    let columns: Vec<&str> = table.all().collect();
    let sql = format!(
        "SELECT {}, mac FROM {} {rest}",
        columns.join(", "),
        table.name
    );
    Query::new(sql, values)
}

/// The rows that `SELECT … FROM table {rest}` finds.
///
/// # Errors
/// One of them is not authentic.
pub(super) fn rows(
    connection: &Connection,
    table: &'static Table,
    rest: &str,
    values: impl Params,
) -> Result<Vec<Entry>, StoreError> {
    found(connection, table, query(table, rest, values))
}

/// The rows that a [`query`] finds.
///
/// # Errors
/// One of them is not authentic.
pub(super) fn found(
    connection: &Connection,
    table: &'static Table,
    query: Query,
) -> Result<Vec<Entry>, StoreError> {
    let found = judged(connection, table, query)?;
    found
        .into_iter()
        .map(|row| row.map_err(|refused| refused.error()))
        .collect()
}

/// The first of [`rows`].
pub(super) fn row(
    connection: &Connection,
    table: &'static Table,
    rest: &str,
    values: impl Params,
) -> Result<Option<Entry>, StoreError> {
    Ok(rows(connection, table, rest, values)?.into_iter().next())
}

/// Those of the rows that are authentic: for lists, in which the others still stand.
pub(super) fn sound_rows(
    connection: &Connection,
    table: &'static Table,
    rest: &str,
    values: impl Params,
) -> Result<Vec<Entry>, StoreError> {
    sound(connection, table, query(table, rest, values))
}

/// Those of the rows that a [`query`] finds that are authentic.
pub(super) fn sound(
    connection: &Connection,
    table: &'static Table,
    query: Query,
) -> Result<Vec<Entry>, StoreError> {
    let found = judged(connection, table, query)?;
    Ok(found.into_iter().filter_map(Result::ok).collect())
}

pub(super) fn insert(connection: &Connection, entry: &Entry) -> Result<(), StoreError> {
    write(connection, entry, "", &connection.sealing()?)
}

/// Adds a row, or changes these columns of the one that has its key. The others must be as they
/// stand there: the row's code is of this entry.
pub(super) fn put(
    connection: &Connection,
    entry: &Entry,
    changed: &[&str],
) -> Result<(), StoreError> {
    put_as(connection, entry, changed, &connection.sealing()?)
}

/// The same, with a code under these keys.
pub(super) fn put_as(
    connection: &Connection,
    entry: &Entry,
    changed: &[&str],
    sealing: &Sealing,
) -> Result<(), StoreError> {
    let keys = entry.table.columns[..entry.table.keys].join(", ");
    let set: Vec<String> = changed
        .iter()
        .chain(&["mac"])
        .map(|column| format!("{column} = excluded.{column}"))
        .collect();
    let conflict = format!("ON CONFLICT ({keys}) DO UPDATE SET {}", set.join(", "));
    write(connection, entry, &conflict, sealing)
}

fn write(
    connection: &Connection,
    entry: &Entry,
    conflict: &str,
    sealing: &Sealing,
) -> Result<(), StoreError> {
    let columns: Vec<&str> = entry.table.all().chain(["mac"]).collect();
    let places: Vec<String> = (1..=columns.len()).map(|n| format!("?{n}")).collect();
    let sql = format!(
        "INSERT INTO {} ({}) VALUES ({}) {conflict}",
        entry.table.name,
        columns.join(", "),
        places.join(", ")
    );
    let mut cells = entry.cells.clone();
    cells.push(Cell::Blob(entry.mac(sealing)));
    Ok(connection.prepare(&sql)?.write(cells)?)
}

/// Changes these columns of the row that has this entry's key. The others must be as they stand
/// there: the row's code is of this entry, which therefore comes from [`rows`].
pub(super) fn update(
    connection: &Connection,
    entry: &Entry,
    changed: &[&str],
) -> Result<(), StoreError> {
    update_as(connection, entry, changed, &connection.sealing()?)
}

/// The same, with a code under these keys.
pub(super) fn update_as(
    connection: &Connection,
    entry: &Entry,
    changed: &[&str],
    sealing: &Sealing,
) -> Result<(), StoreError> {
    let table = entry.table;
    let mut cells = entry.key().to_vec();
    let mut set = Vec::new();
    for column in changed {
        let place = table.place(column).ok_or(SqlError::Column("unknown"))?;
        cells.push(entry.cells[place].clone());
        set.push(format!("{column} = ?{}", cells.len()));
    }
    cells.push(Cell::Blob(entry.mac(sealing)));
    set.push(format!("mac = ?{}", cells.len()));
    let sql = format!(
        "UPDATE {} SET {} WHERE {}",
        table.name,
        set.join(", "),
        table.by_key()
    );
    Ok(connection.prepare(&sql)?.write(cells)?)
}

/// Removes a row's code, so that the row is refused from now on.
pub(super) fn disown(connection: &Connection, entry: &Entry) -> Result<(), StoreError> {
    let table = entry.table;
    let sql = format!(
        "UPDATE {} SET mac = NULL WHERE {}",
        table.name,
        table.by_key()
    );
    connection.execute(&sql, entry.key().to_vec())?;
    Ok(())
}

/// Gives rows of one table that have no sealed column, and only text in their key, codes under
/// these keys. On a server that is a round trip for many of them.
pub(super) fn recode(
    connection: &Connection,
    table: &'static Table,
    entries: &[Entry],
    sealing: &Sealing,
) -> Result<(), StoreError> {
    if !connection.is_shared() || entries.is_empty() {
        return entries
            .iter()
            .try_for_each(|entry| update_as(connection, entry, &[], sealing));
    }
    let (mut cells, mut lines) = (Vec::new(), Vec::new());
    for entry in entries {
        let first = cells.len() + 1;
        cells.extend_from_slice(entry.key());
        let mac = entry.mac(sealing);
        cells.push(Cell::Text(
            mac.iter().map(|byte| format!("{byte:02x}")).collect(),
        ));
        let places: Vec<String> = (first..=cells.len()).map(|n| format!("?{n}")).collect();
        lines.push(format!("({})", places.join(", ")));
    }
    let keys = &table.columns[..table.keys];
    let same: Vec<String> = keys
        .iter()
        .map(|key| format!("{}.{key} = given.{key}", table.name))
        .collect();
    let sql = format!(
        "UPDATE {} SET mac = pg_catalog.decode(given.code, 'hex') FROM (VALUES {}) AS given ({}, code) WHERE {}",
        table.name,
        lines.join(", "),
        keys.join(", "),
        same.join(" AND ")
    );
    connection.execute(&sql, cells)?;
    Ok(())
}

impl Table {
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
