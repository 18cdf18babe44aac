//! The database as ledger: the roles whose comments say that they are of leases. Only listed
//! here; the dispatcher decides, and ends them by the ordinary revocation. What accounts left to
//! grant roles is taken away at once.

use mayfly_protocol::task::{Failure, FailureCode, Ledger, LedgerRole, Sweep};
use tracing::warn;

use super::left_behind;
use super::limits::server_name;
use super::row::Row;
use super::servers::Servers;
use super::sql::{COMMENT_PREFIX, NOT_UTF8, literal, moment, parse_lease_comment};

/// Lists them, by name.
///
/// # Errors
/// As any statement.
pub(crate) async fn sweep(servers: &Servers, task: &Sweep) -> Result<Ledger, Failure> {
    let doing = "listing the roles of leases";
    let home = servers.home_or_postgres(&task.target).await?;
    // Accounts may stand there that other engines made.
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
        now = moment("clock_timestamp()"),
        until = moment("r.rolvaliduntil"),
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
    let parsed = rows
        .split_first()
        .and_then(|(first, rows)| Some((first.timestamp(0)?, rows)));
    let (now, rows) = parsed.ok_or_else(|| Failure::new(FailureCode::StatementFailed, doing))?;
    let limit = usize::try_from(task.limit).unwrap_or(usize::MAX);
    let unnamed = rows.iter().filter(|row| row.get(0) == Some(NOT_UTF8));
    let unnamed = unnamed.count();
    if unnamed > 0 {
        warn!(
            server = server_name(&task.target),
            unnamed,
            "roles with the comment of a lease have names that are not UTF-8; they are passed over"
        );
    }
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
    Ok(Ledger {
        server: facts.identity.clone(),
        now,
        roles: rows.iter().take(limit).filter_map(role).collect(),
        more: rows.len() > limit,
    })
}
