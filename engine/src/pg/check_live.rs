//! Checks whether the admin may end the accounts that exist. From PostgreSQL 16 on only a role that made another, or
//! has ADMIN OPTION on it, may alter or drop it. A new admin in the base secret may lack this right.

use mayfly_protocol::names::InstallationId;
use mayfly_protocol::task::{Failure, Finding, Topic};

use super::session::Session;
use super::sql::{COMMENT_PREFIX, ident, literal};

/// Maximum number of statements in a fix. Further roles are only counted.
const MOST_FIXES: usize = 50;

/// Checks the accounts of this installation.
///
/// # Errors
/// A statement failed: see `SqlError::into_failure`.
pub(super) async fn live_accounts(
    home: &Session<'_>,
    installation: &InstallationId,
    admin: &str,
) -> Result<Option<Finding>, Failure> {
    let facts = home.facts();
    if facts.version < 16 || facts.superuser {
        return Ok(None);
    }
    let doing = "looking at the existing accounts";
    let query = format!(
        "SELECT r.rolname, pg_has_role(r.oid, 'MEMBER WITH ADMIN OPTION') \
         FROM pg_roles r JOIN pg_shdescription d ON d.objoid = r.oid AND d.classoid = 'pg_authid'::regclass \
         WHERE starts_with(d.description, {}) ORDER BY 2, 1",
        literal(&format!("{COMMENT_PREFIX}lease:{installation}:")),
    );
    let rows = home
        .transact(&query)
        .await
        .map_err(|error| error.into_failure(doing))?;
    let lacking: Vec<String> = rows
        .iter()
        .filter(|row| !row.flag(1))
        .filter_map(|row| row.get(0).map(str::to_owned))
        .collect();
    Ok(Some(if lacking.is_empty() {
        let words = format!("{admin} may end the {} existing accounts", rows.len());
        Finding::good(Topic::LiveAccounts, words)
    } else {
        let more = match lacking.len().saturating_sub(MOST_FIXES) {
            0 => String::new(),
            more => format!("; {more} more are not listed: check again after these"),
        };
        let fix: Vec<String> = lacking
            .iter()
            .take(MOST_FIXES)
            .map(|role| {
                format!(
                    "GRANT {} TO {} WITH ADMIN OPTION;",
                    ident(role),
                    ident(admin)
                )
            })
            .collect();
        Finding::bad(Topic::LiveAccounts, format!(
                "{admin} may not end {} of the {} existing accounts: another role made them, and on PostgreSQL 16 and later only that role has ADMIN OPTION on them{more}",
                lacking.len(),
                rows.len()
            )).with_fix(fix)
    }))
}
