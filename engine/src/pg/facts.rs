//! The facts that the engine asks for when it connects to a server.

use std::time::Instant;

use jiff::Timestamp;
use mayfly_common::sql_session::{self, Access, Limits};
use mayfly_protocol::pg_login::Method;
use mayfly_protocol::target::{Endpoint, Target};
use mayfly_protocol::task::{Failure, FailureCode};
use tokio_postgres::Client;

use super::answer::{ANSWER_GRACE, run};
use super::limits::server_name;
use super::row::Rows;
use super::sql;
use super::sql_error::SqlError;
use super::time_guard::Clock;

/// What the server reported when the connection was made.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    /// Major version, 14 and later.
    pub(crate) version: u32,
    /// Whether the admin is a superuser.
    pub(crate) superuser: bool,
    /// Whether the admin may end the sessions of accounts without being a member of them: it is a superuser, or has
    /// `pg_signal_backend`.
    pub(super) ends_sessions: bool,
    /// Whether it is a standby, which takes no writes.
    pub(super) standby: bool,
    /// The system identifier of the server; its address if the server does not report one.
    pub(crate) identity: String,
    /// The server's clock, when the connection was made.
    pub(super) clock: Option<Clock>,
    /// This machine's clock minus the server's, in seconds, when the connection was made.
    pub(crate) clock_skew: f64,
    /// The method by which the admin was authenticated.
    pub(crate) login: Method,
    /// How the database stores text.
    pub(super) encoding: Encoding,
    /// Number of further connections that the limits of the admin and the database allowed when this connection was
    /// made. `None`: there is no limit.
    pub(super) slots_left: Option<u64>,
    /// When the server was asked for these facts.
    pub(super) asked: Instant,
}

/// How a database stores text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    /// The database stores text as UTF-8.
    Utf8,
    /// The database stores the bytes that it gets (`SQL_ASCII`).
    Unknown,
    /// The database stores text in another encoding, which PostgreSQL converts.
    Other,
}

/// The query for the facts, after [`sql_session::FIRST`]. It only reads, so that a standby answers it too.
fn question(identity: &str) -> String {
    let limits = Limits {
        statement: ANSWER_GRACE,
        lock: ANSWER_GRACE,
        idle_in_transaction: ANSWER_GRACE,
    };
    format!(
        "{begin}{of_any_version}\
         SELECT pg_catalog.current_setting('server_version_num'), r.rolsuper, {now}, pg_catalog.pg_is_in_recovery(), {identity}, \
         pg_catalog.current_setting('server_encoding'), {SLOTS_LEFT}, \
         pg_catalog.pg_has_role(CURRENT_USER, 'pg_signal_backend', 'USAGE') \
         FROM pg_catalog.pg_roles r WHERE r.rolname OPERATOR(pg_catalog.=) CURRENT_USER; COMMIT",
        begin = sql_session::begin(Access::ReadOnly, &limits),
        of_any_version = sql_session::of_any_version(true),
        now = sql::timestamp_text("pg_catalog.clock_timestamp()"),
    )
}

/// The column of the answer to [`question`] that has the server's clock.
const SERVER_NOW: usize = 2;

const IDENTITY: &str = "(SELECT c.system_identifier FROM pg_catalog.pg_control_system() c)";

/// How many connections the limits still allow. Superusers have no limit. The sessions of a role and of a database
/// are counted as PostgreSQL does. Every role may see whose sessions they are.
const SLOTS_LEFT: &str = "CASE WHEN r.rolsuper THEN NULL ELSE (SELECT pg_catalog.min(l.most OPERATOR(pg_catalog.-) l.used) FROM (\
     SELECT r.rolconnlimit AS most, CASE WHEN r.rolconnlimit OPERATOR(pg_catalog.>=) 0 THEN \
       (SELECT pg_catalog.count(*) FROM pg_catalog.pg_stat_activity a WHERE a.usesysid OPERATOR(pg_catalog.=) r.oid) END AS used \
     UNION ALL SELECT d.datconnlimit, CASE WHEN d.datconnlimit OPERATOR(pg_catalog.>=) 0 THEN \
       (SELECT pg_catalog.count(*) FROM pg_catalog.pg_stat_activity a WHERE a.datid OPERATOR(pg_catalog.=) d.oid) END \
     FROM pg_catalog.pg_database d WHERE d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()) l) END";

pub(super) const ASKING: &str = "reading the server's version and identity";

/// A server's answer, and when it was asked.
pub(super) struct Answer {
    asked: Timestamp,
    answered: Timestamp,
    rows: Rows,
    clock: Option<Clock>,
}

/// Sends the first statement and the question.
pub(super) async fn read_facts(client: &Client) -> Result<Answer, SqlError> {
    run(client, sql_session::FIRST, ANSWER_GRACE).await?;
    let mut asked = Timestamp::now();
    let mut rows = run(client, &question(IDENTITY), ANSWER_GRACE).await;
    // A managed service may refuse this function. Then the address is the identity.
    if matches!(&rows, Err(error) if error.code() == "42501" && !error.is_lost()) {
        run(client, "ROLLBACK", ANSWER_GRACE).await?;
        asked = Timestamp::now();
        rows = run(client, &question("NULL"), ANSWER_GRACE).await;
    }
    let rows = rows?;
    let now = rows.first().and_then(|row| row.timestamp(SERVER_NOW));
    Ok(Answer {
        clock: now.map(Clock::of),
        rows,
        asked,
        answered: Timestamp::now(),
    })
}

pub(super) fn facts(
    answer: Answer,
    target: &Target,
    endpoint: &Endpoint,
) -> Result<Facts, Failure> {
    let Answer {
        asked,
        answered,
        rows,
        clock,
    } = answer;
    let row = rows
        .first()
        .ok_or_else(|| Failure::new(FailureCode::StatementFailed, ASKING))?;
    let server_now = row.timestamp(SERVER_NOW).unwrap_or(asked);
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
        ends_sessions: row.flag(7),
        standby: row.flag(3),
        identity: row
            .get(4)
            .map_or_else(|| server_name(target), str::to_owned),
        clock,
        clock_skew: (halfway - server_now.as_microsecond()) as f64 / 1e6,
        // The caller replaces this value.
        login: Method::None,
        encoding: match row.text(5) {
            "UTF8" => Encoding::Utf8,
            "SQL_ASCII" => Encoding::Unknown,
            _ => Encoding::Other,
        },
        // A negative number means that no connection is left: this query counts parallel workers, and the server
        // does not.
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
}
