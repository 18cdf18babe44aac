//! The last step of an end: `DROP ROLE`, for many roles at once, or for one role after removing what depends on it.

use std::collections::HashSet;

use jiff::Timestamp;
use tokio_postgres::error::SqlState;

use mayfly_protocol::task::Failure;

use super::cleanup;
use super::disable_logins::{look_up, parse_found};
use super::due::{Dropped, Due};
use super::explain;
use super::servers::Servers;
use super::session::Session;
use super::sql::{ident, literal, literals};
use super::sql_error::SqlError;

/// SQLSTATE of Mayfly's own guard. PostgreSQL does not use the class `MF`.
const MADE_AGAIN: &str = "MF005";

/// The oids of those roles that own something or have a privilege of their own.
pub(super) async fn held(home: &Session<'_>, due: &[Due<'_>]) -> Result<HashSet<u32>, SqlError> {
    let oids: Vec<String> = due.iter().map(|role| role.oid.to_string()).collect();
    let text = format!(
        "SELECT DISTINCT refobjid FROM pg_shdepend WHERE refclassid = 'pg_authid'::regclass AND refobjid IN ({})",
        oids.join(", ")
    );
    let rows = home.transact(&text).await?;
    Ok(rows.iter().filter_map(|row| row.parse(0)).collect())
}

/// Drops roles in one transaction, if none of them may log in. A role that may log in was made again: a create that
/// was delivered twice made it after the login was taken from the first role. Returns when each role was dropped, and
/// how late.
pub(super) async fn drop_roles(
    home: &Session<'_>,
    due: &[Due<'_>],
) -> Result<Vec<Dropped>, SqlError> {
    let names = due
        .iter()
        .map(|role| ident(role.task.role.as_str()))
        .collect::<Vec<_>>()
        .join(", ");
    let look = look_up(due.iter().map(|role| role.task.role.as_str()));
    let guard = format!(
        "BEGIN IF EXISTS (SELECT FROM pg_roles WHERE rolname IN ({}) AND rolcanlogin) THEN \
           RAISE EXCEPTION 'made again' USING ERRCODE = '{MADE_AGAIN}'; END IF; END",
        literals(due.iter().map(|role| role.task.role.as_str()))
    );
    let text = format!("{look}; DO {}; DROP ROLE {names}", literal(&guard));
    let rows = home.transact_retrying(&text).await?;
    let dropped = due.iter().map(|role| {
        let found = parse_found(&rows, role.task);
        let at = found
            .as_ref()
            .map_or_else(Timestamp::now, |found| found.now);
        (at, -found.and_then(|found| found.left).unwrap_or(0.0))
    });
    Ok(dropped.collect())
}

/// Drops one role, after removing what depends on it. `None`: it was gone already.
pub(super) async fn drop_one(
    servers: &Servers,
    home: &Session<'_>,
    role: &Due<'_>,
) -> Result<Option<Dropped>, Failure> {
    let doing = "dropping the role";
    let only = std::slice::from_ref(role);
    let is_gone = |error: &SqlError| error.is(&[SqlState::UNDEFINED_OBJECT]);
    match drop_roles(home, only).await {
        Ok(dropped) => return Ok(dropped.into_iter().next()),
        Err(error) if is_gone(&error) => return Ok(None),
        Err(error) if error.is_lost() || error.code() == MADE_AGAIN => {
            return Err(error.into_failure(doing));
        }
        Err(error) if error.is_transient() => {
            return Err(explain::held_by(home, error, doing).await);
        }
        Err(_) => {}
    }
    cleanup::detach(servers, home, role).await?;
    match drop_roles(home, only).await {
        Ok(dropped) => Ok(dropped.into_iter().next()),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) if error.is_transient() => Err(explain::held_by(home, error, doing).await),
        Err(error) => Err(explain::explain(home, role, error).await),
    }
}
