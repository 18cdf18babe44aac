//! The statements that grant what a role lacks. This module is pure; [`super::grant_apply`] runs them.

use std::collections::{BTreeMap, BTreeSet};

use mayfly_protocol::names::RoleName;

use super::grant_pairs::Lack;
use super::sql::ident;

/// Maximum number of objects in one GRANT statement.
pub(super) const OBJECTS_PER_STATEMENT: usize = 200;

/// The object of a statement: the keyword of GRANT, and the name as SQL.
pub(super) type Thing = (&'static str, String);

/// One statement for one object.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) thing: Thing,
    pub(super) sql: String,
}

/// The missing pairs that a GRANT can give now: the admin may grant them, no other transaction holds the object, and
/// no earlier statement failed for good on the object or its schema (`is_open`).
pub(super) fn still_open(lacks: &[Lack], is_open: impl Fn(&Thing) -> bool) -> Vec<&Lack> {
    let is_open = |keyword: &'static str, object: &str| is_open(&(keyword, object.to_owned()));
    lacks
        .iter()
        .filter(|lack| !lack.unsayable && !lack.busy)
        .filter(|lack| {
            let object = lack.grantable && !lack.held && is_open(lack.keyword, &lack.object);
            let schema = lack.schema.as_ref();
            let schema = schema.is_some_and(|(name, can)| *can && is_open("SCHEMA", name));
            object || schema
        })
        .collect()
}

/// The statements that grant what the role lacks and the admin may grant. Each statement names several objects.
pub(super) fn together<'l>(
    lacks: impl IntoIterator<Item = &'l Lack>,
    role: &RoleName,
    version: u32,
) -> Vec<String> {
    let (schemas, by_object) = gather(lacks);
    let mut by_privileges: BTreeMap<(&str, Vec<&str>), Vec<&str>> = BTreeMap::new();
    for ((keyword, object), privileges) in by_object {
        by_privileges
            .entry((keyword, privileges))
            .or_default()
            .push(object);
    }
    let mut statements: Vec<String> = schemas
        .into_iter()
        .map(|schema| grant("SCHEMA", &["USAGE"], schema, role, version))
        .collect();
    for ((keyword, privileges), objects) in by_privileges {
        for some in objects.chunks(OBJECTS_PER_STATEMENT) {
            statements.push(grant(keyword, &privileges, &some.join(", "), role, version));
        }
    }
    statements
}

/// Like [`together`], with one object in each statement.
pub(super) fn one_by_one<'l>(
    lacks: impl IntoIterator<Item = &'l Lack>,
    role: &RoleName,
    version: u32,
) -> Vec<Step> {
    let (schemas, by_object) = gather(lacks);
    let schemas = schemas
        .into_iter()
        .map(|it| (("SCHEMA", it), vec!["USAGE"]));
    schemas
        .chain(by_object)
        .map(|((keyword, object), privileges)| Step {
            thing: (keyword, object.to_owned()),
            sql: grant(keyword, &privileges, object, role, version),
        })
        .collect()
}

type ByObject<'l> = BTreeMap<(&'static str, &'l str), Vec<&'l str>>;

fn gather<'l>(lacks: impl IntoIterator<Item = &'l Lack>) -> (BTreeSet<&'l str>, ByObject<'l>) {
    let mut schemas = BTreeSet::new();
    let mut by_object = ByObject::new();
    for lack in lacks {
        if lack.unsayable {
            continue;
        }
        if let Some((schema, true)) = &lack.schema {
            schemas.insert(schema.as_str());
        }
        if lack.grantable && !lack.held {
            let privileges = by_object.entry((lack.keyword, &lack.object)).or_default();
            if !privileges.contains(&lack.privilege.as_str()) {
                privileges.push(&lack.privilege);
            }
        }
    }
    (schemas, by_object)
}

fn grant(
    keyword: &str,
    privileges: &[&str],
    objects: &str,
    role: &RoleName,
    version: u32,
) -> String {
    let to = ident(role.as_str());
    match keyword {
        // INHERIT without SET: the rights of the role, without the right to become it.
        "ROLE" if version >= 16 => {
            format!("GRANT {objects} TO {to} WITH INHERIT TRUE, SET FALSE")
        }
        "ROLE" => format!("GRANT {objects} TO {to}"),
        _ => format!(
            "GRANT {} ON {keyword} {objects} TO {to}",
            privileges.join(", ")
        ),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn lack(object: &str, privilege: &str) -> Lack {
        Lack {
            keyword: "TABLE",
            object: object.to_owned(),
            privilege: privilege.to_owned(),
            held: false,
            grantable: true,
            schema: None,
            busy: false,
            unsayable: false,
        }
    }

    #[test]
    fn what_has_the_same_privileges_is_granted_together() {
        let role = "g".parse().unwrap();
        let schema = Some(("app".to_owned(), true));
        let lacks = [
            Lack {
                schema,
                ..lack("app.a", "SELECT")
            },
            lack("app.a", "INSERT"),
            lack("app.b", "SELECT"),
            lack("app.b", "INSERT"),
            lack("app.c", "SELECT"),
            Lack {
                grantable: false,
                ..lack("app.d", "SELECT")
            },
            Lack {
                held: true,
                ..lack("app.e", "SELECT")
            },
            Lack {
                unsayable: true,
                ..lack("caf\\xe9", "SELECT")
            },
        ];
        assert_eq!(
            together(&lacks, &role, 18),
            [
                "GRANT USAGE ON SCHEMA app TO \"g\"",
                "GRANT SELECT ON TABLE app.c TO \"g\"",
                "GRANT SELECT, INSERT ON TABLE app.a, app.b TO \"g\"",
            ]
        );
        let steps: Vec<Thing> = one_by_one(&lacks, &role, 18)
            .into_iter()
            .map(|step| step.thing)
            .collect();
        assert_eq!(
            steps,
            [
                ("SCHEMA", "app"),
                ("TABLE", "app.a"),
                ("TABLE", "app.b"),
                ("TABLE", "app.c")
            ]
            .map(|(keyword, object)| (keyword, object.to_owned()))
        );
    }

    #[test]
    fn a_statement_has_a_limit() {
        let role = "g".parse().unwrap();
        let lacks: Vec<Lack> = (0..=OBJECTS_PER_STATEMENT)
            .map(|n| lack(&format!("t{n}"), "SELECT"))
            .collect();
        assert_eq!(together(&lacks, &role, 15).len(), 2);
    }

    #[test]
    fn what_can_be_granted_now_is_open() {
        let schema = |name: &str, can| Some((name.to_owned(), can));
        let held = |schema| Lack {
            held: true,
            schema,
            ..lack("t", "SELECT")
        };
        let closed = ("TABLE", "failed".to_owned());
        for (lack, expected) in [
            (lack("t", "SELECT"), true),
            (lack("failed", "SELECT"), false),
            (
                Lack {
                    schema: schema("app", true),
                    ..lack("failed", "SELECT")
                },
                true,
            ),
            (
                Lack {
                    grantable: false,
                    ..lack("t", "SELECT")
                },
                false,
            ),
            (
                Lack {
                    busy: true,
                    ..lack("t", "SELECT")
                },
                false,
            ),
            (
                Lack {
                    unsayable: true,
                    ..lack("t", "SELECT")
                },
                false,
            ),
            (held(None), false),
            (held(schema("app", false)), false),
            (held(schema("app", true)), true),
        ] {
            let lacks = [lack];
            let open = still_open(&lacks, |thing| *thing != closed);
            assert_eq!(!open.is_empty(), expected, "{lacks:?}");
        }
    }
}
