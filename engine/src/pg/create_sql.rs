//! The statements that make an account. This module is pure.

use jiff::Timestamp;
use mayfly_protocol::account::Account;
use mayfly_protocol::target::Target;
use mayfly_protocol::task::Create;

use super::account;
use super::clear_password;
use super::sql::{ident, lease_comment, literal};
use super::time_guard::refuse_late_commit;
use super::uncommitted::working_on;

/// The values that an account is made from.
pub(super) struct Making<'a> {
    pub(super) task: &'a Create,
    pub(super) verifier: &'a str,
    /// Its options besides grants.
    pub(super) special: &'a Account,
    pub(super) grant_role: &'a str,
    /// The time limit of [`super::time_guard::guard_at`].
    pub(super) guard: &'a str,
    /// Its end, by the server's clock.
    pub(super) expiration: Timestamp,
    /// Whether the admin becomes a member of the account now, see [`joins_now`].
    pub(super) joins: bool,
}

/// Whether the admin becomes a member of an account when it makes it, so that it may end the account's sessions.
///
/// From 16 on this is done when the account is ended, and only if it has sessions. Each membership of the admin
/// makes later creates slower, because the server reads all memberships again after each change. With several hosts
/// it is done now, because a standby that lags behind would not have the later membership.
pub(super) fn joins_now(version: u32, ends_sessions: bool, target: &Target) -> bool {
    let has_one_host = target.endpoints().is_ok_and(|hosts| hosts.len() == 1);
    !(ends_sessions || version >= 16 && has_one_host)
}

impl Making<'_> {
    /// All statements of the transaction, from the role to COMMIT. The membership in the grant role
    /// comes last, because it locks the grant role until the commit.
    pub(super) fn statements(&self, version: u32) -> String {
        let Self {
            task,
            special,
            joins,
            ..
        } = self;
        let name = ident(task.role.as_str());
        let mut all = vec![format!(
            "SET LOCAL application_name = {}",
            literal(&working_on(&task.lease))
        )];
        if version >= 16 && *joins {
            all.push("SET LOCAL createrole_self_grant = 'inherit'".to_owned());
        }
        all.push(self.create_role(version));
        let comment = literal(&lease_comment(&task.installation, &task.lease));
        all.push(format!("COMMENT ON ROLE {name} IS {comment}"));
        if version < 16 && *joins {
            all.push(format!("GRANT {name} TO CURRENT_USER"));
        }
        all.extend(account::settings(&special.settings, &name));
        all.extend(account::memberships(&task.grants, &name, version));
        if version >= 16 {
            let group = ident(self.grant_role);
            all.push(format!(
                "GRANT {group} TO {name} WITH INHERIT TRUE, SET FALSE"
            ));
        }
        all.push(refuse_late_commit(self.guard));
        all.push("COMMIT".to_owned());
        all.join("; ")
    }

    fn create_role(&self, version: u32) -> String {
        let Self { task, special, .. } = self;
        let name = ident(task.role.as_str());
        let limit = task.connection_limit.map_or(-1, i64::from);
        // On 14 and 15 a membership that CREATE ROLE makes allows no more than one that is made later. On 16 it
        // would allow SET ROLE.
        let in_role = if version < 16 {
            format!(" IN ROLE {}", ident(self.grant_role))
        } else {
            String::new()
        };
        let create = format!(
            "CREATE ROLE {name} LOGIN{} PASSWORD ",
            account::attributes(special)
        );
        let rest = format!(
            " CONNECTION LIMIT {limit} VALID UNTIL {}{in_role}",
            literal(&self.expiration.to_string())
        );
        if task.clear_password().is_none() {
            return format!("{create}{}{rest}", literal(self.verifier));
        }
        // The text of the statement does not contain the password. Otherwise the context of an error would show it
        // in the server's log.
        let body = format!(
            "BEGIN EXECUTE {} || quote_literal({}) || {}; EXCEPTION WHEN OTHERS THEN \
               RAISE EXCEPTION 'the server refuses the account or its password' USING ERRCODE = SQLSTATE; END",
            literal(&create),
            clear_password::PASSWORD,
            literal(&rest),
        );
        format!("DO {}", literal(&body))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) mod tests {
    use super::*;
    use mayfly_protocol::account::Attribute;
    use mayfly_protocol::names::{InstallationId, LeaseId};
    use mayfly_protocol::secret::Secret;
    use mayfly_protocol::target::SslMode;
    use mayfly_protocol::task::Special;

    pub(in crate::pg) fn task(password: Option<&str>) -> Create {
        Create {
            lease: LeaseId::random(),
            installation: InstallationId::random(),
            target: Target {
                host: "db".into(),
                port: 5432,
                database: "d".into(),
                username: "me".into(),
                password: Secret::new("p"),
                sslmode: SslMode::VerifyFull,
                auth: Default::default(),
                channel_binding: None,
                sslrootcert: None,
                sslcert: None,
                sslkey: None,
            },
            database: "app".to_owned(),
            role: "acc".parse().unwrap(),
            verifier: None,
            special: password.map(|password| Special {
                verifier: String::new(),
                password: Some(Secret::new(password)),
                account: Account::default(),
            }),
            ttl_seconds: 77,
            grants: vec![],
            connection_limit: Some(3),
            wait_for_replicas: None,
            not_after: None,
        }
    }

    fn statements(task: &Create, special: &Account, version: u32, joins: bool) -> String {
        let making = Making {
            task,
            verifier: "SCRAM-x'y",
            special,
            grant_role: "grp",
            guard: "100.5",
            expiration: "2026-11-26T10:00:00.5Z".parse().unwrap(),
            joins,
        };
        making.statements(version)
    }

    /// Asserts that the statements contain these texts in this order.
    fn assert_order(text: &str, parts: &[&str]) {
        let mut from = 0;
        for part in parts {
            let found = text[from..].find(part);
            from += found.unwrap_or_else(|| panic!("{part:?} is missing or too early in {text}"));
        }
    }

    #[test]
    fn from_16_on_the_membership_comes_last_and_lets_nobody_become_the_grant_role() {
        let (task, plain) = (task(None), Account::default());
        let text = statements(&task, &plain, 16, true);
        assert_order(
            &text,
            &[
                "createrole_self_grant = 'inherit'",
                "CREATE ROLE \"acc\" LOGIN PASSWORD 'SCRAM-x''y'",
                "VALID UNTIL '2026-11-26T10:00:00.5Z'",
                "COMMENT ON ROLE \"acc\"",
                "GRANT \"grp\" TO \"acc\" WITH INHERIT TRUE, SET FALSE",
                "> 100.5 + 4 THEN",
                "COMMIT",
            ],
        );
        assert!(!text.contains("DO "), "{text}");
        assert!(text.contains("CONNECTION LIMIT 3") && !text.contains(" IN ROLE "));
        assert!(!statements(&task, &plain, 16, false).contains("createrole_self_grant"));
    }

    #[test]
    fn up_to_15_the_role_is_made_with_its_membership() {
        let (task, plain) = (task(None), Account::default());
        let text = statements(&task, &plain, 15, true);
        assert_order(
            &text,
            &[
                " IN ROLE \"grp\"",
                "GRANT \"acc\" TO CURRENT_USER",
                "COMMIT",
            ],
        );
        assert!(!text.contains("createrole_self_grant") && !text.contains("SET FALSE"));
        assert!(!statements(&task, &plain, 15, false).contains("TO CURRENT_USER"));
    }

    #[test]
    fn the_admin_joins_an_account_that_it_makes_only_if_it_must() {
        for (version, ends_sessions, host, joins) in [
            (14, false, "db", true),
            (15, false, "db", true),
            (15, true, "db", false),
            (16, false, "db", false),
            (18, false, "db", false),
            (18, true, "db", false),
            (18, false, "db,standby", true),
            (18, true, "db,standby", false),
        ] {
            let target = Target {
                host: host.to_owned(),
                ..task(None).target
            };
            let found = joins_now(version, ends_sessions, &target);
            assert_eq!(found, joins, "{version} {ends_sessions} {host}");
        }
    }

    /// The password must be a setting of the transaction, and the context of an error must not show the statement.
    #[test]
    fn a_password_in_clear_is_in_no_statement() {
        let special = Account {
            attributes: vec![Attribute::CreateDb],
            ..Account::default()
        };
        let text = statements(&task(Some("geheim")), &special, 18, false);
        assert!(
            !text.contains("geheim") && !text.contains("SCRAM"),
            "{text}"
        );
        assert_order(
            &text,
            &["CREATEDB", "mayfly.password", "EXCEPTION WHEN OTHERS THEN"],
        );
        let text = statements(&task(None), &Account::default(), 18, false);
        assert!(text.contains("SCRAM-x") && !text.contains("EXCEPTION WHEN"));
    }
}
