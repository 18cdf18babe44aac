//! What a role does not hold of the objects that a filter finds: one query for each kind of object
//! and page of objects.

use mayfly_protocol::grant::{ObjectKind, Privilege};
use mayfly_protocol::task::Failure;

use super::grant_catalog::Catalog;
use super::grant_kinds::{Shape, has_and_can, shape, values};
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
    /// Privileges on columns instead, with the columns.
    pub(super) columns: Vec<(Privilege, String)>,
    pub(super) filter: String,
    /// Nobody has to name the objects, so no USAGE of their schemas is needed.
    pub(super) unnamed: bool,
}

impl Wanted {
    pub(super) fn of(
        kind: ObjectKind,
        privileges: Vec<Privilege>,
        filter: impl Into<String>,
    ) -> Self {
        Self {
            kind,
            privileges,
            columns: vec![],
            filter: filter.into(),
            unnamed: false,
        }
    }
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
        if wanted.privileges.is_empty() && wanted.columns.is_empty() {
            return Ok(Page {
                total: 0,
                lacks: vec![],
                next: None,
            });
        }
        let Shape {
            keyword,
            object,
            from,
            target,
            in_schema,
            ..
        } = shape(wanted.kind, &wanted.filter);
        let on_columns = !wanted.columns.is_empty();
        let (has, can) = has_and_can(wanted.kind, on_columns, self.role, self.version, self.dry);
        let role = literal(self.role);
        let (schema, schema_has, schema_can) = if in_schema && !wanted.unnamed {
            (
                "n.oid AS schema_oid, format('%I', n.nspname) AS schema",
                format!("has_schema_privilege({role}, o.schema_oid, 'USAGE')"),
                "has_schema_privilege(o.schema_oid, 'USAGE WITH GRANT OPTION')",
            )
        } else {
            ("NULL AS schema", "true".to_owned(), "true")
        };
        let asked = values(&wanted.privileges, &wanted.columns);
        let filter = match wanted.kind {
            ObjectKind::Parameter => "true",
            _ => &wanted.filter,
        };
        let (busy, after) = match page {
            None => ("false".to_owned(), String::new()),
            Some(from) => (
                self.busy(wanted.kind, &wanted.filter),
                format!(" AND {target} > {from} ORDER BY {target} LIMIT {OBJECTS_PER_PAGE}"),
            ),
        };
        let query = format!(
            "WITH objects AS MATERIALIZED (SELECT {target} AS oid, {object} AS object, {schema}, {busy} AS busy \
               FROM {from} WHERE {filter}{after}), \
             pairs AS MATERIALIZED (SELECT o.*, x.privilege AS asked, x.col, x.said AS privilege, ({has}) AS has, {schema_has} AS schema_has \
               FROM objects o CROSS JOIN (VALUES {asked}) x(privilege, col, said)) \
             SELECT (SELECT count(*) FROM pairs)::text, (SELECT count(*) FROM objects)::text, \
               (SELECT max(oid) FROM objects)::text, NULL, NULL, NULL, NULL \
             UNION ALL SELECT {said_object}, o.privilege, o.has::text, ({can})::text, \
               CASE WHEN NOT o.schema_has THEN {said_schema} END, ({schema_can})::text, o.busy::text \
             FROM pairs o WHERE NOT (o.has AND o.schema_has)",
            said_object = said("o.object"),
            said_schema = said("o.schema"),
        );
        let rows = self.rows(&query).await?;
        let mut rows = rows.iter();
        let first = rows.next().cloned().unwrap_or_default();
        let is_full = first.parse(1) == Some(OBJECTS_PER_PAGE);
        let lacks = rows.map(|row| {
            let (object, unsayable) = heard(row.text(0));
            let schema = row.get(4);
            Lack {
                keyword,
                object,
                privilege: row.text(1).to_owned(),
                held: row.flag(2),
                grantable: row.flag(3),
                schema: schema.map(|schema| (heard(schema).0, row.flag(5))),
                busy: row.flag(6),
                unsayable,
            }
        });
        Ok(Page {
            total: first.parse(0).unwrap_or(0),
            lacks: lacks.collect(),
            next: (page.is_some() && is_full).then(|| first.text(2).to_owned()),
        })
    }

    /// Whether a GRANT would wait: the object's row in its catalog has a successor of a transaction
    /// that is under way. From version 18 on GRANT locks the relation as well.
    fn busy(&self, kind: ObjectKind, filter: &str) -> String {
        let shape = shape(kind, filter);
        let (Some(row), target) = (shape.row, shape.target) else {
            return "false".to_owned();
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
        let Shape {
            from: tables,
            target: oid,
            ..
        } = shape(wanted.kind, &wanted.filter);
        let query = format!(
            "SELECT count(*) FROM {tables} WHERE {} AND {oid} > {from}",
            wanted.filter
        );
        let rows = self.rows(&query).await?;
        let count = rows.first().and_then(|row| row.parse(0));
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
