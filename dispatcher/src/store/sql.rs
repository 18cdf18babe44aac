//! SQL for both kinds of store: a connection like rusqlite's, to SQLite or PostgreSQL. So every query of the store
//! is written once, in SQLite's SQL. `postgres/dialect.rs` translates it for PostgreSQL (placeholders, index hints).

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
    /// The query found no row.
    #[error("no row")]
    NoRow,
    /// A column has another type than the expected one. The value is its position.
    #[error("column {0} has an unexpected type")]
    Type(usize),
    /// A column has another type than the expected one, or is absent. The value is its name.
    #[error("column {0} is absent or has an unexpected type")]
    Column(&'static str),
    #[error("{0}")]
    Sqlite(#[from] rusqlite::Error),
    /// PostgreSQL's message, and the cause if the server is at fault.
    #[error("{0}")]
    Postgres(String, Option<Cause>),
    /// The connection to PostgreSQL is lost, and its transaction with it.
    #[error("the connection to the store's database is lost")]
    Lost,
}

impl SqlError {
    /// The cause in the disk or the server. `None`: the statement itself is wrong.
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

/// The connection to SQLite or PostgreSQL.
pub(super) enum Database {
    Sqlite(rusqlite::Connection),
    Postgres(Box<Postgres>),
}

/// The store's database, and the keys that seal and authenticate its rows.
pub(super) struct Connection {
    database: Database,
    /// `None` until the master key is known.
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
    /// A connection whose rows cannot be used yet.
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

    /// Makes this program count the leases of a store in SQLite, see [`super::counts`].
    pub(super) fn count_without_triggers(&mut self) -> Result<(), SqlError> {
        if let Database::Sqlite(connection) = &self.database {
            connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false)?;
            self.counts = Some(Counts::default());
        }
        Ok(())
    }

    /// Records that a statement has changed the number of a pool's leases in a state by `n`.
    pub(super) fn counted(&self, pool: &PoolName, state: State, n: i64) {
        if let Some(counts) = &self.counts {
            counts.add(pool, state, n);
        }
    }

    /// Whether [`Connection::counted`] has an effect.
    pub(super) fn is_counting(&self) -> bool {
        self.counts.is_some()
    }

    /// Writes the counts so far. A job that reads counts calls it first.
    pub(super) fn write_counts(&self) -> Result<(), SqlError> {
        for ((pool, state), n) in self.counts.iter().flat_map(Counts::take) {
            let values = params![pool.as_str(), state.as_str(), n];
            self.prepare(COUNT)?.execute(values)?;
        }
        Ok(())
    }

    /// Ends a job of this transaction. `is_undone`: its changes are undone.
    pub(super) fn end_job(&self, is_undone: bool) {
        if let Some(counts) = &self.counts {
            counts.end_job(is_undone);
        }
    }

    /// Whether this is the first call in its transaction, so no other job has changed anything.
    pub(super) fn is_untouched(&self) -> bool {
        self.untouched.take()
    }

    /// A connection besides the writer's. Its failures are counted in `health`.
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

    /// The end of a query whose rows must not change until the job ends.
    pub(super) fn for_update(&self) -> &'static str {
        self.role.for_update()
    }

    /// Records that the job of this transaction failed, so nothing of it is committed.
    pub(super) fn fail(&self) {
        self.failed.set(true);
    }

    /// Whether [`Connection::fail`] was called since the last call of this function.
    pub(super) fn has_failed(&self) -> bool {
        self.failed.take()
    }

    /// Counts a job, which is a part of a transaction or all of it.
    pub(super) fn job(&self) {
        self.health.tally.job();
    }

    /// The health of this connection. Each failure of a statement is counted there.
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

    /// Makes its rows usable with these keys.
    pub(super) fn unlock(&mut self, ring: Keyring) {
        self.ring = Some(ring);
    }

    /// The master key, and what notices its changes.
    ///
    /// # Errors
    /// The connection is locked, which is a mistake in this program.
    pub(super) fn ring(&self) -> Result<&Keyring, StoreError> {
        let locked = || StoreError::Unavailable("it is locked".to_owned());
        self.ring.as_ref().ok_or_else(locked)
    }

    /// Opens and seals the columns of its rows. Each connection notices changes of the master key by itself.
    ///
    /// # Errors
    /// As [`Connection::ring`].
    pub(super) fn sealer(&self) -> Result<&Sealer, StoreError> {
        Ok(&self.ring()?.sealer)
    }

    /// The keys that seal and authenticate its rows now.
    ///
    /// # Errors
    /// As [`Connection::ring`].
    pub(super) fn sealing(&self) -> Result<Sealing, StoreError> {
        Ok(self.ring()?.sealer.sealing())
    }

    /// The store's clock. With several dispatchers it is that of their database.
    pub(super) fn now(&self) -> jiff::Timestamp {
        match &self.database {
            Database::Sqlite(_) => jiff::Timestamp::now(),
            Database::Postgres(connection) => connection.now(),
        }
    }

    /// A statement that is kept prepared for later calls.
    pub(super) fn prepare(&self, sql: &str) -> Result<Statement<'_>, SqlError> {
        Ok(Statement {
            connection: self,
            sql: sql.to_owned(),
        })
    }

    /// Runs a statement. Returns the number of changed rows.
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

    /// Runs statements without parameters and rows.
    pub(super) fn execute_batch(&self, sql: &str) -> Result<(), SqlError> {
        self.health.tally.statement();
        self.noted(match &self.database {
            Database::Sqlite(connection) => connection.execute_batch(sql).map_err(SqlError::from),
            Database::Postgres(connection) => connection.batch(sql),
        })
    }

    /// Begins a transaction of its role. In PostgreSQL the queries `ahead` are sent with BEGIN, in this order, and
    /// the job gets their answers when it asks for them. They must not include a query whose answer an earlier
    /// statement of the job could change.
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

    /// Rolls a transaction back. If that fails, the next transaction opens the connection again.
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

    /// Commits the transaction. After an error none of its jobs counts as done.
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

    /// Whether the transaction has ended by itself. SQLite rolls back a whole transaction after a full disk or an
    /// I/O error; PostgreSQL does when its connection is lost.
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

    /// Empties SQLite's write-ahead log into the database file, before the process ends.
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
    /// Runs it. Returns the number of changed rows.
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

    /// Runs a statement whose result is not needed. In a slot it is sent with the next statement or with COMMIT,
    /// which fails if this statement does.
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

    /// The first row of the result. [`SqlError::NoRow`]: there is none.
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
            // The store has no column of this type.
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
