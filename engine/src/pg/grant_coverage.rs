//! What an admin can make of grants, without anything made or granted: for `check`.

use std::collections::{BTreeMap, BTreeSet};

use mayfly_common::grant::Grant;
use mayfly_common::names::RoleName;
use mayfly_common::task::Failure;

use super::grant_catalog::{CONNECT, Catalog, PUBLIC};
use super::grant_lacks::{Lack, names};
use super::grant_plan::{Needed, OBJECTS_PER_STATEMENT};
use super::session::Session;
use super::sql::ident;

/// What an admin can make of one grant.
#[derive(Debug)]
pub(super) struct Coverage {
    /// Of many objects, of which some may be passed over.
    pub(super) pattern: bool,
    /// Pairs of object and privilege.
    pub(super) total: usize,
    /// Of these, what the admin may not pass on.
    pub(super) lacking: usize,
    /// Some of that, by name, and what is good to have beside the grant.
    pub(super) names: String,
    /// What gives the admin the right.
    pub(super) fix: Vec<String>,
}

/// Looks grants up one by one, without anything made or granted. `role` is the grant role, where
/// there is one already.
pub(super) async fn examine(
    db: &Session<'_>,
    admin: &str,
    role: Option<&RoleName>,
    grants: &[Grant],
) -> Vec<(String, Result<Coverage, Failure>)> {
    let catalog = Catalog {
        db,
        // A new role has what everybody has.
        role: role.map_or(PUBLIC, RoleName::as_str),
        version: db.facts().version,
        dry: true,
    };
    let mut examined = vec![(CONNECT.to_owned(), catalog.connect().await)];
    for grant in grants {
        examined.push((grant.to_string(), catalog.grant(grant).await));
    }
    let cover = |needed: Needed| needed.coverage(admin);
    examined
        .into_iter()
        .map(|(text, needed)| (text, needed.map(cover)))
        .collect()
}

impl Lack {
    /// The admin cannot give what is lacking.
    fn is_beyond(&self) -> bool {
        (!self.held && !self.grantable) || self.schema.as_ref().is_some_and(|(_, can)| !can)
    }
}

impl Needed {
    fn coverage(self, admin: &str) -> Coverage {
        let to = ident(admin);
        let mut lacking: Vec<Lack> = self.lacks;
        lacking.retain(Lack::is_beyond);
        let beside = self.beside.into_iter().filter(Lack::is_beyond);
        let count = lacking.len();
        lacking.extend(beside);
        let mut schemas = BTreeSet::new();
        let mut by_privilege: BTreeMap<(&str, &str), BTreeSet<&str>> = BTreeMap::new();
        for lack in &lacking {
            if let Some((schema, false)) = &lack.schema {
                schemas.insert(schema);
            }
            if !lack.held && !lack.grantable {
                by_privilege
                    .entry((lack.keyword, &lack.privilege))
                    .or_default()
                    .insert(&lack.object);
            }
        }
        let mut fix: Vec<String> = schemas
            .iter()
            .map(|schema| format!("GRANT USAGE ON SCHEMA {schema} TO {to} WITH GRANT OPTION;"))
            .collect();
        for ((keyword, privilege), objects) in by_privilege {
            let objects: Vec<&str> = objects.into_iter().collect();
            for some in objects.chunks(OBJECTS_PER_STATEMENT) {
                let objects = some.join(", ");
                fix.push(match keyword {
                    "ROLE" => format!("GRANT {objects} TO {to} WITH ADMIN OPTION;"),
                    _ => {
                        format!(
                            "GRANT {privilege} ON {keyword} {objects} TO {to} WITH GRANT OPTION;"
                        )
                    }
                });
            }
        }
        Coverage {
            pattern: self.pattern,
            total: self.total,
            lacking: count,
            names: names(&lacking),
            fix,
        }
    }
}
