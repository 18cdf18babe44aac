//! The sequences that give numbers to the rows of a table: those that defaults of its columns depend on, in any
//! schema and of any owner. A default calls `nextval` with the rights of the role that writes the row, also through
//! a view, so the writer needs USAGE.
//!
//! If a default takes the sequence's name from a text or a function, the catalog shows no dependency, and the
//! sequence is not found.

/// Bits of `pg_relation_is_updatable` (`1 << CMD_UPDATE`, `1 << CMD_INSERT`).
const WRITTEN_THROUGH: u32 = 4 | 8;

/// A filter over `pg_class c` that finds these sequences. `tables` is a query for the oids of tables and views.
pub(super) fn behind(tables: &str) -> String {
    // pg_relation_is_updatable locks its relation. So it is not called for tables, nor for views that another
    // session alters. Those views are looked at later, together with other locked objects.
    let is_written_through = format!(
        "CASE WHEN view.relkind = 'v' AND view.oid NOT IN (SELECT held.relation FROM pg_locks held \
           WHERE held.relation IS NOT NULL AND held.mode = 'AccessExclusiveLock') \
         THEN pg_relation_is_updatable(view.oid, false) & {WRITTEN_THROUGH} <> 0 ELSE false END"
    );
    format!(
        "c.relkind = 'S' AND c.oid IN (WITH RECURSIVE written(oid) AS ({tables} \
           UNION SELECT under.refobjid FROM written w \
             JOIN pg_rewrite rule ON rule.ev_class = w.oid \
             JOIN pg_class view ON view.oid = w.oid AND {is_written_through} \
             JOIN pg_depend under ON under.classid = 'pg_rewrite'::regclass AND under.objid = rule.oid \
               AND under.refclassid = 'pg_class'::regclass AND under.refobjid <> w.oid) \
         SELECT used.refobjid FROM written w JOIN pg_attrdef value ON value.adrelid = w.oid \
           JOIN pg_depend used ON used.classid = 'pg_attrdef'::regclass AND used.objid = value.oid \
             AND used.refclassid = 'pg_class'::regclass \
         UNION SELECT owned.objid FROM written w JOIN pg_depend owned ON owned.classid = 'pg_class'::regclass \
           AND owned.refclassid = 'pg_class'::regclass AND owned.refobjid = w.oid AND owned.deptype = 'a')"
    )
}
