//! Rows of an answer. The simple query protocol gives every value as text.

use std::str::FromStr;

use jiff::Timestamp;
use tokio_postgres::SimpleQueryRow;

use super::sql::{NOT_UTF8, parse_timestamp};

/// The rows of all statements of a query, in order.
pub(crate) type Rows = Vec<Row>;

/// One row. A column that the row does not have reads as NULL.
#[derive(Debug, Clone, Default)]
pub(crate) struct Row(Vec<Option<String>>);

impl Row {
    /// Whether it has no columns, like [`Row::default`].
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The text of column `n`, counted from 0. `None` for NULL.
    pub(super) fn get(&self, n: usize) -> Option<&str> {
        self.0.get(n)?.as_deref()
    }

    /// The text of column `n`; empty for NULL.
    pub(super) fn text(&self, n: usize) -> &str {
        self.get(n).unwrap_or_default()
    }

    /// Column `n` as a number or another type. `None` for NULL and for a text that cannot be parsed.
    pub(super) fn parse<T: FromStr>(&self, n: usize) -> Option<T> {
        self.get(n)?.parse().ok()
    }

    /// Column `n` as a boolean. It is `t` for a boolean column, and `true` if the column was cast to text. NULL is
    /// false.
    pub(super) fn flag(&self, n: usize) -> bool {
        matches!(self.get(n), Some("t" | "true"))
    }

    /// Column `n` as a timestamp, if the statement wrote it with [`super::sql::timestamp_text`].
    pub(super) fn timestamp(&self, n: usize) -> Option<Timestamp> {
        self.get(n).and_then(parse_timestamp)
    }
}

impl From<&SimpleQueryRow> for Row {
    /// A name may consist of any bytes. If they are not UTF-8, [`NOT_UTF8`] replaces them.
    fn from(row: &SimpleQueryRow) -> Self {
        let value = |n| match row.try_get(n) {
            Ok(text) => text.map(str::to_owned),
            Err(_) => Some(NOT_UTF8.to_owned()),
        };
        Self((0..row.len()).map(value).collect())
    }
}

#[cfg(test)]
impl<const N: usize> From<[Option<&str>; N]> for Row {
    fn from(cells: [Option<&str>; N]) -> Self {
        Self(cells.map(|cell| cell.map(str::to_owned)).into())
    }
}

/// The first column of each row; NULL is left out.
pub(super) fn first_column(rows: &[Row]) -> Vec<String> {
    rows.iter()
        .filter_map(|row| row.get(0).map(str::to_owned))
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn null_and_a_missing_column_read_alike() {
        let row = Row::from([Some("t"), None, Some("17"), Some("x")]);
        assert!(row.flag(0) && !row.flag(1) && !row.flag(9));
        assert_eq!((row.text(1), row.text(9)), ("", ""));
        assert_eq!(row.parse::<u32>(2), Some(17));
        assert_eq!(row.parse::<u32>(3), None);
        assert_eq!(first_column(&[row, Row::from([None])]), ["t"]);
    }
}
