//! One row of an authenticated table, and its authentication code.

use super::{FREE_META, META, Table};
use crate::store::StoreError;
use crate::store::sealer::Sealing;
use crate::store::sql::{Cell, FromCell, SqlError};

/// A row, with all columns of its table but `mac`.
#[derive(Clone)]
pub(in crate::store) struct Entry {
    pub(super) table: &'static Table,
    pub(super) cells: Vec<Cell>,
}

impl Entry {
    pub(in crate::store) fn get<T: FromCell>(&self, column: &'static str) -> Result<T, SqlError> {
        let place = self.table.place(column);
        place
            .and_then(|place| T::from_cell(self.cells.get(place)?))
            .ok_or(SqlError::Column(column))
    }

    pub(in crate::store) fn set(&mut self, column: &str, value: impl Into<Cell>) {
        match self.table.place(column) {
            Some(place) => self.cells[place] = value.into(),
            None => debug_assert!(false, "{column} of {}", self.table.name),
        }
    }

    pub(in crate::store) fn table(&self) -> &'static Table {
        self.table
    }

    /// All its cells, in the order of [`Table::all`].
    pub(in crate::store) fn cells(&self) -> &[Cell] {
        &self.cells
    }

    pub(in crate::store) fn key(&self) -> &[Cell] {
        &self.cells[..self.table.keys]
    }

    /// The row's primary key as text, for messages.
    pub(in crate::store) fn name(&self) -> String {
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

    /// The authenticated bytes: the table's name, and the name, type and bytes of each column that is not null, each
    /// with its length. A column that a later version adds does not change the code of a row that does not use it.
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
    pub(in crate::store) fn mac(&self, sealing: &Sealing) -> Vec<u8> {
        sealing.keys.mac(&self.bytes())
    }

    /// Whether the row is accepted: its code is valid, or an upgrade is in progress.
    pub(in crate::store) fn is_authentic(&self, sealing: &Sealing, mac: &Cell) -> bool {
        sealing.upgrade_until.is_some() || self.is_free() || self.has_mac(sealing, mac)
    }

    /// Whether the row's code is valid under these keys.
    pub(in crate::store) fn has_mac(&self, sealing: &Sealing, mac: &Cell) -> bool {
        matches!(mac, Cell::Blob(mac) if sealing.keys.is_mac(&self.bytes(), mac))
    }

    fn is_free(&self) -> bool {
        self.table.name == META.name
            && matches!(&self.cells[0], Cell::Text(key) if FREE_META.contains(&key.as_str()))
    }
}

/// A row that is refused, with its key.
pub(in crate::store) struct Refused {
    pub(super) entry: Entry,
}

impl Refused {
    /// The row's primary key.
    pub(in crate::store) fn key(&self) -> &[Cell] {
        self.entry.key()
    }

    /// A column of the refused row. Use it only to page over rows.
    pub(in crate::store) fn get<T: FromCell>(&self, column: &'static str) -> Result<T, SqlError> {
        self.entry.get(column)
    }

    /// The refusal, for the caller of this row.
    pub(super) fn error(&self) -> StoreError {
        StoreError::Unusable(format!(
            "{} row {} is not authentic: it was not written by a dispatcher with this master key",
            self.entry.table.name,
            self.entry.name()
        ))
    }
}
