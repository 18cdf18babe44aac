//! Reads which privileges a role lacks on the objects that a filter finds. Each kind of object and each page takes
//! one query.

use mayfly_protocol::grant::ObjectKind;
use mayfly_protocol::task::Failure;

use super::grant_catalog::Catalog;
use super::grant_kinds::{Shape, has_and_can, shape, values};
use super::grant_pairs::{Lack, OBJECTS_PER_PAGE, Page, Wanted};
use super::sql::literal;

impl Catalog<'_> {
    /// The privileges that the role lacks on the named objects that a filter finds, and the number of all pairs.
    pub(super) async fn lacks(&self, wanted: &Wanted) -> Result<(usize, Vec<Lack>), Failure> {
        let page = self.look(wanted, None).await?;
        Ok((page.total, page.lacks))
    }

    /// Like [`Catalog::lacks`], for one page of a pattern's objects from `from` on. It also finds objects that
    /// another transaction holds.
    pub(super) async fn page(&self, wanted: &Wanted, from: &str) -> Result<Page, Failure> {
        self.look(wanted, Some(from)).await
    }

    async fn look(&self, wanted: &Wanted, page: Option<&str>) -> Result<Page, Failure> {
        let Some(question) = self.question(wanted, page) else {
            return Ok(Page {
                total: 0,
                lacks: vec![],
                next: None,
            });
        };
        let keyword = shape(wanted.kind, &wanted.filter).keyword;
        let rows = self.rows(&question).await?;
        Ok(Page::from_rows(&rows, keyword, page.is_some()))
    }

    /// The query of [`Catalog::lacks`], or of [`Catalog::page`] from `page` on. `None`: no privilege is wanted.
    pub(super) fn question(&self, wanted: &Wanted, page: Option<&str>) -> Option<String> {
        if wanted.privileges.is_empty() && wanted.columns.is_empty() {
            return None;
        }
        let Shape {
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
        Some(format!(
            "WITH objects AS MATERIALIZED (SELECT {target} AS oid, {object} AS object, {schema}, {busy} AS busy \
               FROM {from} WHERE {filter}{after}), \
             pairs AS MATERIALIZED (SELECT o.*, x.privilege AS asked, x.col, x.words AS privilege, ({has}) AS has, {schema_has} AS schema_has \
               FROM objects o CROSS JOIN (VALUES {asked}) x(privilege, col, words)) \
             SELECT (SELECT count(*) FROM pairs)::text, (SELECT count(*) FROM objects)::text, \
               (SELECT max(oid) FROM objects)::text, NULL, NULL, NULL, NULL \
             UNION ALL SELECT {object_name}, o.privilege, o.has::text, ({can})::text, \
               CASE WHEN NOT o.schema_has THEN {schema_name} END, ({schema_can})::text, o.busy::text \
             FROM pairs o WHERE NOT (o.has AND o.schema_has)",
            object_name = sent_safely("o.object"),
            schema_name = sent_safely("o.schema"),
        ))
    }

    /// An expression for whether a GRANT would wait: an open transaction has changed the object's row in its
    /// catalog. From version 18 on GRANT locks the relation as well.
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

    /// The number of objects of a pattern after the object `from`.
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

/// SQL that sends a name in a form that always arrives. A database in SQL_ASCII may have names that are not UTF-8,
/// and one of them would fail the whole answer (SQLSTATE 22021). So such a database sends names that are not plain
/// ASCII in hexadecimal.
fn sent_safely(name: &str) -> String {
    format!(
        "CASE WHEN getdatabaseencoding() <> 'SQL_ASCII' OR {name} COLLATE \"C\" ~ '^[ -~]*$' THEN 't' || {name} \
         ELSE 'x' || encode(convert_to({name}, 'SQL_ASCII'), 'hex') END"
    )
}
