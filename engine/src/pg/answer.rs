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
    run_each(client, statements, limit)
        .await
        .map(|answers| answers.concat())
}

/// [`run`] with the rows of each statement by themselves.
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

/// `done` gets the rows of each statement that was done before one failed.
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
