//! What a role does not hold of the objects that a filter finds: one query for each kind of object.

use mayfly_common::grant::{ObjectKind, Privilege};
use mayfly_common::task::Failure;

use super::grant_catalog::{Catalog, PUBLIC, cell};
use super::sql::literal;

/// Names in a message, at most.
pub(super) const NAMES_IN_A_MESSAGE: usize = 5;

/// One privilege on one object that the role does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Lack {
    pub(super) keyword: &'static str,
    pub(super) object: String,
    pub(super) privilege: String,
    /// The role has the privilege itself; what it lacks is USAGE of the schema.
    pub(super) held: bool,
    /// The admin may grant it.
    pub(super) grantable: bool,
    /// The schema whose USAGE is lacking, and whether the admin may grant that.
    pub(super) schema: Option<(String, bool)>,
}

/// Privileges wanted on the objects of one kind that a filter finds.
pub(super) struct Wanted {
    pub(super) kind: ObjectKind,
    pub(super) privileges: Vec<Privilege>,
    pub(super) filter: String,
}

pub(super) fn names(lacks: &[Lack]) -> String {
    let mut text = lacks
        .iter()
        .take(NAMES_IN_A_MESSAGE)
        .map(|lack| match &lack.schema {
            Some((schema, _)) if lack.held => format!("USAGE on schema {schema}"),
            _ => format!("{} on {}", lack.privilege, lack.object),
        })
        .collect::<Vec<_>>()
        .join("; ");
    if lacks.len() > NAMES_IN_A_MESSAGE {
        text.push_str(&format!("; and {} more", lacks.len() - NAMES_IN_A_MESSAGE));
    }
    text
}

impl Catalog<'_> {
    /// How many object-privilege pairs there are, and which of them the role does not have.
    pub(super) async fn lacks(&self, wanted: &Wanted) -> Result<(usize, Vec<Lack>), Failure> {
        if wanted.privileges.is_empty() {
            return Ok((0, vec![]));
        }
        let (keyword, object, from, function, target) = match wanted.kind {
            ObjectKind::Table => (
                "TABLE",
                "format('%I.%I', n.nspname, c.relname)",
                IN_SCHEMA_CLASS,
                "has_table_privilege",
                "c.oid",
            ),
            ObjectKind::Sequence => (
                "SEQUENCE",
                "format('%I.%I', n.nspname, c.relname)",
                IN_SCHEMA_CLASS,
                "has_sequence_privilege",
                "c.oid",
            ),
            ObjectKind::Function => (
                "ROUTINE",
                "p.oid::regprocedure::text",
                IN_SCHEMA_PROC,
                "has_function_privilege",
                "p.oid",
            ),
            ObjectKind::Schema => (
                "SCHEMA",
                "format('%I', n.nspname)",
                "pg_namespace n",
                "has_schema_privilege",
                "n.oid",
            ),
            ObjectKind::Database => (
                "DATABASE",
                "format('%I', d.datname)",
                "pg_database d",
                "has_database_privilege",
                "d.oid",
            ),
            ObjectKind::Role => (
                "ROLE",
                "format('%I', r.rolname)",
                "pg_roles r",
                "pg_has_role",
                "r.oid",
            ),
        };
        let role = literal(self.role);
        let (has, can) = match wanted.kind {
            ObjectKind::Role => (
                match self.role {
                    PUBLIC => "false".to_owned(),
                    _ => format!("pg_has_role({role}, r.oid, 'USAGE')"),
                },
                match (self.dry, self.version) {
                    // Told by the GRANT itself, which fails where it may not.
                    (false, _) => "true".to_owned(),
                    (true, 16..) => "pg_has_role(r.oid, 'MEMBER WITH ADMIN OPTION')".to_owned(),
                    (true, _) => "pg_has_role(r.oid, 'MEMBER WITH ADMIN OPTION') OR (NOT r.rolsuper AND EXISTS \
                                  (SELECT 1 FROM pg_roles me WHERE me.rolname = current_user AND me.rolcreaterole))".to_owned(),
                },
            ),
            _ => (
                format!("{function}({role}, {target}, x.privilege)"),
                format!("{function}({target}, x.privilege || ' WITH GRANT OPTION')"),
            ),
        };
        let in_schema = matches!(
            wanted.kind,
            ObjectKind::Table | ObjectKind::Sequence | ObjectKind::Function
        );
        let (schema, schema_has, schema_can) = if in_schema {
            (
                "format('%I', n.nspname)",
                format!("has_schema_privilege({role}, n.oid, 'USAGE')"),
                "has_schema_privilege(n.oid, 'USAGE WITH GRANT OPTION')",
            )
        } else {
            ("NULL", "true".to_owned(), "true")
        };
        let privileges = wanted
            .privileges
            .iter()
            .map(|p| format!("('{}')", p.as_sql()))
            .collect::<Vec<_>>()
            .join(", ");
        let query = format!(
            "WITH pairs AS MATERIALIZED (SELECT {object} AS object, x.privilege, {has} AS has, {can} AS can, \
             {schema}::text AS schema, {schema_has} AS schema_has, {schema_can} AS schema_can \
             FROM {from} CROSS JOIN (VALUES {privileges}) x(privilege) WHERE {filter}) \
             SELECT (SELECT count(*) FROM pairs)::text, NULL, NULL, NULL, NULL, NULL, NULL \
             UNION ALL SELECT NULL, object, privilege, has::text, can::text, CASE WHEN schema_has THEN NULL ELSE schema END, schema_can::text \
             FROM pairs WHERE NOT (has AND schema_has)",
            filter = wanted.filter,
        );
        let rows = self.rows(&query).await?;
        let mut total = 0;
        let mut lacks = Vec::new();
        for row in &rows {
            if let Some(Some(count)) = row.first() {
                total = count.parse().unwrap_or(0);
                continue;
            }
            let schema = row.get(5).cloned().flatten();
            lacks.push(Lack {
                keyword,
                object: cell(row, 1).to_owned(),
                privilege: cell(row, 2).to_owned(),
                held: cell(row, 3) == "true",
                grantable: cell(row, 4) == "true",
                schema: schema.map(|schema| (schema, cell(row, 6) == "true")),
            });
        }
        Ok((total, lacks))
    }
}

const IN_SCHEMA_CLASS: &str = "pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace";
const IN_SCHEMA_PROC: &str = "pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace";
