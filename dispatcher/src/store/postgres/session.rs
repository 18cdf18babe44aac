//! Opens a session in the store's database. Settings that the database's owner planted have no effect on it.

use std::time::Duration;

use mayfly_common::pg_connect;
use mayfly_common::sql_session::{self, Limits};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use tracing::debug;

use super::{Url, failed};
use crate::store::sql::SqlError;

/// A session, and the task that moves its messages.
pub(super) struct Session {
    pub(super) client: Client,
    moving: JoinHandle<()>,
}

impl Session {
    /// Like [`Session::close`], for callers that run inside the runtime.
    pub(super) async fn end(self) {
        self.moving.abort();
        let _ = self.moving.await;
    }

    /// Closes the socket. If only the client were dropped, the socket would stay open until the runtime runs next,
    /// and the server would keep the transaction and its locks.
    pub(super) fn close(self, runtime: &Runtime) {
        runtime.block_on(self.end());
    }
}

/// Connects, and sets Mayfly's settings. A dispatcher that hangs during a batch must not keep the others waiting.
pub(super) async fn open(url: &Url, options: Option<&str>) -> Result<Session, Opening> {
    const LIMITS: Limits = Limits {
        statement: Duration::from_secs(15),
        lock: Duration::from_secs(15),
        idle_in_transaction: Duration::from_secs(5),
    };
    let login = url.login().map_err(Opening::Login)?;
    let mut config = url.config.clone();
    if let Some(options) = options {
        config.options(options);
    }
    let (client, connection, _) = pg_connect::connect(&config, &login).await?;
    let moving = tokio::spawn(async move { log_end(connection.await) });
    client.batch_execute(sql_session::FIRST).await?;
    let settings = sql_session::session(&LIMITS) + &sql_session::of_any_version(false);
    client.batch_execute(&settings).await?;
    Ok(Session { client, moving })
}

/// Why there is no connection.
pub(super) enum Opening {
    Login(String),
    Driver(tokio_postgres::Error),
}

impl From<tokio_postgres::Error> for Opening {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Driver(error)
    }
}

impl From<Opening> for SqlError {
    fn from(error: Opening) -> Self {
        match error {
            Opening::Login(reason) => Self::Postgres(reason, None),
            Opening::Driver(error) => failed(&error),
        }
    }
}

/// Whether settings that the database's owner planted may be the reason for a failed connect. The driver takes a
/// server that is read-only by default for a standby.
pub(super) fn is_of_settings(error: &Opening) -> bool {
    let Opening::Driver(error) = error else {
        return false;
    };
    let source = std::error::Error::source(error).and_then(|e| e.downcast_ref::<std::io::Error>());
    error
        .code()
        .is_some_and(|state| sql_session::ENDED_BY_SETTINGS.contains(&state.code()))
        || source.is_some_and(|io| io.kind() == std::io::ErrorKind::PermissionDenied)
}

/// Whether the connection cannot be used any more: it is lost, or the server has ended the session.
pub(super) fn ends_session(error: &tokio_postgres::Error) -> bool {
    use tokio_postgres::error::Severity;
    match error.as_db_error() {
        Some(db) => matches!(
            db.parsed_severity(),
            Some(Severity::Fatal | Severity::Panic)
        ),
        None => true,
    }
}

fn log_end(result: Result<(), tokio_postgres::Error>) {
    if let Err(error) = result {
        debug!(%error, "the connection to the store's database ended");
    }
}
