//! What a grant role still lacks: grants looked up in the catalogs of their database. Reads
//! only; [`super::grant_role`] acts on it.

use std::collections::{BTreeMap, BTreeSet};

use mayfly_common::grant::{Grant, ObjectKind, Privilege, Scope, What, Where};
use mayfly_common::names::RoleName;
use mayfly_common::task::{Failure, FailureCode};

use super::session::{Rows, Session};
use super::sql::{COMMENT_PREFIX, ident, literal};

/// Objects in one GRANT statement, at most.
const OBJECTS_PER_STATEMENT: usize = 200;
/// Names in a message, at most.
const NAMES_IN_A_MESSAGE: usize = 5;

/// One privilege on one object that the role does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Lack {
    keyword: &'static str,
    object: String,
    privilege: String,
    /// The role has the privilege itself; what it lacks is USAGE of the schema.
    held: bool,
    /// The admin may grant it.
    grantable: bool,
    /// The schema whose USAGE is lacking, and whether the admin may grant that.
    schema: Option<(String, bool)>,
}

/// One grant against the catalogs.
#[derive(Debug)]
struct Needed {
    text: String,
    pattern: bool,
    /// Pairs of object and privilege the grant covers.
    total: usize,
    lacks: Vec<Lack>,
    /// What is good to have beside it (serial columns' sequences): granted where it can be.
    beside: Vec<Lack>,
}

/// Everything a grant role needs in one database.
#[derive(Debug)]
pub(super) struct Plan {
    needed: Vec<Needed>,
    admin: String,
}

impl Plan {
    /// The statements that give the role what it lacks and the admin may grant.
    pub(super) fn statements(&self, role: &RoleName, version: u32) -> Vec<String> {
        let to = ident(role.as_str());
        let mut schemas = BTreeSet::new();
        let mut by_privileges: BTreeMap<(&str, Vec<String>), Vec<String>> = BTreeMap::new();
        let mut by_object: BTreeMap<(&str, &str), Vec<String>> = BTreeMap::new();
        for lack in self
            .needed
            .iter()
            .flat_map(|n| n.lacks.iter().chain(&n.beside))
        {
            if let Some((schema, true)) = &lack.schema {
                schemas.insert(schema.clone());
            }
            if lack.grantable && !lack.held {
                let privileges = by_object.entry((lack.keyword, &lack.object)).or_default();
                if !privileges.contains(&lack.privilege) {
                    privileges.push(lack.privilege.clone());
                }
            }
        }
        for ((keyword, object), privileges) in by_object {
            by_privileges
                .entry((keyword, privileges))
                .or_default()
                .push(object.to_owned());
        }
        let mut statements: Vec<String> = schemas
            .iter()
            .map(|schema| format!("GRANT USAGE ON SCHEMA {schema} TO {to}"))
            .collect();
        for ((keyword, privileges), objects) in by_privileges {
            for some in objects.chunks(OBJECTS_PER_STATEMENT) {
                let objects = some.join(", ");
                statements.push(match keyword {
                    // INHERIT without SET: what the role allows, but not to become it.
                    "ROLE" if version >= 16 => {
                        format!("GRANT {objects} TO {to} WITH INHERIT TRUE, SET FALSE")
                    }
                    "ROLE" => format!("GRANT {objects} TO {to}"),
                    _ => format!(
                        "GRANT {} ON {keyword} {objects} TO {to}",
                        privileges.join(", ")
                    ),
                });
            }
        }
        statements
    }

    /// Whether the role has all that must be; the number of object-privilege pairs patterns passed
    /// over.
    ///
    /// # Errors
    /// `admin_lacks_rights` for something named, `grant_refused` where a pattern gives nothing.
    pub(super) fn verdict(&self) -> Result<usize, Failure> {
        let mut skipped = 0;
        for needed in &self.needed {
            if needed.pattern {
                if needed.total == 0 {
                    return Err(Failure::new(
                        FailureCode::GrantRefused,
                        format!("nothing in the database matches: {}", needed.text),
                    ));
                }
                if needed.lacks.len() == needed.total {
                    return Err(Failure::new(
                        FailureCode::GrantRefused,
                        format!(
                            "nothing of this can be granted by {}: {} ({}); it must own the objects or hold the privileges WITH GRANT OPTION",
                            self.admin,
                            needed.text,
                            names(&needed.lacks)
                        ),
                    ));
                }
                skipped += needed.lacks.len();
            } else if !needed.lacks.is_empty() {
                return Err(Failure::new(
                    FailureCode::AdminLacksRights,
                    format!(
                        "{} may not grant this: {} ({}); it must own the object or hold the privilege WITH GRANT OPTION",
                        self.admin,
                        needed.text,
                        names(&needed.lacks)
                    ),
                ));
            }
        }
        Ok(skipped)
    }

    /// What patterns passed over, for the log.
    pub(super) fn skipped_names(&self) -> String {
        let lacks: Vec<Lack> = self
            .needed
            .iter()
            .filter(|n| n.pattern)
            .flat_map(|n| n.lacks.clone())
            .collect();
        names(&lacks)
    }
}

fn names(lacks: &[Lack]) -> String {
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

/// Looks all grants up. `db` is a session in the database they are about; the role exists.
///
/// # Errors
/// `no_such_object`, `ambiguous_object`, `grant_refused`.
pub(super) async fn plan(
    db: &Session<'_>,
    admin: &str,
    role: &RoleName,
    grants: &[Grant],
) -> Result<Plan, Failure> {
    let catalog = Catalog {
        db,
        role: role.as_str(),
        version: db.facts().version,
        dry: false,
    };
    let mut needed = vec![catalog.connect().await?];
    for grant in grants {
        needed.push(catalog.grant(grant).await?);
    }
    Ok(Plan {
        needed,
        admin: admin.to_owned(),
    })
}

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

const CONNECT: &str = "CONNECT on the database";
/// Everybody, as the privilege functions call it; no role can have this name.
const PUBLIC: &str = "public";

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

/// Privileges wanted on the objects of one kind that a filter finds.
struct Wanted {
    kind: ObjectKind,
    privileges: Vec<Privilege>,
    filter: String,
}

struct Catalog<'a> {
    db: &'a Session<'a>,
    /// Who is to have it.
    role: &'a str,
    version: u32,
    /// Nothing will be granted: all that can be known must be asked for.
    dry: bool,
}

const TABLE_KINDS: &str = "c.relkind IN ('r', 'p', 'v', 'm', 'f')";
const NOT_SYSTEM: &str = "n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'";

impl Catalog<'_> {
    async fn rows(&self, query: &str) -> Result<Rows, Failure> {
        let rows = self.db.transact(query).await;
        rows.map_err(|error| error.into_failure("looking up what to grant"))
    }

    async fn exists(&self, query: &str) -> Result<bool, Failure> {
        Ok(!self.rows(query).await?.is_empty())
    }

    async fn grant(&self, grant: &Grant) -> Result<Needed, Failure> {
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
    async fn connect(&self) -> Result<Needed, Failure> {
        let wanted = Wanted {
            kind: ObjectKind::Database,
            privileges: vec![Privilege::Connect],
            filter: "d.datname = current_database()".to_owned(),
        };
        self.needed(CONNECT.to_owned(), false, vec![wanted], vec![])
            .await
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
        self.check_fit(grant, kind)?;
        let wanted = Wanted {
            kind,
            privileges: grant.what().on(kind, self.version),
            filter,
        };
        self.needed(grant.to_string(), pattern, vec![wanted], vec![])
            .await
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
            return self.needed(grant.to_string(), true, wanted, beside).await;
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
        self.needed(grant.to_string(), false, vec![wanted], beside)
            .await
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
            Scope::InSchema(schema) => {
                self.schema_must_exist(schema).await?;
                Ok(format!(
                    "{kinds} AND n.nspname = {} AND {not_ours}",
                    literal(schema)
                ))
            }
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
                self.schema_must_exist(schema).await?;
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

    async fn needed(
        &self,
        text: String,
        pattern: bool,
        wanted: Vec<Wanted>,
        beside: Vec<Wanted>,
    ) -> Result<Needed, Failure> {
        let mut needed = Needed {
            text,
            pattern,
            total: 0,
            lacks: vec![],
            beside: vec![],
        };
        for wanted in wanted {
            let (total, lacks) = self.lacks(&wanted).await?;
            needed.total += total;
            needed.lacks.extend(lacks);
        }
        for wanted in beside {
            needed.beside.extend(self.lacks(&wanted).await?.1);
        }
        Ok(needed)
    }

    /// How many object-privilege pairs there are, and which of them the role does not have.
    async fn lacks(&self, wanted: &Wanted) -> Result<(usize, Vec<Lack>), Failure> {
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

fn cell(row: &[Option<String>], n: usize) -> &str {
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
