//! The `where` of a grant: objects by name or by pattern, with their kind before a colon.

use std::str::FromStr;

use super::names::{parse_scope, parse_single, split_kind};
use super::{GrantError, ObjectKind, refuse};

/// Relations or sequences or functions, by pattern or by name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// `*.*`: of every schema except system schemas.
    Everywhere,
    /// `schema.*`: all of one schema.
    InSchema(String),
    /// `schema.name`: one object by its full name.
    Qualified(String, String),
    /// `name`, to be found in exactly one schema.
    Unqualified(String),
}

impl Scope {
    /// Whether this is a pattern. A pattern matches existing objects and skips what the admin may not grant.
    /// A named object must exist and be grantable.
    pub fn is_pattern(&self) -> bool {
        matches!(self, Self::Everywhere | Self::InSchema(_))
    }
}

/// The objects that a grant is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Where {
    /// Tables and, for patterns, sequences; a bare name may also be a database.
    Relations(Scope),
    /// `sequence:…`, by pattern or by name.
    Sequences(Scope),
    /// `function:…`, with the argument types if they are given.
    Functions(Scope, Option<String>),
    /// `schema:NAME`, the schema itself.
    Schema(String),
    /// `database:NAME`, the database itself.
    Database(String),
    /// `type:…`, by pattern or by name.
    Types(Scope),
    /// `server:NAME`, a foreign server.
    Server(String),
    /// `fdw:NAME`, a foreign-data wrapper.
    Wrapper(String),
    /// `largeobject:OID`. `None`: `largeobject:*`, all of them.
    LargeObjects(Option<u32>),
    /// `parameter:NAME`, a setting of the server.
    Parameter(String),
    /// `role:NAME`, a role to be a member of.
    Role(String),
}

impl Where {
    /// The kinds of object this can name.
    pub(super) fn kinds(&self) -> &'static [ObjectKind] {
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
                        return refuse(
                            "where",
                            "the function's argument types have no closing `)`",
                        );
                    };
                    let scope = parse_scope(name.trim())?;
                    if scope.is_pattern() {
                        return refuse(
                            "where",
                            "a pattern for functions must not have argument types",
                        );
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
                    "name a large object by its number, as in largeobject:16403; largeobject:* means all",
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
        assert_eq!(
            on(r#"sequence:"a.b"."c:d""#),
            Sequences(Scope::Qualified("a.b".into(), "c:d".into()))
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
            "a\0b",
            "\"\"",
            "schema:a.b",
            "function:*.*(integer)",
        ] {
            assert!(bad.parse::<Where>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_name_has_at_most_63_bytes() {
        for (bytes, is_a_name) in [(62, true), (63, true), (64, false), (65, false)] {
            let text = "x".repeat(bytes);
            assert_eq!(text.parse::<Where>().is_ok(), is_a_name, "{bytes}");
        }
    }

    proptest! {
        #[test]
        fn any_quoted_name_survives(name in "[^\\x00]{1,15}") {
            let quoted = format!("\"{}\"", name.replace('"', "\"\""));
            prop_assert_eq!(on(&quoted), Where::Relations(Scope::Unqualified(name)));
        }
    }
}
