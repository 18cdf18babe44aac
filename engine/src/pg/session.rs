//! Connections to PostgreSQL servers: opened when needed, shared for a moment, gone at rest (an
//! idle admin connection would keep its database from being dropped). And the one place where a
//! driver's error becomes a failure of ours.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use mayfly_common::target::{SslMode, Target};
use mayfly_common::task::{Failure, FailureCode};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};
use tokio_postgres_rustls::MakeRustlsConnect;
use tracing::debug;

use super::sql;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest a statement may run, and wait for a lock. On the server, per statement.
pub(crate) const STATEMENT_TIMEOUT: Duration = Duration::from_secs(30);
pub(crate) const LOCK_TIMEOUT: Duration = Duration::from_secs(3);
/// Beyond the server's own limit, after which the connection is given up.
const ANSWER_GRACE: Duration = Duration::from_secs(5);
/// How long an unused connection is kept, and how many of one kind.
const IDLE_KEEP: Duration = Duration::from_secs(1);
const IDLE_MAX: usize = 8;

/// The connections of this engine, kept for a moment between two uses.
#[derive(Default)]
pub(crate) struct Servers {
    idle: Mutex<HashMap<Key, Vec<(Instant, Connected)>>>,
}

/// Same server, admin, credentials and database.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    target: String,
    database: String,
}

/// What is known of the other end.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    /// Major version, 14 and later.
    pub(crate) version: u32,
    /// Whether the admin is a superuser.
    pub(crate) superuser: bool,
    /// Which server this is, wherever it is reached.
    pub(crate) identity: String,
    /// This machine's clock less the server's, in seconds, when the connection was made.
    pub(crate) clock_skew: f64,
}

struct Connected {
    client: Client,
    facts: Arc<Facts>,
}

/// A connection in use. Given back with [`Session::release`]; dropped, it is closed, and with it
/// whatever transaction was open.
pub(crate) struct Session<'s> {
    connected: Connected,
    key: Key,
    servers: &'s Servers,
    fresh: bool,
    /// A rollback failed: a transaction may still be open.
    unsound: AtomicBool,
}

/// Rows as text, of all statements of a query.
pub(crate) type Rows = Vec<Vec<Option<String>>>;

/// Why a statement failed.
#[derive(Debug, Clone)]
pub(crate) struct SqlError {
    state: Option<SqlState>,
    message: String,
    /// The connection is of no more use.
    lost: bool,
}

impl SqlError {
    /// Something of ours that a second look will set right.
    pub(crate) fn passing(message: &str) -> Self {
        Self {
            state: Some(SqlState::T_R_SERIALIZATION_FAILURE),
            message: message.to_owned(),
            lost: false,
        }
    }

    /// The SQLSTATE is one of these.
    pub(crate) fn is(&self, states: &[SqlState]) -> bool {
        self.state
            .as_ref()
            .is_some_and(|state| states.contains(state))
    }

    /// SQLSTATE as text, for our own codes.
    pub(crate) fn code(&self) -> &str {
        self.state.as_ref().map_or("", SqlState::code)
    }

    /// The same statement may well succeed in a moment.
    pub(crate) fn is_passing(&self) -> bool {
        self.is(&[
            SqlState::INTERNAL_ERROR, // "tuple concurrently updated"
            SqlState::T_R_DEADLOCK_DETECTED,
            SqlState::T_R_SERIALIZATION_FAILURE,
            SqlState::LOCK_NOT_AVAILABLE,
        ])
    }

    /// The connection went away.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost
            || self.is(&[
                SqlState::ADMIN_SHUTDOWN,
                SqlState::CRASH_SHUTDOWN,
                SqlState::CANNOT_CONNECT_NOW,
            ])
    }

    /// As a failure for the caller.
    pub(crate) fn into_failure(self, doing: &str) -> Failure {
        let code = if self.is_lost() {
            FailureCode::DatabaseUnreachable
        } else {
            match &self.state {
                Some(s) if *s == SqlState::INSUFFICIENT_PRIVILEGE => FailureCode::AdminLacksRights,
                Some(s)
                    if *s == SqlState::UNDEFINED_OBJECT
                        || *s == SqlState::UNDEFINED_TABLE
                        || *s == SqlState::UNDEFINED_FUNCTION
                        || *s == SqlState::INVALID_SCHEMA_NAME
                        || *s == SqlState::INVALID_CATALOG_NAME =>
                {
                    FailureCode::NoSuchObject
                }
                _ => FailureCode::StatementFailed,
            }
        };
        let state = match self.code() {
            "" => String::new(),
            state => format!(" (SQLSTATE {state})"),
        };
        Failure::new(code, format!("{doing}: {}{state}", self.message))
    }
}

impl From<tokio_postgres::Error> for SqlError {
    fn from(error: tokio_postgres::Error) -> Self {
        match error.as_db_error() {
            Some(db) => Self {
                state: Some(db.code().clone()),
                message: db.message().to_owned(),
                lost: matches!(db.severity(), "FATAL" | "PANIC"),
            },
            None => Self {
                state: None,
                message: describe(&error),
                lost: true,
            },
        }
    }
}

/// The driver's words and those of what it rests on. They are about sockets and TLS; neither
/// holds a statement.
fn describe(error: &tokio_postgres::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        source = inner.source();
    }
    text
}

impl Servers {
    /// A connection to a database of the target, as its admin.
    ///
    /// # Errors
    /// `database_unreachable`, `database_refused_login`, `no_such_object` (no such database).
    pub(crate) async fn session(
        &self,
        target: &Target,
        database: &str,
    ) -> Result<Session<'_>, Failure> {
        let key = Key {
            target: target_key(target),
            database: database.to_owned(),
        };
        if let Some(connected) = self.take_idle(&key) {
            return Ok(Session {
                connected,
                key,
                servers: self,
                fresh: false,
                unsound: AtomicBool::new(false),
            });
        }
        self.fresh_session(target, database).await
    }

    /// Likewise, but never one that was used before.
    pub(crate) async fn fresh_session(
        &self,
        target: &Target,
        database: &str,
    ) -> Result<Session<'_>, Failure> {
        let key = Key {
            target: target_key(target),
            database: database.to_owned(),
        };
        let opening = tokio::time::timeout(CONNECT_TIMEOUT, open(target, database));
        let connected = opening.await.unwrap_or_else(|_| {
            Err(Failure::new(
                FailureCode::DatabaseUnreachable,
                format!(
                    "{}: no answer within {} s",
                    place(target),
                    CONNECT_TIMEOUT.as_secs()
                ),
            ))
        })?;
        Ok(Session {
            connected,
            key,
            servers: self,
            fresh: true,
            unsound: AtomicBool::new(false),
        })
    }

    /// A connection to the admin's own database, or to `postgres` where that one is gone.
    ///
    /// # Errors
    /// As [`Servers::session`].
    pub(crate) async fn home_or_postgres(&self, target: &Target) -> Result<Session<'_>, Failure> {
        match self.session(target, &target.database).await {
            Err(failure)
                if failure.code == FailureCode::NoSuchObject && target.database != "postgres" =>
            {
                self.session(target, "postgres").await
            }
            found => found,
        }
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Vec<(Instant, Connected)>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_idle(&self, key: &Key) -> Option<Connected> {
        let mut idle = self.idle();
        let list = idle.get_mut(key)?;
        while let Some((since, connected)) = list.pop() {
            if since.elapsed() < IDLE_KEEP && !connected.client.is_closed() {
                return Some(connected);
            }
        }
        None
    }

    /// Closes what was not used for a moment. Called about twice a second.
    pub(crate) fn close_idle(&self) {
        self.idle().retain(|_, list| {
            list.retain(|(since, connected)| {
                since.elapsed() < IDLE_KEEP && !connected.client.is_closed()
            });
            !list.is_empty()
        });
    }
}

/// Identifies server, admin and credentials without keeping the password as text.
pub(crate) fn target_key(target: &Target) -> String {
    sql::short_hash(&[
        &target.host,
        &target.port.to_string(),
        &target.database,
        &target.username,
        target.password.expose(),
        &format!("{:?}", target.sslmode),
        target.sslrootcert.as_deref().unwrap_or_default(),
        target.sslcert.as_deref().unwrap_or_default(),
        target.sslkey.as_ref().map_or("", |key| key.expose()),
    ])
}

fn place(target: &Target) -> String {
    format!("{}:{}", target.host, target.port)
}

/// What a server says to a login.
#[derive(Debug)]
pub(super) enum Welcome {
    /// It lets in.
    In,
    /// It does not, with this SQLSTATE and these words.
    Refused { state: String, words: String },
    /// There was no answer, or not one about the login.
    Silence(Failure),
}

/// Tries a login and nothing more.
pub(super) async fn knock(target: &Target, database: &str) -> Welcome {
    let knocking = tokio::time::timeout(CONNECT_TIMEOUT, connect(target, database));
    match knocking.await {
        Ok(Ok(_)) => Welcome::In,
        Ok(Err(NotIn {
            state: Some(state),
            failure,
        })) if failure.code == FailureCode::DatabaseRefusedLogin => Welcome::Refused {
            state: state.code().to_owned(),
            words: failure.message,
        },
        // Databases are looked for after the login.
        Ok(Err(NotIn { failure, .. })) if failure.code == FailureCode::NoSuchObject => Welcome::In,
        Ok(Err(NotIn { failure, .. })) => Welcome::Silence(failure),
        Err(_) => Welcome::Silence(Failure::new(
            FailureCode::DatabaseUnreachable,
            format!(
                "{}: no answer within {} s",
                place(target),
                CONNECT_TIMEOUT.as_secs()
            ),
        )),
    }
}

/// No connection, and what the server said.
struct NotIn {
    state: Option<SqlState>,
    failure: Failure,
}

async fn open(target: &Target, database: &str) -> Result<Connected, Failure> {
    let client = connect(target, database)
        .await
        .map_err(|not_in| not_in.failure)?;
    let facts = Arc::new(facts(&client, target).await?);
    Ok(Connected { client, facts })
}

async fn connect(target: &Target, database: &str) -> Result<Client, NotIn> {
    let mut config = Config::new();
    config
        .host(&target.host)
        .port(target.port)
        .user(&target.username)
        .password(target.password.expose())
        .dbname(database)
        .application_name("mayfly-engine")
        .connect_timeout(CONNECT_TIMEOUT)
        .keepalives(true)
        .ssl_mode(match target.sslmode {
            SslMode::Disable => tokio_postgres::config::SslMode::Disable,
            SslMode::Prefer => tokio_postgres::config::SslMode::Prefer,
            SslMode::Require | SslMode::VerifyFull => tokio_postgres::config::SslMode::Require,
        });
    let refused = |error: tokio_postgres::Error| NotIn {
        state: error.code().cloned(),
        failure: connect_failure(target, database, error),
    };
    // The connection's own task ends when its client is dropped.
    if target.sslmode == SslMode::Disable {
        let (client, connection) = config.connect(NoTls).await.map_err(refused)?;
        tokio::spawn(async move { log_end(connection.await) });
        Ok(client)
    } else {
        let tls = mayfly_common::tls::client_config(target).map_err(|error| NotIn {
            state: None,
            failure: Failure::new(
                FailureCode::DatabaseUnreachable,
                format!("{}: {error}", place(target)),
            ),
        })?;
        let (client, connection) = config
            .connect(MakeRustlsConnect::new(tls))
            .await
            .map_err(refused)?;
        tokio::spawn(async move { log_end(connection.await) });
        Ok(client)
    }
}

fn log_end(result: Result<(), tokio_postgres::Error>) {
    if let Err(error) = result {
        debug!(error = describe(&error), "a database connection ended");
    }
}

fn connect_failure(target: &Target, database: &str, error: tokio_postgres::Error) -> Failure {
    let text = describe(&error);
    let code = match error.code() {
        Some(state)
            if *state == SqlState::INVALID_PASSWORD
                || *state == SqlState::INVALID_AUTHORIZATION_SPECIFICATION
                || *state == SqlState::INSUFFICIENT_PRIVILEGE =>
        {
            FailureCode::DatabaseRefusedLogin
        }
        Some(state) if *state == SqlState::INVALID_CATALOG_NAME => FailureCode::NoSuchObject,
        _ => FailureCode::DatabaseUnreachable,
    };
    Failure::new(
        code,
        format!(
            "{}, database {database}, as {}: {text}",
            place(target),
            target.username
        ),
    )
}

async fn facts(client: &Client, target: &Target) -> Result<Facts, Failure> {
    let doing = "asking the server what it is";
    let asked = Timestamp::now();
    let query = format!(
        "SELECT current_setting('server_version_num'), rolsuper, {} FROM pg_catalog.pg_roles WHERE rolname = current_user",
        sql::moment("clock_timestamp()")
    );
    let rows = run(client, &query, ANSWER_GRACE)
        .await
        .map_err(|e| e.into_failure(doing))?;
    let answered = Timestamp::now();
    let row = rows
        .first()
        .ok_or_else(|| Failure::new(FailureCode::StatementFailed, doing))?;
    let text = |n: usize| row.get(n).and_then(Option::as_deref).unwrap_or_default();
    let server_now = sql::parse_moment(text(2)).unwrap_or(asked);
    let halfway = (asked.as_microsecond() + answered.as_microsecond()) / 2;
    let version = text(0).parse::<u32>().unwrap_or(0) / 10_000;
    if version < 14 {
        return Err(Failure::new(
            FailureCode::StatementFailed,
            format!(
                "{}: PostgreSQL {version} is too old; 14 and later are supported",
                place(target)
            ),
        ));
    }
    // A managed service may refuse this function; then the address stands in.
    let identity = run(
        client,
        "SELECT system_identifier FROM pg_catalog.pg_control_system()",
        ANSWER_GRACE,
    )
    .await;
    let identity = match identity {
        Ok(rows) => rows.first().and_then(|row| row.first().cloned().flatten()),
        Err(error) if error.is_lost() => return Err(error.into_failure(doing)),
        Err(_) => None,
    };
    Ok(Facts {
        version,
        superuser: text(1) == "t",
        identity: identity.unwrap_or_else(|| place(target)),
        clock_skew: (halfway - server_now.as_microsecond()) as f64 / 1e6,
    })
}

/// Runs statements, waits for at most `limit`, gives all rows.
async fn run(client: &Client, statements: &str, limit: Duration) -> Result<Rows, SqlError> {
    let answer = tokio::time::timeout(limit, client.simple_query(statements)).await;
    let messages = answer.map_err(|_| SqlError {
        state: None,
        message: format!("no answer within {} s", limit.as_secs()),
        lost: true,
    })??;
    Ok(messages
        .iter()
        .filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(
                (0..row.len())
                    .map(|n| row.get(n).map(str::to_owned))
                    .collect(),
            ),
            _ => None,
        })
        .collect())
}

impl Session<'_> {
    /// What is known of the other end.
    pub(crate) fn facts(&self) -> Arc<Facts> {
        self.connected.facts.clone()
    }

    /// Whether this connection was made for this use.
    pub(crate) fn is_fresh(&self) -> bool {
        self.fresh
    }

    /// Begins a transaction: local time-outs, UTC, ISO dates and a fixed search path.
    pub(crate) fn begin() -> String {
        Self::begin_with(STATEMENT_TIMEOUT, LOCK_TIMEOUT)
    }

    /// [`Session::begin`] with other time-outs.
    pub(crate) fn begin_with(statement: Duration, lock: Duration) -> String {
        format!(
            "BEGIN; SET LOCAL statement_timeout = {}; SET LOCAL lock_timeout = {}; \
             SET LOCAL idle_in_transaction_session_timeout = {}; SET LOCAL search_path = pg_catalog; \
             SET LOCAL DateStyle = 'ISO'; SET LOCAL TimeZone = 'UTC'; SET LOCAL synchronous_commit = on; ",
            statement.as_millis().max(1),
            lock.as_millis().max(1),
            STATEMENT_TIMEOUT.as_millis(),
        )
    }

    /// Runs statements as they are; inside a transaction where [`Session::begin`] is among them.
    pub(crate) async fn query(&self, statements: &str) -> Result<Rows, SqlError> {
        run(
            &self.connected.client,
            statements,
            STATEMENT_TIMEOUT + ANSWER_GRACE,
        )
        .await
    }

    /// Runs statements in one transaction of their own, in one round trip. After an error the
    /// transaction is rolled back and the session can be used on.
    pub(crate) async fn transact(&self, statements: &str) -> Result<Rows, SqlError> {
        let text = format!("{}{statements}; COMMIT", Self::begin());
        let done = self.query(&text).await;
        if done.is_err() {
            self.rollback().await;
        }
        done
    }

    /// Ends a transaction that is not to be.
    pub(crate) async fn rollback(&self) {
        // Where even this fails the connection is not used again, and the transaction ends with it.
        if run(&self.connected.client, "ROLLBACK", ANSWER_GRACE)
            .await
            .is_err()
        {
            self.unsound.store(true, Ordering::Relaxed);
        }
    }

    /// Gives the connection back for others. Not with a transaction open.
    pub(crate) fn release(self) {
        if self.connected.client.is_closed() || self.unsound.load(Ordering::Relaxed) {
            return;
        }
        let mut idle = self.servers.idle();
        let list = idle.entry(self.key).or_default();
        if list.len() < IDLE_MAX {
            list.push((Instant::now(), self.connected));
        }
    }
}
