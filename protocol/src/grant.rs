//! Grants: what an account may do (`what`) and on which objects (`where`), parsed and checked as
//! far as text alone allows. Which objects exist is the engine's question.

mod columns;

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use columns::Columns;

/// Why a grant is refused: which half, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct GrantError {
    /// `what` or `where`.
    pub field: &'static str,
    /// In words for the person who wrote it.
    pub reason: String,
}

fn refuse<T>(field: &'static str, reason: impl Into<String>) -> Result<T, GrantError> {
    Err(GrantError {
        field,
        reason: reason.into(),
    })
}

/// A privilege of PostgreSQL (documentation, "Privileges", table 5.1), and membership.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)]
pub enum Privilege {
    Select,
    Insert,
    Update,
    Delete,
    Truncate,
    References,
    Trigger,
    Maintain,
    Create,
    Connect,
    Temporary,
    Execute,
    Usage,
    Set,
    AlterSystem,
    Member,
}

impl Privilege {
    const ALL: [Self; 16] = [
        Self::Select,
        Self::Insert,
        Self::Update,
        Self::Delete,
        Self::Truncate,
        Self::References,
        Self::Trigger,
        Self::Maintain,
        Self::Create,
        Self::Connect,
        Self::Temporary,
        Self::Execute,
        Self::Usage,
        Self::Set,
        Self::AlterSystem,
        Self::Member,
    ];

    /// The SQL key word.
    pub fn as_sql(self) -> &'static str {
        match self {
            Self::Select => "SELECT",
            Self::Insert => "INSERT",
            Self::Update => "UPDATE",
            Self::Delete => "DELETE",
            Self::Truncate => "TRUNCATE",
            Self::References => "REFERENCES",
            Self::Trigger => "TRIGGER",
            Self::Maintain => "MAINTAIN",
            Self::Create => "CREATE",
            Self::Connect => "CONNECT",
            Self::Temporary => "TEMPORARY",
            Self::Execute => "EXECUTE",
            Self::Usage => "USAGE",
            Self::Set => "SET",
            Self::AlterSystem => "ALTER SYSTEM",
            Self::Member => "MEMBER",
        }
    }

    /// Whether it can be given on columns of a table.
    pub fn is_of_columns(self) -> bool {
        matches!(
            self,
            Self::Select | Self::Insert | Self::Update | Self::References
        )
    }

    fn parse(word: &str) -> Option<Self> {
        if word.eq_ignore_ascii_case("temp") {
            return Some(Self::Temporary);
        }
        Self::ALL
            .into_iter()
            .find(|p| word.eq_ignore_ascii_case(p.as_sql()))
    }
}

/// The kinds of object a grant can be on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectKind {
    /// Table, view, materialized view, foreign table, partitioned table.
    Table,
    /// Sequence.
    Sequence,
    /// Function, procedure, aggregate.
    Function,
    /// Schema.
    Schema,
    /// Database.
    Database,
    /// Type or domain.
    Type,
    /// Foreign server.
    Server,
    /// Foreign-data wrapper.
    Wrapper,
    /// Large object.
    LargeObject,
    /// Setting of the server.
    Parameter,
    /// An existing role, to be a member of.
    Role,
}

impl ObjectKind {
    /// The word in messages.
    pub fn word(self) -> &'static str {
        match self {
            Self::Table => "table",
            Self::Sequence => "sequence",
            Self::Function => "function",
            Self::Schema => "schema",
            Self::Database => "database",
            Self::Type => "type",
            Self::Server => "foreign server",
            Self::Wrapper => "foreign-data wrapper",
            Self::LargeObject => "large object",
            Self::Parameter => "parameter",
            Self::Role => "role",
        }
    }

    /// The privileges this kind of object has on a server of this version
    /// (`server_version_num / 10000`): `MAINTAIN` came with 17, parameters have some since 15.
    pub fn privileges(self, server_major: u32) -> &'static [Privilege] {
        use Privilege::*;
        match self {
            Self::Table if server_major >= 17 => &[
                Select, Insert, Update, Delete, Truncate, References, Trigger, Maintain,
            ],
            Self::Table => &[
                Select, Insert, Update, Delete, Truncate, References, Trigger,
            ],
            Self::Sequence => &[Usage, Select, Update],
            Self::Function => &[Execute],
            Self::Schema => &[Create, Usage],
            Self::Database => &[Create, Connect, Temporary],
            Self::Type | Self::Server | Self::Wrapper => &[Usage],
            Self::LargeObject => &[Select, Update],
            Self::Parameter if server_major >= 15 => &[Set, AlterSystem],
            Self::Parameter => &[],
            Self::Role => &[Member],
        }
    }

    fn may_have(self, privilege: Privilege) -> bool {
        self.privileges(u32::MAX).contains(&privilege)
    }
}

/// Which privileges: all the object has, or a list.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum What {
    /// `ALL [PRIVILEGES]`.
    All,
    /// The privileges named.
    These(BTreeSet<Privilege>),
    /// Privileges of which some are on columns.
    Columns(Columns),
}

impl What {
    /// The privileges asked for that this kind of object has.
    pub fn on(&self, kind: ObjectKind, server_major: u32) -> Vec<Privilege> {
        kind.privileges(server_major)
            .iter()
            .copied()
            .filter(|p| match self {
                Self::All => true,
                Self::These(list) | Self::Columns(Columns { whole: list, .. }) => list.contains(p),
            })
            .collect()
    }

    /// The first privilege asked for that this kind of object does not have.
    pub fn foreign_to(&self, kind: ObjectKind, server_major: u32) -> Option<Privilege> {
        match self {
            Self::All => None,
            Self::These(list) | Self::Columns(Columns { whole: list, .. }) => list
                .iter()
                .copied()
                .find(|p| !kind.privileges(server_major).contains(p)),
        }
    }

    /// The privileges asked for that none of these kinds of object has in this version, though in a
    /// newer one some do.
    pub fn unknown_to(&self, kinds: &[ObjectKind], server_major: u32) -> Vec<Privilege> {
        let Self::These(list) = self else {
            return Vec::new();
        };
        let has = |kind: &ObjectKind, p: &Privilege| kind.privileges(server_major).contains(p);
        list.iter()
            .copied()
            .filter(|p| !kinds.iter().any(|kind| has(kind, p)))
            .collect()
    }

    /// Whether this privilege is asked for.
    pub fn includes(&self, privilege: Privilege) -> bool {
        match self {
            Self::All => true,
            Self::These(list) => list.contains(&privilege),
            Self::Columns(columns) => {
                columns.whole.contains(&privilege) || columns.of.contains_key(&privilege)
            }
        }
    }

    /// What is asked for on columns, one by one.
    pub fn columns(&self) -> impl Iterator<Item = (Privilege, &str)> {
        let of = match self {
            Self::All | Self::These(_) => None,
            Self::Columns(columns) => Some(&columns.of),
        };
        of.into_iter().flatten().flat_map(|(privilege, columns)| {
            columns.iter().map(|column| (*privilege, column.as_str()))
        })
    }
}

impl FromStr for What {
    type Err = GrantError;

    fn from_str(text: &str) -> Result<Self, GrantError> {
        if text.contains('(') {
            return Columns::parse(text).map(Self::Columns);
        }
        let mut list = BTreeSet::new();
        let words: Vec<String> = text
            .split(',')
            .map(|part| {
                part.split_whitespace()
                    .collect::<Vec<_>>()
                    .join(" ")
                    .to_ascii_uppercase()
            })
            .collect();
        if words == ["ALL"] || words == ["ALL PRIVILEGES"] {
            return Ok(Self::All);
        }
        for word in &words {
            if word.is_empty() {
                return refuse(
                    "what",
                    "a privilege is missing; write SELECT, or SELECT, INSERT, or ALL",
                );
            }
            if word.starts_with("ALL") {
                return refuse("what", "ALL stands alone, not beside other privileges");
            }
            match Privilege::parse(word) {
                Some(privilege) => list.insert(privilege),
                None => {
                    let known: Vec<_> = Privilege::ALL.iter().map(|p| p.as_sql()).collect();
                    return refuse(
                        "what",
                        format!(
                            "`{word}` is not a privilege; known: {}, ALL",
                            known.join(", ")
                        ),
                    );
                }
            };
        }
        Ok(Self::These(list))
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("ALL"),
            Self::These(list) => {
                let words: Vec<_> = list.iter().map(|p| p.as_sql()).collect();
                f.write_str(&words.join(","))
            }
            Self::Columns(columns) => columns.fmt(f),
        }
    }
}

/// Relations or sequences or functions, by pattern or by name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// `*.*`: of every schema that is not the system's.
    Everywhere,
    /// `schema.*`
    InSchema(String),
    /// `schema.name`
    Qualified(String, String),
    /// `name`, to be found in exactly one schema.
    Unqualified(String),
}

impl Scope {
    /// Whether this is a pattern: it covers what is there, and passes over what the admin may
    /// not grant. A named object must succeed.
    pub fn is_pattern(&self) -> bool {
        matches!(self, Self::Everywhere | Self::InSchema(_))
    }
}

/// On which objects.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Where {
    /// Tables and, for patterns, sequences; a bare name may also be a database.
    Relations(Scope),
    /// `sequence:…`
    Sequences(Scope),
    /// `function:…`, with the argument types where they are given.
    Functions(Scope, Option<String>),
    /// `schema:NAME`
    Schema(String),
    /// `database:NAME`
    Database(String),
    /// `type:…`
    Types(Scope),
    /// `server:NAME`, a foreign server.
    Server(String),
    /// `fdw:NAME`, a foreign-data wrapper.
    Wrapper(String),
    /// `largeobject:OID`; none: `largeobject:*`.
    LargeObjects(Option<u32>),
    /// `parameter:NAME`
    Parameter(String),
    /// `role:NAME`
    Role(String),
}

impl Where {
    /// The kinds of object this can name.
    fn kinds(&self) -> &'static [ObjectKind] {
        match self {
            Self::Relations(Scope::Unqualified(_)) => &[ObjectKind::Table, ObjectKind::Database],
            Self::Relations(Scope::Qualified(..)) => &[ObjectKind::Table, ObjectKind::Sequence],
            Self::Relations(_) => &[ObjectKind::Table, ObjectKind::Sequence],
            Self::Sequences(_) => &[ObjectKind::Sequence],
            Self::Functions(..) => &[ObjectKind::Function],
            Self::Schema(_) => &[ObjectKind::Schema],
            Self::Database(_) => &[ObjectKind::Database],
            Self::Types(_) => &[ObjectKind::Type],
            Self::Server(_) => &[ObjectKind::Server],
            Self::Wrapper(_) => &[ObjectKind::Wrapper],
            Self::LargeObjects(_) => &[ObjectKind::LargeObject],
            Self::Parameter(_) => &[ObjectKind::Parameter],
            Self::Role(_) => &[ObjectKind::Role],
        }
    }
}

impl FromStr for Where {
    type Err = GrantError;

    fn from_str(text: &str) -> Result<Self, GrantError> {
        let text = text.trim();
        let (kind, name) = match split_kind(text) {
            Some((kind, name)) => (kind, name.trim()),
            None => ("table", text),
        };
        match kind {
            "table" => Ok(Self::Relations(parse_scope(name)?)),
            "sequence" => Ok(Self::Sequences(parse_scope(name)?)),
            "function" => match name.split_once('(') {
                None => Ok(Self::Functions(parse_scope(name)?, None)),
                Some((name, rest)) => {
                    let Some(arguments) = rest.trim_end().strip_suffix(')') else {
                        return refuse("where", "the function's argument types lack their `)`");
                    };
                    let scope = parse_scope(name.trim())?;
                    if scope.is_pattern() {
                        return refuse("where", "a function pattern has no argument types");
                    }
                    Ok(Self::Functions(scope, Some(arguments.trim().to_owned())))
                }
            },
            "schema" => Ok(Self::Schema(parse_single(name)?)),
            "database" => Ok(Self::Database(parse_single(name)?)),
            "type" => Ok(Self::Types(parse_scope(name)?)),
            "server" => Ok(Self::Server(parse_single(name)?)),
            "fdw" => Ok(Self::Wrapper(parse_single(name)?)),
            "largeobject" => match (name, name.parse()) {
                ("*", _) => Ok(Self::LargeObjects(None)),
                (_, Ok(oid)) => Ok(Self::LargeObjects(Some(oid))),
                (_, Err(_)) => refuse(
                    "where",
                    "a large object is named by its number, as largeobject:16403; largeobject:* is all",
                ),
            },
            "parameter" => match crate::account::check_parameter(name) {
                Ok(()) => Ok(Self::Parameter(name.to_owned())),
                Err(reason) => refuse("where", reason),
            },
            "role" => Ok(Self::Role(parse_single(name)?)),
            other => refuse(
                "where",
                format!(
                    "`{other}:` is not a kind of object; known: database:, schema:, sequence:, function:, type:, server:, fdw:, largeobject:, parameter:, role:"
                ),
            ),
        }
    }
}

/// `schema:app` into `schema` and `app`, unless the colon stands inside quotes.
fn split_kind(text: &str) -> Option<(&str, &str)> {
    let colon = text.find(':')?;
    match text.find('"') {
        Some(quote) if quote < colon => None,
        _ => Some((&text[..colon], &text[colon + 1..])),
    }
}

/// One part of a dotted name. Plain parts are taken as they are written (no case folding);
/// a part with dots, colons or stars is put in double quotes, a quote inside doubled.
enum Part {
    Name(String),
    Star,
}

fn parse_parts(text: &str) -> Result<Vec<Part>, GrantError> {
    let mut parts = Vec::new();
    let mut rest = text;
    loop {
        if let Some(mut inside) = rest.strip_prefix('"') {
            let mut name = String::new();
            loop {
                let Some(end) = inside.find('"') else {
                    return refuse("where", "a double quote is not closed");
                };
                name.push_str(&inside[..end]);
                inside = &inside[end + 1..];
                match inside.strip_prefix('"') {
                    Some(after) => {
                        name.push('"');
                        inside = after;
                    }
                    None => break,
                }
            }
            parts.push(Part::Name(name));
            match inside.strip_prefix('.') {
                Some(after) => rest = after,
                None if inside.is_empty() => break,
                None => return refuse("where", "after a quoted name comes a dot or the end"),
            }
        } else {
            let (part, after) = match rest.split_once('.') {
                Some((part, after)) => (part, Some(after)),
                None => (rest, None),
            };
            parts.push(if part == "*" {
                Part::Star
            } else {
                Part::Name(part.to_owned())
            });
            match after {
                Some(after) => rest = after,
                None => break,
            }
        }
    }
    for part in &parts {
        if let Part::Name(name) = part {
            if name.is_empty() {
                return refuse(
                    "where",
                    "a name is missing; write *.*, schema.*, schema.table or table",
                );
            }
            if name.len() > 63 || name.contains('\0') {
                return refuse("where", "a PostgreSQL name has 1 to 63 bytes and no NUL");
            }
        }
    }
    Ok(parts)
}

fn parse_scope(text: &str) -> Result<Scope, GrantError> {
    let mut parts = parse_parts(text)?.into_iter();
    match (parts.next(), parts.next(), parts.next()) {
        (Some(Part::Star), Some(Part::Star), None) => Ok(Scope::Everywhere),
        (Some(Part::Name(schema)), Some(Part::Star), None) => Ok(Scope::InSchema(schema)),
        (Some(Part::Name(schema)), Some(Part::Name(name)), None) => {
            Ok(Scope::Qualified(schema, name))
        }
        (Some(Part::Name(name)), None, None) => Ok(Scope::Unqualified(name)),
        _ => refuse(
            "where",
            format!(
                "`{text}` is not understood; write *.*, schema.*, schema.table or table, names with dots in double quotes"
            ),
        ),
    }
}

fn parse_single(text: &str) -> Result<String, GrantError> {
    let mut parts = parse_parts(text)?.into_iter();
    match (parts.next(), parts.next()) {
        (Some(Part::Name(name)), None) => Ok(name),
        _ => refuse(
            "where",
            format!("`{text}` is not one name; a name with dots goes in double quotes"),
        ),
    }
}

/// One grant, as it is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct GrantText {
    what: String,
    #[serde(rename = "where")]
    on: String,
    // An engine of before this field refuses it.
    #[serde(rename = "setRole", default, skip_serializing_if = "is_false")]
    set_role: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it")]
fn is_false(truth: &bool) -> bool {
    !truth
}

/// One grant: privileges on objects.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "GrantText", into = "GrantText")]
pub struct Grant {
    what: What,
    on: Where,
    on_text: String,
    set_role: bool,
}

impl Grant {
    /// Parses and checks a grant.
    ///
    /// # Errors
    /// An unknown privilege, a `where` that is not understood, or privileges none of which the
    /// kind of object has.
    pub fn parse(what: &str, on: &str) -> Result<Self, GrantError> {
        let what: What = what.parse()?;
        let parsed: Where = on.parse()?;
        if let What::These(list) | What::Columns(Columns { whole: list, .. }) = &what {
            let kinds = parsed.kinds();
            let fits = |p: Privilege| kinds.iter().any(|kind| kind.may_have(p));
            if let Some(misfit) = list.iter().copied().find(|p| !fits(*p)) {
                let words: Vec<_> = kinds.iter().map(|kind| kind.word()).collect();
                return refuse(
                    "what",
                    format!(
                        "{} does not exist on a {} (`where` is `{on}`)",
                        misfit.as_sql(),
                        words.join(" or ")
                    ),
                );
            }
        }
        let is_one_table = matches!(&parsed, Where::Relations(scope) if !scope.is_pattern());
        if what.columns().next().is_some() && !is_one_table {
            return refuse(
                "what",
                "columns belong to one table: write schema.table, or table, in `where`",
            );
        }
        Ok(Self {
            what,
            on: parsed,
            on_text: on.trim().to_owned(),
            set_role: false,
        })
    }

    /// The same, with the right to become the role by `SET ROLE`. The grant role is a member either
    /// way, so this is no part of what names it.
    ///
    /// # Errors
    /// It is not a membership.
    pub fn with_set_role(self) -> Result<Self, GrantError> {
        if self.role().is_none() {
            return refuse(
                "setRole",
                "is for memberships: {\"what\": \"MEMBER\", \"where\": \"role:NAME\", \"setRole\": true}",
            );
        }
        Ok(Self {
            set_role: true,
            ..self
        })
    }

    /// The role that accounts may become by `SET ROLE`.
    pub fn set_role(&self) -> Option<&str> {
        self.role().filter(|_| self.set_role)
    }

    /// The privileges.
    pub fn what(&self) -> &What {
        &self.what
    }

    /// The objects.
    pub fn on(&self) -> &Where {
        &self.on
    }

    /// The role it makes accounts members of.
    pub fn role(&self) -> Option<&str> {
        match &self.on {
            Where::Role(name) => Some(name),
            _ => None,
        }
    }

    /// Whether it lets accounts create objects in a schema or database.
    pub fn creates(&self) -> bool {
        let named = matches!(&self.what, What::These(list) if list.contains(&Privilege::Create));
        match &self.on {
            Where::Schema(_) | Where::Database(_) => named || self.what == What::All,
            // A bare name may be a database.
            _ => named,
        }
    }
}

impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {}", self.what, self.on_text)
    }
}

impl TryFrom<GrantText> for Grant {
    type Error = GrantError;
    fn try_from(text: GrantText) -> Result<Self, GrantError> {
        let grant = Self::parse(&text.what, &text.on)?;
        match text.set_role {
            true => grant.with_set_role(),
            false => Ok(grant),
        }
    }
}

impl From<Grant> for GrantText {
    fn from(grant: Grant) -> Self {
        Self {
            what: grant.what.to_string(),
            on: grant.on_text,
            set_role: grant.set_role,
        }
    }
}

/// What becomes of the objects an account owns when its lease ends.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum OwnedObjects {
    /// To a powerless quarantine role.
    #[default]
    Reassign,
    /// To the role named (for migrations).
    ReassignTo(String),
    /// Dropped, unless something of somebody else's depends on them: then as `Reassign`.
    Drop,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn on(text: &str) -> Where {
        text.parse().unwrap()
    }

    #[test]
    fn wheres_are_understood() {
        use Where::*;
        assert_eq!(on("*.*"), Relations(Scope::Everywhere));
        assert_eq!(on("app.*"), Relations(Scope::InSchema("app".into())));
        assert_eq!(
            on("app.t"),
            Relations(Scope::Qualified("app".into(), "t".into()))
        );
        assert_eq!(on("T"), Relations(Scope::Unqualified("T".into())));
        assert_eq!(
            on(r#""a.b"."c""d""#),
            Relations(Scope::Qualified("a.b".into(), "c\"d".into()))
        );
        assert_eq!(on(r#""x:y""#), Relations(Scope::Unqualified("x:y".into())));
        assert_eq!(
            on(r#""*"."*""#),
            Relations(Scope::Qualified("*".into(), "*".into()))
        );
        assert_eq!(on("database:app"), Database("app".into()));
        assert_eq!(on("schema:app"), Schema("app".into()));
        assert_eq!(on("role:reader"), Role("reader".into()));
        assert_eq!(
            on("sequence:app.*"),
            Sequences(Scope::InSchema("app".into()))
        );
        assert_eq!(
            on("function:app.f(integer, text)"),
            Functions(
                Scope::Qualified("app".into(), "f".into()),
                Some("integer, text".into())
            )
        );
        assert_eq!(on("type:app.*"), Types(Scope::InSchema("app".into())));
        assert_eq!(on("server:far"), Server("far".into()));
        assert_eq!(on("fdw:postgres_fdw"), Wrapper("postgres_fdw".into()));
        assert_eq!(on("largeobject:16403"), LargeObjects(Some(16403)));
        assert_eq!(on("largeobject:*"), LargeObjects(None));
        assert_eq!(on("parameter:app.tenant"), Parameter("app.tenant".into()));
        for bad in [
            "largeobject:x",
            "largeobject:-1",
            "server:*",
            "parameter:Work Mem",
            "parameter:*",
            "",
            ".",
            "*",
            "*.t",
            "a.b.c",
            "\"a",
            "\"a\"b",
            "view:x",
            "schema:*",
            "function:f(",
            "a.",
        ] {
            assert!(bad.parse::<Where>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn whats_are_understood() {
        assert_eq!("all privileges".parse::<What>().unwrap(), What::All);
        assert_eq!(
            "select , Insert".parse::<What>().unwrap().to_string(),
            "SELECT,INSERT"
        );
        assert_eq!("temp".parse::<What>().unwrap().to_string(), "TEMPORARY");
        for bad in [
            "",
            "SELEC",
            "SELECT,",
            "SELECT, ALL",
            "SELECT; DROP TABLE x",
        ] {
            assert!(bad.parse::<What>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn misfits_are_refused() {
        assert_eq!(Grant::parse("EXECUTE", "*.*").unwrap_err().field, "what");
        assert!(Grant::parse("SELECT", "schema:app").is_err());
        assert!(Grant::parse("SELECT", "database:app").is_err());
        assert!(
            Grant::parse("CONNECT", "app").is_ok(),
            "a bare name may be a database"
        );
        assert!(Grant::parse("ALL", "function:f").is_ok());
        assert!(Grant::parse("SET, alter system", "parameter:work_mem").is_ok());
        assert!(Grant::parse("USAGE", "parameter:work_mem").is_err());
        assert!(Grant::parse("SELECT", "largeobject:1").is_ok());
        assert!(Grant::parse("USAGE", "largeobject:1").is_err());
    }

    #[test]
    fn only_a_membership_lets_an_account_become_a_role() {
        let member = |set_role: Option<bool>| {
            let mut text = serde_json::json!({"what": "MEMBER", "where": "role:owner"});
            if let Some(set_role) = set_role {
                text["setRole"] = set_role.into();
            }
            serde_json::from_value::<Grant>(text).unwrap()
        };
        let plain = serde_json::to_value(member(Some(false))).unwrap();
        assert_eq!(
            plain,
            serde_json::json!({"what": "MEMBER", "where": "role:owner"}),
            "an older engine knows no setRole"
        );
        assert_eq!(member(None).set_role(), None);
        let able = member(Some(true));
        assert_eq!(able.set_role(), Some("owner"));
        assert_eq!(able.to_string(), member(None).to_string());
        let again = serde_json::from_value(serde_json::to_value(&able).unwrap());
        assert_eq!(able, again.unwrap());
        let table = Grant::parse("SELECT", "t").unwrap();
        assert_eq!(table.with_set_role().unwrap_err().field, "setRole");
    }

    proptest! {
        #[test]
        fn any_quoted_name_survives(name in "[^\\x00]{1,15}") {
            let quoted = format!("\"{}\"", name.replace('"', "\"\""));
            prop_assert_eq!(on(&quoted), Where::Relations(Scope::Unqualified(name)));
        }
    }
}
