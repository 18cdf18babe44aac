//! The databases in which a role owns something or has a privilege (`pg_shdepend`). Shared objects (databases,
//! tablespaces) belong to no database, and count for the connected one.

use super::row::Rows;
use super::session::Session;
use super::sql_error::SqlError;

/// The kinds of dependency that count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Held {
    /// Ownership and privileges both count.
    Any,
    /// Only ownership counts, not privileges.
    Owned,
}

/// Name and oid of the databases in which a role has such dependencies, by name. `role` is an SQL expression for the
/// role's oid.
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
