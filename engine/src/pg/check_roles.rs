//! Checks what the admin may do with roles: make and drop them, end their sessions, and use Mayfly's own roles.

use mayfly_protocol::grant::OwnedObjects;
use mayfly_protocol::names::random_text;
use mayfly_protocol::task::{Check, Failure, Finding, Topic};

use super::join::membership_options;
use super::new_owner::{self, Unfit, quarantine_name};
use super::own_role::{self, Existing};
use super::row::Row;
use super::session::Session;
use super::sql::{ident, literal, quarantine_comment};
use super::sql_error::SqlError;

/// Makes and drops a role in a transaction that is rolled back.
pub(super) async fn roles(home: &Session<'_>, admin: &str) -> Result<Vec<Finding>, Failure> {
    let facts = home.facts();
    let probe = ident(&format!("mayfly_check_{}", random_text(12)));
    let mut text = home.begin();
    text.push_str(&format!(
        "CREATE ROLE {probe} LOGIN VALID UNTIL '2000-01-01'; COMMENT ON ROLE {probe} IS 'mayfly: a check'; "
    ));
    if !facts.superuser {
        // The options are those that ending an account uses.
        let options = membership_options(facts.version);
        text.push_str(&format!("GRANT {probe} TO CURRENT_USER{options}; "));
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
    let made = Finding::good(
        Topic::CreateRoles,
        format!("{admin} may make and drop roles"),
    );
    let sessions = sessions_finding(&probed, facts.version, facts.superuser, admin);
    Ok(vec![made, sessions])
}

/// Whether the admin may end the sessions of accounts. The row shows whether it has the rights of a role that it
/// makes, and those of `pg_signal_backend`.
fn sessions_finding(probed: &Row, version: u32, superuser: bool, admin: &str) -> Finding {
    let topic = Topic::EndSessions;
    let (member, signal) = (probed.flag(0), probed.flag(1));
    match (superuser, member, signal, version) {
        (true, ..) => Finding::good(topic, "as a superuser"),
        (_, true, ..) => Finding::good(
            topic,
            format!("{admin} has the rights of the roles it makes"),
        ),
        (_, _, _, ..16) => {
            let words = format!(
                "{admin} is NOINHERIT: it cannot end the sessions of accounts or give their objects away"
            );
            let fix = format!("ALTER ROLE {} INHERIT;", ident(admin));
            Finding::bad(topic, words).with_fix([fix])
        }
        (_, _, true, _) => Finding::good(topic, "by pg_signal_backend"),
        (_, _, false, _) => {
            let words = format!("{admin} may not end the sessions of accounts");
            let fix = format!("GRANT pg_signal_backend TO {};", ident(admin));
            Finding::bad(topic, words).with_fix([fix])
        }
    }
}

fn no_roles(error: SqlError, admin: &str) -> Finding {
    let lacking = error.code() == "42501";
    let failure = error.into_failure("making and dropping a trial role");
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

/// Checks one of Mayfly's own roles: whether it exists, and what is wrong with it.
///
/// # Errors
/// A statement failed: see `SqlError::into_failure`.
pub(super) async fn own_role(
    home: &Session<'_>,
    topic: Topic,
    admin: &str,
    name: &str,
    comment: &str,
) -> Result<(bool, Option<Finding>), Failure> {
    let found = own_role::find(home, name, comment, "looking for a role").await?;
    let exists = found.is_some();
    let is_wrong = found.and_then(|role| Wrong::of(&role, home.facts().version));
    let finding = is_wrong.map(|wrong| match wrong {
        Wrong::Foreign => Finding::bad(topic, own_role::foreign(name, comment)),
        Wrong::NoAdminOption => {
            let message = format!("role {name} was made by another role; {admin} may not use it");
            let fix = format!(
                "GRANT {} TO {} WITH ADMIN OPTION;",
                ident(name),
                ident(admin)
            );
            Finding::bad(topic, message).with_fix([fix])
        }
    });
    Ok((exists, finding))
}

/// What is wrong with an existing role of Mayfly's own.
#[derive(Debug, PartialEq, Eq)]
enum Wrong {
    /// It belongs to another installation or user.
    Foreign,
    /// The admin has no ADMIN OPTION on it.
    NoAdminOption,
}

impl Wrong {
    fn of(role: &Existing, version: u32) -> Option<Self> {
        match (role.is_ours, role.can_admin) {
            (false, _) => Some(Self::Foreign),
            // Up to 15 CREATEROLE is enough for this.
            (true, false) if version >= 16 => Some(Self::NoAdminOption),
            (true, _) => None,
        }
    }
}

/// What is wrong with the quarantine role, if it exists.
///
/// # Errors
/// A statement failed: see `SqlError::into_failure`.
pub(super) async fn quarantine(
    home: &Session<'_>,
    task: &Check,
) -> Result<Option<Finding>, Failure> {
    let admin = &task.target.username;
    let name = quarantine_name(&task.installation, admin);
    let comment = quarantine_comment(&task.installation);
    let (_, wrong) = own_role(home, Topic::QuarantineRole, admin, &name, &comment).await?;
    Ok(wrong)
}

/// Checks whether the role that `ownedObjects` names can get the objects of accounts.
///
/// # Errors
/// A statement failed: see `SqlError::into_failure`.
pub(super) async fn new_owner(
    home: &Session<'_>,
    admin: &str,
    owned: &OwnedObjects,
) -> Result<Option<Finding>, Failure> {
    let OwnedObjects::ReassignTo(name) = owned else {
        return Ok(None);
    };
    let unfit = new_owner::unfit(home, name).await?;
    Ok(Some(new_owner_finding(unfit, name, admin)))
}

fn new_owner_finding(unfit: Option<Unfit>, name: &str, admin: &str) -> Finding {
    let topic = Topic::NewOwner;
    let member = format!("GRANT {} TO {};", ident(name), ident(admin));
    match unfit {
        Some(Unfit::Absent) => Finding::bad(
            topic,
            format!("role {name} does not exist; objects of accounts would go to the quarantine role"),
        )
        .with_fix([format!("CREATE ROLE {} NOLOGIN;", ident(name)), member]),
        Some(Unfit::Privileged) => Finding::bad(
            topic,
            format!("role {name} is privileged; objects of accounts would go to the quarantine role"),
        ),
        Some(Unfit::NotMember) => Finding::bad(
            topic,
            format!("{admin} is not a member of {name}; objects of accounts would go to the quarantine role"),
        )
        .with_fix([member]),
        None => Finding::good(topic, format!("{name} gets the objects of accounts")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_end_sessions() {
        let (yes, no) = (Some("t"), Some("f"));
        for (member, signal, version, superuser, ok, fixes) in [
            (no, no, 15, true, true, 0),
            (yes, no, 15, false, true, 0),
            (no, yes, 15, false, false, 1),
            (no, no, 15, false, false, 1),
            (yes, no, 16, false, true, 0),
            (no, yes, 16, false, true, 0),
            (no, no, 16, false, false, 1),
        ] {
            let row = Row::from([member, signal]);
            let found = sessions_finding(&row, version, superuser, "me");
            assert_eq!((found.ok, found.fix.len()), (ok, fixes), "{found:?}");
        }
    }

    #[test]
    fn from_16_on_a_role_of_ours_takes_admin_option() {
        let role = |is_ours, can_admin| Existing { is_ours, can_admin };
        for (role, version, wrong) in [
            (role(true, true), 18, None),
            (role(true, false), 15, None),
            (role(true, false), 16, Some(Wrong::NoAdminOption)),
            (role(false, true), 15, Some(Wrong::Foreign)),
            (role(false, false), 18, Some(Wrong::Foreign)),
        ] {
            assert_eq!(Wrong::of(&role, version), wrong, "{role:?} {version}");
        }
    }

    #[test]
    fn only_a_fit_role_is_the_new_owner() {
        for (unfit, ok, fixes) in [
            (None, true, 0),
            (Some(Unfit::Absent), false, 2),
            (Some(Unfit::Privileged), false, 0),
            (Some(Unfit::NotMember), false, 1),
        ] {
            let found = new_owner_finding(unfit, "keeper", "me");
            assert_eq!((found.ok, found.fix.len()), (ok, fixes), "{found:?}");
        }
    }
}
