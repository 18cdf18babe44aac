//! Reads rows of authenticated tables. A row without a valid code is refused, counted and logged.

use std::sync::atomic::Ordering;

use tracing::error;

use super::{Entry, Refused, Table};
use crate::store::StoreError;
use crate::store::sql::{Cell, Connection, Params, Query};

/// Checks each row that `SELECT … FROM table {rest}` finds.
pub(in crate::store) fn looked_at(
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

/// The rows without a check, with their codes. Only code that writes new codes may use it.
pub(in crate::store) fn raw(
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

/// The query of [`rows`] and similar functions.
pub(in crate::store) fn query(table: &'static Table, rest: &str, values: impl Params) -> Query {
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
pub(in crate::store) fn rows(
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
pub(in crate::store) fn found(
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

/// The first row that [`rows`] finds.
pub(in crate::store) fn row(
    connection: &Connection,
    table: &'static Table,
    rest: &str,
    values: impl Params,
) -> Result<Option<Entry>, StoreError> {
    Ok(rows(connection, table, rest, values)?.into_iter().next())
}

/// The authentic rows among those found. Use it for lists, which skip the others.
pub(in crate::store) fn sound_rows(
    connection: &Connection,
    table: &'static Table,
    rest: &str,
    values: impl Params,
) -> Result<Vec<Entry>, StoreError> {
    sound(connection, table, query(table, rest, values))
}

/// The authentic rows among those that a [`query`] finds.
pub(in crate::store) fn sound(
    connection: &Connection,
    table: &'static Table,
    query: Query,
) -> Result<Vec<Entry>, StoreError> {
    let found = judged(connection, table, query)?;
    Ok(found.into_iter().filter_map(Result::ok).collect())
}
