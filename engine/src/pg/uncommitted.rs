//! An account that is absent may appear later: its transaction waits for a synchronous standby. Nobody sees the
//! account until the standby answers or the session is ended.
//!
//! The name reveals such a transaction. Names of roles are unique, so another transaction that makes a role with the
//! same name has to wait. <https://www.postgresql.org/docs/current/warm-standby.html#SYNCHRONOUS-REPLICATION>

use mayfly_protocol::names::LeaseId;

use super::session::Session;
use super::sql::{literal, literals};
use super::sql_error::SqlError;

/// SQLSTATE that rolls a trial back. PostgreSQL does not use the class `MF`.
const TRIED: &str = "MF006";

/// The `application_name` of a session while it makes or renews an account.
pub(super) fn working_on(lease: &LeaseId) -> String {
    format!("mayfly lease {lease}")
}

/// Returns those names for which another transaction is making a role. Nothing is made here. If a server refuses the
/// trial for another reason, such as a policy about names, the result is unknown.
pub(super) async fn being_made(
    home: &Session<'_>,
    names: &[&str],
) -> Result<Vec<String>, SqlError> {
    if names.is_empty() {
        return Ok(vec![]);
    }
    let body = format!(
        "DECLARE name text; made text[] := '{{}}'; BEGIN \
         FOREACH name IN ARRAY ARRAY[{}] LOOP \
           BEGIN \
             EXECUTE format('CREATE ROLE %I NOLOGIN', name); \
             RAISE EXCEPTION USING ERRCODE = '{TRIED}'; \
           EXCEPTION \
             WHEN lock_not_available OR duplicate_object OR unique_violation THEN made := made || name; \
             WHEN OTHERS THEN NULL; END; \
         END LOOP; \
         PERFORM set_config('mayfly.made', made::text, true); END",
        literals(names.iter().copied())
    );
    let text = format!(
        "DO {}; SELECT unnest(current_setting('mayfly.made')::text[])",
        literal(&body)
    );
    let rows = home.transact(&text).await?;
    let first = rows
        .into_iter()
        .filter_map(|row| row.get(0).map(str::to_owned));
    Ok(first.collect())
}

/// Ends the admin's sessions that make or renew the account of this lease, and returns their processes. After that,
/// what such a session has written is visible.
pub(super) async fn end_work_on(
    home: &Session<'_>,
    lease: &LeaseId,
) -> Result<Vec<String>, SqlError> {
    let text = format!(
        "SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity \
         WHERE usename = CURRENT_USER AND pid <> pg_backend_pid() AND application_name = {}",
        literal(&working_on(lease))
    );
    let rows = home.transact(&text).await?;
    let first = rows
        .into_iter()
        .filter_map(|row| row.get(0).map(str::to_owned));
    Ok(first.collect())
}
