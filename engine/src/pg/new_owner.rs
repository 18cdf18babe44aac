//! The role that gets the objects of accounts: the role that the operator names (`ownedObjects: reassignTo`), or the
//! quarantine role, which has no privilege. It is never a privileged role, because triggers and views would run with
//! its rights. `check` uses the same query as the end of an account.

use mayfly_protocol::grant::OwnedObjects;
use mayfly_protocol::names::InstallationId;
use mayfly_protocol::task::{Failure, FailureCode};
use tracing::warn;

use super::due::Due;
use super::join::join;
use super::own_role::find_or_make;
use super::row::Row;
use super::session::Session;
use super::sql::{literal, quarantine_comment, short_hash};

/// Why a role cannot be the new owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unfit {
    /// There is no role of this name.
    Absent,
    /// The role is a superuser, or has CREATEROLE, BYPASSRLS or REPLICATION: triggers and views of an account would
    /// run with its rights.
    Privileged,
    /// The admin is not a member of it, so it may not give it objects.
    NotMember,
}

/// Whether the role can be the new owner. `None`: it can.
///
/// # Errors
/// A statement failed: see `SqlError::into_failure`.
pub(super) async fn unfit(home: &Session<'_>, name: &str) -> Result<Option<Unfit>, Failure> {
    let query = format!(
        "SELECT rolsuper OR rolcreaterole OR rolbypassrls OR rolreplication, pg_has_role(oid, 'USAGE') \
         FROM pg_roles WHERE rolname = {}",
        literal(name)
    );
    let found = home.first_row("looking for the new owner", &query).await?;
    Ok(Unfit::of(&found))
}

impl Unfit {
    /// Reads a row: whether the role is privileged, and whether the admin is a member of it.
    fn of(found: &Row) -> Option<Self> {
        if found.is_empty() {
            Some(Self::Absent)
        } else if found.flag(0) {
            Some(Self::Privileged)
        } else if !found.flag(1) {
            Some(Self::NotMember)
        } else {
            None
        }
    }

    /// The reason, for the log.
    fn reason(self) -> &'static str {
        match self {
            Self::Absent => "it does not exist",
            Self::Privileged => "it has privileges that a new owner must not have",
            Self::NotMember => "the admin is not a member of it",
        }
    }
}

/// The role that gets the objects of an account.
pub(super) struct NewOwner {
    pub(super) name: String,
    pub(super) oid: u32,
}

/// The role of this name as the new owner.
async fn new_owner_named(home: &Session<'_>, name: String) -> Result<NewOwner, Failure> {
    let doing = "looking for the new owner";
    let query = format!(
        "SELECT oid FROM pg_roles WHERE rolname = {}",
        literal(&name)
    );
    let row = home.first_row(doing, &query).await?;
    let oid = row.parse(0);
    let oid = oid.ok_or_else(|| Failure::new(FailureCode::StatementFailed, doing))?;
    Ok(NewOwner { name, oid })
}

/// The role that gets the objects of the account: the role that the secret names, if it is fit, or else the
/// quarantine role.
///
/// # Errors
/// A statement failed: see `SqlError::into_failure`.
pub(super) async fn choose_new_owner(
    home: &Session<'_>,
    role: &Due<'_>,
) -> Result<NewOwner, Failure> {
    if let OwnedObjects::ReassignTo(named) = &role.task.owned_objects {
        let why_not = unfit(home, named).await?.map(Unfit::reason);
        match why_not {
            None => return new_owner_named(home, named.clone()).await,
            Some(reason) => {
                warn!(role = %role.task.role, owner = named, reason, "objects of the account go to the quarantine role instead");
            }
        }
    }
    quarantine(home, &role.task.installation, &role.task.target.username).await
}

/// The name of the quarantine role of an installation and admin.
pub(super) fn quarantine_name(installation: &InstallationId, admin: &str) -> String {
    format!(
        "mayfly_quarantine_{}",
        short_hash(&[&installation.to_string(), admin])
    )
}

/// The quarantine role of this installation and admin. It is made if it does not exist.
pub(super) async fn quarantine(
    home: &Session<'_>,
    installation: &InstallationId,
    admin: &str,
) -> Result<NewOwner, Failure> {
    let name = quarantine_name(installation, admin);
    let comment = quarantine_comment(installation);
    let doing = "making the quarantine role";
    find_or_make(home, &name, "NOINHERIT", &comment, doing).await?;
    join(home, &name).await.map_err(|e| e.into_failure(doing))?;
    new_owner_named(home, name).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_owner_exists_is_powerless_and_is_shared_with_the_admin() {
        let (yes, no) = (Some("t"), Some("f"));
        assert_eq!(Unfit::of(&Row::default()), Some(Unfit::Absent));
        for (privileged, member, unfit) in [
            (no, yes, None),
            (no, no, Some(Unfit::NotMember)),
            (yes, yes, Some(Unfit::Privileged)),
            (yes, no, Some(Unfit::Privileged)),
        ] {
            let row = Row::from([privileged, member]);
            assert_eq!(Unfit::of(&row), unfit, "{row:?}");
        }
    }
}
