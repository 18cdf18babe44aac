//! Grants looked up in the catalogs of their database: which objects they are about. Reads only.

use mayfly_protocol::grant::{Grant, ObjectKind, Privilege, Scope, What, Where};
use mayfly_protocol::task::{Failure, FailureCode};

use super::grant_lacks::{NAMES_IN_A_MESSAGE, Wanted};
use super::grant_sequences;
use super::row::Rows;
use super::session::Session;
use super::sql::{COMMENT_PREFIX, literal};

pub(super) const CONNECT: &str = "CONNECT on the database";
/// Everybody, as the privilege functions call it; no role can have this name.
pub(super) const PUBLIC: &str = "public";

/// One grant against the catalogs.
#[derive(Debug)]
pub(super) struct Needed {
    pub(super) text: String,
    /// Of many objects, of which some may be passed over.
    pub(super) pattern: bool,
    pub(super) wanted: Vec<Wanted>,
    /// What is good to have beside it (serial columns' sequences): granted where it can be.
    pub(super) beside: Vec<Wanted>,
    /// Privileges of a pattern that this version of PostgreSQL does not have.
    pub(super) unknown: Vec<Privilege>,
    /// Why a pattern can match nothing.
    pub(super) absent: Option<Failure>,
}

pub(super) struct Catalog<'a> {
    pub(super) db: &'a Session<'a>,
    /// Who is to have it.
    pub(super) role: &'a str,
    pub(super) version: u32,
    /// Nothing will be granted: all that can be known must be asked for.
    pub(super) dry: bool,
}

const TABLE_KINDS: &str = "c.relkind IN ('r', 'p', 'v', 'm', 'f')";
pub(super) const NOT_SYSTEM: &str = "n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'";

impl Catalog<'_> {
    pub(super) async fn rows(&self, query: &str) -> Result<Rows, Failure> {
        let rows = self.db.transact(query).await;
        rows.map_err(|error| error.into_failure("looking up what to grant"))
    }

    async fn exists(&self, query: &str) -> Result<bool, Failure> {
        Ok(!self.rows(query).await?.is_empty())
    }

    /// What a grant is about.
    ///
    /// # Errors
    /// Of what is named: `no_such_object`, `ambiguous_object`, `grant_refused`.
    pub(super) async fn grant(&self, grant: &Grant) -> Result<Needed, Failure> {
        if let Where::Relations(scope)
        | Where::Sequences(scope)
        | Where::Functions(scope, _)
        | Where::Types(scope) = grant.on()
            && let Scope::InSchema(schema) = scope
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
            Where::Schema(name) => {
                let filter = format!("n.nspname = {}", literal(name));
                self.must_exist(
                    &format!("SELECT 1 FROM pg_namespace n WHERE {filter}"),
                    "schema",
                    name,
                )
                .await?;
                self.simple(grant, ObjectKind::Schema, false, filter).await
            }
            Where::Database(name) => self.database(grant, name).await,
            Where::Types(scope) => self.types(grant, scope).await,
            Where::Server(name) => {
                let filter = format!("s.srvname = {}", literal(name));
                let query = format!("SELECT 1 FROM pg_foreign_server s WHERE {filter}");
                self.must_exist(&query, "foreign server", name).await?;
                self.simple(grant, ObjectKind::Server, false, filter).await
            }
            Where::Wrapper(name) => {
                let filter = format!("w.fdwname = {}", literal(name));
                let query = format!("SELECT 1 FROM pg_foreign_data_wrapper w WHERE {filter}");
                self.must_exist(&query, "foreign-data wrapper", name)
                    .await?;
                self.simple(grant, ObjectKind::Wrapper, false, filter).await
            }
            Where::LargeObjects(None) => {
                let filter = not_owned_by_ours("l.lomowner");
                self.simple(grant, ObjectKind::LargeObject, true, filter)
                    .await
            }
            Where::LargeObjects(Some(oid)) => {
                let filter = format!("l.oid = {oid}");
                let query = format!("SELECT 1 FROM pg_largeobject_metadata l WHERE {filter}");
                self.must_exist(&query, "large object", &oid.to_string())
                    .await?;
                self.simple(grant, ObjectKind::LargeObject, false, filter)
                    .await
            }
            Where::Parameter(name) => {
                if self.version < 15 {
                    return Err(Failure::new(
                        FailureCode::GrantRefused,
                        format!(
                            "PostgreSQL {} has no privileges on parameters; 15 and later have ({grant})",
                            self.version
                        ),
                    ));
                }
                self.simple(grant, ObjectKind::Parameter, false, literal(name))
                    .await
            }
            Where::Role(name) => {
                let filter = format!("r.rolname = {}", literal(name));
                self.must_exist(
                    &format!("SELECT 1 FROM pg_roles r WHERE {filter}"),
                    "role",
                    name,
                )
                .await?;
                self.simple(grant, ObjectKind::Role, false, filter).await
            }
        }
    }

    /// To connect is needed whatever else is granted.
    pub(super) fn connect() -> Needed {
        let wanted = Wanted::of(
            ObjectKind::Database,
            vec![Privilege::Connect],
            "d.datname = current_database()",
        );
        Needed::of(CONNECT.to_owned(), false, vec![wanted], vec![])
    }

    pub(super) async fn must_exist(
        &self,
        query: &str,
        word: &str,
        name: &str,
    ) -> Result<(), Failure> {
        if self.exists(query).await? {
            return Ok(());
        }
        Err(Failure::new(
            FailureCode::NoSuchObject,
            format!("there is no {word} {name:?} in this database"),
        ))
    }

    async fn database(&self, grant: &Grant, name: &str) -> Result<Needed, Failure> {
        let filter = format!("d.datname = {}", literal(name));
        self.must_exist(
            &format!("SELECT 1 FROM pg_database d WHERE {filter}"),
            "database",
            name,
        )
        .await?;
        self.simple(grant, ObjectKind::Database, false, filter)
            .await
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

    /// A pattern passes over privileges that this version does not have.
    fn passing_over(&self, needed: Needed, grant: &Grant, kinds: &[ObjectKind]) -> Needed {
        let unknown = match needed.pattern {
            true => grant.what().unknown_to(kinds, self.version),
            false => vec![],
        };
        Needed { unknown, ..needed }
    }

    fn check_fit(&self, grant: &Grant, kind: ObjectKind) -> Result<(), Failure> {
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

    async fn relations(&self, grant: &Grant, scope: &Scope) -> Result<Needed, Failure> {
        let what = grant.what();
        if scope.is_pattern() {
            let tables = self.pattern_or_one(scope, TABLE_KINDS, "table").await?;
            let sequences = tables.replace(TABLE_KINDS, "c.relkind = 'S'");
            let on_sequences = what.on(ObjectKind::Sequence, self.version);
            let mut beside = vec![];
            // A row cannot be inserted where its serial column's sequence cannot be used.
            if writes(what) && !on_sequences.contains(&Privilege::Usage) {
                beside.push(Wanted::of(
                    ObjectKind::Sequence,
                    vec![Privilege::Usage],
                    sequences.clone(),
                ));
            }
            // Those of other schemas; under `*.*` there are none.
            if writes(what) && *scope != Scope::Everywhere {
                let tables = format!(
                    "SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE {tables}"
                );
                beside.push(used(&tables));
            }
            let wanted = vec![
                Wanted::of(
                    ObjectKind::Table,
                    what.on(ObjectKind::Table, self.version),
                    tables,
                ),
                Wanted::of(ObjectKind::Sequence, on_sequences, sequences),
            ];
            let needed = Needed::of(grant.to_string(), true, wanted, beside);
            let kinds = [ObjectKind::Table, ObjectKind::Sequence];
            return Ok(self.passing_over(needed, grant, &kinds));
        }
        let named = match scope {
            Scope::Qualified(schema, name) => {
                format!(
                    "n.nspname = {} AND c.relname = {}",
                    literal(schema),
                    literal(name)
                )
            }
            Scope::Unqualified(name) => format!("{NOT_SYSTEM} AND c.relname = {}", literal(name)),
            Scope::Everywhere | Scope::InSchema(_) => unreachable!("patterns are done above"),
        };
        let found = self
            .rows(&format!(
                "SELECT c.relkind, format('%I.%I', n.nspname, c.relname), c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                 WHERE ({TABLE_KINDS} OR (c.relkind = 'S' AND {})) AND {named} ORDER BY 2",
                matches!(scope, Scope::Qualified(..)),
            ))
            .await?;
        if let Scope::Unqualified(name) = scope {
            let database = format!(
                "SELECT 1 FROM pg_database d WHERE d.datname = {}",
                literal(name)
            );
            let is_database = self.exists(&database).await?;
            match (found.len(), is_database) {
                (0, true) => return self.database(grant, name).await,
                (1, false) => {}
                (0, false) => {
                    return Err(Failure::new(
                        FailureCode::NoSuchObject,
                        format!(
                            "{name:?} is neither a table of this database nor a database ({grant})"
                        ),
                    ));
                }
                (tables, _) => {
                    let mut things: Vec<String> = found
                        .iter()
                        .map(|row| format!("table {}", row.text(1)))
                        .collect();
                    if is_database {
                        things.push(format!("database {name}"));
                    }
                    debug_assert!(tables + usize::from(is_database) > 1);
                    return Err(Failure::new(
                        FailureCode::AmbiguousObject,
                        format!(
                            "{name:?} is {}; write schema.table or database:NAME ({grant})",
                            things.join(" and ")
                        ),
                    ));
                }
            }
        }
        let Some(row) = found.first() else {
            return Err(Failure::new(
                FailureCode::NoSuchObject,
                format!("there is no such table in this database ({grant})"),
            ));
        };
        let kind = if row.text(0) == "S" {
            ObjectKind::Sequence
        } else {
            ObjectKind::Table
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

    /// The filter of a scope over `pg_class c` and `pg_namespace n`. A name must be found once.
    async fn pattern_or_one(
        &self,
        scope: &Scope,
        kinds: &str,
        word: &str,
    ) -> Result<String, Failure> {
        let not_ours = not_owned_by_ours("c.relowner");
        match scope {
            Scope::Everywhere => Ok(format!("{kinds} AND {NOT_SYSTEM} AND {not_ours}")),
            Scope::InSchema(schema) => Ok(format!(
                "{kinds} AND n.nspname = {} AND {not_ours}",
                literal(schema)
            )),
            Scope::Qualified(schema, name) => {
                let filter = format!(
                    "{kinds} AND n.nspname = {} AND c.relname = {}",
                    literal(schema),
                    literal(name)
                );
                self.exactly_one(&filter, word, name).await
            }
            Scope::Unqualified(name) => {
                let filter = format!("{kinds} AND {NOT_SYSTEM} AND c.relname = {}", literal(name));
                self.exactly_one(&filter, word, name).await
            }
        }
    }

    async fn schema_must_exist(&self, schema: &str) -> Result<(), Failure> {
        let query = format!(
            "SELECT 1 FROM pg_namespace n WHERE n.nspname = {}",
            literal(schema)
        );
        self.must_exist(&query, "schema", schema).await
    }

    async fn exactly_one(&self, filter: &str, word: &str, name: &str) -> Result<String, Failure> {
        let query = format!(
            "SELECT format('%I.%I', n.nspname, c.relname), c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE {filter} ORDER BY 1"
        );
        let found = self.rows(&query).await?;
        one(&found, word, name).map(|oid| format!("c.oid = {oid}"))
    }
}

impl Needed {
    fn of(text: String, pattern: bool, wanted: Vec<Wanted>, beside: Vec<Wanted>) -> Self {
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

/// USAGE of the sequences that the tables' rows take their numbers from.
fn used(tables: &str) -> Wanted {
    Wanted {
        // A default has its sequence by number.
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

/// Leaves out what an account of ours, or a quarantine role, owns.
pub(super) fn not_owned_by_ours(owner: &str) -> String {
    format!(
        "NOT EXISTS (SELECT 1 FROM pg_shdescription o WHERE o.objoid = {owner} AND o.classoid = 'pg_authid'::regclass \
         AND starts_with(o.description, {}))",
        literal(COMMENT_PREFIX)
    )
}

/// The second column of the only row.
pub(super) fn one(found: &Rows, word: &str, name: &str) -> Result<String, Failure> {
    match found.as_slice() {
        [row] => Ok(row.text(1).to_owned()),
        [] => Err(Failure::new(
            FailureCode::NoSuchObject,
            format!("there is no {word} {name:?} in this database"),
        )),
        several => {
            let things: Vec<&str> = several
                .iter()
                .take(NAMES_IN_A_MESSAGE)
                .map(|row| row.text(0))
                .collect();
            Err(Failure::new(
                FailureCode::AmbiguousObject,
                format!(
                    "{word} {name:?} is more than one: {}; name it in full",
                    things.join(", ")
                ),
            ))
        }
    }
}
