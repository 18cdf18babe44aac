//! A set of grants, and the name of the role that holds them.

use mayfly_protocol::grant::Grant;
use mayfly_protocol::names::{InstallationId, RoleName};
use mayfly_protocol::target::Target;
use mayfly_protocol::task::{Failure, FailureCode};

use super::sql::short_hash;

/// Server and admin, and the role.
pub(super) type Key = (String, RoleName);

/// What a grant role is for.
pub(crate) struct GrantSet<'a> {
    pub(crate) installation: &'a InstallationId,
    pub(crate) target: &'a Target,
    pub(crate) database: &'a str,
    pub(crate) grants: &'a [Grant],
}

impl GrantSet<'_> {
    /// Its role's name: the same for the same set, whichever engine asks.
    pub(crate) fn role(&self) -> Result<RoleName, Failure> {
        let mut grants: Vec<String> = self.grants.iter().map(Grant::to_string).collect();
        grants.sort();
        grants.dedup();
        let hash = short_hash(&[
            &self.installation.to_string(),
            &self.target.username,
            // Kept in the name, so that existing grant roles keep theirs.
            &self.target.database,
            self.database,
            &grants.join("\n"),
        ]);
        format!("mayfly_grant_{hash}")
            .parse()
            .map_err(|error| Failure::new(FailureCode::StatementFailed, format!("{error}")))
    }
}

/// A set that work owns which outlives the request for it.
pub(super) struct OwnedSet {
    installation: InstallationId,
    target: Target,
    database: String,
    grants: Vec<Grant>,
}

impl OwnedSet {
    pub(super) fn of(set: &GrantSet<'_>) -> Self {
        Self {
            installation: *set.installation,
            target: set.target.clone(),
            database: set.database.to_owned(),
            grants: set.grants.to_vec(),
        }
    }

    pub(super) fn as_set(&self) -> GrantSet<'_> {
        GrantSet {
            installation: &self.installation,
            target: &self.target,
            database: &self.database,
            grants: &self.grants,
        }
    }
}

/// What a refresh found.
pub(crate) struct Granted {
    /// The role of which accounts become members.
    pub(crate) role: RoleName,
    /// The oid that it had at the look. `None`: it is gone since then.
    pub(crate) oid: Option<u32>,
    /// Pairs of object and privilege that patterns skipped. `None`: they were not looked at.
    pub(crate) skipped: Option<usize>,
    /// What it lacks at present, as a warning for the caller.
    pub(crate) warnings: Vec<String>,
}
