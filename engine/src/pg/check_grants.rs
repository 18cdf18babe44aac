//! Checks the grants of a dynamic secret: which of their privileges the admin may grant.

use mayfly_protocol::names::RoleName;
use mayfly_protocol::task::{Accounts, Check, Failure, Finding, Topic};

use super::check_limits::may_create;
use super::check_roles::own_role;
use super::grant_coverage::{self, Coverage};
use super::grant_set::GrantSet;
use super::servers::Servers;
use super::session::Session;
use super::sql::grant_comment;

/// Checks the grant role, the database and each grant.
///
/// # Errors
/// A statement in the home database failed.
pub(super) async fn grants(
    servers: &Servers,
    home: &Session<'_>,
    task: &Check,
    accounts: &Accounts,
) -> Result<Vec<Finding>, Failure> {
    let admin = &task.target.username;
    let set = GrantSet {
        installation: &task.installation,
        target: &task.target,
        database: &accounts.database,
        grants: &accounts.grants,
    };
    let role: RoleName = set.role()?;
    let comment = grant_comment(&task.installation, &role);
    let (exists, wrong) = own_role(home, Topic::GrantRole, admin, role.as_str(), &comment).await?;
    let mut findings: Vec<Finding> = wrong.into_iter().collect();
    let db = match servers
        .session_beside(&task.target, &accounts.database)
        .await
    {
        Ok(db) => db,
        Err(failure) => {
            findings.push(Finding::bad(Topic::Database, failure.message));
            return Ok(findings);
        }
    };
    let query = "SELECT has_database_privilege(current_database(), 'CREATE')";
    let creates = db
        .first_row("looking at the database", query)
        .await?
        .flag(0);
    findings.push(Finding::good(
        Topic::Database,
        format!(
            "{admin} connects to {:?} and may {}create schemas there",
            accounts.database,
            if creates { "" } else { "not " }
        ),
    ));
    let role = exists.then_some(&role);
    findings.extend(may_create(&db, role, &accounts.grants).await?);
    let examined = grant_coverage::examine(&db, admin, role, &accounts.grants).await;
    // The first privilege is CONNECT, which gives no access to objects.
    let is_something = examined.iter().skip(1).any(
        |(_, examined)| matches!(examined, Ok(found) if found.total > found.lacking + found.locked),
    );
    for (text, examined) in examined {
        findings.push(match examined {
            Ok(coverage) => granted(&text, admin, coverage, is_something),
            Err(failure) => Finding::bad(
                Topic::Grant,
                format!("{text}: {} ({})", failure.message, failure.code.as_str()),
            ),
        });
    }
    db.release();
    Ok(findings)
}

/// The finding about one grant. A grant without privileges is allowed if another grant of its list gives some
/// (`is_something`).
fn granted(text: &str, admin: &str, found: Coverage, is_something: bool) -> Finding {
    let given = found.total - found.lacking;
    let (mut ok, mut message) = match (found.pattern, found.total, found.lacking) {
        (true, 0, _) => (is_something, format!("{text}: matches nothing at present")),
        (_, _, 0) if found.names.is_empty() => (true, format!("{text}: granted in full")),
        (_, _, 0) => (
            true,
            format!(
                "{text}: granted in full; not granted in addition: {}",
                found.names
            ),
        ),
        (true, total, lacking) => (
            given > 0,
            format!(
                "{text}: {given} of {total} granted, {lacking} skipped because {admin} may not grant them: {}",
                found.names
            ),
        ),
        (false, ..) => (
            false,
            format!("{text}: {admin} may not grant this: {}", found.names),
        ),
    };
    if let Some(why) = &found.nothing {
        message.push_str(&format!("; {why}"));
    }
    if found.locked > 0 {
        ok &= is_something;
        message.push_str(&format!(
            "; another transaction holds {} of them; they are granted when it has ended: {}",
            found.locked, found.locked_names
        ));
    }
    Finding::new(Topic::Grant, ok, message).with_fix(found.fix)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn coverage(pattern: bool, total: usize, lacking: usize) -> Coverage {
        Coverage {
            pattern,
            total,
            lacking,
            names: "SELECT on a.b".repeat(lacking.min(1)),
            fix: vec!["GRANT …;".to_owned(); lacking.min(1)],
            ..Coverage::default()
        }
    }

    #[test]
    fn a_pattern_may_pass_over_some_and_a_name_nothing() {
        for (pattern, total, lacking, others, ok) in [
            (true, 5, 0, false, true),
            (true, 5, 4, false, true),
            (true, 5, 5, true, false),
            (true, 0, 0, false, false),
            (true, 0, 0, true, true),
            (false, 1, 0, false, true),
            (false, 2, 1, true, false),
        ] {
            let coverage = coverage(pattern, total, lacking);
            let found = granted("SELECT on a", "me", coverage, others);
            assert_eq!(found.ok, ok, "{found:?}");
            assert_eq!(found.fix.len(), lacking.min(1), "{found:?}");
        }
    }
}
