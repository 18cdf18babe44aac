//! Looking at a server before anything is asked of it: what its admin can do, what it lacks (as
//! statements that give it), and whether the server asks for passwords at all. What is tried is
//! rolled back.

use mayfly_protocol::grant::OwnedObjects;
use mayfly_protocol::names::{RoleName, random_text};
use mayfly_protocol::secret::Secret;
use mayfly_protocol::target::Target;
use mayfly_protocol::task::{Accounts, Check, CheckWhat, Failure, Finding, Topic};

use super::account;
use super::check_limits::{connections, may_create};
use super::check_live::live_accounts;
use super::check_way;
use super::cleanup::quarantine_name;
use super::connect::{Welcome, knock};
use super::grant_coverage::{self, Coverage};
use super::grant_role::GrantSet;
use super::limits::server_name;
use super::new_owner::{self, Unfit};
use super::protection;
use super::servers::Servers;
use super::session::Session;
use super::sql::{grant_comment, ident, literal, quarantine_comment};
use super::sql_error::SqlError;

/// Clocks that differ by more mislead whoever compares dates.
const CLOCK_LIMIT_SECONDS: f64 = 30.0;
/// SQLSTATE of a wrong password.
const INVALID_PASSWORD: &str = "28P01";

/// Looks.
///
/// # Errors
/// None of what is looked at: that is a finding. Only a database that goes away meanwhile.
pub(crate) async fn check(servers: &Servers, task: &Check) -> Result<Vec<Finding>, Failure> {
    match &task.what {
        CheckWhat::Admin { accounts } => admin(servers, task, accounts.as_ref()).await,
        CheckWhat::WrongPassword { role, database } => {
            // An account has no certificate of the admin's.
            let target = Target {
                username: role.to_string(),
                sslcert: None,
                sslkey: None,
                ..wrong_password(&task.target)
            };
            let welcome = knock(servers.hosts(), &target, database).await;
            Ok(vec![login_finding(
                Topic::AccountPassword,
                role.as_str(),
                welcome,
            )])
        }
        // Of what is made for accounts only: `create::prepare`.
        CheckWhat::Ready { .. } => Ok(Vec::new()),
    }
}

/// The same admin with a password that is certainly not its own.
pub(super) fn wrong_password(target: &Target) -> Target {
    Target {
        password: Secret::new(random_text(32)),
        ..target.clone()
    }
}

/// What the answer to a wrong password says of the server.
fn login_finding(topic: Topic, who: &str, welcome: Welcome) -> Finding {
    match welcome {
        Welcome::In => Finding::bad(
            topic,
            format!(
                "{who} was let in with a wrong password: a line of pg_hba.conf (`trust`, or another method without a password) lets in whoever reaches the server, as any account, whatever its VALID UNTIL. Make it scram-sha-256 and reload"
            ),
        ),
        Welcome::Refused { state, .. } if state == INVALID_PASSWORD => {
            Finding::good(topic, format!("{who} is refused with a wrong password"))
        }
        Welcome::Refused { state, words } => Finding::bad(
            topic,
            format!(
                "a login of {who} does not come to a password: pg_hba.conf sends it another way, so accounts cannot log in from here: {words} (SQLSTATE {state})"
            ),
        ),
        Welcome::Silence(failure) => Finding::bad(topic, failure.message),
    }
}

async fn admin(
    servers: &Servers,
    task: &Check,
    accounts: Option<&Accounts>,
) -> Result<Vec<Finding>, Failure> {
    let target = &task.target;
    let name = &target.username;
    let home = match servers.fresh_session(target, &target.database).await {
        Ok(home) => home,
        Err(failure) => return Ok(vec![Finding::bad(Topic::Connect, failure.message)]),
    };
    let facts = home.facts();
    let mut findings = vec![Finding::good(
        Topic::Connect,
        format!(
            "PostgreSQL {} at {}, as {name}{}",
            facts.version,
            server_name(target),
            if facts.superuser {
                ", a superuser; CREATEROLE would be enough"
            } else {
                ""
            }
        ),
    )];
    findings.push(login_finding(
        Topic::AdminPassword,
        name,
        knock(servers.hosts(), &wrong_password(target), &target.database).await,
    ));
    findings.push(protection::login(target, facts.login));
    findings.push(protection::tls(&home, target).await?);
    findings.push(Finding::new(
        Topic::Clock,
        facts.clock_skew.abs() <= CLOCK_LIMIT_SECONDS,
        format!(
            "the engine's clock less the server's: {:.1} s; accounts end by the server's",
            facts.clock_skew
        ),
    ));
    findings.extend(roles(&home, name).await?);
    findings.extend(live_accounts(&home, &task.installation, name).await?);
    findings.extend(quarantine(&home, task).await?);
    let asked = accounts.and_then(|accounts| accounts.connections);
    findings.push(connections(&home, name, asked).await?);
    findings.extend(check_way::limit(&home, name).await?);
    findings.extend(check_way::pooler(servers, &home, target).await?);
    if let Some(accounts) = accounts {
        findings.extend(grants(servers, &home, task, accounts).await?);
        findings.extend(new_owner_finding(&home, name, &accounts.owned_objects).await?);
        findings.extend(account::look(&home, target, accounts).await?);
    }
    home.release();
    Ok(findings)
}

/// Makes a role and takes it back, all in one transaction.
async fn roles(home: &Session<'_>, admin: &str) -> Result<Vec<Finding>, Failure> {
    let facts = home.facts();
    let probe = ident(&format!("mayfly_check_{}", random_text(12)));
    let mut text = home.begin();
    if facts.version >= 16 && !facts.superuser {
        text.push_str("SET LOCAL createrole_self_grant = 'inherit'; ");
    }
    text.push_str(&format!(
        "CREATE ROLE {probe} LOGIN VALID UNTIL '2000-01-01'; COMMENT ON ROLE {probe} IS 'mayfly: a check'; "
    ));
    if facts.version < 16 && !facts.superuser {
        text.push_str(&format!("GRANT {probe} TO CURRENT_USER; "));
    }
    text.push_str(&format!(
        "SELECT pg_has_role(oid, 'USAGE'), pg_has_role('pg_signal_backend', 'USAGE') FROM pg_roles WHERE rolname = {}; \
         ALTER ROLE {probe} NOLOGIN; DROP ROLE {probe}",
        literal(probe.trim_matches('"'))
    ));
    let tried = home.query(&text).await;
    home.rollback().await;
    let rows = match tried {
        Ok(rows) => rows,
        Err(error) => return Ok(vec![no_roles(error, admin)]),
    };
    let probed = rows.into_iter().next().unwrap_or_default();
    let (member, signal) = (probed.flag(0), probed.flag(1));
    let made = Finding::good(Topic::CreateRoles, format!("{admin} makes and drops roles"));
    let sessions = match (facts.superuser, member, signal, facts.version) {
        (true, ..) => Finding::good(Topic::EndSessions, "as a superuser"),
        (_, true, ..) => Finding::good(
            Topic::EndSessions,
            format!("{admin} has the rights of the roles it makes"),
        ),
        (_, _, _, ..16) => Finding::bad(Topic::EndSessions, format!(
                "{admin} is NOINHERIT: it can neither end the sessions of accounts nor give their objects away"
            )).with_fix([format!("ALTER ROLE {} INHERIT;", ident(admin))]),
        (_, _, true, _) => Finding::good(Topic::EndSessions, "by pg_signal_backend"),
        (_, _, false, _) => Finding::bad(Topic::EndSessions, format!("{admin} may not end the sessions of accounts")).with_fix([format!("GRANT pg_signal_backend TO {};", ident(admin))]),
    };
    Ok(vec![made, sessions])
}

fn no_roles(error: SqlError, admin: &str) -> Finding {
    let lacking = error.code() == "42501";
    let failure = error.into_failure("making and dropping a role for trial");
    if lacking {
        Finding::bad(
            Topic::CreateRoles,
            format!("{admin} may not make roles: {}", failure.message),
        )
        .with_fix([format!("ALTER ROLE {} CREATEROLE;", ident(admin))])
    } else {
        Finding::bad(Topic::CreateRoles, failure.message)
    }
}

/// A role of ours that is there already: whether it is ours, and the admin may use it.
async fn standing(
    home: &Session<'_>,
    topic: Topic,
    admin: &str,
    name: &str,
    comment: &str,
) -> Result<(bool, Option<Finding>), Failure> {
    let query = format!(
        "SELECT coalesce(shobj_description(oid, 'pg_authid'), ''), pg_has_role(oid, 'MEMBER WITH ADMIN OPTION') \
         FROM pg_roles WHERE rolname = {}",
        literal(name)
    );
    let found = home.first_row("looking for a role", &query).await?;
    if found.is_empty() {
        return Ok((false, None));
    }
    if found.text(0) != comment {
        let message = format!(
            "role {name} exists and is not this Mayfly's; its comment should be {comment:?}"
        );
        return Ok((true, Some(Finding::bad(topic, message))));
    }
    // Up to 15 CREATEROLE is enough.
    if home.facts().version >= 16 && !found.flag(1) {
        let fix = format!(
            "GRANT {} TO {} WITH ADMIN OPTION;",
            ident(name),
            ident(admin)
        );
        let message = format!("role {name} was made by another role; {admin} may not use it");
        return Ok((true, Some(Finding::bad(topic, message).with_fix([fix]))));
    }
    Ok((true, None))
}

async fn quarantine(home: &Session<'_>, task: &Check) -> Result<Option<Finding>, Failure> {
    let admin = &task.target.username;
    let name = quarantine_name(&task.installation, admin);
    let comment = quarantine_comment(&task.installation);
    let (_, trouble) = standing(home, Topic::QuarantineRole, admin, &name, &comment).await?;
    Ok(trouble)
}

async fn grants(
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
    let (exists, trouble) =
        standing(home, Topic::GrantRole, admin, role.as_str(), &comment).await?;
    let mut findings: Vec<Finding> = trouble.into_iter().collect();
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
    // The first is CONNECT, which alone is nothing.
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

/// What becomes of one grant. Where something is given by the others of its list, it may come to
/// nothing.
fn granted(text: &str, admin: &str, found: Coverage, is_something: bool) -> Finding {
    let given = found.total - found.lacking;
    let (mut ok, mut message) = match (found.pattern, found.total, found.lacking) {
        (true, 0, _) => (is_something, format!("{text}: nothing for now")),
        (_, _, 0) if found.names.is_empty() => (true, format!("{text}: granted in full")),
        (_, _, 0) => (
            true,
            format!(
                "{text}: granted in full, but not beside it: {}",
                found.names
            ),
        ),
        (true, total, lacking) => (
            given > 0,
            format!(
                "{text}: {given} of {total} granted, {lacking} passed over since {admin} may not grant them: {}",
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
            "; another transaction holds {} of it now, granted when that has ended: {}",
            found.locked, found.locked_names
        ));
    }
    Finding::new(Topic::Grant, ok, message).with_fix(found.fix)
}

/// Whether who is named to get what accounts own can.
async fn new_owner_finding(
    home: &Session<'_>,
    admin: &str,
    owned: &OwnedObjects,
) -> Result<Option<Finding>, Failure> {
    let OwnedObjects::ReassignTo(name) = owned else {
        return Ok(None);
    };
    let found = match new_owner::unfit(home, name).await? {
        Some(Unfit::Absent) => Finding::bad(
            Topic::NewOwner,
            format!("role {name} does not exist; what accounts own would go to quarantine"),
        )
        .with_fix([
            format!("CREATE ROLE {} NOLOGIN;", ident(name)),
            format!("GRANT {} TO {};", ident(name), ident(admin)),
        ]),
        Some(Unfit::Privileged) => Finding::bad(
            Topic::NewOwner,
            format!("role {name} is privileged; what accounts own would go to quarantine"),
        ),
        Some(Unfit::NotMember) => Finding::bad(
            Topic::NewOwner,
            format!("{admin} is not a member of {name}; what accounts own would go to quarantine"),
        )
        .with_fix([format!("GRANT {} TO {};", ident(name), ident(admin))]),
        None => Finding::good(Topic::NewOwner, format!("{name} gets what accounts own")),
    };
    Ok(Some(found))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mayfly_protocol::task::FailureCode;

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

    #[test]
    fn only_a_refused_password_refuses_a_login() {
        let refused = |state: &str| Welcome::Refused {
            state: state.to_owned(),
            words: "no".to_owned(),
        };
        assert!(login_finding(Topic::AdminPassword, "r", refused("28P01")).ok);
        assert!(!login_finding(Topic::AdminPassword, "r", refused("28000")).ok);
        let open = login_finding(Topic::AdminPassword, "r", Welcome::In);
        assert!(!open.ok && open.message.contains("pg_hba.conf"));
        let gone = Failure::new(FailureCode::DatabaseUnreachable, "gone");
        assert!(!login_finding(Topic::AdminPassword, "r", Welcome::Silence(gone)).ok);
    }
}
