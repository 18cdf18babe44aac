//! Conversion between the store's values and those of PostgreSQL's driver.

use bytes::BytesMut;
use tokio_postgres::SimpleQueryMessage;
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};

use crate::store::sql::{Cell, Row, SqlError};

/// The first cell of each row of statements without parameters.
pub(super) fn first_cells(messages: &[SimpleQueryMessage]) -> Vec<String> {
    let cell = |message: &SimpleQueryMessage| match message {
        // A text that is not UTF-8 counts as absent: it is not one of the expected words.
        SimpleQueryMessage::Row(row) => row.try_get(0).ok().flatten().map(str::to_owned),
        _ => None,
    };
    messages.iter().filter_map(cell).collect()
}

/// The parameters as the driver expects them.
pub(super) fn references(cells: &[Cell]) -> Vec<&(dyn ToSql + Sync)> {
    cells
        .iter()
        .map(|cell| cell as &(dyn ToSql + Sync))
        .collect()
}

pub(super) fn row(row: &tokio_postgres::Row) -> Result<Row, SqlError> {
    let cell = |n: usize, kind: &Type| {
        let found = match *kind {
            Type::INT8 => row.try_get::<_, Option<i64>>(n).map(Cell::from),
            Type::INT4 => row
                .try_get::<_, Option<i32>>(n)
                .map(|number| Cell::from(number.map(i64::from))),
            Type::BYTEA => row.try_get::<_, Option<Vec<u8>>>(n).map(Cell::from),
            _ => row.try_get::<_, Option<String>>(n).map(Cell::from),
        };
        found.map_err(|_| SqlError::Type(n))
    };
    let columns = row.columns().iter().enumerate();
    let cells: Result<_, _> = columns.map(|(n, column)| cell(n, column.type_())).collect();
    cells.map(Row)
}

impl ToSql for Cell {
    fn to_sql(
        &self,
        kind: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        match self {
            Self::Null => Ok(IsNull::Yes),
            Self::Int(number) if *kind == Type::INT4 => i32::try_from(*number)?.to_sql(kind, out),
            Self::Int(number) => number.to_sql(kind, out),
            Self::Text(text) => text.to_sql(kind, out),
            Self::Blob(bytes) => bytes.to_sql(kind, out),
        }
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    to_sql_checked!();
}
