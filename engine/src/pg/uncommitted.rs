//! An account that is not there may be about to appear: its transaction has ended but for the wait
//! for a synchronous standby, and nobody sees it until that is back, or until its session is ended.
//!
//! What tells is the name itself. Names of roles are unique, so who makes a role of a name that
//! somebody else is making waits for the other's transaction, whatever it waits for.
//! <https://www.postgresql.org/docs/current/warm-standby.html#SYNCHRONOUS-REPLICATION>

use mayfly_protocol::names::LeaseId;

use super::session::Session;
use super::sql::{literal, literals};
use super::sql_error::SqlError;

/// SQLSTATE that takes a trial back (class `MF` is nobody's).
const TRIED: &str = "MF006";

/// What a session calls itself while it makes or renews an account.
pub(super) fn working_on(lease: &LeaseId) -> String {
    format!("mayfly lease {lease}")
}

/// Those of the names that somebody is making a role of. Nothing is made. A server that refuses the
/// trial for another reason, as a policy about names, tells nothing.
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

/// Ends the admin's sessions that make or renew the account of this lease. What such a one has
/// written is seen then. Which.
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
