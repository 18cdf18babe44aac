//! The role that gets what accounts own, where the operator names one (`ownedObjects: reassignTo`).
//! `check` predicts by the same query that an end decides by.

use mayfly_protocol::task::Failure;

use super::session::Session;
use super::sql::literal;

/// What speaks against a role as the new owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unfit {
    /// There is no role of this name.
    Absent,
    /// It is a superuser, or has CREATEROLE, BYPASSRLS or REPLICATION: triggers and views of an account
    /// would run with its rights.
    Privileged,
    /// The admin is not a member of it, and may not give it anything.
    NotMember,
}

/// Whether the role can be the new owner. `None`: it can.
///
/// # Errors
/// As any statement.
pub(super) async fn unfit(home: &Session<'_>, name: &str) -> Result<Option<Unfit>, Failure> {
    let query = format!(
        "SELECT rolsuper OR rolcreaterole OR rolbypassrls OR rolreplication, pg_has_role(oid, 'USAGE') \
         FROM pg_roles WHERE rolname = {}",
        literal(name)
    );
    let found = home.first_row("looking for the new owner", &query).await?;
    Ok(if found.is_empty() {
        Some(Unfit::Absent)
    } else if found.flag(0) {
        Some(Unfit::Privileged)
    } else if !found.flag(1) {
        Some(Unfit::NotMember)
    } else {
        None
    })
}
