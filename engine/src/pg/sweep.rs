//! Lists the roles whose comments name leases: the database as ledger. The dispatcher decides about them, and ends
//! them by the usual revocation. Objects that accounts left to grant roles are moved to the quarantine role at once.

use mayfly_protocol::task::{Failure, FailureCode, Ledger, LedgerRole, Sweep};
use tracing::warn;

use super::left_behind;
use super::limits::server_name;
use super::row::Row;
use super::servers::Servers;
use super::sql::{COMMENT_PREFIX, NOT_UTF8, literal, parse_lease_comment, timestamp_text};

/// Lists these roles by name.
///
/// # Errors
/// A statement failed: see `SqlError::into_failure`.
pub(crate) async fn sweep(servers: &Servers, task: &Sweep) -> Result<Ledger, Failure> {
    let doing = "listing the roles of leases";
    let home = servers.home_or_postgres(&task.target).await?;
    // Other engines may have made accounts on this server.
    servers.want_one(&task.target);
    let mut conditions = vec![format!(
        "starts_with(d.description, {})",
        literal(&format!("{COMMENT_PREFIX}lease:"))
    )];
    if let Some(seconds) = task.expired_for_seconds {
        conditions.push(format!(
            "r.rolvaliduntil < clock_timestamp() - interval '{seconds} seconds'"
        ));
    }
    if let Some(after) = &task.after {
        conditions.push(format!("r.rolname > {}", literal(after)));
    }
    let text = format!(
        "SELECT {now}; \
         SELECT r.rolname, d.description, {until}, \
           EXISTS (SELECT 1 FROM pg_shdepend s WHERE s.refclassid = 'pg_authid'::regclass \
                   AND s.refobjid = r.oid AND s.deptype = 'o') \
         FROM pg_roles r JOIN pg_shdescription d ON d.objoid = r.oid AND d.classoid = 'pg_authid'::regclass \
         WHERE {conditions} ORDER BY r.rolname LIMIT {limit}",
        now = timestamp_text("clock_timestamp()"),
        until = timestamp_text("r.rolvaliduntil"),
        conditions = conditions.join(" AND "),
        limit = u64::from(task.limit) + 1,
    );
    let rows = home
        .transact(&text)
        .await
        .map_err(|error| error.into_failure(doing))?;
    let facts = home.facts();
    if let Some(installation) = &task.installation
        && task.after.is_none()
    {
        left_behind::take_away(servers, &home, &task.target, installation).await;
    }
    home.release();
    let limit = usize::try_from(task.limit).unwrap_or(usize::MAX);
    let (ledger, unnamed) = ledger(&rows, limit, &facts.identity)
        .ok_or_else(|| Failure::new(FailureCode::StatementFailed, doing))?;
    if unnamed > 0 {
        warn!(
            server = server_name(&task.target),
            unnamed,
            "roles with the comment of a lease have names that are not UTF-8; they are skipped"
        );
    }
    Ok(ledger)
}

/// Parses the answer. Returns the ledger, and the number of roles whose name is not UTF-8. The first row has the
/// server's clock. Each other row has a role's name, comment and end, and whether it owns something. `None`: there
/// is no clock.
fn ledger(rows: &[Row], limit: usize, server: &str) -> Option<(Ledger, usize)> {
    let (first, rows) = rows.split_first()?;
    let role = |row: &Row| {
        let (installation, lease) = parse_lease_comment(row.get(1)?)?;
        Some(LedgerRole {
            role: row.parse(0)?,
            installation,
            lease,
            expiration: row.timestamp(2),
            owns: row.flag(3),
        })
    };
    let ledger = Ledger {
        server: server.to_owned(),
        now: first.timestamp(0)?,
        roles: rows.iter().take(limit).filter_map(role).collect(),
        more: rows.len() > limit,
    };
    let unnamed = rows.iter().filter(|row| row.get(0) == Some(NOT_UTF8));
    Some((ledger, unnamed.count()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::pg::sql::lease_comment;
    use mayfly_protocol::names::{InstallationId, LeaseId};

    #[test]
    fn a_ledger_lists_the_roles_of_leases_up_to_a_limit() {
        let (installation, lease) = (InstallationId::random(), LeaseId::random());
        let comment = lease_comment(&installation, &lease);
        let at = "2026-11-26T10:00:00.5Z";
        let clock = Row::from([Some(at)]);
        let role = |name| Row::from([Some(name), Some(comment.as_str()), Some(at), Some("t")]);
        let foreign = Row::from([Some("c"), Some("mayfly:lease:x"), None, Some("f")]);
        let rows = [clock.clone(), role("a"), role(NOT_UTF8), foreign, role("d")];
        let (found, unnamed) = ledger(&rows, 3, "s").unwrap();
        assert_eq!((found.roles.len(), found.more, unnamed), (1, true, 1));
        let one = &found.roles[0];
        assert_eq!((one.role.as_str(), one.lease, one.owns), ("a", lease, true));
        assert!(one.expiration.is_some());
        let (found, _) = ledger(&rows, 4, "s").unwrap();
        assert_eq!((found.roles.len(), found.more), (2, false));
        assert!(ledger(&[], 3, "s").is_none());
        assert!(ledger(&[Row::from([None])], 3, "s").is_none());
        assert!(ledger(&[clock], 3, "s").unwrap().0.roles.is_empty());
    }
}
