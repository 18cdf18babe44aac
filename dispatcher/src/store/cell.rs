//! Values of columns and parameters, for SQLite and PostgreSQL.

use super::sql::SqlError;

/// The value of a column or a parameter.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Cell {
    Null,
    Int(i64),
    Text(String),
    Blob(Vec<u8>),
}

/// A query and its parameters.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Query {
    pub(super) sql: String,
    pub(super) cells: Vec<Cell>,
}

impl Query {
    pub(super) fn new(sql: impl Into<String>, params: impl Params) -> Self {
        Self {
            sql: sql.into(),
            cells: params.cells(),
        }
    }
}

#[derive(Debug)]
pub(super) struct Row(pub(super) Vec<Cell>);

impl Row {
    pub(super) fn get<T: FromCell>(&self, n: usize) -> Result<T, SqlError> {
        self.0
            .get(n)
            .and_then(T::from_cell)
            .ok_or(SqlError::Type(n))
    }
}

/// A type that a column can be read as.
pub(super) trait FromCell: Sized {
    fn from_cell(cell: &Cell) -> Option<Self>;
}

impl FromCell for i64 {
    fn from_cell(cell: &Cell) -> Option<Self> {
        match cell {
            Cell::Int(number) => Some(*number),
            Cell::Null | Cell::Text(_) | Cell::Blob(_) => None,
        }
    }
}

impl FromCell for u64 {
    fn from_cell(cell: &Cell) -> Option<Self> {
        i64::from_cell(cell).and_then(|number| Self::try_from(number).ok())
    }
}

impl FromCell for u32 {
    fn from_cell(cell: &Cell) -> Option<Self> {
        i64::from_cell(cell).and_then(|number| Self::try_from(number).ok())
    }
}

impl FromCell for bool {
    fn from_cell(cell: &Cell) -> Option<Self> {
        i64::from_cell(cell).map(|number| number != 0)
    }
}

impl FromCell for String {
    fn from_cell(cell: &Cell) -> Option<Self> {
        match cell {
            Cell::Text(text) => Some(text.clone()),
            Cell::Null | Cell::Int(_) | Cell::Blob(_) => None,
        }
    }
}

impl FromCell for Vec<u8> {
    fn from_cell(cell: &Cell) -> Option<Self> {
        match cell {
            Cell::Blob(bytes) => Some(bytes.clone()),
            Cell::Null | Cell::Int(_) | Cell::Text(_) => None,
        }
    }
}

impl<T: FromCell> FromCell for Option<T> {
    fn from_cell(cell: &Cell) -> Option<Self> {
        match cell {
            Cell::Null => Some(None),
            other => T::from_cell(other).map(Some),
        }
    }
}

macro_rules! from_number {
    ($($number:ty),*) => {$(
        impl From<$number> for Cell {
            fn from(number: $number) -> Self {
                Self::Int(i64::from(number))
            }
        }
    )*};
}
from_number!(i64, u32, bool);

impl From<u64> for Cell {
    fn from(number: u64) -> Self {
        // Seconds, versions and counts are far below the limit.
        Self::Int(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<Vec<u8>> for Cell {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Blob(bytes)
    }
}

impl From<&[u8]> for Cell {
    fn from(bytes: &[u8]) -> Self {
        Self::Blob(bytes.to_vec())
    }
}

impl<T: Into<Cell>> From<Option<T>> for Cell {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Null, Into::into)
    }
}

impl<T: Clone + Into<Cell>> From<&T> for Cell {
    fn from(value: &T) -> Self {
        value.clone().into()
    }
}

/// Parameters of a statement.
pub(super) trait Params {
    fn cells(self) -> Vec<Cell>;
}

impl Params for Vec<Cell> {
    fn cells(self) -> Vec<Cell> {
        self
    }
}

impl<T: Into<Cell>, const N: usize> Params for [T; N] {
    fn cells(self) -> Vec<Cell> {
        self.into_iter().map(Into::into).collect()
    }
}

pub(super) const NONE: [Cell; 0] = [];

/// Parameters of several types.
macro_rules! params {
    ($($value:expr),* $(,)?) => {
        vec![$($crate::store::sql::Cell::from(&$value)),*]
    };
}
pub(super) use params;
