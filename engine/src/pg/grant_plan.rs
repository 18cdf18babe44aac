//! What a grant role still lacks, and the statements that give it. Reads only;
//! [`super::grant_role`] acts on it.

use std::collections::{BTreeMap, BTreeSet};

use mayfly_common::grant::Grant;
use mayfly_common::names::RoleName;
use mayfly_common::task::{Failure, FailureCode};

use super::grant_catalog::Catalog;
use super::grant_lacks::{Lack, names};
use super::session::Session;
use super::sql::ident;

/// Objects in one GRANT statement, at most.
pub(super) const OBJECTS_PER_STATEMENT: usize = 200;

/// One grant against the catalogs.
#[derive(Debug)]
pub(super) struct Needed {
    pub(super) text: String,
    pub(super) pattern: bool,
    /// Pairs of object and privilege the grant covers.
    pub(super) total: usize,
    pub(super) lacks: Vec<Lack>,
    /// What is good to have beside it (serial columns' sequences): granted where it can be.
    pub(super) beside: Vec<Lack>,
}

/// Everything a grant role needs in one database.
#[derive(Debug)]
pub(super) struct Plan {
    needed: Vec<Needed>,
    admin: String,
}

impl Plan {
    /// The statements that give the role what it lacks and the admin may grant.
    pub(super) fn statements(&self, role: &RoleName, version: u32) -> Vec<String> {
        let to = ident(role.as_str());
        let mut schemas = BTreeSet::new();
        let mut by_privileges: BTreeMap<(&str, Vec<String>), Vec<String>> = BTreeMap::new();
        let mut by_object: BTreeMap<(&str, &str), Vec<String>> = BTreeMap::new();
        for lack in self
            .needed
            .iter()
            .flat_map(|n| n.lacks.iter().chain(&n.beside))
        {
            if let Some((schema, true)) = &lack.schema {
                schemas.insert(schema.clone());
            }
            if lack.grantable && !lack.held {
                let privileges = by_object.entry((lack.keyword, &lack.object)).or_default();
                if !privileges.contains(&lack.privilege) {
                    privileges.push(lack.privilege.clone());
                }
            }
        }
        for ((keyword, object), privileges) in by_object {
            by_privileges
                .entry((keyword, privileges))
                .or_default()
                .push(object.to_owned());
        }
        let mut statements: Vec<String> = schemas
            .iter()
            .map(|schema| format!("GRANT USAGE ON SCHEMA {schema} TO {to}"))
            .collect();
        for ((keyword, privileges), objects) in by_privileges {
            for some in objects.chunks(OBJECTS_PER_STATEMENT) {
                let objects = some.join(", ");
                statements.push(match keyword {
                    // INHERIT without SET: what the role allows, but not to become it.
                    "ROLE" if version >= 16 => {
                        format!("GRANT {objects} TO {to} WITH INHERIT TRUE, SET FALSE")
                    }
                    "ROLE" => format!("GRANT {objects} TO {to}"),
                    _ => format!(
                        "GRANT {} ON {keyword} {objects} TO {to}",
                        privileges.join(", ")
                    ),
                });
            }
        }
        statements
    }

    /// Whether the role has all that must be; the number of object-privilege pairs patterns passed
    /// over.
    ///
    /// # Errors
    /// `admin_lacks_rights` for something named, `grant_refused` where a pattern gives nothing.
    pub(super) fn verdict(&self) -> Result<usize, Failure> {
        let mut skipped = 0;
        for needed in &self.needed {
            if needed.pattern {
                if needed.total == 0 {
                    return Err(Failure::new(
                        FailureCode::GrantRefused,
                        format!("nothing in the database matches: {}", needed.text),
                    ));
                }
                if needed.lacks.len() == needed.total {
                    return Err(Failure::new(
                        FailureCode::GrantRefused,
                        format!(
                            "nothing of this can be granted by {}: {} ({}); it must own the objects or hold the privileges WITH GRANT OPTION",
                            self.admin,
                            needed.text,
                            names(&needed.lacks)
                        ),
                    ));
                }
                skipped += needed.lacks.len();
            } else if !needed.lacks.is_empty() {
                return Err(Failure::new(
                    FailureCode::AdminLacksRights,
                    format!(
                        "{} may not grant this: {} ({}); it must own the object or hold the privilege WITH GRANT OPTION",
                        self.admin,
                        needed.text,
                        names(&needed.lacks)
                    ),
                ));
            }
        }
        Ok(skipped)
    }

    /// What patterns passed over, for the log.
    pub(super) fn skipped_names(&self) -> String {
        let lacks: Vec<Lack> = self
            .needed
            .iter()
            .filter(|n| n.pattern)
            .flat_map(|n| n.lacks.clone())
            .collect();
        names(&lacks)
    }
}

/// Looks all grants up. `db` is a session in the database they are about; the role exists.
///
/// # Errors
/// `no_such_object`, `ambiguous_object`, `grant_refused`.
pub(super) async fn plan(
    db: &Session<'_>,
    admin: &str,
    role: &RoleName,
    grants: &[Grant],
) -> Result<Plan, Failure> {
    let catalog = Catalog {
        db,
        role: role.as_str(),
        version: db.facts().version,
        dry: false,
    };
    let mut needed = vec![catalog.connect().await?];
    for grant in grants {
        needed.push(catalog.grant(grant).await?);
    }
    Ok(Plan {
        needed,
        admin: admin.to_owned(),
    })
}
