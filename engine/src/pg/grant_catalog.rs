//! Finds the objects of a grant in the catalogs of its database. It only reads.

use mayfly_protocol::grant::{Grant, ObjectKind, Privilege, Scope, Where};
use mayfly_protocol::task::{Failure, FailureCode};

use super::grant_answers::Answers;
use super::grant_kinds::{by_name, shape};
use super::grant_names::one;
use super::grant_pairs::Wanted;
use super::row::Rows;
use super::session::Session;
use super::sql::{COMMENT_PREFIX, literal};

pub(super) const LOOKING: &str = "looking up what to grant";
pub(super) const CONNECT: &str = "CONNECT on the database";

/// The objects of one grant, from the catalogs.
#[derive(Debug)]
pub(super) struct Needed {
    pub(super) text: String,
    /// Whether it is a pattern: then objects that the admin may not grant are skipped.
    pub(super) pattern: bool,
    pub(super) wanted: Vec<Wanted>,
    /// Additional objects that are useful (sequences of serial columns). They are granted if the admin may.
    pub(super) beside: Vec<Wanted>,
    /// Privileges of a pattern that this version of PostgreSQL does not have.
    pub(super) unknown: Vec<Privilege>,
    /// Why the pattern matches no object, if its schema is absent.
    pub(super) absent: Option<Failure>,
}

pub(super) struct Catalog<'a> {
    pub(super) db: &'a Session<'a>,
    /// The role that gets the privileges.
    pub(super) role: &'a str,
    pub(super) version: u32,
    /// Whether this is a check, which grants nothing. Then the catalogs must show what a GRANT would do.
    pub(super) dry: bool,
    pub(super) answers: Answers,
}

pub(super) const NOT_SYSTEM: &str = "n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'";

impl Catalog<'_> {
    pub(super) async fn rows(&self, query: &str) -> Result<Rows, Failure> {
        if let Some(rows) = self.answers.take(query) {
            return Ok(rows);
        }
        let rows = self.db.transact(query).await;
        rows.map_err(|error| error.into_failure(LOOKING))
    }

    pub(super) async fn exists(&self, query: &str) -> Result<bool, Failure> {
        Ok(!self.rows(query).await?.is_empty())
    }

    /// Finds the objects of one grant.
    ///
    /// # Errors
    /// For a named object: `no_such_object`, `ambiguous_object`, `grant_refused`.
    pub(super) async fn grant(&self, grant: &Grant) -> Result<Needed, Failure> {
        if let Some(schema) = schema_of(grant)
            && let Err(failure) = self.schema_must_exist(schema).await
        {
            if failure.code != FailureCode::NoSuchObject {
                return Err(failure);
            }
            return Ok(Needed {
                absent: Some(failure),
                ..Needed::of(grant.to_string(), true, vec![], vec![])
            });
        }
        match grant.on() {
            Where::Relations(scope) => self.relations(grant, scope).await,
            Where::Sequences(scope) => {
                let filter = self
                    .pattern_or_one(scope, "c.relkind = 'S'", "sequence")
                    .await?;
                self.simple(grant, ObjectKind::Sequence, scope.is_pattern(), filter)
                    .await
            }
            Where::Functions(scope, arguments) => {
                self.functions(grant, scope, arguments.as_deref()).await
            }
            Where::Types(scope) => self.types(grant, scope).await,
            Where::Schema(name) => self.named(grant, ObjectKind::Schema, name).await,
            Where::Database(name) => self.named(grant, ObjectKind::Database, name).await,
            Where::Server(name) => self.named(grant, ObjectKind::Server, name).await,
            Where::Wrapper(name) => self.named(grant, ObjectKind::Wrapper, name).await,
            Where::Role(name) => self.named(grant, ObjectKind::Role, name).await,
            Where::LargeObjects(None) => {
                let filter = not_owned_by_ours("l.lomowner");
                self.simple(grant, ObjectKind::LargeObject, true, filter)
                    .await
            }
            Where::LargeObjects(Some(oid)) => {
                let oid = oid.to_string();
                self.named(grant, ObjectKind::LargeObject, &oid).await
            }
            Where::Parameter(name) if self.version >= 15 => {
                self.simple(grant, ObjectKind::Parameter, false, literal(name))
                    .await
            }
            Where::Parameter(_) => Err(Failure::new(
                FailureCode::GrantRefused,
                format!(
                    "PostgreSQL {} has no privileges on parameters; 15 and later have ({grant})",
                    self.version
                ),
            )),
        }
    }

    /// A grant on one object that belongs to no schema. It must exist.
    pub(super) async fn named(
        &self,
        grant: &Grant,
        kind: ObjectKind,
        name: &str,
    ) -> Result<Needed, Failure> {
        let filter = by_name(kind, name);
        let query = format!("SELECT 1 FROM {} WHERE {filter}", shape(kind, &filter).from);
        self.must_exist(&query, kind.word(), name).await?;
        self.simple(grant, kind, false, filter).await
    }

    /// The right to connect, which every account needs.
    pub(super) fn connect() -> Needed {
        let wanted = Wanted::of(
            ObjectKind::Database,
            vec![Privilege::Connect],
            "d.datname = current_database()",
        );
        Needed::of(CONNECT.to_owned(), false, vec![wanted], vec![])
    }

    async fn must_exist(&self, query: &str, word: &str, name: &str) -> Result<(), Failure> {
        if self.exists(query).await? {
            return Ok(());
        }
        Err(Failure::new(
            FailureCode::NoSuchObject,
            format!("there is no {word} {name:?} in this database"),
        ))
    }

    /// A grant on one kind of object.
    pub(super) async fn simple(
        &self,
        grant: &Grant,
        kind: ObjectKind,
        pattern: bool,
        filter: String,
    ) -> Result<Needed, Failure> {
        if !pattern {
            self.check_fit(grant, kind)?;
        }
        let wanted = Wanted::of(kind, grant.what().on(kind, self.version), filter);
        let needed = Needed::of(grant.to_string(), pattern, vec![wanted], vec![]);
        Ok(self.passing_over(needed, grant, &[kind]))
    }

    /// Records the privileges of a pattern that this version does not have. They are skipped.
    pub(super) fn passing_over(
        &self,
        needed: Needed,
        grant: &Grant,
        kinds: &[ObjectKind],
    ) -> Needed {
        let unknown = match needed.pattern {
            true => grant.what().unknown_to(kinds, self.version),
            false => vec![],
        };
        Needed { unknown, ..needed }
    }

    pub(super) fn check_fit(&self, grant: &Grant, kind: ObjectKind) -> Result<(), Failure> {
        match grant.what().foreign_to(kind, self.version) {
            None => Ok(()),
            Some(privilege) => Err(Failure::new(
                FailureCode::GrantRefused,
                format!(
                    "{} does not exist on a {} in PostgreSQL {} ({grant})",
                    privilege.as_sql(),
                    kind.word(),
                    self.version
                ),
            )),
        }
    }

    /// The filter of a scope over `pg_class c` and `pg_namespace n`. A bare name must match exactly one object.
    pub(super) async fn pattern_or_one(
        &self,
        scope: &Scope,
        kinds: &str,
        word: &str,
    ) -> Result<String, Failure> {
        let (within, name) = within(scope, "c.relname", "c.relowner");
        let filter = format!("{kinds} AND {within}");
        match name {
            Some(name) => self.exactly_one(&filter, word, name).await,
            None => Ok(filter),
        }
    }

    async fn schema_must_exist(&self, schema: &str) -> Result<(), Failure> {
        self.must_exist(&schema_question(schema), "schema", schema)
            .await
    }

    async fn exactly_one(&self, filter: &str, word: &str, name: &str) -> Result<String, Failure> {
        let query = format!(
            "SELECT format('%I.%I', n.nspname, c.relname), c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE {filter} ORDER BY 1"
        );
        let found = self.rows(&query).await?;
        one(&found, word, name).map(|oid| format!("c.oid = {oid}"))
    }
}

/// The condition that selects the objects of a scope. It is over `pg_namespace n` and the columns with the object's
/// name and owner. Also returns the name if the scope names one object. A pattern leaves out what accounts and
/// quarantine roles own; a name does not.
pub(super) fn within<'s>(
    scope: &'s Scope,
    name_column: &str,
    owner_column: &str,
) -> (String, Option<&'s str>) {
    let (place, name) = match scope {
        Scope::Everywhere => (NOT_SYSTEM.to_owned(), None),
        Scope::InSchema(schema) => (format!("n.nspname = {}", literal(schema)), None),
        Scope::Qualified(schema, name) => (
            format!("n.nspname = {}", literal(schema)),
            Some(name.as_str()),
        ),
        Scope::Unqualified(name) => (NOT_SYSTEM.to_owned(), Some(name.as_str())),
    };
    let which = match name {
        Some(name) => format!("{name_column} = {}", literal(name)),
        None => not_owned_by_ours(owner_column),
    };
    (format!("{place} AND {which}"), name)
}

/// The schema of a pattern.
pub(super) fn schema_of(grant: &Grant) -> Option<&str> {
    match grant.on() {
        Where::Relations(Scope::InSchema(schema))
        | Where::Sequences(Scope::InSchema(schema))
        | Where::Functions(Scope::InSchema(schema), _)
        | Where::Types(Scope::InSchema(schema)) => Some(schema),
        _ => None,
    }
}

pub(super) fn schema_question(schema: &str) -> String {
    let schema = literal(schema);
    format!("SELECT 1 FROM pg_namespace n WHERE n.nspname = {schema}")
}

impl Needed {
    pub(super) fn of(
        text: String,
        pattern: bool,
        wanted: Vec<Wanted>,
        beside: Vec<Wanted>,
    ) -> Self {
        Self {
            text,
            pattern,
            wanted,
            beside,
            unknown: vec![],
            absent: None,
        }
    }
}

/// A condition that leaves out objects of accounts and quarantine roles of Mayfly.
pub(super) fn not_owned_by_ours(owner: &str) -> String {
    format!(
        "NOT EXISTS (SELECT 1 FROM pg_shdescription o WHERE o.objoid = {owner} AND o.classoid = 'pg_authid'::regclass \
         AND starts_with(o.description, {}))",
        literal(COMMENT_PREFIX)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An object is looked for in the schema that the grant names, and otherwise in all schemas except the system's.
    /// A pattern leaves out Mayfly's own objects.
    #[test]
    fn a_scope_is_a_condition_with_quoted_names() {
        let ours = not_owned_by_ours("p.proowner");
        let named = |schema: &str, name: &str| Scope::Qualified(schema.to_owned(), name.to_owned());
        let odd = "o'; DROP";
        for (scope, expected, name) in [
            (Scope::Everywhere, format!("{NOT_SYSTEM} AND {ours}"), None),
            (
                Scope::InSchema("app".to_owned()),
                format!("n.nspname = 'app' AND {ours}"),
                None,
            ),
            (
                named("app", odd),
                "n.nspname = 'app' AND p.proname = 'o''; DROP'".to_owned(),
                Some(odd),
            ),
            (
                named(odd, "f"),
                "n.nspname = 'o''; DROP' AND p.proname = 'f'".to_owned(),
                Some("f"),
            ),
            (
                Scope::Unqualified("f".to_owned()),
                format!("{NOT_SYSTEM} AND p.proname = 'f'"),
                Some("f"),
            ),
        ] {
            let found = within(&scope, "p.proname", "p.proowner");
            assert_eq!(found, (expected, name));
            assert_eq!(name.is_none(), scope.is_pattern(), "{scope:?}");
        }
    }
}
