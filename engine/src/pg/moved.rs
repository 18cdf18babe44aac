//! Roles of leases on another server than the one on which they were made. A major upgrade and a restore from a dump
//! keep roles, comments and `VALID UNTIL`, and change the server's identity. So a role with the lease's comment
//! belongs to the lease on every server. But on another server the role's absence proves nothing.

use mayfly_protocol::task::{Failure, FailureCode, Revoke};

use super::disable_logins::{LOOK_WITHIN, foreign, look_up, parse_found};
use super::limits::server_name;
use super::session::Session;
use mayfly_protocol::revocation::Ended;

/// The result of each task on a server that the task does not name. It changes nothing.
///
/// # Errors
/// A statement failed: see `SqlError::into_failure`.
pub(super) async fn look(
    home: &Session<'_>,
    tasks: &[(usize, &Revoke)],
) -> Result<Vec<(usize, Result<Ended, Failure>)>, Failure> {
    if tasks.is_empty() {
        return Ok(Vec::new());
    }
    let names = tasks.iter().map(|(_, task)| task.role.as_str());
    let text = format!("{}{}; COMMIT", home.begin(), look_up(names));
    let rows = match home.query_within(&text, LOOK_WITHIN).await {
        Ok(rows) => rows,
        Err(error) => {
            home.rollback().await;
            return Err(error.into_failure("looking for accounts of another server"));
        }
    };
    let found = tasks.iter().map(|(index, task)| {
        let result = match parse_found(&rows, task) {
            // A dispatcher of an earlier version does not understand this result.
            Some(_) if task.place.is_none() => Err(other_server(&task.target, task.role.as_str())),
            Some(found) if found.ours => Ok(Ended::Moved {
                server: home.facts().identity.clone(),
            }),
            Some(_) => Err(foreign(task)),
            None => Err(other_server(&task.target, task.role.as_str())),
        };
        (*index, result)
    });
    Ok(found.collect())
}

/// The failure if the role was made on another server than the one that answers.
pub(super) fn other_server(target: &mayfly_protocol::target::Target, role: &str) -> Failure {
    Failure::new(
        FailureCode::OtherServer,
        format!(
            "{} is not the server on which role {role} was made. The role is absent here, which proves nothing about the account",
            server_name(target)
        ),
    )
}
