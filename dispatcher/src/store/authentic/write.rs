//! Writes rows of authenticated tables, each with its code.

use super::{Entry, Table};
use crate::store::StoreError;
use crate::store::sealer::Sealing;
use crate::store::sql::{Cell, Connection, SqlError};

pub(in crate::store) fn insert(connection: &Connection, entry: &Entry) -> Result<(), StoreError> {
    write(connection, entry, "", &connection.sealing()?)
}

/// Adds a row, or changes these columns of the row with its key. The row's other columns must be as in this entry,
/// because the authentication code covers all columns.
pub(in crate::store) fn put(
    connection: &Connection,
    entry: &Entry,
    changed: &[&str],
) -> Result<(), StoreError> {
    put_as(connection, entry, changed, &connection.sealing()?)
}

/// Like [`put`], with a code under these keys.
pub(in crate::store) fn put_as(
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

/// Changes these columns of the row with this entry's key. The row's other columns must be as in this entry, because
/// the authentication code covers all columns. So read the entry with [`rows`] first.
pub(in crate::store) fn update(
    connection: &Connection,
    entry: &Entry,
    changed: &[&str],
) -> Result<(), StoreError> {
    update_as(connection, entry, changed, &connection.sealing()?)
}

/// Like [`update`], with a code under these keys.
pub(in crate::store) fn update_as(
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
pub(in crate::store) fn disown(connection: &Connection, entry: &Entry) -> Result<(), StoreError> {
    let table = entry.table;
    let sql = format!(
        "UPDATE {} SET mac = NULL WHERE {}",
        table.name,
        table.by_key()
    );
    connection.execute(&sql, entry.key().to_vec())?;
    Ok(())
}

/// Writes new codes under these keys for rows of one table, many of them in one round trip. The table has no sealed
/// column, and its key columns are texts.
pub(in crate::store) fn recode(
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
