//! What a role does not hold of the objects that a filter finds: one query for each kind of object
//! and page of objects.

use mayfly_common::grant::{ObjectKind, Privilege};
use mayfly_common::task::Failure;

use super::grant_catalog::{Catalog, PUBLIC, cell};
use super::sql::literal;

/// Names in a message, at most.
pub(super) const NAMES_IN_A_MESSAGE: usize = 5;
/// Objects of a pattern that are looked at together, at most.
const OBJECTS_PER_PAGE: usize = 5000;

/// One privilege on one object that the role does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Lack {
    pub(super) keyword: &'static str,
    /// The object as SQL; where `unsayable`, for people only.
    pub(super) object: String,
    pub(super) privilege: String,
    /// The role has the privilege itself; what it lacks is USAGE of the schema.
    pub(super) held: bool,
    /// The admin may grant it.
    pub(super) grantable: bool,
    /// The schema whose USAGE is lacking, and whether the admin may grant that.
    pub(super) schema: Option<(String, bool)>,
    /// Another transaction holds the object: a GRANT would wait for its end.
    pub(super) busy: bool,
    /// The object's name cannot be written in UTF-8, so no statement of ours can name it.
    pub(super) unsayable: bool,
}

impl Lack {
    /// The admin cannot give what is lacking.
    pub(super) fn is_beyond(&self) -> bool {
        self.unsayable
            || (!self.held && !self.grantable)
            || self.schema.as_ref().is_some_and(|(_, can)| !can)
    }
}

/// Privileges wanted on the objects of one kind that a filter finds.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) kind: ObjectKind,
    pub(super) privileges: Vec<Privilege>,
    pub(super) filter: String,
}

/// Some of the objects that a filter finds.
#[derive(Debug)]
pub(super) struct Page {
    /// Pairs of object and privilege.
    pub(super) total: usize,
    pub(super) lacks: Vec<Lack>,
    /// Where the next page begins; none: there is none.
    pub(super) next: Option<String>,
}

pub(super) fn names(lacks: &[Lack]) -> String {
    let mut text = lacks
        .iter()
        .take(NAMES_IN_A_MESSAGE)
        .map(|lack| match &lack.schema {
            Some((schema, _)) if lack.held => format!("USAGE on schema {schema}"),
            _ if lack.unsayable => format!(
                "{} on {} (its name is not UTF-8)",
                lack.privilege, lack.object
            ),
            _ => format!("{} on {}", lack.privilege, lack.object),
        })
        .collect::<Vec<_>>()
        .join("; ");
    if lacks.len() > NAMES_IN_A_MESSAGE {
        text.push_str(&format!("; and {} more", lacks.len() - NAMES_IN_A_MESSAGE));
    }
    text
}

impl Catalog<'_> {
    /// What the role does not have of the named objects that a filter finds.
    pub(super) async fn lacks(&self, wanted: &Wanted) -> Result<(usize, Vec<Lack>), Failure> {
        let page = self.look(wanted, None).await?;
        Ok((page.total, page.lacks))
    }

    /// Likewise of a pattern's objects, from one on. Which of them another transaction holds is
    /// looked for, too.
    pub(super) async fn page(&self, wanted: &Wanted, from: &str) -> Result<Page, Failure> {
        self.look(wanted, Some(from)).await
    }

    async fn look(&self, wanted: &Wanted, page: Option<&str>) -> Result<Page, Failure> {
        if wanted.privileges.is_empty() {
            return Ok(Page {
                total: 0,
                lacks: vec![],
                next: None,
            });
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
                    _ => format!("pg_has_role({role}, o.oid, 'USAGE')"),
                },
                match (self.dry, self.version) {
                    // Told by the GRANT itself, which fails where it may not.
                    (false, _) => "true".to_owned(),
                    (true, 16..) => "pg_has_role(o.oid, 'MEMBER WITH ADMIN OPTION')".to_owned(),
                    (true, _) => "pg_has_role(o.oid, 'MEMBER WITH ADMIN OPTION') OR EXISTS \
                                  (SELECT 1 FROM pg_roles me, pg_roles it WHERE it.oid = o.oid AND NOT it.rolsuper \
                                   AND me.rolname = current_user AND me.rolcreaterole)".to_owned(),
                },
            ),
            _ => (
                format!("{function}({role}, o.oid, x.privilege)"),
                format!("{function}(o.oid, o.privilege || ' WITH GRANT OPTION')"),
            ),
        };
        let in_schema = matches!(
            wanted.kind,
            ObjectKind::Table | ObjectKind::Sequence | ObjectKind::Function
        );
        let (schema, schema_has, schema_can) = if in_schema {
            (
                "n.oid AS schema_oid, format('%I', n.nspname) AS schema",
                format!("has_schema_privilege({role}, o.schema_oid, 'USAGE')"),
                "has_schema_privilege(o.schema_oid, 'USAGE WITH GRANT OPTION')",
            )
        } else {
            ("NULL AS schema", "true".to_owned(), "true")
        };
        let privileges = wanted
            .privileges
            .iter()
            .map(|p| format!("('{}')", p.as_sql()))
            .collect::<Vec<_>>()
            .join(", ");
        let (busy, after) = match page {
            None => ("false".to_owned(), String::new()),
            Some(from) => (
                self.busy(wanted.kind, target),
                format!(" AND {target} > {from} ORDER BY {target} LIMIT {OBJECTS_PER_PAGE}"),
            ),
        };
        let query = format!(
            "WITH objects AS MATERIALIZED (SELECT {target} AS oid, {object} AS object, {schema}, {busy} AS busy \
               FROM {from} WHERE {filter}{after}), \
             pairs AS MATERIALIZED (SELECT o.*, x.privilege, {has} AS has, {schema_has} AS schema_has \
               FROM objects o CROSS JOIN (VALUES {privileges}) x(privilege)) \
             SELECT (SELECT count(*) FROM pairs)::text, (SELECT count(*) FROM objects)::text, \
               (SELECT max(oid) FROM objects)::text, NULL, NULL, NULL, NULL \
             UNION ALL SELECT {said_object}, o.privilege, o.has::text, ({can})::text, \
               CASE WHEN NOT o.schema_has THEN {said_schema} END, ({schema_can})::text, o.busy::text \
             FROM pairs o WHERE NOT (o.has AND o.schema_has)",
            filter = wanted.filter,
            said_object = said("o.object"),
            said_schema = said("o.schema"),
        );
        let rows = self.rows(&query).await?;
        let mut rows = rows.iter();
        let first = rows.next().map(Vec::as_slice).unwrap_or_default();
        let is_full = cell(first, 1).parse() == Ok(OBJECTS_PER_PAGE);
        let lacks = rows.map(|row| {
            let (object, unsayable) = heard(cell(row, 0));
            let schema = row.get(4).cloned().flatten();
            Lack {
                keyword,
                object,
                privilege: cell(row, 1).to_owned(),
                held: cell(row, 2) == "true",
                grantable: cell(row, 3) == "true",
                schema: schema.map(|schema| (heard(&schema).0, cell(row, 5) == "true")),
                busy: cell(row, 6) == "true",
                unsayable,
            }
        });
        Ok(Page {
            total: cell(first, 0).parse().unwrap_or(0),
            lacks: lacks.collect(),
            next: (page.is_some() && is_full).then(|| cell(first, 2).to_owned()),
        })
    }

    /// Whether a GRANT would wait: the object's row in its catalog has a successor of a transaction
    /// that is under way. From version 18 on GRANT locks the relation as well.
    fn busy(&self, kind: ObjectKind, target: &str) -> String {
        let row = match kind {
            ObjectKind::Table | ObjectKind::Sequence => "c",
            ObjectKind::Function => "p",
            ObjectKind::Schema | ObjectKind::Database | ObjectKind::Role => {
                return "false".to_owned();
            }
        };
        let mut busy = format!(
            "{row}.xmax IN (SELECT transactionid FROM pg_locks WHERE locktype = 'transactionid' \
             AND granted AND pid <> pg_backend_pid())"
        );
        if self.version >= 18 && row == "c" {
            busy = format!(
                "({busy} OR {target} IN (SELECT relation FROM pg_locks WHERE locktype = 'relation' \
                 AND mode = 'AccessExclusiveLock' AND pid <> pg_backend_pid() \
                 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())))"
            );
        }
        busy
    }

    /// How many objects of a pattern there are from one on.
    pub(super) async fn count(&self, wanted: &Wanted, from: &str) -> Result<usize, Failure> {
        let (tables, oid) = match wanted.kind {
            ObjectKind::Function => (IN_SCHEMA_PROC, "p.oid"),
            _ => (IN_SCHEMA_CLASS, "c.oid"),
        };
        let query = format!(
            "SELECT count(*) FROM {tables} WHERE {} AND {oid} > {from}",
            wanted.filter
        );
        let rows = self.rows(&query).await?;
        let count = rows.first().and_then(|row| cell(row, 0).parse().ok());
        Ok(count.unwrap_or(0))
    }
}

/// SQL that gives a name so that it always arrives. A database in SQL_ASCII holds names of any
/// bytes, and one that is not UTF-8 would fail the whole answer (SQLSTATE 22021): there all but
/// plain ASCII goes as hexadecimal.
fn said(name: &str) -> String {
    format!(
        "CASE WHEN getdatabaseencoding() <> 'SQL_ASCII' OR {name} COLLATE \"C\" ~ '^[ -~]*$' THEN 't' || {name} \
         ELSE 'x' || encode(convert_to({name}, 'SQL_ASCII'), 'hex') END"
    )
}

/// The name of [`said`], and whether it cannot be said: then it is for people only.
fn heard(text: &str) -> (String, bool) {
    let Some(hex) = text.strip_prefix('x') else {
        return (text.get(1..).unwrap_or_default().to_owned(), false);
    };
    let digit = |n: usize| hex.get(n..n + 2);
    let bytes: Vec<u8> = (0..hex.len())
        .step_by(2)
        .filter_map(|n| u8::from_str_radix(digit(n)?, 16).ok())
        .collect();
    match String::from_utf8(bytes) {
        Ok(name) => (name, false),
        Err(error) => (error.as_bytes().escape_ascii().to_string(), true),
    }
}

const IN_SCHEMA_CLASS: &str = "pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace";
const IN_SCHEMA_PROC: &str = "pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_not_utf8_is_shown_and_not_said() {
        assert_eq!(heard("tapp.\"x y\""), ("app.\"x y\"".to_owned(), false));
        assert_eq!(heard("x636166c3a9"), ("café".to_owned(), false));
        assert_eq!(heard("x636166e9"), ("caf\\xe9".to_owned(), true));
    }
}
