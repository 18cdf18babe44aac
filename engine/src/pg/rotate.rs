//! Changes the admin's own password. A login shows which of two passwords is in force, so the result of an
//! earlier try can be found out. With `trust` and similar methods a login shows nothing, and nothing is
//! changed.

use mayfly_common::arrival::Arrival;
use mayfly_common::fault;
use mayfly_protocol::secret::Secret;
use mayfly_protocol::target::Target;
use mayfly_protocol::task::{Failure, FailureCode, Rotate, Rotated};
use mayfly_protocol::timing::timing;
use postgres_protocol::password::scram_sha_256;
use tracing::{info, warn};

use super::limits::server_name;
use super::probe_login::{LoginAnswer, probe_login, wrong_password};
use super::servers::Servers;
use super::session::{LOCK_TIMEOUT, Session};
use super::sql::literal;
use super::sql_error::SqlError;
use super::time_guard::{TOO_LATE, guard_at, refuse_after, refuse_late_commit};

/// Changes the password, unless it is changed already. `arrived` is the time of delivery. The change is committed at
/// most the create budget later, or never, and not after [`Rotate::not_after`] by the database's clock.
///
/// # Errors
/// None. The result has the failure, and says which password is in force.
pub(crate) async fn rotate(
    servers: &Servers,
    task: &Rotate,
    arrived: Arrival,
) -> Result<Rotated, Failure> {
    let wrong = wrong_password(&task.target);
    match probe_login(servers.hosts(), &wrong, &task.target.database).await {
        LoginAnswer::LetIn => return Ok(Rotated::Trusted(trusted(&task.target))),
        LoginAnswer::Refused { .. } => {}
        LoginAnswer::NoAnswer(failure) => return Ok(Rotated::Unknown(failure)),
    }
    let not_yet = Failure::new(FailureCode::StatementFailed, "it was not requested");
    let looked = look(servers, task, not_yet).await;
    if !task.change || !matches!(looked, Rotated::Unchanged(_)) {
        return Ok(looked);
    }
    let limit = tokio::time::Instant::from_std(arrived.instant() + timing().create_budget);
    let changed = tokio::time::timeout_at(limit, change(servers, task, arrived)).await;
    let failure = match changed {
        Ok(Ok(())) => Failure::new(
            FailureCode::StatementFailed,
            "PostgreSQL accepted the new password, but refuses a login with it",
        ),
        Ok(Err(failure)) => {
            warn!(
                code = failure.code.as_str(),
                reason = failure.message,
                "the admin's password was not changed"
            );
            failure
        }
        Err(_) => Failure::new(
            FailureCode::DatabaseUnreachable,
            format!(
                "the database did not finish within {} s",
                timing().create_budget.as_secs()
            ),
        ),
    };
    let looked = look(servers, task, failure).await;
    if matches!(looked, Rotated::Changed { .. }) {
        // A connection that was opened with the old password cannot serve revocations that name the new one.
        let new = with_password(&task.target, &task.password);
        if let Err(failure) = servers.keep_one(&new).await {
            warn!(
                reason = failure.message,
                "no connection could be kept for revocations"
            );
        }
        info!(admin = task.target.username, "changed the admin's password");
    }
    Ok(looked)
}

fn trusted(target: &Target) -> Failure {
    Failure::new(
        FailureCode::StatementFailed,
        format!(
            "{} lets {} log in with a wrong password (a `trust`, `cert`, `peer` or `ident` line of pg_hba.conf): a login cannot show which password is in force, so the password is not changed",
            server_name(target),
            target.username
        ),
    )
}

fn with_password(target: &Target, password: &Secret) -> Target {
    Target {
        password: password.clone(),
        ..target.clone()
    }
}

/// Finds out which password is in force. `otherwise` is the reason why it may still be the earlier password.
async fn look(servers: &Servers, task: &Rotate, otherwise: Failure) -> Rotated {
    let new = with_password(&task.target, &task.password);
    let new = login(servers, &new).await.map(|session| {
        let server = session.facts().identity.clone();
        session.release();
        server
    });
    match by_new_password(new) {
        Some(looked) => looked,
        None => by_old_password(login(servers, &task.target).await.map(drop), otherwise),
    }
}

/// What a login with the new password shows. It gives the identity of the server. `None`: the login is refused, so
/// the earlier password is tried.
fn by_new_password(login: Result<String, Failure>) -> Option<Rotated> {
    match login {
        Ok(server) => Some(Rotated::Changed { server }),
        Err(failure) if failure.code == FailureCode::DatabaseRefusedLogin => None,
        Err(failure) => Some(Rotated::Unknown(failure)),
    }
}

/// What a login with the earlier password shows after the new password was refused.
fn by_old_password(login: Result<(), Failure>, otherwise: Failure) -> Rotated {
    match login {
        Ok(()) => Rotated::Unchanged(otherwise),
        Err(failure) => Rotated::Unknown(failure),
    }
}

/// Opens a new connection, even if the admin's own database is gone.
async fn login<'s>(servers: &'s Servers, target: &Target) -> Result<Session<'s>, Failure> {
    match servers.fresh_session(target, &target.database).await {
        Err(failure) if failure.code == FailureCode::NoSuchObject => {
            servers.fresh_session(target, "postgres").await
        }
        found => found,
    }
}

async fn change(servers: &Servers, task: &Rotate, arrived: Arrival) -> Result<(), Failure> {
    let session = login(servers, &task.target).await?;
    let verifier = scram_sha_256(task.password.expose().as_bytes());
    fault::point("rotate", "before_change").await;
    let not_after = guard_at(&session, arrived, task.not_after).await?;
    // Without `synchronous_commit = local`, a COMMIT that waits for a standby could make the change visible at any
    // later time. With it and the two checks, the transaction commits in time or not at all, even if a statement is
    // delayed.
    let (early, late) = (refuse_after(&not_after), refuse_late_commit(&not_after));
    // SESSION_USER is the role that logged in; its settings may make it another `current_user`. The statement is
    // inside a block, so that `log_statement = ddl` does not log it.
    let change = format!("ALTER ROLE SESSION_USER PASSWORD {}", literal(&verifier));
    let body = format!("BEGIN EXECUTE {}; END", literal(&change));
    let text = format!(
        "{}SET LOCAL synchronous_commit = local; {early}; DO {}; {late}; COMMIT",
        session.begin_with(timing().create_statement, LOCK_TIMEOUT),
        literal(&body),
    );
    fault::point("rotate", "before_commit").await;
    let done = session.query(&text).await;
    fault::point("rotate", "committed").await;
    let Err(error) = done else {
        return Ok(());
    };
    session.rollback().await;
    Err(not_changed(error))
}

/// Why the password was not changed, with what the operator can do about it.
fn not_changed(error: SqlError) -> Failure {
    let more = match error.code() {
        TOO_LATE => {
            return Failure::new(FailureCode::PastDeadline, "the request came too late");
        }
        "42501" => {
            "; PostgreSQL lets every role change its own password, so an addition to this server forbids it (on a managed service the admin may need a role such as rds_password)"
        }
        "25006" => "; the server is a standby",
        _ => "",
    };
    let mut failure = error.into_failure("changing the admin's password");
    failure.message.push_str(more);
    failure
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_postgres::error::SqlState;

    fn failed(code: FailureCode) -> Failure {
        Failure::new(code, "x")
    }

    /// A login that could not be tried shows nothing about a password.
    #[test]
    fn a_login_shows_which_password_is_in_force() {
        use FailureCode::{DatabaseRefusedLogin, DatabaseUnreachable, StatementFailed};
        let by_new = |login: Result<&str, FailureCode>| {
            by_new_password(login.map(str::to_owned).map_err(failed))
        };
        assert!(matches!(by_new(Ok("s")), Some(Rotated::Changed { server }) if server == "s"));
        assert!(
            by_new(Err(DatabaseRefusedLogin)).is_none(),
            "the earlier one is tried"
        );
        for code in [DatabaseUnreachable, StatementFailed] {
            let looked = by_new(Err(code));
            assert!(matches!(looked, Some(Rotated::Unknown(failure)) if failure.code == code));
        }
        let otherwise = || failed(StatementFailed);
        let by_old =
            |login: Result<(), FailureCode>| by_old_password(login.map_err(failed), otherwise());
        assert!(matches!(by_old(Ok(())), Rotated::Unchanged(why) if why == otherwise()));
        // Neither password is accepted: somebody has set a third one.
        for code in [DatabaseRefusedLogin, DatabaseUnreachable] {
            let looked = by_old(Err(code));
            assert!(matches!(looked, Rotated::Unknown(failure) if failure.code == code));
        }
    }

    #[test]
    fn a_refused_change_says_what_helps() {
        for (state, code, words) in [
            (TOO_LATE, FailureCode::PastDeadline, "too late"),
            ("42501", FailureCode::AdminLacksRights, "rds_password"),
            ("25006", FailureCode::DatabaseUnreachable, "is a standby"),
            ("22023", FailureCode::StatementFailed, "(SQLSTATE 22023)"),
        ] {
            let failure = not_changed(SqlError {
                state: Some(SqlState::from_code(state)),
                message: String::new(),
                lost: false,
                slow: false,
            });
            assert_eq!(failure.code, code, "{state}");
            assert!(failure.message.contains(words), "{failure:?}");
        }
    }
}
