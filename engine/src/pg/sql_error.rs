//! Why a statement failed. This is the only place where a driver's error becomes a failure of Mayfly. Only the
//! error's SQLSTATE decides, never its text.

use mayfly_protocol::task::{Failure, FailureCode};
use tokio_postgres::error::{Severity, SqlState};

/// Why a statement failed.
#[derive(Debug, Clone)]
pub(crate) struct SqlError {
    pub(super) state: Option<SqlState>,
    pub(super) message: String,
    /// Whether the connection cannot be used any more.
    pub(super) lost: bool,
    /// Whether there was no answer in time.
    pub(super) slow: bool,
}

#[cfg(test)]
impl SqlError {
    /// With this SQLSTATE, if the server gave one.
    pub(super) fn for_tests(state: Option<&str>, lost: bool) -> Self {
        Self {
            state: state.map(SqlState::from_code),
            message: String::new(),
            lost,
            slow: false,
        }
    }
}

/// SQLSTATE of a lock that was not available within `lock_timeout`.
pub(super) const LOCK_NOT_AVAILABLE: &str = "55P03";

/// The meaning of a SQLSTATE that does not depend on the statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meaning {
    /// The server is at fault, not the statement: it shuts down, starts, has crashed, is full, or is a standby.
    /// Another connection, or a later connection, may succeed. This connection is closed.
    Server,
    /// There was a conflict with other sessions. The same statement may succeed at once.
    Conflict,
    /// The statement took too long, or somebody cancelled it.
    Cancelled,
    /// The admin lacks a right.
    Rights,
    /// Something that the statement names does not exist.
    Absent,
    /// The statement cannot succeed.
    Statement,
}

/// The meaning according to the classes in appendix A of PostgreSQL's documentation.
pub(super) fn meaning(state: &str) -> Meaning {
    match state {
        // query_canceled: the statement's time-out, or pg_cancel_backend.
        "57014" => Meaning::Cancelled,
        // lock_not_available; internal_error, above all "tuple concurrently updated".
        "55P03" | "XX000" => Meaning::Conflict,
        // in_failed_sql_transaction, the two time-outs of a transaction, read_only_sql_transaction.
        "25P02" | "25P03" | "25P04" | "25006" => Meaning::Server,
        "42501" => Meaning::Rights,
        // undefined_object, _table, _function, invalid_schema_name, invalid_catalog_name.
        "42704" | "42P01" | "42883" | "3F000" | "3D000" => Meaning::Absent,
        _ => match state.get(..2) {
            // connection_exception, insufficient_resources, operator_intervention, system_error,
            // config_file_error, and data_corrupted or index_corrupted.
            Some("08" | "53" | "57" | "58" | "F0" | "XX") => Meaning::Server,
            // transaction_rollback: serialization, deadlock.
            Some("40") => Meaning::Conflict,
            _ => Meaning::Statement,
        },
    }
}

/// Whether this is a transient condition of the server, as after a failover or a restart.
pub(super) fn is_of_the_server(state: &SqlState) -> bool {
    meaning(state.code()) == Meaning::Server
}

impl SqlError {
    /// A failure of Mayfly's own that another look will correct.
    pub(crate) fn transient(message: &str) -> Self {
        Self {
            state: Some(SqlState::T_R_SERIALIZATION_FAILURE),
            message: message.to_owned(),
            lost: false,
            slow: false,
        }
    }

    /// A fault of this program. Nothing was sent.
    pub(super) fn ours(message: &str) -> Self {
        Self {
            state: None,
            message: message.to_owned(),
            lost: false,
            slow: false,
        }
    }

    /// Whether the SQLSTATE is one of these.
    pub(crate) fn is(&self, states: &[SqlState]) -> bool {
        self.state
            .as_ref()
            .is_some_and(|state| states.contains(state))
    }

    /// The SQLSTATE as text, also for Mayfly's own codes.
    pub(crate) fn code(&self) -> &str {
        self.state.as_ref().map_or("", SqlState::code)
    }

    fn meaning(&self) -> Meaning {
        meaning(self.code())
    }

    /// Whether the same statement may succeed a moment later.
    pub(crate) fn is_transient(&self) -> bool {
        self.meaning() == Meaning::Conflict
    }

    /// Like [`SqlError::is_transient`], except for a lock that was not available in time: its holder may keep it for
    /// long.
    pub(super) fn is_worth_retrying(&self) -> bool {
        self.is_transient() && self.code() != LOCK_NOT_AVAILABLE
    }

    /// Whether the connection is lost, or leads to a server that cannot do this now.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost || self.meaning() == Meaning::Server
    }

    /// The failure for the caller. Its message begins with `doing`.
    pub(crate) fn into_failure(self, doing: &str) -> Failure {
        let code = match self.meaning() {
            _ if self.lost => FailureCode::DatabaseUnreachable,
            // The request itself is correct and may be repeated.
            Meaning::Server | Meaning::Conflict | Meaning::Cancelled => {
                FailureCode::DatabaseUnreachable
            }
            Meaning::Rights => FailureCode::AdminLacksRights,
            Meaning::Absent => FailureCode::NoSuchObject,
            Meaning::Statement => FailureCode::StatementFailed,
        };
        let state = match self.code() {
            "" => String::new(),
            state => format!(" (SQLSTATE {state})"),
        };
        Failure {
            transient: code == FailureCode::DatabaseUnreachable && !self.slow,
            ..Failure::new(code, format!("{doing}: {}{state}", self.message))
        }
    }
}

impl From<tokio_postgres::Error> for SqlError {
    fn from(error: tokio_postgres::Error) -> Self {
        match error.as_db_error() {
            Some(db) => Self {
                state: Some(db.code().clone()),
                message: words(db),
                // The other field with the severity is translated for people, so this field is used.
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

/// The server's message. If a right is missing, DETAIL and HINT name it and how to grant it; they contain only
/// names. For other errors they may contain data, so they are left out.
fn words(db: &tokio_postgres::error::DbError) -> String {
    let mut text = db.message().to_owned();
    if meaning(db.code().code()) == Meaning::Rights {
        for (name, more) in [("DETAIL", db.detail()), ("HINT", db.hint())] {
            if let Some(more) = more {
                text.push_str(&format!("; {name}: {more}"));
            }
        }
    }
    text
}

/// The messages of the driver and of the libraries below it. They are about sockets and TLS, and contain no
/// statement.
pub(super) fn describe(error: &tokio_postgres::Error) -> String {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(state: &str) -> SqlError {
        SqlError {
            state: Some(SqlState::from_code(state)),
            message: String::new(),
            lost: false,
            slow: false,
        }
    }

    /// One row for each SQLSTATE a server was seen to send, and for each class by what it means.
    #[test]
    fn a_state_means_the_same_whatever_it_interrupts() {
        use FailureCode::{AdminLacksRights, DatabaseUnreachable, NoSuchObject, StatementFailed};
        for (states, meaning, code) in [
            (
                // Shutdown, crash, start, dropped database, idle sessions; resources; the system;
                // corruption; a standby; a transaction that is no more.
                "57P01 57P02 57P03 57P04 57P05 57000 08000 08003 08006 08P01 53000 53100 53200 53300 53400 \
                 58000 58030 58P01 58P02 58P03 XX001 XX002 F0000 F0001 25006 25P02 25P03 25P04",
                Meaning::Server,
                DatabaseUnreachable,
            ),
            (
                "XX000 40000 40001 40003 40P01 55P03",
                Meaning::Conflict,
                DatabaseUnreachable,
            ),
            ("57014", Meaning::Cancelled, DatabaseUnreachable),
            ("42501", Meaning::Rights, AdminLacksRights),
            (
                "42704 42P01 42883 3F000 3D000",
                Meaning::Absent,
                NoSuchObject,
            ),
            (
                "0A000 22023 23505 2BP01 42601 42710 54000 55006 P0001 MF001 MF010 00000",
                Meaning::Statement,
                StatementFailed,
            ),
        ] {
            for state in states.split_whitespace() {
                let error = failed(state);
                assert_eq!(error.meaning(), meaning, "{state}");
                assert_eq!(error.is_lost(), meaning == Meaning::Server, "{state}");
                assert_eq!(
                    error.is_transient(),
                    meaning == Meaning::Conflict,
                    "{state}"
                );
                let failure = error.into_failure("x");
                assert_eq!(failure.code, code, "{state}");
                assert_eq!(failure.transient, code == DatabaseUnreachable, "{state}");
            }
        }
    }

    #[test]
    fn silence_and_a_fatal_error_are_of_the_server_whatever_the_state() {
        for (state, slow) in [(None, false), (None, true), (Some("42501"), false)] {
            let error = SqlError {
                state: state.map(SqlState::from_code),
                lost: true,
                slow,
                ..failed("00000")
            };
            let failure = error.into_failure("x");
            assert_eq!(failure.code, FailureCode::DatabaseUnreachable);
            assert_eq!(failure.transient, !slow);
        }
    }
}
