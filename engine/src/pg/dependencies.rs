//! In which databases a role holds something (`pg_shdepend`). Shared objects (databases, tablespaces)
//! have no database of their own, and count for the one that is connected to.

use super::row::Rows;
use super::session::Session;
use super::sql_error::SqlError;

/// Which dependencies count here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Held {
    /// Ownership and privileges both.
    Any,
    /// Ownership alone, without privileges.
    Owned,
}

/// Databases in which a role holds something: name and oid, by name. `role` is an SQL expression for
/// the role's oid.
///
/// # Errors
/// A statement failed: see `SqlError::into_failure`.
pub(super) async fn databases(
    home: &Session<'_>,
    role: &str,
    held: Held,
) -> Result<Rows, SqlError> {
    let owned = match held {
        Held::Any => "",
        Held::Owned => " AND s.deptype = 'o'",
    };
    let query = format!(
        "SELECT DISTINCT d.datname, d.oid FROM pg_shdepend s \
         JOIN pg_database d ON d.oid = s.dbid OR (s.dbid = 0 AND d.datname = current_database()) \
         WHERE s.refclassid = 'pg_authid'::regclass AND s.refobjid = {role}{owned} ORDER BY 1"
    );
    home.transact_retrying(&query).await
}
