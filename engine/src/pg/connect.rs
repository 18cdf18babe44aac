//! Connecting to the hosts of a server: who is tried for how long, what a refusal means, and what the
//! other end says it is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use mayfly_common::pg_connect::{self, Login};
use mayfly_common::sql_session::{self, Access, Limits};
use mayfly_protocol::pg_login::{Cause, Method, Refusal, Rule};
use mayfly_protocol::target::{Endpoint, Target};
use mayfly_protocol::task::{Failure, FailureCode};
use tokio::task::AbortHandle;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config};
use tracing::debug;

use super::breaker::Reached;
use super::hosts::Hosts;
use super::limits::server_name;
use super::row::Rows;
use super::session::{ANSWER_GRACE, run};
use super::sql;
use super::sql_error::{SqlError, describe, is_of_the_server};

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

/// What is known of the other end.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    /// Major version, 14 and later.
    pub(crate) version: u32,
    /// Whether the admin is a superuser.
    pub(crate) superuser: bool,
    /// Whether it takes no writes.
    pub(super) standby: bool,
    /// Which server this is, wherever it is reached.
    pub(crate) identity: String,
    /// This machine's clock less the server's, in seconds, when the connection was made.
    pub(crate) clock_skew: f64,
    /// How the server let the admin in.
    pub(crate) login: Method,
    /// How the database keeps text.
    pub(super) encoding: Encoding,
    /// How many more connections the limit of the admin, or that of the database, left when this one
    /// was made; none where there is no limit.
    pub(super) slots_left: Option<u64>,
    /// When the server was asked all this.
    pub(super) asked: Instant,
}

/// How a database keeps text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    /// As it is sent here.
    Utf8,
    /// As whatever bytes it came in.
    Unknown,
    /// In another encoding, which PostgreSQL converts.
    Other,
}

/// Which names a connection is for. PostgreSQL converts text between a client's encoding and that of
/// the *database*, but names of roles and databases belong to the whole server, which keeps them as
/// bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Names {
    /// Those of roles and databases: nothing is converted, so that a role is called the same in
    /// whichever database it is made, and by who logs in.
    OfServer,
    /// Those of what is in the database.
    OfDatabase,
}

pub(super) struct Connected {
    pub(super) client: Client,
    /// What moves its bytes. It ends with the client, but not while an answer is outstanding.
    pub(super) driver: Option<AbortHandle>,
    pub(super) facts: Arc<Facts>,
    pub(super) names: Names,
    /// Where it leads.
    pub(super) endpoint: Endpoint,
}

impl Connected {
    /// Whether it does for these names.
    pub(super) fn serves(&self, names: Names) -> bool {
        self.facts.encoding != Encoding::Other || self.names == names
    }
}

/// Why there is no connection.
pub(super) struct Refused {
    /// What the server said, where it said anything.
    pub(super) state: Option<SqlState>,
    pub(super) failure: Failure,
    pub(super) found: Reached,
}

/// What several hosts said, as one. The word of a server counts for more than the silence of
/// another.
pub(super) fn all_refused(refusals: Vec<Refused>) -> Refused {
    let any = |wanted: FailureCode| refusals.iter().any(|one| one.failure.code == wanted);
    let code = [
        FailureCode::DatabaseRefusedLogin,
        FailureCode::NoSuchObject,
        FailureCode::StatementFailed,
    ]
    .into_iter()
    .find(|code| any(*code))
    .unwrap_or(FailureCode::DatabaseUnreachable);
    let found = [Reached::Reachable, Reached::Unreachable]
        .into_iter()
        .find(|found| refusals.iter().any(|one| one.found == *found))
        .unwrap_or(Reached::Aborted);
    let messages: Vec<&str> = refusals
        .iter()
        .map(|one| one.failure.message.as_str())
        .collect();
    Refused {
        state: None,
        found,
        failure: Failure {
            // As long as one of them only cannot take writes yet.
            transient: refusals.iter().any(|one| one.failure.transient),
            full: refusals.iter().any(|one| one.failure.full),
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
/// refuses, and that for more than silence: each is a way in. Only with a password that is nobody's.
pub(super) async fn knock(hosts: &Hosts, target: &Target, database: &str) -> Welcome {
    let silence =
        |reason: String| Welcome::Silence(Failure::new(FailureCode::DatabaseUnreachable, reason));
    let rule = Rule {
        is_trial: true,
        ..Rule::of(target)
    };
    let (endpoints, login) = match (target.endpoints(), Login::new(target, rule)) {
        (Ok(endpoints), Ok(login)) => (endpoints, login),
        (Err(reason), _) => return silence(format!("host: {reason}")),
        (_, Err(reason)) => return silence(format!("{}: {reason}", server_name(target))),
    };
    let limit = limit_for(&endpoints);
    let mut answer = silence(format!("{}: no host", server_name(target)));
    for endpoint in &endpoints {
        let knocking = connect(hosts, target, endpoint, database, &login, None);
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

/// Opens a connection to a primary.
pub(super) async fn open(
    hosts: &Hosts,
    target: &Target,
    endpoint: &Endpoint,
    to: (&str, Names),
    login: &Login,
) -> Result<Connected, Refused> {
    let connected = open_any(hosts, target, endpoint, to, login).await?;
    // default_transaction_read_only is a default, which our transactions do not take.
    if !connected.facts.standby {
        return Ok(connected);
    }
    Err(Refused {
        state: None,
        found: Reached::Reachable,
        failure: Failure {
            // Another host may take over at any moment; a single one says what it is.
            transient: target.host.contains(','),
            ..Failure::new(
                FailureCode::DatabaseUnreachable,
                format!(
                    "{endpoint} takes no writes: it is a standby; name the primary in the base secret, or all hosts it may be on"
                ),
            )
        },
    })
}

/// Opens a connection to a primary or a standby.
pub(super) async fn open_any(
    hosts: &Hosts,
    target: &Target,
    endpoint: &Endpoint,
    to: (&str, Names),
    login: &Login,
) -> Result<Connected, Refused> {
    let refused = match open_with(hosts, target, endpoint, to, login, None).await {
        Ok(connected) => return Ok(connected),
        Err(refused) => refused,
    };
    let state = refused.state.as_ref().map(SqlState::code);
    if !state.is_some_and(|state| sql_session::ENDED_BY_SETTINGS.contains(&state)) {
        return Err(refused);
    }
    let options = Some(sql_session::STARTUP_OPTIONS);
    let opened = open_with(hosts, target, endpoint, to, login, options).await;
    opened.map_err(|_| refused)
}

async fn open_with(
    hosts: &Hosts,
    target: &Target,
    endpoint: &Endpoint,
    (database, names): (&str, Names),
    login: &Login,
    options: Option<&str>,
) -> Result<Connected, Refused> {
    let connected = connect(hosts, target, endpoint, database, login, options).await;
    let (client, driver, method) = connected?;
    // One that is given up in the middle of an answer would not end by itself.
    let unless_opened = Abort(Some(driver));
    let said = |failure| Refused {
        state: None,
        failure,
        found: Reached::Reachable,
    };
    let answer = read_facts(&client).await.map_err(|error| Refused {
        state: error.state.clone(),
        ..said(error.into_failure(ASKING))
    })?;
    let facts = facts(answer, target, endpoint).map_err(said)?;
    let as_bytes = match facts.encoding {
        Encoding::Utf8 => false,
        Encoding::Unknown => true,
        Encoding::Other => names == Names::OfServer,
    };
    if as_bytes {
        let asked = run(&client, AS_BYTES, ANSWER_GRACE).await;
        asked.map_err(|error| said(error.into_failure(ASKING)))?;
    }
    Ok(Connected {
        client,
        names,
        endpoint: endpoint.clone(),
        driver: unless_opened.opened(),
        facts: Arc::new(Facts {
            login: method,
            ..facts
        }),
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

/// How to log in to a target.
pub(super) fn login_of(target: &Target) -> Result<Login, String> {
    Login::new(target, Rule::of(target))
}

/// How long each of these hosts may take.
pub(super) fn limit_for(endpoints: &[Endpoint]) -> Duration {
    match u32::try_from(endpoints.len()) {
        Ok(0 | 1) => CONNECT_TIMEOUT,
        Ok(several) => HOST_TIMEOUT.min(HOSTS_TIMEOUT / several),
        Err(_) => HOST_TIMEOUT,
    }
}

pub(super) fn silent(endpoint: &Endpoint, limit: Duration) -> Refused {
    Refused {
        state: None,
        found: Reached::Unreachable,
        failure: Failure::new(
            FailureCode::DatabaseUnreachable,
            format!("{endpoint}: no answer within {} s", limit.as_secs_f64()),
        ),
    }
}

async fn connect(
    hosts: &Hosts,
    target: &Target,
    endpoint: &Endpoint,
    database: &str,
    login: &Login,
    options: Option<&str>,
) -> Result<(Client, AbortHandle, Method), Refused> {
    hosts.allow(endpoint).map_err(|failure| Refused {
        state: None,
        found: Reached::Aborted,
        failure,
    })?;
    let mut config = Config::new();
    if let Some(options) = options {
        config.options(options);
    }
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
        .tcp_user_timeout(UNHEARD_MAX);
    let connected = pg_connect::connect(&config, login).await;
    let (client, connection, method) =
        connected.map_err(|error| connect_failure(target, endpoint, database, &error))?;
    // The connection's own task ends when its client is dropped.
    let driver = tokio::spawn(async move { log_end(connection.await) });
    Ok((client, driver.abort_handle(), method))
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
    if let Some(refusal) = Refusal::in_error(error) {
        return broken_off(target, endpoint, database, refusal);
    }
    let is_full = error.code() == Some(&SqlState::TOO_MANY_CONNECTIONS);
    let text = if is_full {
        "too many connections, no connection slot is free: the sessions there are at max_connections, or at the limit of the database or of this role; `mayfly secret check` compares the limits (SQLSTATE 53300)".to_owned()
    } else {
        describe(error)
    };
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
    let is_garbled = error.as_db_error().is_none() && has_bad_text(error);
    Refused {
        state: match is_garbled {
            true => Some(SqlState::CHARACTER_NOT_IN_REPERTOIRE),
            false => error.code().cloned(),
        },
        found: if is_garbled {
            Reached::Reachable
        } else {
            found(error)
        },
        failure: Failure {
            transient: error.code().is_some_and(is_of_the_server),
            full: is_full,
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

/// A login that this engine did not go along with. Other credentials of the base secret, or another
/// `auth`, may be what is missing, as where the server refused it.
fn broken_off(target: &Target, endpoint: &Endpoint, database: &str, refusal: &Refusal) -> Refused {
    let code = match refusal.cause {
        Cause::Garbled => FailureCode::DatabaseUnreachable,
        Cause::Method(_)
        | Cause::Unsupported(_)
        | Cause::Unbound
        | Cause::Unbindable
        | Cause::Unproven
        | Cause::Rounds(_) => FailureCode::DatabaseRefusedLogin,
    };
    Refused {
        state: None,
        found: Reached::Reachable,
        failure: Failure::new(
            code,
            format!(
                "{endpoint}, database {database}, as {}: {refusal}",
                target.username
            ),
        ),
    }
}

/// Whether a refused connection is about the database and not about its server: it is gone, it takes
/// no connections, this admin may not connect, its limit is reached, or its settings end each
/// session. Its owner can cause all of these.
pub(super) fn is_of_the_database(state: &SqlState) -> bool {
    let state = state.code();
    ["3D000", "55000", "42501", "53300"].contains(&state)
        || sql_session::ENDED_BY_SETTINGS.contains(&state)
}

/// Whether the server sent text that is not UTF-8 where the driver wants it to be: a setting that is
/// reported at the start, such as `search_path` from 18 on.
fn has_bad_text(error: &tokio_postgres::Error) -> bool {
    let source = std::error::Error::source(error);
    let io = source.and_then(|source| source.downcast_ref::<std::io::Error>());
    io.is_some_and(|io| {
        io.get_ref()
            .is_some_and(|inner| inner.is::<std::str::Utf8Error>())
    })
}

/// What a failed connection says about the server, rather than about how it was spoken to.
fn found(error: &tokio_postgres::Error) -> Reached {
    use std::io::ErrorKind;
    if error.as_db_error().is_some() {
        return Reached::Reachable;
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
                | ErrorKind::UnexpectedEof => Reached::Unreachable,
                // What TLS makes of a certificate it does not want.
                ErrorKind::InvalidData => Reached::Reachable,
                // A name that is not known, above all.
                _ => Reached::Aborted,
            };
        }
        source = inner.source();
    }
    Reached::Aborted
}

/// What a server is asked after [`sql_session::FIRST`]. Reads only, so that a standby answers too.
fn question(identity: &str) -> String {
    let limits = Limits {
        statement: ANSWER_GRACE,
        lock: ANSWER_GRACE,
        idle_in_transaction: ANSWER_GRACE,
    };
    format!(
        "{begin}{of_any_version}\
         SELECT pg_catalog.current_setting('server_version_num'), r.rolsuper, {now}, pg_catalog.pg_is_in_recovery(), {identity}, \
         pg_catalog.current_setting('server_encoding'), {SLOTS_LEFT} \
         FROM pg_catalog.pg_roles r WHERE r.rolname OPERATOR(pg_catalog.=) CURRENT_USER; COMMIT",
        begin = sql_session::begin(Access::ReadOnly, &limits),
        of_any_version = sql_session::of_any_version(true),
        now = sql::moment("pg_catalog.clock_timestamp()"),
    )
}

const IDENTITY: &str = "(SELECT c.system_identifier FROM pg_catalog.pg_control_system() c)";

/// Sends and takes text as bytes: nothing is converted, and nothing that is no UTF-8 is an error.
/// It stays so through a pooler in transaction mode, which follows this setting.
const AS_BYTES: &str = "SELECT pg_catalog.set_config('client_encoding', 'SQL_ASCII', false)";

/// What the connection limits leave. Superusers have none. The sessions of a role, and of a database,
/// are counted as PostgreSQL does; everybody may see whose they are.
const SLOTS_LEFT: &str = "CASE WHEN r.rolsuper THEN NULL ELSE (SELECT pg_catalog.min(l.most OPERATOR(pg_catalog.-) l.used) FROM (\
     SELECT r.rolconnlimit AS most, CASE WHEN r.rolconnlimit OPERATOR(pg_catalog.>=) 0 THEN \
       (SELECT pg_catalog.count(*) FROM pg_catalog.pg_stat_activity a WHERE a.usesysid OPERATOR(pg_catalog.=) r.oid) END AS used \
     UNION ALL SELECT d.datconnlimit, CASE WHEN d.datconnlimit OPERATOR(pg_catalog.>=) 0 THEN \
       (SELECT pg_catalog.count(*) FROM pg_catalog.pg_stat_activity a WHERE a.datid OPERATOR(pg_catalog.=) d.oid) END \
     FROM pg_catalog.pg_database d WHERE d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()) l) END";

const ASKING: &str = "asking the server what it is";

/// What a server said, and when it was asked.
struct Answer {
    asked: Timestamp,
    answered: Timestamp,
    rows: Rows,
}

/// Says the first statement and asks.
async fn read_facts(client: &Client) -> Result<Answer, SqlError> {
    run(client, sql_session::FIRST, ANSWER_GRACE).await?;
    let mut asked = Timestamp::now();
    let mut rows = run(client, &question(IDENTITY), ANSWER_GRACE).await;
    // A managed service may refuse this function; then the address stands in.
    if matches!(&rows, Err(error) if error.code() == "42501" && !error.is_lost()) {
        run(client, "ROLLBACK", ANSWER_GRACE).await?;
        asked = Timestamp::now();
        rows = run(client, &question("NULL"), ANSWER_GRACE).await;
    }
    Ok(Answer {
        rows: rows?,
        asked,
        answered: Timestamp::now(),
    })
}

fn facts(answer: Answer, target: &Target, endpoint: &Endpoint) -> Result<Facts, Failure> {
    let Answer {
        asked,
        answered,
        rows,
    } = answer;
    let row = rows
        .first()
        .ok_or_else(|| Failure::new(FailureCode::StatementFailed, ASKING))?;
    let server_now = row.timestamp(2).unwrap_or(asked);
    let halfway = (asked.as_microsecond() + answered.as_microsecond()) / 2;
    let version = row.parse::<u32>(0).unwrap_or(0) / 10_000;
    if version < 14 {
        return Err(Failure::new(
            FailureCode::StatementFailed,
            format!("{endpoint}: PostgreSQL {version} is too old; 14 and later are supported"),
        ));
    }
    Ok(Facts {
        version,
        superuser: row.flag(1),
        standby: row.flag(3),
        identity: row
            .get(4)
            .map_or_else(|| server_name(target), str::to_owned),
        clock_skew: (halfway - server_now.as_microsecond()) as f64 / 1e6,
        // Known to the caller.
        login: Method::None,
        encoding: match row.text(5) {
            "UTF8" => Encoding::Utf8,
            "SQL_ASCII" => Encoding::Unknown,
            _ => Encoding::Other,
        },
        // One too many, as of a parallel worker that is counted here and not there, is none left.
        slots_left: row
            .parse(6)
            .map(|left: i64| u64::try_from(left).unwrap_or(0)),
        asked: Instant::now(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_first_is_qualified() {
        for identity in [IDENTITY, "NULL"] {
            let text = question(identity);
            assert_eq!(sql_session::unqualified(&text), Vec::<String>::new());
        }
    }

    #[test]
    fn the_word_of_one_host_counts_for_more_than_silence() {
        let refused = |code, found, transient| Refused {
            state: None,
            found,
            failure: Failure {
                transient,
                ..Failure::new(code, format!("{code:?}"))
            },
        };
        let silent = || {
            refused(
                FailureCode::DatabaseUnreachable,
                Reached::Unreachable,
                false,
            )
        };
        let standby = || refused(FailureCode::DatabaseUnreachable, Reached::Reachable, true);
        let login = || refused(FailureCode::DatabaseRefusedLogin, Reached::Reachable, false);
        let absent = || refused(FailureCode::NoSuchObject, Reached::Reachable, false);

        let all = all_refused(vec![silent(), standby()]);
        assert!(all.failure.transient && all.found == Reached::Reachable);
        assert!(all.failure.message.contains("; "));
        let all = all_refused(vec![silent(), silent()]);
        assert!(!all.failure.transient && all.found == Reached::Unreachable);
        assert_eq!(
            all_refused(vec![silent(), absent(), login()]).failure.code,
            FailureCode::DatabaseRefusedLogin
        );
        assert_eq!(
            all_refused(vec![absent(), silent()]).failure.code,
            FailureCode::NoSuchObject
        );
    }
}
