//! `mayfly-dispatcher --copy-store TO`: moves the store to another place, for example from a SQLite file to
//! PostgreSQL, while no dispatcher works with it.
//!
//! Everything is copied unchanged, sealed and authenticated under the same master key. It is read back to check each
//! row's code, the number of rows and their content. Then the old store is marked as moved, and no dispatcher opens
//! it any more, not even one of the previous version. The new store is committed last. If the command is killed at
//! any step, at most one of the two stores can be used. If neither can, the same command completes the move.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::AtomicI64;

use aws_lc_rs::digest::{Context, SHA256};
use mayfly_common::fault;
use tracing::{info, warn};

use super::authentic::{self, Entry, META, SECRETS, TABLES, Table};
use super::open::{Backend, OpenError, Place, identity, is_used, lock, open_sqlite};
use super::postgres::Postgres;
use super::sealer::Sealing;
use super::sql::{Cell, Connection, Database, NONE};
use super::{StoreError, commands, keys};

/// Rows read at a time.
const PAGE: usize = 500;
/// Rows in one statement.
const ROWS: usize = 50;
/// Maximum number of rows named in a message if they are not authentic.
const NAMED: usize = 10;

/// Rows of `meta` that are not copied: how the old store is sealed, where it was moved to, and data about its
/// server.
const LEFT: [&str; 4] = [keys::SEALING, keys::MOVED_TO, "timeline", "touched"];

/// Moves the store of `place` to `to`.
///
/// # Errors
/// See [`OpenError`]. Nothing is changed then, unless the error says so.
pub(crate) fn copy_store(place: &Place, to: &Backend) -> Result<(), OpenError> {
    // The PostgreSQL connection has its own runtime, which cannot run inside another runtime.
    let done = std::thread::scope(|scope| scope.spawn(|| copy(place, to)).join());
    done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn copy(place: &Place, to: &Backend) -> Result<(), OpenError> {
    let there = Place {
        backend: to.clone(),
        ..place.clone()
    };
    let failed = |error: &dyn std::fmt::Display| commands::failed(place, error);
    let failed_there = |error: &dyn std::fmt::Display| commands::failed(&there, error);
    if place.backend.to_string() == to.to_string() {
        return Err(failed(&"this is the store itself; name another place"));
    }
    if let Backend::Sqlite(file) = &place.backend
        && !file.exists()
    {
        return Err(failed(&"there is no store here"));
    }
    // These locks keep dispatchers out: a dispatcher with a SQLite store holds the store's lock, and a dispatcher
    // with a store in PostgreSQL waits for its turn.
    let _locks = (locked(&place.backend)?, locked(to)?);
    let (from, sealing, was_moved) = open_old(place, to)?;

    let mut target = open(&there)?;
    target.begin(&[]).map_err(|e| failed_there(&e))?;
    keys::share(&mut target, &place.key_files(), sealing.clone());
    let is_empty = is_empty(&target).map_err(|e| failed_there(&e))?;
    if !is_empty && !was_moved {
        return Err(failed_there(
            &"it is not empty; use an empty database or a new file",
        ));
    }
    let mut total = 0;
    for table in TABLES {
        let copied = copy_table(&from, &target, table, &sealing, is_empty);
        let (digest, refused) = copied.map_err(|e| failed_there(&e))?;
        if let Some(refused) = refused {
            return Err(failed(&refused));
        }
        let there = read_back(&target, table).map_err(|e| failed_there(&e))?;
        if there != digest {
            return Err(failed_there(&format!(
                "{} does not contain the copied rows ({} rows of {})",
                table.name, there.rows, digest.rows
            )));
        }
        total += digest.rows;
    }
    keys::record(&target, &sealing).map_err(|e| failed_there(&e))?;
    check_counts(&target).map_err(|e| failed_there(&e))?;
    // Checks that the new store opens: it must have its own keys, and they must be this installation's.
    let of = |connection: &Connection| {
        identity(connection, &connection.ring()?.sealer).map(|identity| identity.installation)
    };
    let ours = of(&from).map_err(|e| failed(&e))?;
    if of(&target).map_err(|e| failed_there(&e))? != ours {
        return Err(failed_there(&"it belongs to another installation"));
    }
    step("copied");
    if !was_moved {
        keys::record_moved(&from, &to.to_string()).map_err(|e| failed(&e))?;
    }
    from.commit().map_err(|e| failed(&e))?;
    step("marked");
    target.commit().map_err(|error| {
        warn!("the old store is already marked as moved; run the same command again to copy it");
        failed_there(&error)
    })?;
    step("committed");
    info!(rows = total, from = %place.backend, to = %to, installation = %ours,
        "the store is moved and its rows are verified. Start dispatchers with the new store; no dispatcher opens the old one any more");
    Ok(())
}

/// Opens the old store and begins a transaction in it. Returns its keys, and whether it is already marked as moved
/// to the same place.
fn open_old(place: &Place, to: &Backend) -> Result<(Connection, Sealing, bool), OpenError> {
    let failed = |error: &dyn std::fmt::Display| commands::failed(place, error);
    let mut from = open(place)?;
    from.begin(&[]).map_err(|e| failed(&e))?;
    if !is_used(&from).map_err(|e| failed(&e))? {
        return Err(failed(&"this store is empty"));
    }
    let moved_to = keys::unlock_moved(&mut from, &place.key_files())?;
    if let Some(moved_to) = &moved_to
        && *moved_to != to.to_string()
    {
        return Err(failed(&format!("it has already been moved to {moved_to}")));
    }
    let sealing = from.sealing().map_err(|e| failed(&e))?;
    if sealing.upgrade_until.is_some() {
        return Err(failed(
            &"it is being upgraded; `mayfly-dispatcher --finish-upgrade` first",
        ));
    }
    Ok((from, sealing, moved_to.is_some()))
}

/// Reads a table. If the target is empty, writes the rows there. Returns the sum of the rows. If rows are not
/// authentic, also returns the reason not to commit.
fn copy_table(
    from: &Connection,
    target: &Connection,
    table: &'static Table,
    sealing: &Sealing,
    is_empty: bool,
) -> Result<(Digest, Option<String>), StoreError> {
    let mut digest = Digest::default();
    let mut refused = Vec::new();
    walk(from, table, |page| {
        for (entry, mac) in page {
            digest.add(entry, mac);
            if !entry.is_authentic(sealing, mac) {
                refused.push(format!("{} row {}", table.name, entry.name()));
            }
        }
        match is_empty && refused.is_empty() {
            true => insert(target, table, page),
            false => Ok(()),
        }
    })?;
    let count = refused.len();
    refused.truncate(NAMED);
    let reason = (count > 0).then(|| {
        format!(
            "{count} rows are not authentic, the first of them: {}; restore them from a backup, or delete them",
            refused.join(", ")
        )
    });
    Ok((digest, reason))
}

fn locked(backend: &Backend) -> Result<Option<std::fs::File>, OpenError> {
    match backend {
        Backend::Sqlite(file) => lock(file).map(Some),
        Backend::Postgres(_) => Ok(None),
    }
}

fn open(place: &Place) -> Result<Connection, OpenError> {
    match &place.backend {
        Backend::Sqlite(file) => open_sqlite(file),
        Backend::Postgres(url) => {
            let postgres = Postgres::open((**url).clone(), Arc::new(AtomicI64::new(0)));
            let postgres = postgres.map_err(|error| commands::failed(place, &error))?;
            Ok(Connection::locked(Database::Postgres(Box::new(postgres))))
        }
    }
}

fn is_empty(connection: &Connection) -> Result<bool, StoreError> {
    for table in TABLES {
        if !authentic::raw(connection, table, "LIMIT 1", NONE)?.is_empty() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The number of rows, and a sum of their contents that does not depend on their order.
#[derive(Debug, Default, PartialEq, Eq)]
struct Digest {
    rows: u64,
    sum: [u8; 32],
}

impl Digest {
    fn add(&mut self, entry: &Entry, mac: &Cell) {
        let mut context = Context::new(&SHA256);
        for cell in entry.cells().iter().chain([mac]) {
            let number;
            let (kind, bytes) = match cell {
                Cell::Null => (b'n', &[][..]),
                Cell::Int(int) => {
                    number = int.to_be_bytes();
                    (b'i', &number[..])
                }
                Cell::Text(text) => (b't', text.as_bytes()),
                Cell::Blob(bytes) => (b'b', &bytes[..]),
            };
            context.update(&[kind]);
            context.update(&(bytes.len() as u64).to_be_bytes());
            context.update(bytes);
        }
        self.rows += 1;
        for (sum, byte) in self.sum.iter_mut().zip(context.finish().as_ref()) {
            *sum ^= byte;
        }
    }
}

/// Reads a table in the order of its key. In `secrets` the base secrets come first, because the others refer to
/// them.
pub(super) fn walk(
    connection: &Connection,
    table: &'static Table,
    mut each: impl FnMut(&[(Entry, Cell)]) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let parts: &[&str] = match table.name == SECRETS.name {
        true => &["linked IS NULL", "linked IS NOT NULL"],
        false => &["TRUE"],
    };
    let keys = table.columns[..table.keys].join(", ");
    let places: Vec<String> = (1..=table.keys).map(|n| format!("?{n}")).collect();
    let places = places.join(", ");
    for part in parts {
        let mut after: Vec<Cell> = Vec::new();
        loop {
            let from = match after.is_empty() {
                true => String::new(),
                false => format!("AND ({keys}) > ({places})"),
            };
            let rest = format!("WHERE {part} {from} ORDER BY {keys} LIMIT {PAGE}");
            let mut page = authentic::raw(connection, table, &rest, after)?;
            let count = page.len();
            after = page
                .last()
                .map(|(entry, _)| entry.key().to_vec())
                .unwrap_or_default();
            page.retain(|(entry, _)| !is_left(table, entry));
            each(&page)?;
            if count < PAGE {
                break;
            }
        }
    }
    Ok(())
}

fn is_left(table: &Table, entry: &Entry) -> bool {
    let of_meta = table.name == META.name;
    of_meta && matches!(entry.key(), [Cell::Text(key)] if LEFT.contains(&key.as_str()))
}

/// Adds rows, with their present codes.
fn insert(
    connection: &Connection,
    table: &'static Table,
    rows: &[(Entry, Cell)],
) -> Result<(), StoreError> {
    let columns: Vec<&str> = table.all().chain(["mac"]).collect();
    for rows in rows.chunks(ROWS) {
        let mut cells = Vec::with_capacity(rows.len() * columns.len());
        let mut lines = Vec::with_capacity(rows.len());
        for (entry, mac) in rows {
            let first = cells.len() + 1;
            cells.extend_from_slice(entry.cells());
            cells.push(mac.clone());
            let places: Vec<String> = (first..=cells.len()).map(|n| format!("?{n}")).collect();
            lines.push(format!("({})", places.join(", ")));
        }
        let sql = format!(
            "INSERT INTO {} ({}) VALUES {}",
            table.name,
            columns.join(", "),
            lines.join(", ")
        );
        connection.execute(&sql, cells)?;
    }
    Ok(())
}

fn read_back(target: &Connection, table: &'static Table) -> Result<Digest, StoreError> {
    let sealing = target.sealing()?;
    let mut digest = Digest::default();
    walk(target, table, |page| {
        for (entry, mac) in page {
            if !entry.is_authentic(&sealing, mac) {
                let row = format!("{} row {} is not authentic", table.name, entry.name());
                return Err(StoreError::Unavailable(row));
            }
            digest.add(entry, mac);
        }
        Ok(())
    })?;
    Ok(digest)
}

/// Checks that the counts of leases match the rows.
pub(super) fn check_counts(connection: &Connection) -> Result<(), StoreError> {
    let counts = |sql: &str| -> Result<BTreeSet<(String, String, i64)>, StoreError> {
        let rows = connection.prepare(sql)?.query(NONE)?;
        let rows = rows
            .iter()
            .map(|row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)));
        let counts: Result<Vec<_>, StoreError> = rows.collect();
        Ok(counts?.into_iter().filter(|(_, _, n)| *n != 0).collect())
    };
    let kept = counts(
        "SELECT pool, state, CAST(sum(n) AS BIGINT) FROM lease_counts GROUP BY pool, state",
    )?;
    let counted = counts("SELECT pool, state, count(*) FROM leases GROUP BY pool, state")?;
    match kept == counted {
        true => Ok(()),
        false => Err(StoreError::Unavailable(
            "its counts of leases are wrong".to_owned(),
        )),
    }
}

/// A step at which the fault suite can kill the process.
fn step(name: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build();
    if let Ok(runtime) = runtime {
        runtime.block_on(fault::point("copy", name));
    }
}
