//! Grants looked up in the catalogs of their database: which objects they are about. Reads only.

use mayfly_common::grant::{Grant, ObjectKind, Privilege, Scope, What, Where};
use mayfly_common::task::{Failure, FailureCode};

use super::grant_lacks::{NAMES_IN_A_MESSAGE, Wanted};
use super::session::{Rows, Session};
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
const NOT_SYSTEM: &str = "n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'";

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
        if let Where::Relations(scope) | Where::Sequences(scope) | Where::Functions(scope, _) =
            grant.on()
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
        let wanted = Wanted {
            kind: ObjectKind::Database,
            privileges: vec![Privilege::Connect],
            filter: "d.datname = current_database()".to_owned(),
        };
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
    async fn simple(
        &self,
        grant: &Grant,
        kind: ObjectKind,
        pattern: bool,
        filter: String,
    ) -> Result<Needed, Failure> {
        if !pattern {
            self.check_fit(grant, kind)?;
        }
        let wanted = Wanted {
            kind,
            privileges: grant.what().on(kind, self.version),
            filter,
        };
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
                beside.push(Wanted {
                    kind: ObjectKind::Sequence,
                    privileges: vec![Privilege::Usage],
                    filter: sequences.clone(),
                });
            }
            let wanted = vec![
                Wanted {
                    kind: ObjectKind::Table,
                    privileges: what.on(ObjectKind::Table, self.version),
                    filter: tables,
                },
                Wanted {
                    kind: ObjectKind::Sequence,
                    privileges: on_sequences,
                    filter: sequences,
                },
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
                        .map(|row| format!("table {}", cell(row, 1)))
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
        let kind = if cell(row, 0) == "S" {
            ObjectKind::Sequence
        } else {
            ObjectKind::Table
        };
        self.check_fit(grant, kind)?;
        let oid = cell(row, 2);
        let wanted = Wanted {
            kind,
            privileges: what.on(kind, self.version),
            filter: format!("c.oid = {oid}"),
        };
        let mut beside = vec![];
        if kind == ObjectKind::Table && writes(what) {
            beside.push(Wanted {
                kind: ObjectKind::Sequence,
                privileges: vec![Privilege::Usage],
                filter: format!(
                    "c.relkind = 'S' AND c.oid IN (SELECT objid FROM pg_depend WHERE classid = 'pg_class'::regclass \
                     AND refclassid = 'pg_class'::regclass AND refobjid = {oid} AND deptype = 'a')"
                ),
            });
        }
        Ok(Needed::of(grant.to_string(), false, vec![wanted], beside))
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

    async fn functions(
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

fn writes(what: &What) -> bool {
    what.includes(Privilege::Insert) || what.includes(Privilege::Update)
}

/// Leaves out what an account of ours, or a quarantine role, owns.
fn not_owned_by_ours(owner: &str) -> String {
    format!(
        "NOT EXISTS (SELECT 1 FROM pg_shdescription o WHERE o.objoid = {owner} AND o.classoid = 'pg_authid'::regclass \
         AND starts_with(o.description, {}))",
        literal(COMMENT_PREFIX)
    )
}

pub(super) fn cell(row: &[Option<String>], n: usize) -> &str {
    row.get(n).and_then(Option::as_deref).unwrap_or_default()
}

/// The second column of the only row.
fn one(found: &Rows, word: &str, name: &str) -> Result<String, Failure> {
    match found.as_slice() {
        [row] => Ok(cell(row, 1).to_owned()),
        [] => Err(Failure::new(
            FailureCode::NoSuchObject,
            format!("there is no {word} {name:?} in this database"),
        )),
        several => {
            let things: Vec<&str> = several
                .iter()
                .take(NAMES_IN_A_MESSAGE)
                .map(|row| cell(row, 0))
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
