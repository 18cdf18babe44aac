//! A set of grants, and the name of the role that holds them.

use mayfly_protocol::grant::Grant;
use mayfly_protocol::names::{InstallationId, RoleName};
use mayfly_protocol::target::Target;
use mayfly_protocol::task::{Failure, FailureCode};

use super::sql::short_hash;

/// The key of a grant role: server and admin, and the role's name.
pub(super) type Key = (String, RoleName);

/// What a grant role is for.
pub(crate) struct GrantSet<'a> {
    pub(crate) installation: &'a InstallationId,
    pub(crate) target: &'a Target,
    pub(crate) database: &'a str,
    pub(crate) grants: &'a [Grant],
}

impl GrantSet<'_> {
    /// The name of its role. It is the same for the same set at every engine.
    pub(crate) fn role(&self) -> Result<RoleName, Failure> {
        let mut grants: Vec<String> = self.grants.iter().map(Grant::to_string).collect();
        grants.sort();
        grants.dedup();
        let hash = short_hash(&[
            &self.installation.to_string(),
            &self.target.username,
            // This part stays in the name, so that existing grant roles keep their names.
            &self.target.database,
            self.database,
            &grants.join("\n"),
        ]);
        format!("mayfly_grant_{hash}")
            .parse()
            .map_err(|error| Failure::new(FailureCode::StatementFailed, format!("{error}")))
    }
}

/// A set with owned data, for work that outlives the request.
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

/// The result of a refresh.
pub(crate) struct Granted {
    /// The role that accounts become members of.
    pub(crate) role: RoleName,
    /// Its oid at the look. `None`: it has disappeared since.
    pub(crate) oid: Option<u32>,
    /// Number of pairs of object and privilege that patterns skipped. `None`: they were not looked at.
    pub(crate) skipped: Option<usize>,
    /// What it lacks at present, as a warning for the caller.
    pub(crate) warnings: Vec<String>,
}
