//! Sending statements over a connection and reading the answer, within a time.

use std::time::Duration;

use futures_util::StreamExt;
use mayfly_common::sql_session;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, SimpleQueryMessage};

use super::row::{Row, Rows};
use super::sql_error::SqlError;

/// Beyond the server's own limit, after which the connection is given up.
pub(super) const ANSWER_GRACE: Duration = Duration::from_secs(5);

/// Runs statements, waits for at most `limit`, gives all rows.
pub(super) async fn run(
    client: &Client,
    statements: &str,
    limit: Duration,
) -> Result<Rows, SqlError> {
    let mut done = 0;
    let answer = tokio::time::timeout(limit, rows(client, statements, &mut done)).await;
    let mut answer = answer.map_err(|_| SqlError {
        state: None,
        message: format!("no answer within {} s", limit.as_secs()),
        lost: true,
        slow: true,
    })?;
    if let Err(error) = &mut answer
        && done == 0
        && [sql_session::BEGIN, sql_session::FIRST]
            .iter()
            .any(|first| statements.starts_with(first))
        && error.is(&[SqlState::FEATURE_NOT_SUPPORTED])
    {
        // A standby's error for a transaction that writes or is serializable.
        error.state = Some(SqlState::READ_ONLY_SQL_TRANSACTION);
    }
    answer
}

/// `done` counts the statements that were done before one failed.
async fn rows(client: &Client, statements: &str, done: &mut usize) -> Result<Rows, SqlError> {
    let mut messages = std::pin::pin!(client.simple_query_raw(statements).await?);
    let mut rows = Rows::new();
    while let Some(message) = messages.next().await {
        match message? {
            SimpleQueryMessage::Row(row) => rows.push(Row::from(&row)),
            SimpleQueryMessage::CommandComplete(_) => *done += 1,
            _ => {}
        }
    }
    Ok(rows)
}
