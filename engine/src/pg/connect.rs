//! Connects to one host of a server, with time limits and a text encoding.

use std::sync::Arc;
use std::time::Duration;

use mayfly_common::pg_connect::{self, Login};
use mayfly_common::sql_session;
use mayfly_protocol::pg_login::{Method, Rule};
use mayfly_protocol::target::{Endpoint, Target};
use mayfly_protocol::task::{Failure, FailureCode};
use tokio::task::AbortHandle;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config};
use tracing::debug;

use super::answer::{ANSWER_GRACE, run};
use super::breaker::Reached;
use super::facts::{ASKING, Encoding, Facts, facts, read_facts};
use super::hosts::Hosts;
use super::refused::{Refused, connect_failure};
use super::sql_error::describe;
use super::time_guard::Clock;

/// Maximum time of a connection to a single host.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum time of a connection to one of several hosts.
const HOST_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum time of the connections to all hosts together. It leaves time for the work of a create.
const HOSTS_TIMEOUT: Duration = Duration::from_secs(6);
/// A dead connection is noticed after this time, even if no task waits for it.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(15);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_RETRIES: u32 = 3;
const UNHEARD_MAX: Duration = Duration::from_secs(30);

/// The names that a connection is used for. PostgreSQL converts text between the encodings of the client and of the
/// *database*. But names of roles and databases belong to the whole server, which stores them as bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Names {
    /// Names of roles and databases. Nothing is converted, so a role has the same name in every database and for
    /// every login.
    OfServer,
    /// Names of objects in the database.
    OfDatabase,
}

pub(super) struct Connected {
    pub(super) client: Client,
    /// The task that moves its bytes. It ends with the client, except while an answer is outstanding.
    pub(super) driver: Option<AbortHandle>,
    pub(super) facts: Arc<Facts>,
    pub(super) names: Names,
    /// The host and port it leads to.
    pub(super) endpoint: Endpoint,
    /// The last reading of the server's clock on it.
    pub(super) clock: Option<Clock>,
}

impl Connected {
    /// Whether it can be used for names of this kind.
    pub(super) fn serves(&self, names: Names) -> bool {
        self.facts.encoding != Encoding::Other || self.names == names
    }
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
    // `default_transaction_read_only` does not count: it is only a default, which Mayfly's transactions override.
    if !connected.facts.standby {
        return Ok(connected);
    }
    Err(Refused {
        state: None,
        found: Reached::Reachable,
        failure: Failure {
            // If the target has several hosts, another may become the primary. A single host stays a standby.
            transient: target.host.contains(','),
            ..Failure::new(
                FailureCode::DatabaseUnreachable,
                format!(
                    "{endpoint} accepts no writes: it is a standby; name the primary in the base secret, or all hosts of the cluster"
                ),
            )
        },
    })
}

/// Makes the server send and take text as bytes: nothing is converted, and text that is not UTF-8 is no error. This
/// also works through a pooler in transaction mode, which follows this setting.
const AS_BYTES: &str = "SELECT pg_catalog.set_config('client_encoding', 'SQL_ASCII', false)";

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
    // A connection that is dropped during an answer would not end by itself.
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
        clock: facts.clock,
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

/// The time limit for each of these hosts.
pub(super) fn limit_for(endpoints: &[Endpoint]) -> Duration {
    match u32::try_from(endpoints.len()) {
        Ok(0 | 1) => CONNECT_TIMEOUT,
        Ok(several) => HOST_TIMEOUT.min(HOSTS_TIMEOUT / several),
        Err(_) => HOST_TIMEOUT,
    }
}

pub(super) async fn connect(
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
