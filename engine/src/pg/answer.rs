//! Sends statements over a connection and reads the answer, within a time limit.

use std::time::Duration;

use futures_util::StreamExt;
use mayfly_common::sql_session;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, SimpleQueryMessage};

use super::row::{Row, Rows};
use super::sql_error::SqlError;

/// How long an answer may take beyond the server's own time limit. Then the connection is closed.
pub(super) const ANSWER_GRACE: Duration = Duration::from_secs(5);

/// Runs statements, waits for at most `limit`, and returns all rows.
pub(super) async fn run(
    client: &Client,
    statements: &str,
    limit: Duration,
) -> Result<Rows, SqlError> {
    run_each(client, statements, limit)
        .await
        .map(|answers| answers.concat())
}

/// Like [`run`], with separate rows for each statement.
pub(super) async fn run_each(
    client: &Client,
    statements: &str,
    limit: Duration,
) -> Result<Vec<Rows>, SqlError> {
    let mut done = Vec::new();
    let answer = tokio::time::timeout(limit, rows(client, statements, &mut done)).await;
    let mut answer = answer.map_err(|_| SqlError {
        state: None,
        message: format!("no answer within {} s", limit.as_secs()),
        lost: true,
        slow: true,
    })?;
    if let Err(error) = &mut answer
        && done.is_empty()
        && [sql_session::BEGIN, sql_session::FIRST]
            .iter()
            .any(|first| statements.starts_with(first))
        && error.is(&[SqlState::FEATURE_NOT_SUPPORTED])
    {
        // A standby's error for a transaction that writes or is serializable.
        error.state = Some(SqlState::READ_ONLY_SQL_TRANSACTION);
    }
    answer.map(|()| done)
}

/// Runs statements. `done` gets the rows of each statement that succeeded before one failed.
async fn rows(client: &Client, statements: &str, done: &mut Vec<Rows>) -> Result<(), SqlError> {
    let mut messages = std::pin::pin!(client.simple_query_raw(statements).await?);
    let mut rows = Rows::new();
    while let Some(message) = messages.next().await {
        match message? {
            SimpleQueryMessage::Row(row) => rows.push(Row::from(&row)),
            SimpleQueryMessage::CommandComplete(_) => done.push(std::mem::take(&mut rows)),
            _ => {}
        }
    }
    Ok(())
}
