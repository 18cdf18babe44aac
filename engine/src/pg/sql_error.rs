//! Why a statement failed, and the one place where a driver's error becomes a failure of ours: by its
//! SQLSTATE, never by its words.

use mayfly_common::task::{Failure, FailureCode};
use tokio_postgres::error::{Severity, SqlState};

/// Why a statement failed.
#[derive(Debug, Clone)]
pub(crate) struct SqlError {
    pub(super) state: Option<SqlState>,
    pub(super) message: String,
    /// The connection is of no more use.
    pub(super) lost: bool,
    /// There was no answer in time.
    pub(super) slow: bool,
}

/// A condition of the server that passes, as after a failover or a restart, and that another
/// connection may not meet: a connection that has it is of no more use.
pub(super) fn is_of_the_server(state: &SqlState) -> bool {
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
}
