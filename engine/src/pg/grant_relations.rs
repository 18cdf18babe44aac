//! Finds the tables and, for patterns, the sequences of grants in the catalogs. It only reads.

use mayfly_protocol::grant::{Grant, ObjectKind, Privilege, Scope, What};
use mayfly_protocol::task::{Failure, FailureCode};

use super::grant_catalog::{Catalog, NOT_SYSTEM, Needed};
use super::grant_names::{Bare, bare_name};
use super::grant_pairs::Wanted;
use super::grant_sequences;
use super::row::Row;
use super::sql::literal;

const TABLE_KINDS: &str = "c.relkind IN ('r', 'p', 'v', 'm', 'f')";

impl Catalog<'_> {
    /// Tables by pattern or by name; a bare name may also be a database.
    ///
    /// # Errors
    /// As [`Catalog::grant`].
    pub(super) async fn relations(&self, grant: &Grant, scope: &Scope) -> Result<Needed, Failure> {
        let (named, any_kind) = match scope {
            Scope::Everywhere | Scope::InSchema(_) => return self.tables(grant, scope).await,
            Scope::Qualified(schema, name) => {
                let (schema, name) = (literal(schema), literal(name));
                (format!("n.nspname = {schema} AND c.relname = {name}"), true)
            }
            Scope::Unqualified(name) => (
                format!("{NOT_SYSTEM} AND c.relname = {}", literal(name)),
                false,
            ),
        };
        let found = self
            .rows(&format!(
                "SELECT c.relkind, format('%I.%I', n.nspname, c.relname), c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                 WHERE ({TABLE_KINDS} OR (c.relkind = 'S' AND {any_kind})) AND {named} ORDER BY 2"
            ))
            .await?;
        if let Scope::Unqualified(name) = scope {
            let database = format!(
                "SELECT 1 FROM pg_database d WHERE d.datname = {}",
                literal(name)
            );
            let is_database = self.exists(&database).await?;
            if bare_name(&found, name, is_database, grant)? == Bare::Database {
                return self.named(grant, ObjectKind::Database, name).await;
            }
        }
        match found.first() {
            Some(row) => self.table(grant, row).await,
            None => Err(Failure::new(
                FailureCode::NoSuchObject,
                format!("there is no such table in this database ({grant})"),
            )),
        }
    }

    /// The tables and sequences of a pattern.
    async fn tables(&self, grant: &Grant, scope: &Scope) -> Result<Needed, Failure> {
        let what = grant.what();
        let tables = self.pattern_or_one(scope, TABLE_KINDS, "table").await?;
        let sequences = tables.replace(TABLE_KINDS, "c.relkind = 'S'");
        let on_tables = what.on(ObjectKind::Table, self.version);
        let on_sequences = what.on(ObjectKind::Sequence, self.version);
        let mut beside = vec![];
        // To insert a row, a role must be able to use the sequence of a serial column.
        if writes(what) && !on_sequences.contains(&Privilege::Usage) {
            beside.push(Wanted::of(
                ObjectKind::Sequence,
                vec![Privilege::Usage],
                sequences.clone(),
            ));
        }
        // These are sequences of other schemas. With `*.*` there are none.
        if writes(what) && *scope != Scope::Everywhere {
            beside.push(used(&format!(
                "SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE {tables}"
            )));
        }
        let wanted = vec![
            Wanted::of(ObjectKind::Table, on_tables, tables),
            Wanted::of(ObjectKind::Sequence, on_sequences, sequences),
        ];
        let needed = Needed::of(grant.to_string(), true, wanted, beside);
        let kinds = [ObjectKind::Table, ObjectKind::Sequence];
        Ok(self.passing_over(needed, grant, &kinds))
    }

    /// One table or sequence; the row has its kind, name and oid.
    async fn table(&self, grant: &Grant, row: &Row) -> Result<Needed, Failure> {
        let what = grant.what();
        let kind = match row.text(0) {
            "S" => ObjectKind::Sequence,
            _ => ObjectKind::Table,
        };
        self.check_fit(grant, kind)?;
        let oid = row.text(2);
        let filter = format!("c.oid = {oid}");
        let columns = self.columns(grant, kind, oid).await?;
        let mut wanted = vec![Wanted::of(kind, what.on(kind, self.version), &*filter)];
        if !columns.is_empty() {
            wanted.push(Wanted {
                columns,
                ..Wanted::of(kind, vec![], filter)
            });
        }
        let mut beside = vec![];
        if kind == ObjectKind::Table && writes(what) {
            beside.push(used(&format!("SELECT {oid}::oid")));
        }
        Ok(Needed::of(grant.to_string(), false, wanted, beside))
    }
}

/// USAGE of the sequences that give numbers to the tables' rows.
fn used(tables: &str) -> Wanted {
    Wanted {
        // A column's default names its sequence by oid.
        unnamed: true,
        ..Wanted::of(
            ObjectKind::Sequence,
            vec![Privilege::Usage],
            grant_sequences::behind(tables),
        )
    }
}

fn writes(what: &What) -> bool {
    what.includes(Privilege::Insert) || what.includes(Privilege::Update)
}
