//! Ends the sessions of accounts that have lost their login, and logins that began before that and are still in
//! progress.
//!
//! A client can make its login last up to 35 minutes: it may set `post_auth_delay`, which sleeps after the password
//! was checked. During that time no list of sessions shows the login, but it is in a transaction, which `pg_locks`
//! shows. To find the account of a login, the engine tries to end it as each account: an account may end its own
//! sessions only. <https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-ADMIN-SIGNAL>

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use super::due::Due;
use super::join::join_all;
use super::row::Rows;
use super::session::Session;
use super::sql::literal;
use super::sql_error::SqlError;

/// Maximum time for which a login in progress is waited for. Logins take milliseconds.
const LOGIN_TAKES: Duration = Duration::from_millis(200);
const PAUSE_FIRST: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_millis(200);

/// Processes of sessions, by the oid of their account.
pub(super) type Open = BTreeMap<u32, Vec<String>>;

/// Ends the roles' sessions, and waits at most `within` until they are gone. Returns those that are not. After `DROP
/// ROLE` only a superuser may end them, and a session that did `SET ROLE` would live on.
pub(super) async fn end_sessions(
    home: &Session<'_>,
    due: &[Due<'_>],
    within: Duration,
) -> Result<Open, SqlError> {
    let oids: Vec<u32> = due.iter().map(|role| role.oid).collect();
    end_them(home, &oids, due, within).await
}

/// Like [`end_sessions`], by the roles' oids and on a standby, where nothing can be granted.
pub(super) async fn end_sessions_of(
    standby: &Session<'_>,
    oids: &[u32],
    within: Duration,
) -> Result<Open, SqlError> {
    end_them(standby, oids, &[], within).await
}

/// Ends the sessions of these oids. `due` are the roles that the admin may join to get the right.
async fn end_them(
    home: &Session<'_>,
    oids: &[u32],
    due: &[Due<'_>],
    within: Duration,
) -> Result<Open, SqlError> {
    // Logins are listed first. A login that becomes a session in between is then listed as a session; in the other
    // order both lists would miss it. A transaction reads the list of sessions once, unless the snapshot is cleared.
    let text = format!(
        "{IN_PROGRESS}; SELECT pg_stat_clear_snapshot(); {}",
        end(oids)
    );
    let begun = tokio::time::Instant::now();
    let mut pause = PAUSE_FIRST;
    let mut in_progress: Option<HashSet<String>> = None;
    let (mut joined, mut looked) = (HashSet::new(), false);
    loop {
        let rows = match home.transact(&text).await {
            Ok(rows) => rows,
            // The admin joins the roles that have sessions, to get the right to end them. It joins no other roles,
            // because each membership costs the server much time if the admin has many accounts.
            Err(error) if error.code() == "42501" && begun.elapsed() < within => {
                let open = with_sessions(home, oids).await?;
                let due: Vec<Due<'_>> = due
                    .iter()
                    .filter(|role| open.contains(&role.oid) && joined.insert(role.oid))
                    .cloned()
                    .collect();
                if due.is_empty() && !open.is_empty() {
                    return Err(error);
                }
                join_all(home, &due).await?;
                continue;
            }
            Err(error) => return Err(error),
        };
        let (sessions, logins) = parse(&rows);
        // The server refuses every later login, because the role may not log in any more.
        let before = in_progress.take().unwrap_or_else(|| logins.clone());
        let mut left: HashSet<String> = before.intersection(&logins).cloned().collect();
        if sessions.is_empty() && left.is_empty() {
            return Ok(sessions);
        }
        if !left.is_empty() && !looked && begun.elapsed() >= LOGIN_TAKES {
            looked = true;
            // The other logins do not belong to these accounts.
            join_all(home, due).await?;
            left = end_logins(home, oids, &left).await?;
        }
        if begun.elapsed() >= within {
            return Ok(sessions);
        }
        in_progress = Some(left);
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Ends sessions whose role is already gone, if the admin may.
pub(super) async fn end_those_left(home: &Session<'_>, due: &[Due<'_>]) {
    // Only a superuser, or a member of pg_signal_backend, may do this.
    let oids: Vec<u32> = due.iter().map(|role| role.oid).collect();
    let _ = home.transact(&end(&oids)).await;
}

/// Finds which of the roles have sessions. Every role may see that.
async fn with_sessions(home: &Session<'_>, oids: &[u32]) -> Result<HashSet<u32>, SqlError> {
    let text = format!(
        "SELECT DISTINCT usesysid FROM pg_stat_activity WHERE usesysid IN ({})",
        list(oids)
    );
    let rows = home.transact(&text).await?;
    Ok(rows.iter().filter_map(|row| row.parse(0)).collect())
}

fn list(oids: &[u32]) -> String {
    let oids: Vec<String> = oids.iter().map(u32::to_string).collect();
    oids.join(", ")
}

fn end(oids: &[u32]) -> String {
    format!(
        "SELECT usesysid, pid, pg_terminate_backend(pid) FROM pg_stat_activity WHERE usesysid IN ({})",
        list(oids)
    )
}

/// Processes in a transaction that are not a session yet. From 18 on `pg_stat_activity` shows them, without a role.
/// To an admin without more rights it shows some of the server's own processes in the same way.
const IN_PROGRESS: &str = "SELECT NULL, l.pid FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid \
     WHERE l.locktype = 'virtualxid' AND l.pid <> pg_backend_pid() \
     AND (a.pid IS NULL OR a.usesysid IS NULL AND coalesce(a.backend_type, 'walsender') IN ('client backend', 'walsender'))";

fn parse(rows: &Rows) -> (Open, HashSet<String>) {
    let (mut sessions, mut logins) = (Open::new(), HashSet::new());
    for row in rows {
        match (row.parse(0), row.get(1)) {
            (Some(oid), Some(pid)) => sessions.entry(oid).or_default().push(pid.to_owned()),
            (None, Some(pid)) => drop(logins.insert(pid.to_owned())),
            (_, None) => {}
        }
    }
    (sessions, logins)
}

/// Ends those of the logins in progress, given by process id, that belong to one of the roles. Returns the process
/// ids that it ended.
async fn end_logins(
    home: &Session<'_>,
    oids: &[u32],
    logins: &HashSet<String>,
) -> Result<HashSet<String>, SqlError> {
    let pids: Vec<&str> = logins.iter().map(String::as_str).collect();
    let body = format!(
        "DECLARE account oid; process int; ended text := ''; BEGIN \
         FOREACH account IN ARRAY ARRAY[{}]::oid[] LOOP \
           BEGIN \
             EXECUTE 'SET LOCAL ROLE ' || account::regrole; \
             FOREACH process IN ARRAY ARRAY[{}]::int[] LOOP \
               BEGIN \
                 IF pg_terminate_backend(process) THEN ended := ended || ' ' || process; END IF; \
               EXCEPTION WHEN insufficient_privilege THEN NULL; END; \
             END LOOP; \
             SET LOCAL ROLE NONE; \
           EXCEPTION WHEN insufficient_privilege OR invalid_parameter_value OR undefined_object THEN NULL; END; \
         END LOOP; \
         PERFORM set_config('mayfly.ended', ended, true); END",
        list(oids),
        pids.join(", ")
    );
    let text = format!(
        "DO {}; SELECT current_setting('mayfly.ended')",
        literal(&body)
    );
    let rows = home.transact(&text).await?;
    let ended = rows.first().map(|row| row.text(0)).unwrap_or_default();
    Ok(ended.split_whitespace().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::row::Row;

    /// Logins in progress have no account yet, and the rows of other statements have no process.
    #[test]
    fn sessions_and_logins_are_told_apart() {
        let rows = vec![
            Row::from([None, Some("101")]),
            Row::from([Some("")]),
            Row::from([Some("7"), Some("102"), Some("t")]),
            Row::from([Some("7"), Some("103"), Some("f")]),
            Row::from([Some("4294967295"), Some("104"), Some("t")]),
            Row::from([None, None]),
        ];
        let (sessions, logins) = parse(&rows);
        let of = |oid: u32| sessions.get(&oid).cloned().unwrap_or_default();
        assert_eq!(of(7), ["102", "103"]);
        assert_eq!(of(4_294_967_295), ["104"], "oids are unsigned");
        assert_eq!(sessions.len(), 2);
        assert_eq!(logins, HashSet::from(["101".to_owned()]));
    }
}
