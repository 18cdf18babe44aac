//! The lease store in PostgreSQL, for several dispatchers. Jobs that see the store alone share a transaction, which
//! first takes its turn ([`super::turn`]). A job about one lease takes a slot, and runs beside others. If a
//! connection is lost, its transaction fails, and the next transaction opens a new connection.

mod begin;
mod cells;
mod connect;
mod dialect;
mod migrate;
mod primary;
mod session;
mod url;

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::{join, join_all};
use jiff::Timestamp;
use mayfly_protocol::pg_login::Refusal;
use tokio::runtime::Runtime;
use tokio_postgres::Client;
use tracing::debug;

use super::health::Cause;
use super::sql::{Cell, Query, Row, SqlError};
use crate::store::Role;
use cells::{first_cells, references, row};
pub(super) use dialect::for_postgres;
use primary::Timeline;
pub(super) use primary::watch as watch_primary;
use session::{Session, ends_session};
pub(crate) use url::Url;

/// Time limit of one statement, and of the wait for the turns of other dispatchers.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// A connection that reconnects by itself, with the runtime that drives it.
pub(crate) struct Postgres(RefCell<Inner>);

struct Inner {
    role: Role,
    /// The slot of the session, if it uses one.
    slot: usize,
    /// When the store was last found without slots.
    unsplit: Option<Instant>,
    url: Url,
    runtime: Runtime,
    session: Option<Session>,
    /// The timeline of the session's server, if the server reports it.
    timeline: Option<Timeline>,
    statements: HashMap<String, tokio_postgres::Statement>,
    failed: Option<Instant>,
    /// Whether it was connected before. Its opener reports the first connection.
    was_connected: bool,
    /// The server's clock minus this machine's, in milliseconds.
    offset: Arc<AtomicI64>,
    /// Answers to queries that were sent with BEGIN, until the job asks for them.
    ahead: Vec<(Query, Result<Vec<Row>, SqlError>)>,
    /// Statements that are sent together with the next statement.
    later: Vec<(tokio_postgres::Statement, Vec<Cell>)>,
    /// Number of round trips to the server so far.
    round_trips: u64,
}

fn failed(error: &tokio_postgres::Error) -> SqlError {
    // The server's message may repeat a value. Secret values are sealed.
    if let Some(db) = error.as_db_error() {
        let state = db.code().code();
        let words = format!("{} (SQLSTATE {state})", db.message());
        return SqlError::Postgres(words, Cause::of_sqlstate(state));
    }
    match Refusal::in_error(error) {
        Some(refusal) => SqlError::Postgres(refusal.to_string(), None),
        None => SqlError::Postgres(described(error), Some(Cause::Away)),
    }
}

/// The messages of the driver and of the libraries below it, for example about sockets and TLS.
fn described(error: &tokio_postgres::Error) -> String {
    match std::error::Error::source(error) {
        Some(inner) => format!("{error}: {inner}"),
        None => error.to_string(),
    }
}

impl Postgres {
    /// A connection besides the writer's. It connects at its first transaction.
    ///
    /// # Errors
    /// No runtime can be made for it.
    pub(super) fn beside(role: Role, url: Url, offset: Arc<AtomicI64>) -> Result<Self, SqlError> {
        Ok(Self(RefCell::new(Inner::new(role, url, offset)?)))
    }

    /// Begins a transaction of its role. A writer takes the turn or a slot, and reads the server's clock. A reader
    /// sees the store as it is at its first statement. The queries `ahead` are sent with BEGIN, in one round trip,
    /// and run one after another. The job gets their answers when it asks for them.
    pub(super) fn begin(&self, ahead: &[Query]) -> Result<(), SqlError> {
        let mut inner = self.0.borrow_mut();
        let was_connected = inner.session.is_some();
        match inner.begin(ahead) {
            // The connection ended while it was idle, which is noticed only now. No transaction has begun.
            Err(SqlError::Lost) if was_connected => inner.begin(ahead),
            begun => begun,
        }
    }

    /// The server's clock, as the last [`Postgres::begin`] read it.
    pub(super) fn now(&self) -> Timestamp {
        let offset = self.0.borrow().offset.load(Ordering::Relaxed);
        Timestamp::now() + jiff::SignedDuration::from_millis(offset)
    }

    /// Commits the transaction that [`Postgres::begin`] began. After an error none of its jobs counts as done.
    pub(super) fn commit(&self) -> Result<(), SqlError> {
        // In a failed transaction COMMIT is a ROLLBACK and no error. So another statement comes first, which fails
        // there.
        self.batch("SELECT 1; COMMIT")
    }

    /// Whether the connection is lost, and its transaction with it.
    pub(super) fn is_lost(&self) -> bool {
        self.0.borrow().is_closed()
    }

    /// Rolls a transaction back.
    pub(super) fn roll_back(&self) -> Result<(), SqlError> {
        let mut inner = self.0.borrow_mut();
        inner.later.clear();
        inner.ahead.clear();
        if inner.role == Role::Reads {
            inner.send_rollback();
            return Ok(());
        }
        inner.batch("ROLLBACK")
    }

    pub(super) fn batch(&self, sql: &str) -> Result<(), SqlError> {
        let mut inner = self.0.borrow_mut();
        inner.after_writes(async |client| client.batch_execute(sql).await)
    }

    pub(super) fn execute(&self, sql: &str, cells: &[Cell]) -> Result<usize, SqlError> {
        let mut inner = self.0.borrow_mut();
        // What was read before may have changed.
        inner.ahead.clear();
        let statement = inner.prepare(sql)?;
        let cells = references(cells);
        let changed =
            inner.after_writes(async |client| client.execute(&statement, &cells).await)?;
        Ok(usize::try_from(changed).unwrap_or(usize::MAX))
    }

    /// Sends a statement together with the next statement or with COMMIT, in one round trip. If it fails, the next
    /// statement fails.
    pub(super) fn write_later(&self, sql: &str, cells: Vec<Cell>) -> Result<(), SqlError> {
        let mut inner = self.0.borrow_mut();
        inner.ahead.clear();
        let statement = inner.prepare(sql)?;
        inner.later.push((statement, cells));
        Ok(())
    }

    pub(super) fn query(&self, sql: &str, cells: &[Cell]) -> Result<Vec<Row>, SqlError> {
        let mut inner = self.0.borrow_mut();
        let is_asked = |(query, _): &(Query, _)| query.sql == sql && query.cells == cells;
        if let Some(at) = inner.ahead.iter().position(is_asked) {
            return inner.ahead.swap_remove(at).1;
        }
        let statement = inner.prepare(sql)?;
        let cells = references(cells);
        let rows = inner.after_writes(async |client| client.query(&statement, &cells).await)?;
        rows.iter().map(row).collect()
    }

    /// Round trips to the server since the last call.
    pub(super) fn take_round_trips(&self) -> u64 {
        std::mem::take(&mut self.0.borrow_mut().round_trips)
    }
}

impl Inner {
    fn new(role: Role, url: Url, offset: Arc<AtomicI64>) -> Result<Self, SqlError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| SqlError::Postgres(error.to_string(), None))?;
        Ok(Self {
            role,
            slot: 0,
            unsplit: None,
            url,
            runtime,
            session: None,
            timeline: None,
            statements: HashMap::new(),
            failed: None,
            was_connected: false,
            offset,
            ahead: Vec::new(),
            later: Vec::new(),
            round_trips: 0,
        })
    }

    fn rows(
        &mut self,
        answer: Option<Result<Vec<tokio_postgres::Row>, tokio_postgres::Error>>,
    ) -> Result<Vec<Row>, SqlError> {
        let rows = self.judged(answer.ok_or(SqlError::Lost)?)?;
        rows.iter().map(row).collect()
    }

    fn batch(&mut self, text: &str) -> Result<(), SqlError> {
        self.run(async |client| client.batch_execute(text).await)
    }

    /// Runs statements and returns the first cell of each row.
    fn cells(&mut self, text: &str) -> Result<Vec<String>, SqlError> {
        let messages = self.run(async |client| client.simple_query(text).await)?;
        Ok(first_cells(&messages))
    }

    fn prepare(&mut self, sql: &str) -> Result<tokio_postgres::Statement, SqlError> {
        match self.statements.get(sql) {
            Some(statement) => Ok(statement.clone()),
            None => self.prepare_text(sql, &for_postgres(sql)),
        }
    }

    /// Prepares SQL that is written for PostgreSQL.
    fn prepare_as_is(&mut self, sql: &str) -> Result<tokio_postgres::Statement, SqlError> {
        match self.statements.get(sql) {
            Some(statement) => Ok(statement.clone()),
            None => self.prepare_text(sql, sql),
        }
    }

    fn prepare_text(
        &mut self,
        key: &str,
        text: &str,
    ) -> Result<tokio_postgres::Statement, SqlError> {
        let statement = self.run(async |client| client.prepare(text).await)?;
        self.statements.insert(key.to_owned(), statement.clone());
        Ok(statement)
    }

    /// Sends the waiting statements together with a last statement. If one of them fails, the last statement fails
    /// too.
    fn after_writes<T>(
        &mut self,
        last: impl AsyncFnOnce(&Client) -> Result<T, tokio_postgres::Error>,
    ) -> Result<T, SqlError> {
        let later = std::mem::take(&mut self.later);
        self.run(async |client| {
            let cells: Vec<_> = later.iter().map(|(_, cells)| references(cells)).collect();
            let writes = later.iter().zip(&cells);
            let writes = writes.map(|((sql, _), cells)| client.execute(sql, cells));
            let (written, last) = join(join_all(writes), last(client)).await;
            written.into_iter().collect::<Result<Vec<_>, _>>()?;
            last
        })
    }

    /// Runs `work` on the connection. A connection that does not answer is closed, and its transaction is lost.
    fn run<T>(
        &mut self,
        work: impl AsyncFnOnce(&Client) -> Result<T, tokio_postgres::Error>,
    ) -> Result<T, SqlError> {
        let client = &self.session.as_ref().ok_or(SqlError::Lost)?.client;
        self.round_trips += 1;
        let answer = self
            .runtime
            .block_on(async { tokio::time::timeout(ANSWER_TIMEOUT, work(client)).await });
        match answer {
            Ok(done) => self.judged(done),
            Err(_) => {
                self.close();
                Err(SqlError::Postgres(
                    "the store's database does not answer".to_owned(),
                    Some(Cause::Away),
                ))
            }
        }
    }

    /// Closes the connection if an error has ended its session.
    fn judged<T>(&mut self, done: Result<T, tokio_postgres::Error>) -> Result<T, SqlError> {
        match done {
            Ok(done) => Ok(done),
            Err(error) if self.is_closed() || ends_session(&error) => {
                debug!(%error, "the connection to the store's database is lost");
                self.close();
                Err(SqlError::Lost)
            }
            Err(error) => Err(failed(&error)),
        }
    }
}
