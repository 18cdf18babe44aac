//! Finds the objects of grants on functions, types and columns in the catalogs. It only reads.

use mayfly_protocol::grant::{Grant, ObjectKind, Privilege, Scope};
use mayfly_protocol::task::{Failure, FailureCode};

use super::grant_catalog::{Catalog, Needed, within};
use super::grant_names::one;
use super::row::first_column;
use super::sql::literal;

impl Catalog<'_> {
    pub(super) async fn functions(
        &self,
        grant: &Grant,
        scope: &Scope,
        arguments: Option<&str>,
    ) -> Result<Needed, Failure> {
        let (mut filter, name) = within(scope, "p.proname", "p.proowner");
        if let Some(name) = name {
            if let Some(arguments) = arguments {
                filter.push_str(&format!(
                    " AND p.oid = to_regprocedure(format('%I.%I', n.nspname, p.proname) || {})",
                    literal(&format!("({arguments})"))
                ));
            }
            let query = format!(
                "SELECT p.oid::regprocedure::text, p.oid FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE {filter} ORDER BY 1"
            );
            filter = format!(
                "p.oid = {}",
                one(&self.rows(&query).await?, "function", name)?
            );
        }
        self.simple(grant, ObjectKind::Function, name.is_none(), filter)
            .await
    }

    pub(super) async fn types(&self, grant: &Grant, scope: &Scope) -> Result<Needed, Failure> {
        // Arrays, ranges of ranges and the rows of tables have no privileges of their own.
        let kinds = "(t.typtype IN ('b', 'd', 'e', 'r') OR (t.typtype = 'c' AND EXISTS (SELECT 1 FROM pg_class k \
             WHERE k.oid = t.typrelid AND k.relkind = 'c'))) AND NOT EXISTS (SELECT 1 FROM pg_type e WHERE e.typarray = t.oid)";
        let (within, name) = within(scope, "t.typname", "t.typowner");
        let mut filter = format!("{kinds} AND {within}");
        if let Some(name) = name {
            let query = format!(
                "SELECT format('%I.%I', n.nspname, t.typname), t.oid FROM pg_type t \
                 JOIN pg_namespace n ON n.oid = t.typnamespace WHERE {filter} ORDER BY 1"
            );
            filter = format!("t.oid = {}", one(&self.rows(&query).await?, "type", name)?);
        }
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
        let asked = columns_of(grant, kind)?;
        if !asked.is_empty() {
            let query = format!(
                "SELECT attname FROM pg_attribute WHERE attrelid = {oid} AND attnum > 0 AND NOT attisdropped"
            );
            must_exist(&asked, &first_column(&self.rows(&query).await?), grant)?;
        }
        Ok(asked)
    }
}

/// The privileges that a grant names for columns of an object.
///
/// # Errors
/// `grant_refused` if the object has no columns.
fn columns_of(grant: &Grant, kind: ObjectKind) -> Result<Vec<(Privilege, String)>, Failure> {
    let columns = grant.what().columns();
    let asked: Vec<_> = columns
        .map(|(privilege, column)| (privilege, column.to_owned()))
        .collect();
    match asked.is_empty() || kind == ObjectKind::Table {
        true => Ok(asked),
        false => Err(Failure::new(
            FailureCode::GrantRefused,
            format!(
                "only a table has columns, and this is a {} ({grant})",
                kind.word()
            ),
        )),
    }
}

/// Each column must be among those of the table.
fn must_exist(
    asked: &[(Privilege, String)],
    there: &[String],
    grant: &Grant,
) -> Result<(), Failure> {
    match asked.iter().find(|(_, column)| !there.contains(column)) {
        None => Ok(()),
        Some((_, column)) => Err(Failure::new(
            FailureCode::NoSuchObject,
            format!("the table has no column {column:?} ({grant})"),
        )),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_tables_have_columns() {
        let plain = Grant::parse("SELECT", "app.t").unwrap();
        let columns = Grant::parse("SELECT(a, \"B\"), UPDATE(a)", "app.t").unwrap();
        let expected = [
            (Privilege::Select, "B".to_owned()),
            (Privilege::Select, "a".to_owned()),
            (Privilege::Update, "a".to_owned()),
        ];
        for (kind, is_table) in [(ObjectKind::Table, true), (ObjectKind::Sequence, false)] {
            assert_eq!(columns_of(&plain, kind), Ok(vec![]), "{kind:?}");
            match columns_of(&columns, kind) {
                Ok(found) => assert!(is_table && found == expected, "{kind:?} {found:?}"),
                Err(failure) => {
                    assert!(!is_table && failure.code == FailureCode::GrantRefused);
                    assert!(failure.message.contains("a sequence"), "{failure:?}");
                }
            }
        }
    }

    /// Names are compared as they are kept: `B` is not `b`.
    #[test]
    fn each_column_must_exist() {
        let grant = Grant::parse("SELECT(a, \"B\")", "app.t").unwrap();
        let asked = columns_of(&grant, ObjectKind::Table).unwrap();
        for (there, absent) in [
            (&["a", "B", "c"][..], None),
            (&["a", "b"], Some("\"B\"")),
            (&["B"], Some("\"a\"")),
            (&[], Some("\"B\"")),
        ] {
            let there: Vec<String> = there.iter().map(|name| (*name).to_owned()).collect();
            match (must_exist(&asked, &there, &grant), absent) {
                (Ok(()), None) => {}
                (Err(failure), Some(name)) => {
                    assert_eq!(failure.code, FailureCode::NoSuchObject);
                    assert!(
                        failure.message.contains(&format!("no column {name}")),
                        "{failure:?}"
                    );
                }
                (found, _) => panic!("{there:?}: {found:?}"),
            }
        }
    }
}
