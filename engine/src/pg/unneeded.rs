//! Removes a role only if nobody needs it. The statements check that themselves.

use mayfly_protocol::names::{RoleName, random_text};
use tokio_postgres::error::SqlState;

use super::row::first_column;
use super::session::Session;
use super::sql::{ident, literal};
use super::sql_error::SqlError;

/// SQLSTATE of Mayfly's own guard. PostgreSQL does not use the class `MF`.
pub(super) const NEEDED: &str = "MF010";
/// The members that need the role. The admin is not one of them, nor is a role that may only grant it to others.
pub(super) const MEMBERS: &str = "SELECT u.rolname FROM pg_auth_members m JOIN pg_roles u ON u.oid = m.member \
     WHERE m.roleid = r.oid AND NOT m.admin_option AND u.rolname <> current_user";
pub(super) const OWNS: &str = "SELECT FROM pg_shdepend s WHERE s.refclassid = 'pg_authid'::regclass AND s.refobjid = r.oid AND s.deptype = 'o'";

/// A guard that fails if somebody needs the role, or if it owns something.
pub(super) fn guard(oid: &str) -> String {
    let body = format!(
        "BEGIN IF EXISTS (SELECT 1 FROM pg_roles r WHERE r.oid = {oid} AND (EXISTS ({MEMBERS}) OR EXISTS ({OWNS}))) THEN \
         RAISE EXCEPTION 'needed' USING ERRCODE = '{NEEDED}'; END IF; END"
    );
    format!("DO {}", literal(&body))
}

/// Statements that rename a role nobody needs.
pub(super) fn rename(oid: &str, name: &str, to: &str) -> String {
    format!(
        "{}; ALTER ROLE {} RENAME TO {}",
        guard(oid),
        ident(name),
        ident(to)
    )
}

/// Statements that drop a role nobody needs.
pub(super) fn drop(oid: &str, name: &str) -> String {
    format!("{}; DROP ROLE {}", guard(oid), ident(name))
}

/// The name of a grant role that creates must not find any more.
pub(super) fn nameless() -> String {
    format!("mayfly_gone_{}", random_text(16))
}

/// Removes a grant role that was just made and could not get its grants. It is renamed first, as in a tidying. If
/// somebody needs it, or this is interrupted, a tidying removes it.
///
/// # Errors
/// A statement failed: see `SqlError::into_failure`.
pub(super) async fn drop_unfilled(home: &Session<'_>, role: &RoleName) -> Result<(), SqlError> {
    let find = format!(
        "SELECT oid FROM pg_roles WHERE rolname = {}",
        literal(role.as_str())
    );
    let rows = home.transact_retrying(&find).await?;
    let Some(oid) = first_column(&rows).into_iter().next() else {
        return Ok(());
    };
    let gone = nameless();
    let rename = rename(&oid, role.as_str(), &gone);
    let drop = drop(&oid, &gone);
    for text in [rename, drop] {
        match home.transact_retrying(&text).await {
            Ok(_) => {}
            // Another engine has given the role its grants and uses it, or has already removed it.
            Err(error) if error.code() == NEEDED || error.is(&[SqlState::UNDEFINED_OBJECT]) => {
                return Ok(());
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
