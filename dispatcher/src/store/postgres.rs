//! The lease store in PostgreSQL, for several dispatchers. A batch of jobs that see the store alone is a
//! transaction that first takes its turn ([`super::turn`]), as SQLite's one thread does. A job about one lease
//! takes a slot, and runs beside others. A connection that is lost fails its transaction and is opened again
//! at the next.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use jiff::Timestamp;
use mayfly_common::sql_session;
use mayfly_protocol::pg_login::Refusal;
use tokio::runtime::Runtime;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};
use tokio_postgres::{Client, SimpleQueryMessage};
use tracing::{debug, info, warn};

use super::health::Cause;
use super::migrations;
use super::postgres_open::{ends_session, is_of_settings, open};
use super::postgres_url::CONNECT_TIMEOUT;
pub(crate) use super::postgres_url::Url;
use super::sql::{Cell, Row, SqlError, for_postgres};
use super::turn;
use crate::store::Role;

/// Longest one statement, and the wait for the other dispatchers' turns.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// Between two looks whether the store has slots.
const LOOK_FOR_SLOTS: Duration = Duration::from_secs(30);
/// How a transaction begins that only reads: all its statements see the same rows.
const READ: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";
/// The pause after a failed connect.
const CONNECT_PAUSE: Duration = Duration::from_millis(500);

/// A connection that comes back by itself, with the runtime it is driven by.
pub(crate) struct Postgres(RefCell<Inner>);

struct Inner {
    role: Role,
    /// Of the session, where it takes one.
    slot: usize,
    /// When it was last seen that the store has no slots.
    unsplit: Option<Instant>,
    url: Url,
    runtime: Runtime,
    client: Option<Client>,
    statements: HashMap<String, tokio_postgres::Statement>,
    failed: Option<Instant>,
    /// Whether it was connected before: of the first time its opener speaks.
    was_connected: bool,
    /// The server's clock less this machine's, in milliseconds.
    offset: Arc<AtomicI64>,
    /// The first query of the last transaction. Each begins with the same, so it is sent with BEGIN.
    first: Option<(String, Vec<Cell>)>,
    is_first: bool,
    ahead: Option<Vec<tokio_postgres::Row>>,
}

pub(super) fn failed(error: &tokio_postgres::Error) -> SqlError {
    // The server's words may repeat a value, but those of ours that are secret are sealed.
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

/// The messages of the driver and of the libraries below it, about sockets and TLS.
fn described(error: &tokio_postgres::Error) -> String {
    match std::error::Error::source(error) {
        Some(inner) => format!("{error}: {inner}"),
        None => error.to_string(),
    }
}

/// Whether another try may succeed: somebody holds a table that is to be changed.
fn of_migration(error: &refinery_core::Error) -> Option<Cause> {
    let refinery_core::error::Kind::Connection(_, source) = error.kind() else {
        return None;
    };
    let state = source.downcast_ref::<tokio_postgres::Error>()?.code()?;
    (*state == SqlState::LOCK_NOT_AVAILABLE).then_some(Cause::Away)
}

impl Postgres {
    /// Connects, and brings the tables to this version's form.
    ///
    /// # Errors
    /// Words for the log; the password is in none.
    pub(super) fn open(url: Url, offset: Arc<AtomicI64>) -> Result<Self, SqlError> {
        // Two dispatchers may start at once on an empty database. A migration ends a transaction of
        // its own, so the turn is held by another connection.
        let mut turn = Inner::new(Role::Alone, url.clone(), offset.clone())?;
        turn.take_turn_to_migrate()?;
        let mut inner = Inner::new(Role::Alone, url, offset)?;
        inner.connect()?;
        let Inner {
            runtime, client, ..
        } = &mut inner;
        let client = client.as_mut().ok_or(SqlError::Lost)?;
        // A dispatcher of the version before may start on tables of the next, in the middle of
        // an upgrade: migrations of the next version only add.
        let migrated = runtime.block_on(async {
            // Migrations name their tables as SQLite's do. `pg_catalog` comes first all the same, and
            // they call nothing that is not exactly one of its functions.
            // Dispatchers of the version before wait for their turn meanwhile. So a table that a dump holds is
            // waited for in short steps: the start tries again.
            let path =
                client.batch_execute("SET search_path = public, pg_temp; SET lock_timeout = '2s'");
            path.await.map_err(|error| failed(&error))?;
            let runner = migrations::postgres()
                .map_err(|error| SqlError::Postgres(error.to_string(), None))?
                .set_abort_missing(false);
            if let Err(error) = runner.run_async(client).await {
                return Err(match client.is_closed() {
                    true => SqlError::Lost,
                    false => SqlError::Postgres(error.to_string(), of_migration(&error)),
                });
            }
            let path = format!("{}SET lock_timeout = '15s'", sql_session::SET_PATH);
            let path = client.batch_execute(&path);
            path.await.map_err(|error| failed(&error))
        });
        migrated?;
        turn.run(async |client| client.batch_execute("COMMIT").await)?;
        Ok(Self(RefCell::new(inner)))
    }

    /// One beside the writer's. It connects at its first transaction.
    ///
    /// # Errors
    /// It cannot have a runtime.
    pub(super) fn beside(role: Role, url: Url, offset: Arc<AtomicI64>) -> Result<Self, SqlError> {
        Ok(Self(RefCell::new(Inner::new(role, url, offset)?)))
    }

    /// Begins a transaction of its role: takes the turn or a slot, and reads the server's clock; or one that
    /// sees the store as it is at its first statement.
    pub(super) fn begin(&self) -> Result<(), SqlError> {
        let mut inner = self.0.borrow_mut();
        let was_connected = inner.client.is_some();
        match inner.begin() {
            // The connection ended while it was idle, which is noticed only now. No transaction was begun.
            Err(SqlError::Lost) if was_connected => inner.begin(),
            begun => begun,
        }
    }

    /// The server's clock, as the last [`Postgres::begin`] read it.
    pub(super) fn now(&self) -> Timestamp {
        let offset = self.0.borrow().offset.load(Ordering::Relaxed);
        Timestamp::now() + jiff::SignedDuration::from_millis(offset)
    }

    /// Ends the transaction that [`Postgres::begin`] began. An error means that nothing of it may
    /// be called done.
    pub(super) fn commit(&self) -> Result<(), SqlError> {
        // In a transaction that failed, COMMIT is a ROLLBACK and no error; another statement is.
        self.batch("SELECT 1; COMMIT")
    }

    /// Whether the connection, and with it the transaction, is gone.
    pub(super) fn is_lost(&self) -> bool {
        self.0
            .borrow()
            .client
            .as_ref()
            .is_none_or(Client::is_closed)
    }

    pub(super) fn batch(&self, sql: &str) -> Result<(), SqlError> {
        let mut inner = self.0.borrow_mut();
        inner.run(async |client| client.batch_execute(sql).await)
    }

    pub(super) fn execute(&self, sql: &str, cells: &[Cell]) -> Result<usize, SqlError> {
        let mut inner = self.0.borrow_mut();
        inner.is_first = false;
        let statement = inner.prepare(sql)?;
        let cells = references(cells);
        let changed = inner.run(async |client| client.execute(&statement, &cells).await)?;
        Ok(usize::try_from(changed).unwrap_or(usize::MAX))
    }

    pub(super) fn query(&self, sql: &str, cells: &[Cell]) -> Result<Vec<Row>, SqlError> {
        let mut inner = self.0.borrow_mut();
        if let Some(rows) = inner.sent_ahead(sql, cells) {
            return rows.iter().map(row).collect();
        }
        let statement = inner.prepare(sql)?;
        let cells = references(cells);
        let rows = inner.run(async |client| client.query(&statement, &cells).await)?;
        rows.iter().map(row).collect()
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
            client: None,
            statements: HashMap::new(),
            failed: None,
            was_connected: false,
            offset,
            first: None,
            is_first: false,
            ahead: None,
        })
    }

    fn begin(&mut self) -> Result<(), SqlError> {
        if self.client.as_ref().is_none_or(Client::is_closed) {
            self.connect_in_slot()?;
        }
        let lock = match self.role {
            Role::Alone => turn::take(),
            Role::Slot => turn::take_slot(self.slot),
            Role::Reads => return self.begun(READ).map(drop),
        };
        let sent = Timestamp::now().as_millisecond();
        let rows = self.begun(&format!(
            "{}WRITE; {lock}; SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint",
            sql_session::BEGIN,
        ))?;
        let heard = Timestamp::now().as_millisecond();
        if let Some(theirs) = rows.last().and_then(|cell| cell.parse::<i64>().ok()) {
            // It was read between the two. A late answer must not set the clock back: leaders and deadlines
            // are judged by it.
            let known = self.offset.load(Ordering::Relaxed);
            let (least, most) = (theirs - heard, theirs - sent);
            let offset = known.clamp(least.min(most), most.max(least));
            self.offset.store(offset, Ordering::Relaxed);
        }
        if rows.first().map(String::as_str) == Some("t") {
            return Ok(());
        }
        // What was read may be older than the turn of the other.
        self.ahead = None;
        let has_turn = match self.role {
            Role::Alone => self.wait_for_older(None),
            // The writer waits.
            Role::Slot | Role::Reads => Err(SqlError::Postgres(
                "a dispatcher of an earlier version has its turn".to_owned(),
                None,
            )),
        };
        has_turn.inspect_err(|_| self.client = None)
    }

    fn connect_in_slot(&mut self) -> Result<(), SqlError> {
        let no_slots = || SqlError::Postgres("the store has no slots yet".to_owned(), None);
        if self.unsplit.is_some_and(|at| at.elapsed() < LOOK_FOR_SLOTS) {
            return Err(no_slots());
        }
        self.connect()?;
        if self.role != Role::Slot {
            return Ok(());
        }
        if self.cells(turn::KIND)?.first().map(String::as_str) != Some("v") {
            self.unsplit = Some(Instant::now());
            self.client = None;
            return Err(no_slots());
        }
        // One more session than slots shares one.
        let chosen = self.cells(&turn::choose())?;
        self.slot = chosen.first().and_then(|n| n.parse().ok()).unwrap_or(0);
        Ok(())
    }

    /// Runs the statements that begin a transaction, and with them its first query, in one round trip. Gives
    /// the first cell of each row of the statements.
    fn begun(&mut self, text: &str) -> Result<Vec<String>, SqlError> {
        (self.is_first, self.ahead) = (true, None);
        let first = self.first.clone();
        let known =
            first.and_then(|(sql, cells)| Some((self.statements.get(&sql)?.clone(), cells)));
        let begun = match &known {
            None => self.cells(text),
            Some((statement, cells)) => {
                let cells = references(cells);
                let both = self.run(async |client| {
                    // Sent in this order. The query waits for the locks of the statements.
                    futures_util::future::try_join(
                        client.simple_query(text),
                        client.query(statement, &cells),
                    )
                    .await
                });
                both.map(|(messages, rows)| {
                    self.ahead = Some(rows);
                    first_cells(&messages)
                })
            }
        };
        // It may stand in a transaction that failed, in which no other can begin.
        begun.inspect_err(|_| self.client = None)
    }

    /// The rows of the first query of a transaction, if it was sent with BEGIN.
    fn sent_ahead(&mut self, sql: &str, cells: &[Cell]) -> Option<Vec<tokio_postgres::Row>> {
        if !std::mem::take(&mut self.is_first) {
            return None;
        }
        let is_same = matches!(&self.first, Some((first, with)) if first == sql && with == cells);
        if !is_same {
            self.first = Some((sql.to_owned(), cells.to_vec()));
        }
        self.ahead.take().filter(|_| is_same)
    }

    /// Connects, makes the table of the turn where it is missing, and takes the turn until the
    /// connection ends.
    fn take_turn_to_migrate(&mut self) -> Result<(), SqlError> {
        self.connect()?;
        while self.cells(turn::KIND)?.is_empty() {
            // Another may make it at the same time.
            let made = self.run(async |client| client.batch_execute(turn::MAKE).await);
            if let Err(error) = made
                && self.cells(turn::KIND)?.is_empty()
            {
                return Err(error);
            }
        }
        let rows = self.cells(&format!(
            "SET idle_in_transaction_session_timeout = '10min'; {}WRITE; {}",
            sql_session::BEGIN,
            turn::take()
        ))?;
        self.wait_for_older(rows.first())?;
        self.split_turn()
    }

    /// Makes slots, where the store has none. Somebody may hold the table up for ever by a statement on it:
    /// then jobs about one lease go on taking turns, until another start.
    fn split_turn(&mut self) -> Result<(), SqlError> {
        if self.cells(turn::KIND)?.first().map(String::as_str) != Some("r") {
            return Ok(());
        }
        self.batch("SAVEPOINT split; SET LOCAL lock_timeout = '3s'")?;
        match self.batch(&turn::split()) {
            Ok(()) => self.batch("RELEASE split; SET LOCAL lock_timeout = '15s'"),
            Err(error) => {
                warn!(%error, "leases are recorded one after another, not side by side, until the next start");
                self.batch("ROLLBACK TO split")
            }
        }
    }

    fn batch(&mut self, text: &str) -> Result<(), SqlError> {
        self.run(async |client| client.batch_execute(text).await)
    }

    /// Waits until no dispatcher of the version before has its turn, where [`turn::take`] says that
    /// one may have it.
    fn wait_for_older(&mut self, taken: Option<&String>) -> Result<(), SqlError> {
        let mut taken = taken.is_some_and(|cell| cell == "t");
        let until = Instant::now() + ANSWER_TIMEOUT;
        while !taken {
            if Instant::now() > until {
                return Err(SqlError::Postgres(
                    "a dispatcher of the earlier version does not end its turn".to_owned(),
                    Some(Cause::Away),
                ));
            }
            std::thread::sleep(turn::LOOK_EVERY);
            let rows = self.cells(&turn::take_from_older())?;
            taken = rows.first().is_some_and(|cell| cell == "t");
        }
        Ok(())
    }

    /// Runs statements and gives the first cell of each row.
    fn cells(&mut self, text: &str) -> Result<Vec<String>, SqlError> {
        let messages = self.run(async |client| client.simple_query(text).await)?;
        Ok(first_cells(&messages))
    }

    fn connect(&mut self) -> Result<(), SqlError> {
        if self.failed.is_some_and(|at| at.elapsed() < CONNECT_PAUSE) {
            return Err(SqlError::Postgres(
                "the store's database is away".to_owned(),
                Some(Cause::Away),
            ));
        }
        self.client = None;
        self.statements.clear();
        self.ahead = None;
        let Url { config, place, .. } = &self.url;
        let opening = async {
            let client = match open(&self.url, None).await {
                Err(error) if is_of_settings(&error) => {
                    let told = [config.get_options(), Some(sql_session::STARTUP_OPTIONS)];
                    let options: Vec<&str> = told.into_iter().flatten().collect();
                    open(&self.url, Some(&options.join(" "))).await
                }
                opened => opened,
            };
            client.map_err(SqlError::from)
        };
        let hosts = u32::try_from(config.get_hosts().len()).unwrap_or(1).max(1);
        let opened = self.runtime.block_on(async {
            let timed = tokio::time::timeout(CONNECT_TIMEOUT * hosts, opening).await;
            let late = || SqlError::Postgres("no answer in time".to_owned(), Some(Cause::Away));
            timed.unwrap_or_else(|_| Err(late()))
        });
        match opened {
            Ok(client) => {
                if self.failed.take().is_some() {
                    info!(place, "the store's database is back");
                }
                self.client = Some(client);
                self.was_connected = true;
                Ok(())
            }
            Err(error) => {
                if self.failed.replace(Instant::now()).is_none() && self.was_connected {
                    warn!(place, %error, "the store's database cannot be reached; trying again");
                }
                let cause = error.cause();
                Err(SqlError::Postgres(format!("{place}: {error}"), cause))
            }
        }
    }

    fn prepare(&mut self, sql: &str) -> Result<tokio_postgres::Statement, SqlError> {
        if let Some(statement) = self.statements.get(sql) {
            return Ok(statement.clone());
        }
        let text = for_postgres(sql);
        let statement = self.run(async |client| client.prepare(&text).await)?;
        self.statements.insert(sql.to_owned(), statement.clone());
        Ok(statement)
    }

    /// Runs something on the connection. One that does not answer is given up, and with it the
    /// transaction.
    fn run<T>(
        &mut self,
        work: impl AsyncFnOnce(&Client) -> Result<T, tokio_postgres::Error>,
    ) -> Result<T, SqlError> {
        let client = self.client.as_ref().ok_or(SqlError::Lost)?;
        let answer = self
            .runtime
            .block_on(async { tokio::time::timeout(ANSWER_TIMEOUT, work(client)).await });
        match answer {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(error)) if client.is_closed() || ends_session(&error) => {
                debug!(%error, "the connection to the store's database is lost");
                self.client = None;
                Err(SqlError::Lost)
            }
            Ok(Err(error)) => Err(failed(&error)),
            Err(_) => {
                self.client = None;
                Err(SqlError::Postgres(
                    "the store's database does not answer".to_owned(),
                    Some(Cause::Away),
                ))
            }
        }
    }
}

fn first_cells(messages: &[SimpleQueryMessage]) -> Vec<String> {
    let cell = |message: &SimpleQueryMessage| match message {
        // Text that is not UTF-8 is not one of the expected words.
        SimpleQueryMessage::Row(row) => row.try_get(0).ok().flatten().map(str::to_owned),
        _ => None,
    };
    messages.iter().filter_map(cell).collect()
}

fn references(cells: &[Cell]) -> Vec<&(dyn ToSql + Sync)> {
    cells
        .iter()
        .map(|cell| cell as &(dyn ToSql + Sync))
        .collect()
}

fn row(row: &tokio_postgres::Row) -> Result<Row, SqlError> {
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
