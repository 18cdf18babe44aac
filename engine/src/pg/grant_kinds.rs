//! How the catalogs show each kind of object, and how PostgreSQL reports privileges on it.

use mayfly_protocol::grant::{ObjectKind, Privilege};

use super::sql::literal;

/// The name for everybody in PostgreSQL's privilege functions. No role can have it.
pub(super) const PUBLIC: &str = "public";

/// How objects of a kind are found and named.
pub(super) struct Shape {
    /// The keyword of the kind in GRANT.
    pub(super) keyword: &'static str,
    /// The object as SQL.
    pub(super) object: &'static str,
    pub(super) from: String,
    /// The expression that identifies the object, which its privilege function takes.
    pub(super) target: &'static str,
    /// The alias of its catalog row, if that row shows a transaction that changes the object.
    pub(super) row: Option<&'static str>,
    /// Whether it is in a schema `n`, whose USAGE is needed to name it.
    pub(super) in_schema: bool,
}

/// The shape of a kind. `filter` is that of [`super::grant_pairs::Wanted`].
pub(super) fn shape(kind: ObjectKind, filter: &str) -> Shape {
    let (keyword, object, from, target, row) = match kind {
        ObjectKind::Table => ("TABLE", CLASS_NAME, CLASSES, "c.oid", Some("c")),
        ObjectKind::Sequence => ("SEQUENCE", CLASS_NAME, CLASSES, "c.oid", Some("c")),
        ObjectKind::Function => ("ROUTINE", FUNCTION_NAME, FUNCTIONS, "p.oid", Some("p")),
        ObjectKind::Type => ("TYPE", TYPE_NAME, TYPES, "t.oid", Some("t")),
        ObjectKind::Schema => ("SCHEMA", SCHEMA_NAME, "pg_namespace n", "n.oid", None),
        ObjectKind::Database => ("DATABASE", DATABASE_NAME, "pg_database d", "d.oid", None),
        ObjectKind::Server => ("FOREIGN SERVER", SERVER_NAME, SERVERS, "s.oid", None),
        ObjectKind::Wrapper => (
            "FOREIGN DATA WRAPPER",
            WRAPPER_NAME,
            WRAPPERS,
            "w.oid",
            None,
        ),
        ObjectKind::LargeObject => (
            "LARGE OBJECT",
            "l.oid::text",
            LARGE_OBJECTS,
            "l.oid",
            Some("l"),
        ),
        ObjectKind::Role => ("ROLE", ROLE_NAME, "pg_roles r", "r.oid", None),
        // A parameter has a catalog row only if a role has a privilege on it. A parameter that the operator defined
        // may have no row at all.
        ObjectKind::Parameter => ("PARAMETER", PARAMETER_NAME, "", "p.name", None),
    };
    Shape {
        keyword,
        object,
        from: match kind {
            ObjectKind::Parameter => format!("(SELECT {filter} AS name) p"),
            _ => from.to_owned(),
        },
        target,
        row,
        in_schema: matches!(
            kind,
            ObjectKind::Table | ObjectKind::Sequence | ObjectKind::Function | ObjectKind::Type
        ),
    }
}

/// The filter that finds the one object of this name. Only for kinds that are in no schema.
pub(super) fn by_name(kind: ObjectKind, name: &str) -> String {
    let column = match kind {
        ObjectKind::Schema => "n.nspname",
        ObjectKind::Database => "d.datname",
        ObjectKind::Server => "s.srvname",
        ObjectKind::Wrapper => "w.fdwname",
        ObjectKind::Role => "r.rolname",
        ObjectKind::LargeObject => "l.oid",
        ObjectKind::Table
        | ObjectKind::Sequence
        | ObjectKind::Function
        | ObjectKind::Type
        | ObjectKind::Parameter => return "false".to_owned(),
    };
    format!("{column} = {}", literal(name))
}

/// Two expressions: whether a role has the privilege `x.privilege` on the object `o`, and whether the admin may
/// grant the privilege `o.asked` on it. `dry`: no GRANT follows.
pub(super) fn has_and_can(
    kind: ObjectKind,
    on_columns: bool,
    role: &str,
    version: u32,
    dry: bool,
) -> (String, String) {
    let is_public = role == PUBLIC;
    let role = literal(role);
    let by = |function: &str| {
        (
            format!("{function}({role}, o.oid, x.privilege)"),
            format!("{function}(o.oid, o.asked || ' WITH GRANT OPTION')"),
        )
    };
    match kind {
        ObjectKind::Table if on_columns => (
            format!("has_column_privilege({role}, o.oid, x.col, x.privilege)"),
            "has_column_privilege(o.oid, o.col, o.asked || ' WITH GRANT OPTION')".to_owned(),
        ),
        ObjectKind::Table => by("has_table_privilege"),
        ObjectKind::Sequence => by("has_sequence_privilege"),
        ObjectKind::Function => by("has_function_privilege"),
        ObjectKind::Schema => by("has_schema_privilege"),
        ObjectKind::Database => by("has_database_privilege"),
        ObjectKind::Type => by("has_type_privilege"),
        ObjectKind::Server => by("has_server_privilege"),
        ObjectKind::Wrapper => by("has_foreign_data_wrapper_privilege"),
        ObjectKind::Parameter => by("has_parameter_privilege"),
        ObjectKind::LargeObject if version >= 18 => by("has_largeobject_privilege"),
        ObjectKind::LargeObject => {
            let acl = "aclexplode(coalesce(l.lomacl, acldefault('L', l.lomowner))) a";
            let member = match is_public {
                true => "false".to_owned(),
                false => format!("pg_has_role({role}, a.grantee, 'USAGE')"),
            };
            (
                format!(
                    "EXISTS (SELECT 1 FROM pg_largeobject_metadata l, {acl} WHERE l.oid = o.oid \
                     AND a.privilege_type = x.privilege AND CASE a.grantee WHEN 0 THEN true ELSE {member} END)"
                ),
                format!(
                    "EXISTS (SELECT 1 FROM pg_largeobject_metadata l WHERE l.oid = o.oid AND (pg_has_role(l.lomowner, 'USAGE') \
                     OR EXISTS (SELECT 1 FROM {acl} WHERE a.privilege_type = o.asked AND a.is_grantable AND a.grantee <> 0 \
                       AND pg_has_role(a.grantee, 'USAGE'))))"
                ),
            )
        }
        ObjectKind::Role => (
            match is_public {
                true => "false".to_owned(),
                false => format!("pg_has_role({role}, o.oid, 'USAGE')"),
            },
            match (dry, version) {
                // If the admin may not grant this privilege, the GRANT itself fails.
                (false, _) => "true".to_owned(),
                (true, 16..) => "pg_has_role(o.oid, 'MEMBER WITH ADMIN OPTION')".to_owned(),
                (true, _) => "pg_has_role(o.oid, 'MEMBER WITH ADMIN OPTION') OR EXISTS \
                              (SELECT 1 FROM pg_roles me, pg_roles it WHERE it.oid = o.oid AND NOT it.rolsuper \
                               AND me.rolname = current_user AND me.rolcreaterole)".to_owned(),
            },
        ),
    }
}

/// Rows of the wanted privileges, as `x(privilege, col, words)`.
pub(super) fn values(privileges: &[Privilege], columns: &[(Privilege, String)]) -> String {
    let whole = privileges
        .iter()
        .map(|p| format!("('{0}', NULL, '{0}')", p.as_sql()));
    let columns = columns.iter().map(|(privilege, column)| {
        let (privilege, column) = (privilege.as_sql(), literal(column));
        format!("('{privilege}', {column}, '{privilege} (' || quote_ident({column}) || ')')")
    });
    whole.chain(columns).collect::<Vec<_>>().join(", ")
}

const CLASS_NAME: &str = "format('%I.%I', n.nspname, c.relname)";
const CLASSES: &str = "pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace";
const FUNCTION_NAME: &str = "p.oid::regprocedure::text";
const FUNCTIONS: &str = "pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace";
const TYPE_NAME: &str = "format('%I.%I', n.nspname, t.typname)";
const TYPES: &str = "pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace";
const SCHEMA_NAME: &str = "format('%I', n.nspname)";
const DATABASE_NAME: &str = "format('%I', d.datname)";
const SERVER_NAME: &str = "format('%I', s.srvname)";
const SERVERS: &str = "pg_foreign_server s";
const WRAPPER_NAME: &str = "format('%I', w.fdwname)";
const WRAPPERS: &str = "pg_foreign_data_wrapper w";
const LARGE_OBJECTS: &str = "pg_largeobject_metadata l";
const ROLE_NAME: &str = "format('%I', r.rolname)";
/// A dotted name with each part quoted separately.
const PARAMETER_NAME: &str =
    "(SELECT string_agg(format('%I', part), '.') FROM unnest(string_to_array(p.name, '.')) part)";
