//! Why there is no connection: what a refusal proves about the server, and the failure for it.

use std::time::Duration;

use mayfly_common::sql_session;
use mayfly_protocol::pg_login::{Cause, Refusal};
use mayfly_protocol::target::{Endpoint, Target};
use mayfly_protocol::task::{Failure, FailureCode};
use tokio_postgres::error::SqlState;

use super::breaker::Reached;
use super::sql_error::{describe, is_of_the_server};

/// Why there is no connection.
pub(super) struct Refused {
    /// The SQLSTATE of the server's answer, if there was one.
    pub(super) state: Option<SqlState>,
    pub(super) failure: Failure,
    pub(super) found: Reached,
}

/// Combines the refusals of several hosts. An answer counts more than silence.
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
            // One of the hosts may accept writes soon.
            transient: refusals.iter().any(|one| one.failure.transient),
            full: refusals.iter().any(|one| one.failure.full),
            ..Failure::new(code, messages.join("; "))
        },
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

pub(super) fn connect_failure(
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
        "too many connections, no connection slot is free: max_connections, or the limit of the database or of this role, is reached; `mayfly secret check` compares the limits (SQLSTATE 53300)".to_owned()
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

/// The failure of a login that this engine aborted. As with a refusal by the server, other credentials or another
/// `auth` of the base secret may help.
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

/// Whether a refused connection is a fault of the database and not of its server: the database is gone, accepts no
/// connections, refuses this admin, has reached its limit, or has settings that end each session. Its owner can
/// cause all of these.
pub(super) fn is_of_the_database(state: &SqlState) -> bool {
    let state = state.code();
    ["3D000", "55000", "42501", "53300"].contains(&state)
        || sql_session::ENDED_BY_SETTINGS.contains(&state)
}

/// Whether the server sent text that is not UTF-8 where the driver expects UTF-8. An example is a setting that is
/// reported at the start, such as `search_path` from 18 on.
fn has_bad_text(error: &tokio_postgres::Error) -> bool {
    let source = std::error::Error::source(error);
    let io = source.and_then(|source| source.downcast_ref::<std::io::Error>());
    io.is_some_and(|io| {
        io.get_ref()
            .is_some_and(|inner| inner.is::<std::str::Utf8Error>())
    })
}

/// What a failed connection shows about the server.
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
                // rustls refused the certificate.
                ErrorKind::InvalidData => Reached::Reachable,
                // The usual cause is a name that cannot be resolved.
                _ => Reached::Aborted,
            };
        }
        source = inner.source();
    }
    Reached::Aborted
}

#[cfg(test)]
mod tests {
    use super::*;

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
