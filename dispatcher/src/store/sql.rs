//! SQL on either store: a connection in the way of rusqlite's, over SQLite or PostgreSQL, so that
//! every query of the store is written once. SQL is SQLite's; `postgres/dialect.rs` translates what PostgreSQL
//! writes otherwise (placeholders, index hints).

use mayfly_protocol::lease::State;
use mayfly_protocol::names::PoolName;
use rusqlite::config::DbConfig;
use rusqlite::types::ValueRef;

use std::sync::Arc;

pub(super) use super::cell::{Cell, FromCell, NONE, Params, Query, Row, params};
use super::counts::Counts;
use super::health::{Cause, Health};
use super::keys::Keyring;
use super::postgres::Postgres;
#[cfg(test)]
pub(super) use super::postgres::for_postgres;
use super::sealer::{Sealer, Sealing};
use super::{Role, StoreError};

/// Changes the count of a pool and a state.
const COUNT: &str = "INSERT INTO lease_counts (pool, state, n) VALUES (?1, ?2, ?3)
    ON CONFLICT (pool, state) DO UPDATE SET n = n + excluded.n";

/// Why a statement failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum SqlError {
    /// There is no such row.
    #[error("no row")]
    NoRow,
    /// A column holds something else than is asked for.
    #[error("column {0} has another type")]
    Type(usize),
    /// The same, where its name is known.
    #[error("column {0} has another type, or is absent")]
    Column(&'static str),
    #[error("{0}")]
    Sqlite(#[from] rusqlite::Error),
    /// PostgreSQL's, and what it says about the server.
    #[error("{0}")]
    Postgres(String, Option<Cause>),
    /// The connection to PostgreSQL is gone, and the transaction with it.
    #[error("the connection to the store's database is lost")]
    Lost,
}

impl SqlError {
    /// Whether the disk or the server is the cause, and which; `None` if the statement is.
    pub(super) fn cause(&self) -> Option<Cause> {
        match self {
            Self::NoRow | Self::Type(_) | Self::Column(_) => None,
            Self::Sqlite(error) => Cause::of_sqlite(error),
            Self::Postgres(_, cause) => *cause,
            Self::Lost => Some(Cause::Away),
        }
    }
}

impl From<SqlError> for StoreError {
    fn from(error: SqlError) -> Self {
        tracing::error!(%error, "the lease store failed");
        Self::Unavailable(error.to_string())
    }
}

/// Where the store is kept.
pub(super) enum Database {
    Sqlite(rusqlite::Connection),
    Postgres(Box<Postgres>),
}

/// The store's database, and what its rows are sealed and authenticated with.
pub(super) struct Connection {
    database: Database,
    /// None until the master key is known.
    ring: Option<Keyring>,
    health: Arc<Health>,
    role: Role,
    /// Whether the job of this transaction failed.
    failed: std::cell::Cell<bool>,
    /// Whether the transaction has done nothing yet.
    untouched: std::cell::Cell<bool>,
    /// `None`: triggers count leases.
    counts: Option<Counts>,
}

/// A statement; the store keeps it prepared.
pub(super) struct Statement<'c> {
    connection: &'c Connection,
    sql: String,
}

impl Connection {
    /// One whose rows cannot be used yet.
    pub(super) fn locked(database: Database) -> Self {
        Self {
            database,
            ring: None,
            health: Arc::default(),
            role: Role::Alone,
            failed: Default::default(),
            untouched: Default::default(),
            counts: None,
        }
    }

    /// From now on the leases of a store in SQLite are counted by this program, see [`super::counts`].
    pub(super) fn count_without_triggers(&mut self) -> Result<(), SqlError> {
        if let Database::Sqlite(connection) = &self.database {
            connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false)?;
            self.counts = Some(Counts::default());
        }
        Ok(())
    }

    /// A statement of this transaction has changed the number of leases of a pool in a state by `n`.
    pub(super) fn counted(&self, pool: &PoolName, state: State, n: i64) {
        if let Some(counts) = &self.counts {
            counts.add(pool, state, n);
        }
    }

    /// Whether [`Connection::counted`] has an effect.
    pub(super) fn is_counting(&self) -> bool {
        self.counts.is_some()
    }

    /// Writes the counts up to now. A job that reads counts does it before.
    pub(super) fn write_counts(&self) -> Result<(), SqlError> {
        for ((pool, state), n) in self.counts.iter().flat_map(Counts::take) {
            let values = params![pool.as_str(), state.as_str(), n];
            self.prepare(COUNT)?.execute(values)?;
        }
        Ok(())
    }

    /// A job of this transaction is done, or undone.
    pub(super) fn end_job(&self, is_undone: bool) {
        if let Some(counts) = &self.counts {
            counts.end_job(is_undone);
        }
    }

    /// Whether this is the first call in its transaction: no other job has changed anything.
    pub(super) fn is_untouched(&self) -> bool {
        self.untouched.take()
    }

    /// One beside the writer's. Its failures are noted in `health`.
    pub(super) fn beside(role: Role, database: Database, health: Arc<Health>) -> Self {
        Self {
            health,
            role,
            ..Self::locked(database)
        }
    }

    pub(super) fn role(&self) -> Role {
        self.role
    }

    /// What a query ends with whose rows a job relies on until its end.
    pub(super) fn for_update(&self) -> &'static str {
        self.role.for_update()
    }

    /// The job of this transaction failed: nothing of it is to be committed.
    pub(super) fn fail(&self) {
        self.failed.set(true);
    }

    /// Whether [`Connection::fail`] was called since the last call of this.
    pub(super) fn has_failed(&self) -> bool {
        self.failed.take()
    }

    /// Counts a job, which is a part of a transaction or all of it.
    pub(super) fn job(&self) {
        self.health.tally.job();
    }

    /// How it does; each failure of a statement is noted there.
    pub(super) fn health(&self) -> Arc<Health> {
        self.health.clone()
    }

    fn noted<T>(&self, done: Result<T, SqlError>) -> Result<T, SqlError> {
        if let Database::Postgres(connection) = &self.database {
            let waits = connection.take_round_trips();
            self.health.tally.round_trips(waits);
        }
        if let Some(cause) = done.as_ref().err().and_then(SqlError::cause) {
            self.health.failed(cause);
        }
        done
    }

    /// From now on its rows can be used.
    pub(super) fn unlock(&mut self, ring: Keyring) {
        self.ring = Some(ring);
    }

    /// The master key, as it is followed.
    ///
    /// # Errors
    /// It is locked, by a mistake in this program.
    pub(super) fn ring(&self) -> Result<&Keyring, StoreError> {
        let locked = || StoreError::Unavailable("it is locked".to_owned());
        self.ring.as_ref().ok_or_else(locked)
    }

    /// Opens and seals the columns of its rows. Each connection follows the master key by itself.
    ///
    /// # Errors
    /// As [`Connection::ring`].
    pub(super) fn sealer(&self) -> Result<&Sealer, StoreError> {
        Ok(&self.ring()?.sealer)
    }

    /// What its rows are sealed and authenticated with at present.
    ///
    /// # Errors
    /// As [`Connection::ring`].
    pub(super) fn sealing(&self) -> Result<Sealing, StoreError> {
        Ok(self.ring()?.sealer.sealing())
    }

    /// The store's clock: with several dispatchers, that of their database.
    pub(super) fn now(&self) -> jiff::Timestamp {
        match &self.database {
            Database::Sqlite(_) => jiff::Timestamp::now(),
            Database::Postgres(connection) => connection.now(),
        }
    }

    /// A statement that will be used again.
    pub(super) fn prepare(&self, sql: &str) -> Result<Statement<'_>, SqlError> {
        Ok(Statement {
            connection: self,
            sql: sql.to_owned(),
        })
    }

    /// Runs a statement; how many rows it changed.
    pub(super) fn execute(&self, sql: &str, params: impl Params) -> Result<usize, SqlError> {
        self.prepare(sql)?.execute(params)
    }

    /// The rows of a query.
    pub(super) fn ask(&self, query: Query) -> Result<Vec<Row>, SqlError> {
        self.prepare(&query.sql)?.query(query.cells)
    }

    /// The first row of a query.
    pub(super) fn query_row<T>(
        &self,
        sql: &str,
        params: impl Params,
        read: impl FnOnce(&Row) -> Result<T, SqlError>,
    ) -> Result<T, SqlError> {
        self.prepare(sql)?.query_row(params, read)
    }

    /// Statements without parameters and rows.
    pub(super) fn execute_batch(&self, sql: &str) -> Result<(), SqlError> {
        self.health.tally.statement();
        self.noted(match &self.database {
            Database::Sqlite(connection) => connection.execute_batch(sql).map_err(SqlError::from),
            Database::Postgres(connection) => connection.batch(sql),
        })
    }

    /// Begins a transaction of its role. In PostgreSQL these queries are sent with BEGIN, in this order. They are
    /// answered when they are asked for. A query that an earlier statement of the job could change must not be
    /// among them.
    pub(super) fn begin(&self, ahead: &[Query]) -> Result<(), SqlError> {
        self.failed.set(false);
        self.untouched.set(true);
        if let Some(counts) = &self.counts {
            counts.forget();
        }
        self.health.tally.statement();
        self.noted(match (&self.database, self.role) {
            (Database::Sqlite(connection), role) => {
                let begin = match role {
                    Role::Reads => "BEGIN",
                    Role::Alone | Role::Slot => "BEGIN IMMEDIATE",
                };
                connection.execute_batch(begin).map_err(SqlError::from)
            }
            (Database::Postgres(connection), _) => connection.begin(ahead),
        })
    }

    /// Ends a transaction without its changes. A connection that cannot is opened again at the next.
    pub(super) fn roll_back(&self) {
        if self.is_autocommit() {
            return;
        }
        let _ = match &self.database {
            Database::Sqlite(_) => self.execute_batch("ROLLBACK"),
            Database::Postgres(connection) => {
                self.health.tally.statement();
                self.noted(connection.roll_back())
            }
        };
    }

    /// Commits it. An error means that nothing of it may be called done.
    pub(super) fn commit(&self) -> Result<(), SqlError> {
        self.write_counts()?;
        self.health.tally.statement();
        self.health.tally.transaction();
        self.noted(match &self.database {
            Database::Sqlite(connection) => {
                connection.execute_batch("COMMIT").map_err(SqlError::from)
            }
            Database::Postgres(connection) => connection.commit(),
        })
    }

    /// Whether the server has ended the transaction that was begun. SQLite rolls back a whole transaction after a full
    /// disk or an I/O error; PostgreSQL does when its connection is lost.
    pub(super) fn is_autocommit(&self) -> bool {
        match &self.database {
            Database::Sqlite(connection) => connection.is_autocommit(),
            Database::Postgres(connection) => connection.is_lost(),
        }
    }

    /// Whether other dispatchers may use this store too.
    pub(super) fn is_shared(&self) -> bool {
        matches!(self.database, Database::Postgres(_))
    }

    /// Before the process ends: empties SQLite's write-ahead log into the database file.
    pub(super) fn tidy(&self) -> Result<(), SqlError> {
        match &self.database {
            Database::Sqlite(connection) => {
                Ok(connection.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)")?)
            }
            Database::Postgres(_) => Ok(()),
        }
    }
}

impl Statement<'_> {
    /// How many rows it changed.
    pub(super) fn execute(&self, params: impl Params) -> Result<usize, SqlError> {
        let cells = params.cells();
        self.connection.health.tally.text(&self.sql);
        self.connection.noted(match &self.connection.database {
            Database::Sqlite(connection) => connection
                .prepare_cached(&self.sql)
                .and_then(|mut statement| statement.execute(rusqlite::params_from_iter(cells)))
                .map_err(SqlError::from),
            Database::Postgres(connection) => connection.execute(&self.sql, &cells),
        })
    }

    /// Runs a statement of which nothing is asked. In a slot it is sent with the next statement or with COMMIT,
    /// which fails if this one does.
    pub(super) fn write(&self, params: impl Params) -> Result<(), SqlError> {
        match (&self.connection.database, self.connection.role) {
            (Database::Postgres(connection), Role::Slot) => {
                self.connection.health.tally.text(&self.sql);
                let kept = connection.write_later(&self.sql, params.cells());
                self.connection.noted(kept)
            }
            (Database::Sqlite(_) | Database::Postgres(_), _) => self.execute(params).map(drop),
        }
    }

    pub(super) fn query(&self, params: impl Params) -> Result<Vec<Row>, SqlError> {
        let cells = params.cells();
        self.connection.health.tally.text(&self.sql);
        self.connection.noted(match &self.connection.database {
            Database::Sqlite(connection) => {
                sqlite_rows(connection, &self.sql, cells).map_err(SqlError::from)
            }
            Database::Postgres(connection) => connection.query(&self.sql, &cells),
        })
    }

    /// The first row; [`SqlError::NoRow`] without one.
    pub(super) fn query_row<T>(
        &self,
        params: impl Params,
        read: impl FnOnce(&Row) -> Result<T, SqlError>,
    ) -> Result<T, SqlError> {
        let rows = self.query(params)?;
        read(rows.first().ok_or(SqlError::NoRow)?)
    }
}

fn sqlite_rows(
    connection: &rusqlite::Connection,
    sql: &str,
    cells: Vec<Cell>,
) -> Result<Vec<Row>, rusqlite::Error> {
    let mut statement = connection.prepare_cached(sql)?;
    let columns = statement.column_count();
    let mut rows = statement.query(rusqlite::params_from_iter(cells))?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        let cells = (0..columns).map(|n| Ok(Cell::from(row.get_ref(n)?)));
        found.push(Row(cells.collect::<Result<_, rusqlite::Error>>()?));
    }
    Ok(found)
}

impl From<ValueRef<'_>> for Cell {
    fn from(value: ValueRef<'_>) -> Self {
        match value {
            ValueRef::Null => Self::Null,
            ValueRef::Integer(number) => Self::Int(number),
            // No column of ours is one.
            ValueRef::Real(_) => Self::Null,
            ValueRef::Text(text) => Self::Text(String::from_utf8_lossy(text).into_owned()),
            ValueRef::Blob(bytes) => Self::Blob(bytes.to_vec()),
        }
    }
}

impl rusqlite::ToSql for Cell {
    fn to_sql(&self) -> rusqlite::Result<rusqlite::types::ToSqlOutput<'_>> {
        use rusqlite::types::ToSqlOutput;
        Ok(ToSqlOutput::Borrowed(match self {
            Self::Null => ValueRef::Null,
            Self::Int(number) => ValueRef::Integer(*number),
            Self::Text(text) => ValueRef::Text(text.as_bytes()),
            Self::Blob(bytes) => ValueRef::Blob(bytes),
        }))
    }
}
