//! Options of an account besides its grants: settings of its sessions, attributes of its role, and memberships with
//! which it may become another role. The transaction that makes the role sets all of them, so no account exists
//! without them.

use std::collections::BTreeSet;

use mayfly_protocol::account::{Account, Attribute, Settings};
use mayfly_protocol::grant::Grant;
use mayfly_protocol::names::random_text;
use mayfly_protocol::target::Target;
use mayfly_protocol::task::{Accounts, Failure, FailureCode, Finding, Topic};

use super::clear_password;
use super::row::Row;
use super::session::Session;
use super::sql::{ident, literal, literals};

/// `pg_settings.context` of settings that any session may change (PostgreSQL documentation, "pg_settings"). Accounts
/// get only such settings, which they could also set themselves.
const FREE: &str = "user";
/// The setting `role`. A session may set it, but `pg_settings` does not have it.
const ROLE: &str = "role";

/// Refuses settings that this server does not have, or that a session may not set itself.
///
/// # Errors
/// `statement_failed`, which names the setting.
pub(super) async fn fit(home: &Session<'_>, settings: &Settings) -> Result<(), Failure> {
    let names: Vec<&str> = settings
        .keys()
        .map(String::as_str)
        .filter(|name| *name != ROLE)
        .collect();
    if names.is_empty() {
        return Ok(());
    }
    let query = format!(
        "SELECT pg_catalog.lower(name), context FROM pg_catalog.pg_settings WHERE pg_catalog.lower(name) IN ({})",
        literals(names.iter().copied())
    );
    let rows = home.transact(&query).await;
    let rows = rows.map_err(|error| error.into_failure("looking at the settings"))?;
    match unfit(&names, &rows, home.facts().version) {
        None => Ok(()),
        Some(reason) => Err(Failure::new(FailureCode::StatementFailed, reason)),
    }
}

/// Why the first of these settings that does not fit cannot be set. The rows have the names that the server knows, and
/// who may set them.
fn unfit(names: &[&str], rows: &[Row], version: u32) -> Option<String> {
    names.iter().find_map(|name| {
        let known = rows.iter().find(|row| row.get(0) == Some(*name));
        let reason = match known.map(|row| row.text(1)) {
            Some(FREE) => return None,
            // A setting that the operator defined. PostgreSQL itself checks the right to set it.
            None if name.contains('.') => return None,
            Some(_) => "cannot be set for accounts: a session may not set it".to_owned(),
            None => format!("does not exist in PostgreSQL {version}"),
        };
        Some(format!("the setting {name:?} {reason}"))
    })
}

/// The attributes as words of `CREATE ROLE`, each with a space before it.
pub(super) fn attributes(account: &Account) -> String {
    account
        .attributes
        .iter()
        .map(|attribute| format!(" {}", attribute.as_sql()))
        .collect()
}

/// `ALTER ROLE … SET` statements, one for each setting. `name` is quoted.
pub(super) fn settings(settings: &Settings, name: &str) -> Vec<String> {
    settings
        .iter()
        .map(|(setting, value)| {
            // A dotted name is two identifiers.
            let setting = setting.split('.').map(ident).collect::<Vec<_>>().join(".");
            let value = literals(value.iter().map(String::as_str));
            format!("ALTER ROLE {name} SET {setting} = {value}")
        })
        .collect()
}

/// Statements for the memberships with which an account may become a role. Up to PostgreSQL 15 the membership in its
/// grant role is enough. From 16 on each link of the chain must allow `SET`, and the membership in the grant role
/// does not. They are sorted, because each locks its role.
pub(super) fn memberships(grants: &[Grant], name: &str, version: u32) -> Vec<String> {
    if version < 16 {
        return vec![];
    }
    let roles: BTreeSet<&str> = grants.iter().filter_map(Grant::set_role).collect();
    roles
        .into_iter()
        .map(|role| {
            format!(
                "GRANT {} TO {name} WITH INHERIT TRUE, SET TRUE",
                ident(role)
            )
        })
        .collect()
}

/// Checks whether accounts can be made as the secret defines them.
pub(super) async fn look(
    home: &Session<'_>,
    target: &Target,
    accounts: &Accounts,
) -> Result<Vec<Finding>, Failure> {
    let admin = &target.username;
    let mut findings = Vec::new();
    if !accounts.account.settings.is_empty() {
        findings.push(try_settings(home, admin, &accounts.account.settings).await?);
    }
    for attribute in &accounts.account.attributes {
        findings.push(may_give(home, admin, *attribute).await?);
    }
    if accounts.account.clear_password {
        findings.push(clear_password::look(home, target).await?);
    }
    for role in accounts.grants.iter().filter_map(Grant::set_role) {
        findings.extend(becomes(home, admin, role).await?);
    }
    Ok(findings)
}

/// Applies the settings to a role in a transaction that is rolled back.
async fn try_settings(
    home: &Session<'_>,
    admin: &str,
    wanted: &Settings,
) -> Result<Finding, Failure> {
    let topic = Topic::Settings;
    if let Err(failure) = fit(home, wanted).await {
        return Ok(Finding::bad(topic, failure.message));
    }
    let probe = ident(&format!("mayfly_check_{}", random_text(12)));
    for (name, value) in wanted {
        let one = Settings::from([(name.clone(), value.clone())]);
        let text = format!(
            "{}CREATE ROLE {probe}; {}",
            home.begin(),
            settings(&one, &probe).join("; ")
        );
        let tried = home.query(&text).await;
        home.rollback().await;
        let Err(error) = tried else { continue };
        let lacks = error.code() == "42501";
        let words = error.into_failure(&format!("the setting {name:?}")).message;
        return Ok(match (lacks, home.facts().version) {
            (true, 15..) => Finding::bad(topic, words).with_fix([format!(
                "GRANT SET ON PARAMETER {name} TO {};",
                ident(admin)
            )]),
            _ => Finding::bad(topic, words),
        });
    }
    let names: Vec<&str> = wanted.keys().map(String::as_str).collect();
    Ok(Finding::good(
        topic,
        format!("accounts get {}", names.join(", ")),
    ))
}

/// Whether the admin may give an attribute.
async fn may_give(
    home: &Session<'_>,
    admin: &str,
    attribute: Attribute,
) -> Result<Finding, Failure> {
    let query = format!(
        "SELECT {} FROM pg_catalog.pg_roles WHERE rolname = current_user",
        attribute.column()
    );
    let admins = home
        .first_row("looking at the admin's attributes", &query)
        .await?;
    let facts = home.facts();
    let may = may_be_given(attribute, admins.flag(0), facts.superuser, facts.version);
    Ok(giving(attribute, may, admin, facts.version))
}

/// Whether an admin may give an attribute, which it has itself or not. Up to 15 an admin with CREATEROLE may give
/// CREATEDB, and a superuser may give the others. From 16 on an admin may give the attributes that it has itself.
fn may_be_given(attribute: Attribute, has_it: bool, superuser: bool, version: u32) -> bool {
    superuser
        || match version {
            16.. => has_it,
            _ => attribute == Attribute::CreateDb,
        }
}

fn giving(attribute: Attribute, may: bool, admin: &str, version: u32) -> Finding {
    let (topic, word) = (Topic::Attribute(attribute), attribute.as_sql());
    let means = match attribute {
        Attribute::CreateDb => {
            "accounts may make databases; the databases of an ended account go to the new owner of ownedObjects, also with \"drop\""
        }
        Attribute::Replication => {
            "accounts may copy the whole server and make replication slots. Slots stay and keep WAL: set max_slot_wal_keep_size, and drop unused slots"
        }
        Attribute::BypassRls => "row security does not apply to accounts",
    };
    match (may, version) {
        (true, _) => Finding::good(topic, means),
        (false, 16..) => Finding::bad(
            topic,
            format!("{admin} may give {word} only if it has {word} itself"),
        )
        .with_fix([format!("ALTER ROLE {} {word};", ident(admin))]),
        (false, version) => Finding::bad(
            topic,
            format!("in PostgreSQL {version} only a superuser may give {word}; {admin} is not one"),
        ),
    }
}

/// Checks a role that accounts may become by `SET ROLE`.
async fn becomes(home: &Session<'_>, admin: &str, role: &str) -> Result<Option<Finding>, Failure> {
    let query = format!(
        "SELECT rolsuper, rolcreaterole, pg_catalog.pg_has_role(oid, 'MEMBER WITH ADMIN OPTION') \
         FROM pg_catalog.pg_roles WHERE rolname = {}",
        literal(role)
    );
    let found = home
        .first_row("looking at a role accounts may become", &query)
        .await?;
    Ok(becoming(&found, home.facts().version, admin, role))
}

/// What is found about a role that accounts may become: whether it is a superuser, whether it may make roles, and
/// whether the admin may give it away. What accounts do as a powerful role remains after their end. `None`: there is
/// no such role. The finding about the grant reports this.
fn becoming(found: &Row, version: u32, admin: &str, role: &str) -> Option<Finding> {
    if found.is_empty() {
        return None;
    }
    let powerful = |words: &str| {
        Finding::bad(
            Topic::SetRole,
            format!(
                "{role} {words}, and accounts may become it: what they do as {role} stays after their end, and can reverse their end"
            ),
        )
    };
    Some(match (found.flag(0), found.flag(1), found.flag(2)) {
        (true, _, _) => powerful("is a superuser"),
        (_, true, _) => powerful("may make roles"),
        (_, _, false) if version >= 16 => Finding::bad(
            Topic::SetRole,
            format!("{admin} may not let accounts become {role}"),
        )
        .with_fix([format!(
            "GRANT {} TO {} WITH ADMIN OPTION;",
            ident(role),
            ident(admin)
        )]),
        _ => Finding::good(
            Topic::SetRole,
            format!(
                "accounts may become {role}; objects that they make as {role} belong to it and stay"
            ),
        ),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn values_stay_inside_their_quotes() {
        let wanted = Settings::from([
            (
                "app.tenant".to_owned(),
                vec!["x'; DROP ROLE y; --".to_owned()],
            ),
            (
                "search_path".to_owned(),
                vec!["app".to_owned(), "My \\S".to_owned()],
            ),
        ]);
        assert_eq!(
            settings(&wanted, "\"r\""),
            [
                r#"ALTER ROLE "r" SET "app"."tenant" = 'x''; DROP ROLE y; --'"#,
                r#"ALTER ROLE "r" SET "search_path" = 'app', E'My \\S'"#,
            ]
        );
    }

    #[test]
    fn a_role_is_become_by_a_membership_of_its_own_from_16_on() {
        let grant = |on: &str| Grant::parse("MEMBER", on).unwrap();
        let grants = [
            grant("role:b").with_set_role().unwrap(),
            grant("role:c"),
            grant("role:a").with_set_role().unwrap(),
            grant("role:a").with_set_role().unwrap(),
        ];
        assert!(memberships(&grants, "\"r\"", 15).is_empty());
        assert_eq!(
            memberships(&grants, "\"r\"", 16),
            [
                "GRANT \"a\" TO \"r\" WITH INHERIT TRUE, SET TRUE",
                "GRANT \"b\" TO \"r\" WITH INHERIT TRUE, SET TRUE",
            ]
        );
    }

    /// Names are in lower case here, as the server compares them.
    #[test]
    fn an_account_gets_only_settings_that_it_could_set_itself() {
        let rows = [
            Row::from([Some("work_mem"), Some("user")]),
            Row::from([Some("log_statement"), Some("superuser")]),
            Row::from([Some("max_connections"), Some("postmaster")]),
            Row::from([Some("pg_stat_statements.track"), Some("superuser")]),
        ];
        for (names, expected) in [
            (&["work_mem"][..], None),
            // A setting of the operator: the server checks it when it is set.
            (&["app.tenant", "work_mem"], None),
            (&["log_statement"], Some("\"log_statement\" cannot be set")),
            (
                &["max_connections"],
                Some("\"max_connections\" cannot be set"),
            ),
            // A dot does not make a known setting free.
            (&["pg_stat_statements.track"], Some("track\" cannot be set")),
            (
                &["wrok_mem"],
                Some("\"wrok_mem\" does not exist in PostgreSQL 17"),
            ),
            (
                &["work_mem", "nothing", "log_statement"],
                Some("\"nothing\" does not exist"),
            ),
        ] {
            let reason = unfit(names, &rows, 17);
            assert_eq!(reason.is_some(), expected.is_some(), "{names:?} {reason:?}");
            let words = reason.unwrap_or_default();
            assert!(
                words.contains(expected.unwrap_or_default()),
                "{names:?} {words}"
            );
        }
    }

    #[test]
    fn an_admin_gives_what_its_version_lets_it_give() {
        use Attribute::{BypassRls, CreateDb, Replication};
        // An admin without the attribute, and with it.
        for (attribute, version, without, with) in [
            (CreateDb, 14, true, true),
            (CreateDb, 15, true, true),
            (CreateDb, 16, false, true),
            (Replication, 15, false, false),
            (Replication, 16, false, true),
            (BypassRls, 15, false, false),
            (BypassRls, 18, false, true),
        ] {
            let may = |has, superuser| may_be_given(attribute, has, superuser, version);
            assert_eq!(
                (may(false, false), may(true, false)),
                (without, with),
                "{attribute:?} {version}"
            );
            assert!(may(false, true), "a superuser gives everything");
            let finding = giving(attribute, without, "a\"d", version);
            assert_eq!(finding.ok, without);
            // From 16 on the operator can correct this.
            let fix = format!("ALTER ROLE \"a\"\"d\" {};", attribute.as_sql());
            let expected = match without || version < 16 {
                true => vec![],
                false => vec![fix],
            };
            assert_eq!(finding.fix, expected, "{attribute:?} {version}");
        }
    }

    #[test]
    fn a_powerful_role_is_no_role_for_accounts() {
        let row =
            |flags: [bool; 3]| Row::from(flags.map(|flag| Some(if flag { "t" } else { "f" })));
        let may_not = "admin may not let accounts become r";
        for (superuser, creates_roles, is_given, version, words, ok, fixes) in [
            (true, false, true, 15, "r is a superuser", false, 0),
            (true, true, true, 17, "r is a superuser", false, 0),
            (false, true, true, 15, "r may make roles", false, 0),
            (false, true, false, 17, "r may make roles", false, 0),
            // Up to 15 the membership in the grant role is enough.
            (false, false, false, 15, "accounts may become r", true, 0),
            (false, false, false, 16, may_not, false, 1),
            (false, false, true, 16, "accounts may become r", true, 0),
        ] {
            let row = row([superuser, creates_roles, is_given]);
            let finding = becoming(&row, version, "admin", "r").unwrap();
            assert!(finding.message.starts_with(words), "{finding:?}");
            assert_eq!((finding.ok, finding.fix.len()), (ok, fixes), "{finding:?}");
        }
        assert!(becoming(&Row::default(), 17, "admin", "r").is_none());
    }
}
