//! Connections to PostgreSQL servers: opened when needed, shared for a moment, gone at rest (an
//! idle admin connection would keep its database from being dropped). And the one place where a
//! driver's error becomes a failure of ours.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use mayfly_common::target::{Endpoint, SslMode, Target};
use mayfly_common::task::{Failure, FailureCode};
use tokio::task::AbortHandle;
use tokio_postgres::error::{Severity, SqlState};
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};
use tokio_postgres_rustls::MakeRustlsConnect;
use tracing::debug;

use super::breaker::Found;
use super::door::{Door, place};
use super::sql;

/// Longest a connection to a single host may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Of several hosts each has so long, and all together ...
const HOST_TIMEOUT: Duration = Duration::from_secs(2);
/// ... so long: a create still has time for its work.
const HOSTS_TIMEOUT: Duration = Duration::from_secs(6);
/// A connection whose other end has gone ends by itself, also where nobody waits on it any more.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(15);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_RETRIES: u32 = 3;
const UNHEARD_MAX: Duration = Duration::from_secs(30);
/// A host that was of no use is tried after the others for so long.
const HOST_LAST_FOR: Duration = Duration::from_secs(5);
/// Longest a statement may run, and wait for a lock. On the server, per statement.
pub(crate) const STATEMENT_TIMEOUT: Duration = Duration::from_secs(30);
pub(crate) const LOCK_TIMEOUT: Duration = Duration::from_secs(3);
/// Beyond the server's own limit, after which the connection is given up.
const ANSWER_GRACE: Duration = Duration::from_secs(5);
/// How long an unused connection is kept, and how many of one kind.
const IDLE_KEEP: Duration = Duration::from_secs(1);
const IDLE_MAX: usize = 8;
/// How long a difference of clocks is told of that was seen when connecting.
const SKEW_KEPT: Duration = Duration::from_secs(600);

/// The connections of this engine, kept for a moment between two uses.
#[derive(Default)]
pub(crate) struct Servers {
    idle: Mutex<HashMap<Key, Vec<(Instant, Connected)>>>,
    doors: Mutex<HashMap<String, Arc<Door>>>,
    /// Hosts of several that were of no use: when, and whether they answered.
    useless: Mutex<HashMap<Endpoint, (Instant, Found)>>,
    /// By a server's identity: this machine's clock less the server's in seconds, and when.
    skews: Mutex<HashMap<String, (Instant, f64)>>,
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
    /// What moves its bytes. It ends with the client, but not while an answer is outstanding.
    driver: Option<AbortHandle>,
    facts: Arc<Facts>,
}

/// A connection in use. Given back with [`Session::release`]; dropped, it is closed, and with it
/// whatever transaction was open.
pub(crate) struct Session<'s> {
    connected: Connected,
    key: Key,
    servers: &'s Servers,
    door: Arc<Door>,
    fresh: bool,
    /// Not to be used again: it is lost, or a transaction may still be open.
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
    /// There was no answer in time.
    slow: bool,
}

/// A condition of the server that passes, as after a failover or a restart, and that another
/// connection may not meet: a connection that has it is of no more use.
fn is_of_the_server(state: &SqlState) -> bool {
    // Class 08: connection exceptions.
    state.code().starts_with("08")
        || [
            SqlState::READ_ONLY_SQL_TRANSACTION,
            SqlState::TOO_MANY_CONNECTIONS,
            SqlState::ADMIN_SHUTDOWN,
            SqlState::CRASH_SHUTDOWN,
            SqlState::CANNOT_CONNECT_NOW,
        ]
        .contains(state)
}

impl SqlError {
    /// Something of ours that a second look will set right.
    pub(crate) fn passing(message: &str) -> Self {
        Self {
            state: Some(SqlState::T_R_SERIALIZATION_FAILURE),
            message: message.to_owned(),
            lost: false,
            slow: false,
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

    /// The connection went away, or leads to a server that cannot do it now.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost || self.state.as_ref().is_some_and(is_of_the_server)
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
        Failure {
            passing: self.is_lost() && !self.slow,
            ..Failure::new(code, format!("{doing}: {}{state}", self.message))
        }
    }
}

impl From<tokio_postgres::Error> for SqlError {
    fn from(error: tokio_postgres::Error) -> Self {
        match error.as_db_error() {
            Some(db) => Self {
                state: Some(db.code().clone()),
                message: db.message().to_owned(),
                // Not the severity that is for people: it is translated.
                lost: matches!(
                    db.parsed_severity(),
                    Some(Severity::Fatal | Severity::Panic)
                ),
                slow: false,
            },
            None => Self {
                state: None,
                message: describe(&error),
                lost: true,
                slow: false,
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
        self.session_for(target, database, false).await
    }

    async fn session_for(
        &self,
        target: &Target,
        database: &str,
        asked: bool,
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
                door: self.door(target),
                fresh: false,
                unsound: AtomicBool::new(false),
            });
        }
        self.new_session(target, key, asked).await
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
        self.new_session(target, key, false).await
    }

    async fn new_session(
        &self,
        target: &Target,
        key: Key,
        asked: bool,
    ) -> Result<Session<'_>, Failure> {
        let door = self.door(target);
        let attempt = door.ask(asked)?;
        match self.open(target, &key.database).await {
            Ok(connected) => {
                attempt.ended(Found::There, None);
                Ok(Session {
                    connected,
                    key,
                    servers: self,
                    door,
                    fresh: true,
                    unsound: AtomicBool::new(false),
                })
            }
            Err(refused) => {
                attempt.ended(refused.found, Some(&refused.failure));
                Err(refused.failure)
            }
        }
    }

    /// Connects to the first host that takes writes.
    async fn open(&self, target: &Target, database: &str) -> Result<Connected, Refused> {
        let unusable = |reason: String| Refused {
            state: None,
            found: Found::Nothing,
            failure: Failure::new(FailureCode::DatabaseUnreachable, reason),
        };
        let endpoints = target
            .endpoints()
            .map_err(|reason| unusable(format!("host: {reason}")))?;
        let tls =
            tls_of(target).map_err(|reason| unusable(format!("{}: {reason}", place(target))))?;
        let one_of_several = endpoints.len() > 1;
        let limit = limit_for(&endpoints);
        let mut refusals: Vec<Refused> = Vec::new();
        for endpoint in self.in_order(endpoints) {
            let opening = open(target, &endpoint, database, tls.clone());
            let opened = tokio::time::timeout(limit, opening).await;
            let opened = opened.unwrap_or_else(|_| Err(silent(&endpoint, limit)));
            match opened {
                Ok(connected) => {
                    self.useless().remove(&endpoint);
                    let facts = &connected.facts;
                    let seen = (Instant::now(), facts.clock_skew);
                    self.skews().insert(facts.identity.clone(), seen);
                    return Ok(connected);
                }
                Err(refused) if one_of_several => {
                    debug!(%endpoint, reason = refused.failure.message, "not this host");
                    self.useless()
                        .insert(endpoint, (Instant::now(), refused.found));
                    refusals.push(refused);
                }
                Err(refused) => return Err(refused),
            }
        }
        Err(all_refused(refusals))
    }

    /// As written, but those of no use a moment ago last, and the silent ones last of all.
    fn in_order(&self, mut endpoints: Vec<Endpoint>) -> Vec<Endpoint> {
        if endpoints.len() > 1 {
            let useless = self.useless();
            endpoints.sort_by_key(|endpoint| match useless.get(endpoint) {
                Some((at, found)) if at.elapsed() < HOST_LAST_FOR => {
                    if *found == Found::There {
                        1
                    } else {
                        2
                    }
                }
                _ => 0,
            });
        }
        endpoints
    }

    fn useless(&self) -> MutexGuard<'_, HashMap<Endpoint, (Instant, Found)>> {
        self.useless.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn skews(&self) -> MutexGuard<'_, HashMap<String, (Instant, f64)>> {
        self.skews.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This machine's clock less that of the server that differs most, in seconds; 0 where no
    /// server was spoken to lately.
    pub(crate) fn clock_skew(&self) -> f64 {
        let mut skews = self.skews();
        skews.retain(|_, (at, _)| at.elapsed() < SKEW_KEPT);
        let differences = skews.values().map(|(_, skew)| *skew);
        differences
            .max_by(|one, other| one.abs().total_cmp(&other.abs()))
            .unwrap_or(0.0)
    }

    /// What is known of the target's server.
    pub(crate) fn door(&self, target: &Target) -> Arc<Door> {
        let mut doors = self.doors.lock().unwrap_or_else(PoisonError::into_inner);
        doors
            .entry(Door::key(target))
            .or_insert_with(|| Arc::new(Door::new(target)))
            .clone()
    }

    /// A connection to the admin's own database, or to `postgres` where that one is gone.
    ///
    /// # Errors
    /// As [`Servers::session`].
    pub(crate) async fn home_or_postgres(&self, target: &Target) -> Result<Session<'_>, Failure> {
        self.home_for(target, false).await
    }

    /// Likewise; also at a server taken for away, where a person asked for it.
    ///
    /// # Errors
    /// As [`Servers::session`].
    pub(crate) async fn home_for(
        &self,
        target: &Target,
        asked: bool,
    ) -> Result<Session<'_>, Failure> {
        match self.session_for(target, &target.database, asked).await {
            Err(failure)
                if failure.code == FailureCode::NoSuchObject && target.database != "postgres" =>
            {
                self.session_for(target, "postgres", asked).await
            }
            found => found,
        }
    }

    fn idle(&self) -> MutexGuard<'_, HashMap<Key, Vec<(Instant, Connected)>>> {
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

    /// Closes what others keep of this target: where one connection led to the wrong server, or
    /// was ended, all do.
    fn close_idle_of(&self, target: &str) {
        self.idle().retain(|key, _| key.target != target);
    }

    /// Closes what was not used for a moment, and forgets the servers nothing is to be remembered
    /// of. Called about twice a second.
    pub(crate) fn close_idle(&self) {
        self.useless()
            .retain(|_, (at, _)| at.elapsed() < HOST_LAST_FOR);
        self.doors
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|_, door| Arc::strong_count(door) > 1 || !door.is_forgettable());
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

/// Why there is no connection.
struct Refused {
    /// What the server said, where it said anything.
    state: Option<SqlState>,
    failure: Failure,
    found: Found,
}

/// What several hosts said, as one. The word of a server counts for more than the silence of
/// another.
fn all_refused(refusals: Vec<Refused>) -> Refused {
    let any = |wanted: FailureCode| refusals.iter().any(|one| one.failure.code == wanted);
    let code = [
        FailureCode::DatabaseRefusedLogin,
        FailureCode::NoSuchObject,
        FailureCode::StatementFailed,
    ]
    .into_iter()
    .find(|code| any(*code))
    .unwrap_or(FailureCode::DatabaseUnreachable);
    let found = [Found::There, Found::Away]
        .into_iter()
        .find(|found| refusals.iter().any(|one| one.found == *found))
        .unwrap_or(Found::Nothing);
    let messages: Vec<&str> = refusals
        .iter()
        .map(|one| one.failure.message.as_str())
        .collect();
    Refused {
        state: None,
        found,
        failure: Failure {
            // As long as one of them only cannot take writes yet.
            passing: refusals.iter().any(|one| one.failure.passing),
            ..Failure::new(code, messages.join("; "))
        },
    }
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

/// Tries a login and nothing more. Of several hosts, one that lets in counts for more than one that
/// refuses, and that for more than silence: each is a way in.
pub(super) async fn knock(target: &Target, database: &str) -> Welcome {
    let silence =
        |reason: String| Welcome::Silence(Failure::new(FailureCode::DatabaseUnreachable, reason));
    let (endpoints, tls) = match (target.endpoints(), tls_of(target)) {
        (Ok(endpoints), Ok(tls)) => (endpoints, tls),
        (Err(reason), _) => return silence(format!("host: {reason}")),
        (_, Err(reason)) => return silence(format!("{}: {reason}", place(target))),
    };
    let limit = limit_for(&endpoints);
    let mut answer = silence(format!("{}: no host", place(target)));
    for endpoint in &endpoints {
        let knocking = connect(target, endpoint, database, tls.clone());
        let said = match tokio::time::timeout(limit, knocking).await {
            Ok(Ok(_)) => return Welcome::In,
            // Databases are looked for after the login.
            Ok(Err(refused)) if refused.failure.code == FailureCode::NoSuchObject => {
                return Welcome::In;
            }
            Ok(Err(Refused {
                state: Some(state),
                failure,
                ..
            })) if failure.code == FailureCode::DatabaseRefusedLogin => Welcome::Refused {
                state: state.code().to_owned(),
                words: failure.message,
            },
            Ok(Err(refused)) => Welcome::Silence(refused.failure),
            Err(_) => Welcome::Silence(silent(endpoint, limit).failure),
        };
        if matches!(answer, Welcome::Silence(_)) {
            answer = said;
        }
    }
    answer
}

async fn open(
    target: &Target,
    endpoint: &Endpoint,
    database: &str,
    tls: Option<MakeRustlsConnect>,
) -> Result<Connected, Refused> {
    let (client, driver) = connect(target, endpoint, database, tls).await?;
    // One that is given up in the middle of an answer would not end by itself.
    let unless_opened = Abort(Some(driver));
    let said = |failure| Refused {
        state: None,
        failure,
        found: Found::There,
    };
    let facts = facts(&client, target, endpoint).await.map_err(said)?;
    Ok(Connected {
        client,
        driver: unless_opened.opened(),
        facts: Arc::new(facts),
    })
}

/// Ends the task of a connection, unless it is opened.
struct Abort(Option<AbortHandle>);

impl Abort {
    fn opened(mut self) -> Option<AbortHandle> {
        self.0.take()
    }
}

impl Drop for Abort {
    fn drop(&mut self) {
        if let Some(driver) = self.0.take() {
            driver.abort();
        }
    }
}

/// The client's side of TLS, where there may be any.
fn tls_of(target: &Target) -> Result<Option<MakeRustlsConnect>, String> {
    if target.sslmode == SslMode::Disable {
        return Ok(None);
    }
    let config = mayfly_common::tls::client_config(target)?;
    Ok(Some(MakeRustlsConnect::new(config)))
}

/// How long each of these hosts may take.
fn limit_for(endpoints: &[Endpoint]) -> Duration {
    match u32::try_from(endpoints.len()) {
        Ok(0 | 1) => CONNECT_TIMEOUT,
        Ok(several) => HOST_TIMEOUT.min(HOSTS_TIMEOUT / several),
        Err(_) => HOST_TIMEOUT,
    }
}

fn silent(endpoint: &Endpoint, limit: Duration) -> Refused {
    Refused {
        state: None,
        found: Found::Away,
        failure: Failure::new(
            FailureCode::DatabaseUnreachable,
            format!("{endpoint}: no answer within {} s", limit.as_secs_f64()),
        ),
    }
}

async fn connect(
    target: &Target,
    endpoint: &Endpoint,
    database: &str,
    tls: Option<MakeRustlsConnect>,
) -> Result<(Client, AbortHandle), Refused> {
    let mut config = Config::new();
    config
        .host(&endpoint.host)
        .port(endpoint.port)
        .user(&target.username)
        .password(target.password.expose())
        .dbname(database)
        .application_name("mayfly-engine")
        .connect_timeout(CONNECT_TIMEOUT)
        .keepalives(true)
        .keepalives_idle(KEEPALIVE_IDLE)
        .keepalives_interval(KEEPALIVE_INTERVAL)
        .keepalives_retries(KEEPALIVE_RETRIES)
        .tcp_user_timeout(UNHEARD_MAX)
        .ssl_mode(match target.sslmode {
            SslMode::Disable => tokio_postgres::config::SslMode::Disable,
            SslMode::Prefer => tokio_postgres::config::SslMode::Prefer,
            SslMode::Require | SslMode::VerifyFull => tokio_postgres::config::SslMode::Require,
        });
    let refused =
        |error: tokio_postgres::Error| connect_failure(target, endpoint, database, &error);
    // The connection's own task ends when its client is dropped.
    match tls {
        None => {
            let (client, connection) = config.connect(NoTls).await.map_err(refused)?;
            let driver = tokio::spawn(async move { log_end(connection.await) });
            Ok((client, driver.abort_handle()))
        }
        Some(tls) => {
            let (client, connection) = config.connect(tls).await.map_err(refused)?;
            let driver = tokio::spawn(async move { log_end(connection.await) });
            Ok((client, driver.abort_handle()))
        }
    }
}

fn log_end(result: Result<(), tokio_postgres::Error>) {
    if let Err(error) = result {
        debug!(error = describe(&error), "a database connection ended");
    }
}

fn connect_failure(
    target: &Target,
    endpoint: &Endpoint,
    database: &str,
    error: &tokio_postgres::Error,
) -> Refused {
    let text = describe(error);
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
    Refused {
        state: error.code().cloned(),
        found: found(error),
        failure: Failure {
            passing: error.code().is_some_and(is_of_the_server),
            ..Failure::new(
                code,
                format!(
                    "{endpoint}, database {database}, as {}: {text}",
                    target.username
                ),
            )
        },
    }
}

/// What a failed connection says about the server, rather than about how it was spoken to.
fn found(error: &tokio_postgres::Error) -> Found {
    use std::io::ErrorKind;
    if error.as_db_error().is_some() {
        return Found::There;
    }
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(io) = inner.downcast_ref::<std::io::Error>() {
            return match io.kind() {
                ErrorKind::ConnectionRefused
                | ErrorKind::ConnectionReset
                | ErrorKind::ConnectionAborted
                | ErrorKind::HostUnreachable
                | ErrorKind::NetworkUnreachable
                | ErrorKind::NetworkDown
                | ErrorKind::NotConnected
                | ErrorKind::BrokenPipe
                | ErrorKind::TimedOut
                | ErrorKind::UnexpectedEof => Found::Away,
                // What TLS makes of a certificate it does not want.
                ErrorKind::InvalidData => Found::There,
                // A name that is not known, above all.
                _ => Found::Nothing,
            };
        }
        source = inner.source();
    }
    Found::Nothing
}

async fn facts(client: &Client, target: &Target, endpoint: &Endpoint) -> Result<Facts, Failure> {
    let doing = "asking the server what it is";
    let asked = Timestamp::now();
    let query = format!(
        "SELECT current_setting('server_version_num'), rolsuper, {}, current_setting('transaction_read_only'), pg_is_in_recovery() FROM pg_catalog.pg_roles WHERE rolname = current_user",
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
            format!("{endpoint}: PostgreSQL {version} is too old; 14 and later are supported"),
        ));
    }
    let one_of_several = target.host.contains(',');
    // Where there is no other host, what only this admin may not write is said by the statement.
    if text(3) == "on" && (one_of_several || text(4) == "t") {
        let why = if text(4) == "t" {
            "is a standby"
        } else {
            "has default_transaction_read_only on"
        };
        return Err(Failure {
            // Another host may take over at any moment; a single one says what it is.
            passing: one_of_several,
            ..Failure::new(
                FailureCode::DatabaseUnreachable,
                format!(
                    "{endpoint} takes no writes: it {why}; name the primary in the base secret, or all hosts it may be on"
                ),
            )
        });
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
        slow: true,
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
        self.query_within(statements, STATEMENT_TIMEOUT + ANSWER_GRACE)
            .await
    }

    /// Likewise, where the answer must come sooner.
    pub(crate) async fn query_within(
        &self,
        statements: &str,
        limit: Duration,
    ) -> Result<Rows, SqlError> {
        let done = run(&self.connected.client, statements, limit).await;
        match &done {
            Err(error) if error.is_lost() => {
                if error.slow
                    && let Some(driver) = &self.connected.driver
                {
                    driver.abort();
                }
                self.unsound.store(true, Ordering::Relaxed);
                self.servers.close_idle_of(&self.key.target);
            }
            Ok(_) | Err(_) => self.door.answered(),
        }
        done
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use mayfly_common::target::endpoints;

    fn failed(state: &str) -> SqlError {
        SqlError {
            state: Some(SqlState::from_code(state)),
            message: String::new(),
            lost: false,
            slow: false,
        }
    }

    #[test]
    fn conditions_of_the_server_pass_and_cost_the_connection() {
        for state in [
            "25006", "57P01", "57P02", "57P03", "53300", "08006", "08P01",
        ] {
            let error = failed(state);
            assert!(error.is_lost(), "{state}");
            let failure = error.into_failure("x");
            assert_eq!(failure.code, FailureCode::DatabaseUnreachable, "{state}");
            assert!(failure.passing, "{state}");
        }
        for state in ["42501", "42P01", "XX000", "55P03", "57014"] {
            let error = failed(state);
            assert!(!error.is_lost(), "{state}");
            assert!(!error.into_failure("x").passing, "{state}");
        }
        let slow = SqlError {
            state: None,
            lost: true,
            slow: true,
            ..failed("00000")
        };
        let failure = slow.into_failure("x");
        assert!(!failure.passing && failure.code == FailureCode::DatabaseUnreachable);
    }

    #[test]
    fn the_word_of_one_host_counts_for_more_than_silence() {
        let refused = |code, found, passing| Refused {
            state: None,
            found,
            failure: Failure {
                passing,
                ..Failure::new(code, format!("{code:?}"))
            },
        };
        let silent = || refused(FailureCode::DatabaseUnreachable, Found::Away, false);
        let standby = || refused(FailureCode::DatabaseUnreachable, Found::There, true);
        let login = || refused(FailureCode::DatabaseRefusedLogin, Found::There, false);
        let absent = || refused(FailureCode::NoSuchObject, Found::There, false);

        let all = all_refused(vec![silent(), standby()]);
        assert!(all.failure.passing && all.found == Found::There);
        assert!(all.failure.message.contains("; "));
        let all = all_refused(vec![silent(), silent()]);
        assert!(!all.failure.passing && all.found == Found::Away);
        assert_eq!(
            all_refused(vec![silent(), absent(), login()]).failure.code,
            FailureCode::DatabaseRefusedLogin
        );
        assert_eq!(
            all_refused(vec![absent(), silent()]).failure.code,
            FailureCode::NoSuchObject
        );
    }

    #[test]
    fn the_worst_clock_is_told_of() {
        let servers = Servers::default();
        assert_eq!(servers.clock_skew(), 0.0);
        let now = Instant::now();
        let old = now.checked_sub(SKEW_KEPT).unwrap();
        for (server, at, skew) in [("a", now, 0.1), ("b", now, -20.0), ("c", old, 500.0)] {
            servers.skews().insert(server.to_owned(), (at, skew));
        }
        assert_eq!(servers.clock_skew(), -20.0);
    }

    #[test]
    fn hosts_of_no_use_are_tried_last() {
        let servers = Servers::default();
        let written = endpoints("a,b,c,d", 1).unwrap();
        let now = Instant::now();
        let old = now.checked_sub(HOST_LAST_FOR * 2).unwrap();
        for (n, at, found) in [
            (0, now, Found::Away),
            (1, now, Found::There),
            (2, old, Found::Away),
        ] {
            servers.useless().insert(written[n].clone(), (at, found));
        }
        let order: Vec<String> = servers
            .in_order(written)
            .into_iter()
            .map(|endpoint| endpoint.host)
            .collect();
        assert_eq!(order, ["c", "d", "b", "a"]);
    }
}
