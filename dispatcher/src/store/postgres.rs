//! The lease store in PostgreSQL, for several dispatchers. A batch of jobs that see the store alone is a
//! transaction that first takes its turn ([`super::turn`]), as SQLite's one thread does. A job about one lease
//! takes a slot, and runs beside others. A connection that is lost fails its transaction and is opened again
//! at the next.

use std::cell::RefCell;
use std::collections::HashMap;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_util::future::{join, join_all};
use jiff::Timestamp;
use mayfly_common::sql_session;
use mayfly_protocol::pg_login::Refusal;
use tokio::runtime::Runtime;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tracing::{debug, info, warn};

use super::health::Cause;
use super::migrations;
use super::postgres_cells::{first_cells, references, row};
use super::postgres_open::{Session, ends_session, is_of_settings, open};
use super::postgres_url::CONNECT_TIMEOUT;
pub(crate) use super::postgres_url::Url;
use super::sql::{Cell, Query, Row, SqlError, for_postgres};
use super::turn;
use crate::store::Role;

/// Longest one statement, and the wait for the other dispatchers' turns.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// The longest time in which the server gives the locks of a turn on.
const HANDOVER: Duration = Duration::from_millis(500);
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
    session: Option<Session>,
    statements: HashMap<String, tokio_postgres::Statement>,
    failed: Option<Instant>,
    /// Whether it was connected before: of the first time its opener speaks.
    was_connected: bool,
    /// The server's clock less this machine's, in milliseconds.
    offset: Arc<AtomicI64>,
    /// Answers to queries that were sent with BEGIN and are not asked for yet.
    ahead: Vec<(Query, Result<Vec<Row>, SqlError>)>,
    /// Statements that are sent with the next one.
    later: Vec<(tokio_postgres::Statement, Vec<Cell>)>,
    /// Waits for the server so far.
    round_trips: u64,
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
            runtime, session, ..
        } = &mut inner;
        let client = &mut session.as_mut().ok_or(SqlError::Lost)?.client;
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
    /// sees the store as it is at its first statement. The queries `ahead` are sent with BEGIN, in one round
    /// trip, and run one after another. The job gets their answers when it asks for them.
    pub(super) fn begin(&self, ahead: &[Query]) -> Result<(), SqlError> {
        let mut inner = self.0.borrow_mut();
        let was_connected = inner.session.is_some();
        match inner.begin(ahead) {
            // The connection ended while it was idle, which is noticed only now. No transaction was begun.
            Err(SqlError::Lost) if was_connected => inner.begin(ahead),
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
        self.0.borrow().is_closed()
    }

    /// Ends a transaction without its changes.
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
        // What was read before may be different now.
        inner.ahead.clear();
        let statement = inner.prepare(sql)?;
        let cells = references(cells);
        let changed =
            inner.after_writes(async |client| client.execute(&statement, &cells).await)?;
        Ok(usize::try_from(changed).unwrap_or(usize::MAX))
    }

    /// Runs a statement together with the next one or with COMMIT, in one round trip. If it fails, that one fails.
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

    /// Waits for the server since the last call of this.
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
            statements: HashMap::new(),
            failed: None,
            was_connected: false,
            offset,
            ahead: Vec::new(),
            later: Vec::new(),
            round_trips: 0,
        })
    }

    fn begin(&mut self, ahead: &[Query]) -> Result<(), SqlError> {
        if self.is_closed() {
            self.connect_in_slot()?;
        }
        let (begin, look) = match self.role {
            Role::Alone => (turn::take(), turn::take_from_older()),
            Role::Slot => (turn::take_slot(self.slot), turn::take_beside_older()),
            Role::Reads => return self.begun(READ, None, ahead).map(drop),
        };
        let begin = format!("{}WRITE; {begin}", sql_session::BEGIN);
        let sent = Timestamp::now().as_millisecond();
        let found = self.begun(&begin, Some(&look), ahead)?;
        let heard = Timestamp::now().as_millisecond();
        let found = found.first().ok_or(SqlError::NoRow)?;
        let (has_turn, theirs): (bool, i64) = (found.get(0)?, found.get(1)?);
        // It was read between the two. A late answer must not set the clock back: leaders and deadlines
        // are judged by it.
        let known = self.offset.load(Ordering::Relaxed);
        let (least, most) = (theirs - heard, theirs - sent);
        let offset = known.clamp(least.min(most), most.max(least));
        self.offset.store(offset, Ordering::Relaxed);
        if has_turn {
            return Ok(());
        }
        // What was read may be older than the turn of the other.
        self.ahead.clear();
        let within = match self.role {
            Role::Alone => ANSWER_TIMEOUT,
            // The server gives the lock of a slot on before that of the version two before. The writer waits for
            // longer.
            Role::Slot | Role::Reads => HANDOVER,
        };
        self.wait_for_older(&look, within)
            .inspect_err(|_| self.close())
    }

    fn is_closed(&self) -> bool {
        self.session
            .as_ref()
            .is_none_or(|session| session.client.is_closed())
    }

    /// Gives up the connection, and with it the transaction.
    fn close(&mut self) {
        if let Some(session) = self.session.take() {
            session.close(&self.runtime);
        }
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
            self.close();
            return Err(no_slots());
        }
        // One more session than slots shares one.
        let chosen = self.cells(&turn::choose())?;
        self.slot = chosen.first().and_then(|n| n.parse().ok()).unwrap_or(0);
        Ok(())
    }

    /// Runs the statements that begin a transaction, then `look`, whose rows it gives, and then the queries
    /// `ahead`: all in one round trip.
    fn begun(
        &mut self,
        begin: &str,
        look: Option<&str>,
        ahead: &[Query],
    ) -> Result<Vec<Row>, SqlError> {
        self.later.clear();
        self.ahead.clear();
        let mut statements = Vec::new();
        if let Some(look) = look {
            statements.push((self.prepare_as_is(look)?, Vec::new()));
        }
        for query in ahead {
            statements.push((self.prepare(&query.sql)?, references(&query.cells)));
        }
        let (begun, answers) = self.run(async |client| {
            // Sent in this order. The queries wait for the locks of the first statements.
            let queries = statements
                .iter()
                .map(|(sql, cells)| client.query(sql, cells));
            Ok(join(client.batch_execute(begin), join_all(queries)).await)
        })?;
        let mut answers = answers.into_iter();
        let looked = self.judged(begun).and_then(|()| match look {
            Some(_) => self.rows(answers.next()),
            None => Ok(Vec::new()),
        });
        for query in ahead {
            // One that failed is the failure of the job that asks for it.
            match self.rows(answers.next()) {
                Err(SqlError::Lost) => return Err(SqlError::Lost),
                answer => self.ahead.push((query.clone(), answer)),
            }
        }
        // It may stand in a transaction that failed, in which no other can begin.
        looked.inspect_err(|_| self.close())
    }

    fn rows(
        &mut self,
        answer: Option<Result<Vec<tokio_postgres::Row>, tokio_postgres::Error>>,
    ) -> Result<Vec<Row>, SqlError> {
        let rows = self.judged(answer.ok_or(SqlError::Lost)?)?;
        rows.iter().map(row).collect()
    }

    /// Sends ROLLBACK without a wait. Its answer is read with that of the next BEGIN.
    fn send_rollback(&mut self) {
        let Some(Session { client, .. }) = &self.session else {
            return;
        };
        self.runtime.block_on(async {
            let mut sent = pin!(client.batch_execute("ROLLBACK"));
            // The first poll gives it to the connection, whose task then writes it.
            std::future::poll_fn(|context| {
                let _ = sent.as_mut().poll(context);
                Poll::Ready(())
            })
            .await;
            tokio::task::yield_now().await;
        });
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
        self.batch(&format!(
            "SET idle_in_transaction_session_timeout = '10min'; {}WRITE; {}",
            sql_session::BEGIN,
            turn::take(),
        ))?;
        self.wait_for_older(&turn::take_from_older(), ANSWER_TIMEOUT)?;
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

    /// Waits until `look`, of [`turn`], says that no dispatcher of the version two before has its turn.
    fn wait_for_older(&mut self, look: &str, within: Duration) -> Result<(), SqlError> {
        let until = Instant::now() + within;
        loop {
            let found = self.cells(look)?;
            if found.first().is_some_and(|cell| cell == "1") {
                return Ok(());
            }
            if Instant::now() > until {
                return Err(SqlError::Postgres(
                    "a dispatcher of an earlier version does not end its turn".to_owned(),
                    Some(Cause::Away),
                ));
            }
            std::thread::sleep(turn::LOOK_EVERY);
        }
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
        self.close();
        self.statements.clear();
        let Url { config, place, .. } = &self.url;
        let opening = async {
            let session = match open(&self.url, None).await {
                Err(error) if is_of_settings(&error) => {
                    let told = [config.get_options(), Some(sql_session::STARTUP_OPTIONS)];
                    let options: Vec<&str> = told.into_iter().flatten().collect();
                    open(&self.url, Some(&options.join(" "))).await
                }
                opened => opened,
            };
            session.map_err(SqlError::from)
        };
        let hosts = u32::try_from(config.get_hosts().len()).unwrap_or(1).max(1);
        let opened = self.runtime.block_on(async {
            let timed = tokio::time::timeout(CONNECT_TIMEOUT * hosts, opening).await;
            let late = || SqlError::Postgres("no answer in time".to_owned(), Some(Cause::Away));
            timed.unwrap_or_else(|_| Err(late()))
        });
        match opened {
            Ok(session) => {
                if self.failed.take().is_some() {
                    info!(place, "the store's database is back");
                }
                self.session = Some(session);
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

    /// Sends the statements that wait, and with them the last one. If one of them fails, so does the last.
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

    /// Runs something on the connection. One that does not answer is given up, and with it the
    /// transaction.
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

    /// An error that ends the session ends the connection too.
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
