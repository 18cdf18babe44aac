//! Finds the objects of grants on functions, types and columns in the catalogs. It only reads.

use mayfly_protocol::grant::{Grant, ObjectKind, Privilege, Scope};
use mayfly_protocol::task::{Failure, FailureCode};

use super::grant_catalog::{Catalog, NOT_SYSTEM, Needed, not_owned_by_ours};
use super::grant_names::one;
use super::sql::literal;

impl Catalog<'_> {
    pub(super) async fn functions(
        &self,
        grant: &Grant,
        scope: &Scope,
        arguments: Option<&str>,
    ) -> Result<Needed, Failure> {
        let not_ours = not_owned_by_ours("p.proowner");
        let filter = match scope {
            Scope::Everywhere => format!("{NOT_SYSTEM} AND {not_ours}"),
            Scope::InSchema(schema) => {
                format!("n.nspname = {} AND {not_ours}", literal(schema))
            }
            Scope::Qualified(..) | Scope::Unqualified(_) => {
                let (mut filter, name) = match scope {
                    Scope::Qualified(schema, name) => (
                        format!(
                            "n.nspname = {} AND p.proname = {}",
                            literal(schema),
                            literal(name)
                        ),
                        name,
                    ),
                    Scope::Unqualified(name) => (
                        format!("{NOT_SYSTEM} AND p.proname = {}", literal(name)),
                        name,
                    ),
                    Scope::Everywhere | Scope::InSchema(_) => {
                        unreachable!("patterns are done above")
                    }
                };
                if let Some(arguments) = arguments {
                    filter.push_str(&format!(
                        " AND p.oid = to_regprocedure(format('%I.%I', n.nspname, p.proname) || {})",
                        literal(&format!("({arguments})"))
                    ));
                }
                let query = format!(
                    "SELECT p.oid::regprocedure::text, p.oid FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE {filter} ORDER BY 1"
                );
                let found = self.rows(&query).await?;
                format!("p.oid = {}", one(&found, "function", name)?)
            }
        };
        self.simple(grant, ObjectKind::Function, scope.is_pattern(), filter)
            .await
    }

    pub(super) async fn types(&self, grant: &Grant, scope: &Scope) -> Result<Needed, Failure> {
        // Arrays, ranges of ranges and the rows of tables have no privileges of their own.
        let kinds = "(t.typtype IN ('b', 'd', 'e', 'r') OR (t.typtype = 'c' AND EXISTS (SELECT 1 FROM pg_class k \
             WHERE k.oid = t.typrelid AND k.relkind = 'c'))) AND NOT EXISTS (SELECT 1 FROM pg_type e WHERE e.typarray = t.oid)";
        let not_ours = not_owned_by_ours("t.typowner");
        let (place, name) = match scope {
            Scope::Everywhere => (NOT_SYSTEM.to_owned(), None),
            Scope::InSchema(schema) => (format!("n.nspname = {}", literal(schema)), None),
            Scope::Qualified(schema, name) => {
                (format!("n.nspname = {}", literal(schema)), Some(name))
            }
            Scope::Unqualified(name) => (NOT_SYSTEM.to_owned(), Some(name)),
        };
        let filter = match name {
            None => format!("{kinds} AND {place} AND {not_ours}"),
            Some(name) => {
                let query = format!(
                    "SELECT format('%I.%I', n.nspname, t.typname), t.oid FROM pg_type t \
                     JOIN pg_namespace n ON n.oid = t.typnamespace \
                     WHERE {kinds} AND {place} AND t.typname = {} ORDER BY 1",
                    literal(name)
                );
                format!("t.oid = {}", one(&self.rows(&query).await?, "type", name)?)
            }
        };
        self.simple(grant, ObjectKind::Type, name.is_none(), filter)
            .await
    }

    /// Privileges that are requested on columns. Each column must exist.
    pub(super) async fn columns(
        &self,
        grant: &Grant,
        kind: ObjectKind,
        oid: &str,
    ) -> Result<Vec<(Privilege, String)>, Failure> {
        let asked: Vec<_> = grant
            .what()
            .columns()
            .map(|(privilege, column)| (privilege, column.to_owned()))
            .collect();
        if asked.is_empty() {
            return Ok(asked);
        }
        if kind != ObjectKind::Table {
            return Err(Failure::new(
                FailureCode::GrantRefused,
                format!(
                    "only a table has columns, and this is a {} ({grant})",
                    kind.word()
                ),
            ));
        }
        let query = format!(
            "SELECT attname FROM pg_attribute WHERE attrelid = {oid} AND attnum > 0 AND NOT attisdropped"
        );
        let there = self.rows(&query).await?;
        let is_there = |column: &String| there.iter().any(|row| row.text(0) == column);
        match asked.iter().find(|(_, column)| !is_there(column)) {
            None => Ok(asked),
            Some((_, column)) => Err(Failure::new(
                FailureCode::NoSuchObject,
                format!("the table has no column {column:?} ({grant})"),
            )),
        }
    }
}
