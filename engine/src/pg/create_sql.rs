//! The statements that make an account. Pure.

use mayfly_protocol::account::Account;
use mayfly_protocol::task::Create;

use super::account;
use super::clear_password;
use super::sql::{ident, lease_comment, literal};
use super::time_guard::{refuse_after, refuse_late_commit};
use super::uncommitted::working_on;

/// SQLSTATE of our own guard: the grant role is gone.
pub(super) const NO_GRANT_ROLE: &str = "MF002";

/// What one account is made from.
pub(super) struct Making<'a> {
    pub(super) task: &'a Create,
    pub(super) verifier: &'a str,
    /// What it is beyond its grants.
    pub(super) special: &'a Account,
    pub(super) grant_role: &'a str,
    /// The timestamp of [`super::time_guard::guard_at`].
    pub(super) guard: &'a str,
}

impl Making<'_> {
    /// All statements of the transaction, from the role to COMMIT. The membership in the grant role
    /// comes last, because it locks the grant role until the commit.
    pub(super) fn statements(&self, version: u32, superuser: bool) -> String {
        let Self { task, special, .. } = self;
        let name = ident(task.role.as_str());
        let mut all = vec![format!(
            "SET LOCAL application_name = {}",
            literal(&working_on(&task.lease))
        )];
        if version >= 16 && !superuser {
            // So that the admin may end the role's sessions.
            all.push("SET LOCAL createrole_self_grant = 'inherit'".to_owned());
        }
        all.push(format!("DO {}", literal(&self.guarded_create(version))));
        let comment = literal(&lease_comment(&task.installation, &task.lease));
        all.push(format!("COMMENT ON ROLE {name} IS {comment}"));
        if version < 16 && !superuser {
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

    /// A block of PL/pgSQL: nothing is made after the guard, or without the grant role.
    fn guarded_create(&self, version: u32) -> String {
        let create = self.create_role(version);
        let make = match self.task.clear_password() {
            None => create,
            // An error's context would have the statement, with the password, in the server's log.
            Some(_) => format!(
                "BEGIN {create} EXCEPTION WHEN OTHERS THEN \
                   RAISE EXCEPTION 'the server refuses the account or its password' USING ERRCODE = SQLSTATE; END;"
            ),
        };
        format!(
            "BEGIN {not_late} \
             IF NOT EXISTS (SELECT 1 FROM pg_roles WHERE rolname = {group}) THEN \
               RAISE EXCEPTION 'no grant role' USING ERRCODE = '{NO_GRANT_ROLE}'; END IF; \
             {make} \
             END",
            not_late = refuse_after(self.guard),
            group = literal(self.grant_role),
        )
    }

    fn create_role(&self, version: u32) -> String {
        let Self { task, special, .. } = self;
        let name = ident(task.role.as_str());
        let limit = task.connection_limit.map_or(-1, i64::from);
        // On 14 and 15 a membership made with the role allows nothing more than one made later; on
        // 16 it would allow SET ROLE.
        let in_role = if version < 16 {
            format!(" IN ROLE {}", ident(self.grant_role))
        } else {
            String::new()
        };
        format!(
            "EXECUTE {} || {} || {} || quote_literal((clock_timestamp() + interval '{} seconds')::text) || {};",
            literal(&format!(
                "CREATE ROLE {name} LOGIN{} PASSWORD ",
                account::attributes(special)
            )),
            match task.clear_password() {
                None => literal(&literal(self.verifier)),
                Some(_) => format!("quote_literal({})", clear_password::PASSWORD),
            },
            literal(&format!(" CONNECTION LIMIT {limit} VALID UNTIL ")),
            task.ttl_seconds,
            literal(&in_role),
        )
    }
}
