//! What an admin could grant, for `check`. Nothing is made or granted.

use std::collections::{BTreeMap, BTreeSet};

use mayfly_protocol::grant::Grant;
use mayfly_protocol::names::RoleName;
use mayfly_protocol::task::Failure;

use super::grant_answers::Answers;
use super::grant_catalog::{CONNECT, Catalog, Needed};
use super::grant_kinds::PUBLIC;
use super::grant_pairs::{Lack, names};
use super::grant_plan::OBJECTS_PER_STATEMENT;
use super::grant_verdict::{nothing, unknown};
use super::session::Session;
use super::sql::ident;

/// Maximum number of missing pairs that the statements of a fix name.
const LACKS_IN_A_FIX: usize = 1000;

/// What an admin could grant of one grant.
#[derive(Debug, Default)]
pub(super) struct Coverage {
    /// Whether it is a pattern: then objects that the admin may not grant are skipped.
    pub(super) pattern: bool,
    /// Number of pairs of object and privilege.
    pub(super) total: usize,
    /// Number of pairs that the admin may not grant.
    pub(super) lacking: usize,
    /// Names of some of these, and of useful additional objects.
    pub(super) names: String,
    /// Statements that let the admin grant them.
    pub(super) fix: Vec<String>,
    /// Why a pattern is empty, or which of its privileges this version does not have.
    pub(super) nothing: Option<String>,
    /// Number of pairs whose objects another transaction holds now.
    pub(super) locked: usize,
    /// Names of some of the locked objects.
    pub(super) locked_names: String,
}

/// Examines grants one by one. `role` is the grant role, if it exists.
pub(super) async fn examine(
    db: &Session<'_>,
    admin: &str,
    role: Option<&RoleName>,
    grants: &[Grant],
) -> Vec<(String, Result<Coverage, Failure>)> {
    let catalog = Catalog {
        db,
        // A new role has the privileges of everybody.
        role: role.map_or(PUBLIC, RoleName::as_str),
        version: db.facts().version,
        dry: true,
        answers: Answers::default(),
    };
    let connect = catalog.coverage(&Catalog::connect(), admin).await;
    let mut examined = vec![(CONNECT.to_owned(), connect)];
    for grant in grants {
        let coverage = match catalog.grant(grant).await {
            Ok(needed) => catalog.coverage(&needed, admin).await,
            Err(failure) => Err(failure),
        };
        examined.push((grant.to_string(), coverage));
    }
    examined
}

/// What is missing: all pairs are counted, and some are kept as examples.
#[derive(Default)]
struct Lacking {
    total: usize,
    beyond: usize,
    kept: Vec<Lack>,
    locked: usize,
    locked_kept: Vec<Lack>,
}

impl Lacking {
    fn add(&mut self, total: usize, lacks: Vec<Lack>) {
        self.total += total;
        for lack in lacks {
            if lack.is_beyond() {
                self.beyond += 1;
                if self.kept.len() < LACKS_IN_A_FIX {
                    self.kept.push(lack);
                }
            } else if lack.busy {
                self.locked += 1;
                if self.locked_kept.len() < LACKS_IN_A_FIX {
                    self.locked_kept.push(lack);
                }
            }
        }
    }
}

impl Catalog<'_> {
    async fn coverage(&self, needed: &Needed, admin: &str) -> Result<Coverage, Failure> {
        let (mut wanted, mut beside) = (Lacking::default(), Lacking::default());
        for (lists, lacking) in [(&needed.wanted, &mut wanted), (&needed.beside, &mut beside)] {
            for one in lists {
                let mut from = Some("0".to_owned());
                while let Some(after) = from.take() {
                    if needed.pattern {
                        let page = self.page(one, &after).await?;
                        lacking.add(page.total, page.lacks);
                        from = page.next;
                    } else {
                        let (total, lacks) = self.lacks(one).await?;
                        lacking.add(total, lacks);
                    }
                }
            }
        }
        Ok(Coverage::of(needed, self.version, admin, wanted, beside))
    }
}

impl Coverage {
    /// The result for a grant and its useful additional objects.
    fn of(needed: &Needed, version: u32, admin: &str, wanted: Lacking, beside: Lacking) -> Self {
        let mut kept = wanted.kept;
        kept.extend(beside.kept);
        let is_empty = needed.pattern && wanted.total == 0;
        Self {
            pattern: needed.pattern,
            total: wanted.total,
            lacking: wanted.beyond,
            names: names(&kept),
            fix: fix(&kept, admin),
            nothing: match is_empty {
                true => Some(nothing(needed, version).message),
                false => unknown(&needed.unknown, version),
            },
            locked: wanted.locked,
            locked_names: names(&wanted.locked_kept),
        }
    }
}

/// The statements that let the admin grant what is missing.
fn fix(lacking: &[Lack], admin: &str) -> Vec<String> {
    let to = ident(admin);
    let mut schemas = BTreeSet::new();
    let mut by_privilege: BTreeMap<(&str, &str), BTreeSet<&str>> = BTreeMap::new();
    for lack in lacking.iter().filter(|lack| !lack.unsayable) {
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
                    format!("GRANT {privilege} ON {keyword} {objects} TO {to} WITH GRANT OPTION;")
                }
            });
        }
    }
    fix
}

#[cfg(test)]
mod tests {
    use super::*;
    use mayfly_protocol::grant::Privilege;

    fn lack(object: &str, privilege: &str) -> Lack {
        Lack {
            keyword: "TABLE",
            object: object.to_owned(),
            privilege: privilege.to_owned(),
            held: false,
            grantable: false,
            schema: None,
            busy: false,
            unsayable: false,
        }
    }

    #[test]
    fn a_fix_names_what_the_admin_may_not_pass_on() {
        let lacks = [
            lack("app.b", "SELECT"),
            lack("app.a", "SELECT"),
            lack("app.a", "INSERT"),
            Lack {
                grantable: true,
                schema: Some(("app".to_owned(), false)),
                ..lack("app.c", "SELECT")
            },
            Lack {
                held: true,
                schema: Some(("app".to_owned(), true)),
                ..lack("app.d", "SELECT")
            },
            Lack {
                unsayable: true,
                ..lack("caf\\xe9", "SELECT")
            },
            Lack {
                keyword: "ROLE",
                ..lack("reader", "MEMBER")
            },
        ];
        assert_eq!(
            fix(&lacks, "me"),
            [
                "GRANT USAGE ON SCHEMA app TO \"me\" WITH GRANT OPTION;",
                "GRANT reader TO \"me\" WITH ADMIN OPTION;",
                "GRANT INSERT ON TABLE app.a TO \"me\" WITH GRANT OPTION;",
                "GRANT SELECT ON TABLE app.a, app.b TO \"me\" WITH GRANT OPTION;",
            ]
        );
        let many: Vec<Lack> = (0..=OBJECTS_PER_STATEMENT)
            .map(|n| lack(&format!("t{n}"), "SELECT"))
            .collect();
        assert_eq!(fix(&many, "me").len(), 2);
    }

    #[test]
    fn what_is_lacking_is_out_of_reach_or_locked() {
        let mut lacking = Lacking::default();
        let grantable = Lack {
            grantable: true,
            ..lack("a", "SELECT")
        };
        let locked = Lack {
            busy: true,
            ..grantable.clone()
        };
        let both = Lack {
            busy: true,
            ..lack("b", "SELECT")
        };
        lacking.add(9, vec![grantable, locked, both, lack("c", "SELECT")]);
        assert_eq!((lacking.total, lacking.beyond, lacking.locked), (9, 2, 1));
        let many = vec![lack("t", "SELECT"); LACKS_IN_A_FIX + 5];
        lacking.add(many.len(), many);
        assert_eq!(lacking.kept.len(), LACKS_IN_A_FIX);
        assert_eq!(lacking.beyond, LACKS_IN_A_FIX + 7);
    }

    #[test]
    fn an_empty_pattern_says_why() {
        let needed = |pattern, unknown| Needed {
            text: "MAINTAIN on app.*".to_owned(),
            pattern,
            wanted: vec![],
            beside: vec![],
            unknown,
            absent: None,
        };
        let coverage = |needed: &Needed, total| {
            let wanted = Lacking {
                total,
                ..Lacking::default()
            };
            Coverage::of(needed, 15, "me", wanted, Lacking::default())
        };
        let maintain = vec![Privilege::Maintain];
        assert!(coverage(&needed(true, vec![]), 0).nothing.is_some());
        assert_eq!(coverage(&needed(true, vec![]), 1).nothing, None);
        assert_eq!(coverage(&needed(false, vec![]), 0).nothing, None);
        let unknown = coverage(&needed(true, maintain), 1).nothing;
        assert!(unknown.is_some_and(|text| text.contains("PostgreSQL 15")));
    }
}
