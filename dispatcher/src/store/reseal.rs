//! Seals and authenticates the whole store under other keys, in one transaction: when the master key is renewed, and
//! at the end of an upgrade. Rows that are not authentic are not changed, so they stay refused.

use tracing::error;

use super::authentic::{self, Entry, META, SECRETS, TABLES, Table};
use super::authentic::{BASE_VERSIONS, ROTATIONS, UNPROVEN};
use super::sealer::Sealing;
use super::sql::{Cell, Connection};
use super::{StoreError, generations, open, rotations, secret_row, unproven};
use mayfly_protocol::lease::BaseRef;

/// Number of rows that are read at a time.
const PAGE: usize = 500;

/// Seals all rows again, from the keys in use to `to`. The row `sealing` is not changed.
///
/// # Errors
/// The store is unreachable.
pub(super) fn all(connection: &Connection, to: &Sealing) -> Result<(), StoreError> {
    let from = connection.sealing()?;
    for table in TABLES {
        let keys = table.columns[..table.keys].join(", ");
        let places: Vec<String> = (1..=table.keys).map(|n| format!("?{n}")).collect();
        let mut after: Vec<Cell> = Vec::new();
        loop {
            let rest = if after.is_empty() {
                format!("ORDER BY {keys} LIMIT {PAGE}")
            } else {
                let places = places.join(", ");
                format!("WHERE ({keys}) > ({places}) ORDER BY {keys} LIMIT {PAGE}")
            };
            let page = authentic::raw(connection, table, &rest, after)?;
            let count = page.len();
            after = page
                .last()
                .map(|(entry, _)| entry.key().to_vec())
                .unwrap_or_default();
            resealed(connection, table, page, &from, to)?;
            if count < PAGE {
                break;
            }
        }
    }
    Ok(())
}

fn resealed(
    connection: &Connection,
    table: &'static Table,
    page: Vec<(Entry, Cell)>,
    from: &Sealing,
    to: &Sealing,
) -> Result<(), StoreError> {
    let mut clear = Vec::new();
    for (mut entry, mac) in page {
        if !entry.is_authentic(from, &mac) {
            error!(
                table = table.name,
                row = entry.name(),
                "this row is not authentic and remains refused"
            );
            continue;
        }
        match reseal(&mut entry, from, to) {
            Ok(Some(column)) => authentic::update_as(connection, &entry, &[column], to)?,
            Ok(None) => clear.push(entry),
            Err(error) => {
                error!(%error, table = table.name, row = entry.name(), "this row cannot be decrypted and is refused from now on");
                // During an upgrade this row was accepted without a code.
                authentic::disown(connection, &entry)?;
            }
        }
    }
    authentic::recode(connection, table, &clear, to)
}

/// Seals the row's sealed column under the new keys. Returns the column's name, if the row has one.
fn reseal(
    entry: &mut Entry,
    from: &Sealing,
    to: &Sealing,
) -> Result<Option<&'static str>, StoreError> {
    let table = entry.table().name;
    let key: String;
    let base;
    let (column, cell) = if table == META.name {
        key = entry.get("key")?;
        if !generations::is_sealed(&key) {
            return Ok(None);
        }
        ("value", open::meta_cell(&key))
    } else if table == SECRETS.name {
        key = entry.get("id")?;
        ("data", secret_row::data_spot(&key, entry.get("version")?))
    } else if table == BASE_VERSIONS.name {
        base = BaseRef {
            id: entry.get("secret_id")?,
            version: entry.get("version")?,
        };
        ("target_sealed", secret_row::target_spot(&base))
    } else if table == ROTATIONS.name {
        key = entry.get("secret_id")?;
        (
            "password_sealed",
            rotations::cell(&key, entry.get("version")?),
        )
    } else if table == UNPROVEN.name {
        key = entry.get("secret_id")?;
        (
            "password_sealed",
            unproven::cell(&key, entry.get("version")?),
        )
    } else {
        return Ok(None);
    };
    let sealed: Vec<u8> = entry.get(column)?;
    let sealed = to.seal(cell, &from.open(cell, &sealed)?)?;
    entry.set(column, sealed);
    Ok(Some(column))
}
