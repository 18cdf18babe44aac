//! Ends one role alone, with all the time that it needs.

use std::time::Duration;

use mayfly_common::fault;
use mayfly_protocol::task::{Failure, FailureCode, Revoke};
use tokio::time::Instant;

use super::disable_logins::disable_logins;
use super::drop_roles::drop_one;
use super::due::{Candidate, Due, Results};
use super::end_sessions::{Open, end_sessions, end_those_left};
use super::explain;
use super::jobs;
use super::left_behind;
use super::moved;
use super::revoke::{ENDING, LOOKING, TAKING, is_other_server, open};
use super::servers::Servers;
use super::session::Session;
use super::sql_error::LOCK_NOT_AVAILABLE;
use super::standbys::end_on_standbys;
use super::uncommitted;
use mayfly_protocol::revocation::Ended;

/// Maximum wait for a lock while a role is ended alone, and the number of tries.
const ALONE_LOCK: Duration = Duration::from_secs(1);
const ALONE_TRIES: u32 = 3;
/// Maximum wait for the end of the role's sessions.
const ALONE_SESSIONS: Duration = Duration::from_secs(5);
/// Maximum wait until an account becomes visible after the end of its transaction.
const APPEARS_WITHIN: Duration = Duration::from_secs(3);

/// Revokes one task, with all the time that it needs.
///
/// # Errors
/// The failure names what prevents the end.
pub(crate) async fn revoke_alone(
    servers: &Servers,
    task: &Revoke,
    conclusive: bool,
) -> Result<Ended, Failure> {
    let mut home = open(servers, task).await?;
    home.wait_for_locks(ALONE_LOCK);
    let candidate = Candidate {
        index: 0,
        task,
        conclusive,
    };
    match alone(servers, &home, candidate).await {
        Ok(ended) => {
            home.release();
            Ok(ended)
        }
        Err(failure) => {
            home.give_up().await;
            Err(failure)
        }
    }
}

async fn alone(
    servers: &Servers,
    home: &Session<'_>,
    candidate: Candidate<'_>,
) -> Result<Ended, Failure> {
    let Candidate {
        task, conclusive, ..
    } = candidate;
    let identity = home.facts().identity.clone();
    if is_other_server(task, &identity) {
        let looked = moved::look(home, &[(0, task)]).await?.pop();
        return looked.map_or(Ok(Ended::NotTried), |(_, result)| result);
    }
    let mut results = Results { list: vec![None] };
    let until = Instant::now() + APPEARS_WITHIN;
    let role = loop {
        let due = disable_login_alone(home, candidate, &identity, &mut results).await?;
        if let Some(role) = due {
            break role;
        }
        let result = results.list[0].take().unwrap_or(Ok(Ended::NotTried));
        if !conclusive || !matches!(result, Ok(Ended::Absent { .. })) {
            return result;
        }
        let made = uncommitted::being_made(home, &[task.role.as_str()]).await;
        let made = made.map_err(|error| error.into_failure(LOOKING))?;
        if made.is_empty() {
            return result;
        }
        let sessions = uncommitted::end_work_on(home, &task.lease).await;
        let sessions = sessions.map_err(|error| error.into_failure(LOOKING))?;
        if Instant::now() > until {
            return Err(Failure {
                objects: named(&sessions),
                ..Failure::new(
                    FailureCode::StatementFailed,
                    "the transaction that makes the account has not ended; its COMMIT may wait for a synchronous standby. The account is ended when it is visible",
                )
            });
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    fault::point("revoke", "login_taken").await;
    let due = [role];
    let open = end_sessions(home, &due, ALONE_SESSIONS).await;
    let open = open.map_err(|error| error.into_failure(ENDING))?;
    if !open.is_empty() {
        return Err(do_not_end(open));
    }
    fault::point("revoke", "sessions_ended").await;
    end_on_standbys(servers, home, &due).await;
    jobs::unschedule(servers, home, &due).await?;
    left_behind::take_away_soon(servers, home, &due).await;
    let dropped = drop_one(servers, home, &due[0]).await?;
    end_those_left(home, &due).await;
    Ok(match dropped {
        Some((at, late_seconds)) => {
            fault::point("revoke", "dropped").await;
            Ended::Dropped {
                at,
                server: identity,
                late_seconds,
            }
        }
        // Another engine was faster. The next look finds the role absent.
        None => Ended::NotTried,
    })
}

async fn disable_login_alone<'t>(
    home: &Session<'_>,
    candidate: Candidate<'t>,
    identity: &str,
    results: &mut Results,
) -> Result<Option<Due<'t>>, Failure> {
    let mut tries = 0;
    loop {
        tries += 1;
        match disable_logins(home, &[candidate], identity, results).await {
            Ok(due) => return Ok(due.into_iter().next()),
            Err(error) if error.is_transient() && tries < ALONE_TRIES => {
                // A renewal may hold the role while its COMMIT waits for a standby.
                if error.code() == LOCK_NOT_AVAILABLE {
                    let ended = uncommitted::end_work_on(home, &candidate.task.lease).await;
                    ended.map_err(|error| error.into_failure(TAKING))?;
                }
            }
            Err(error) => return Err(explain::held_by(home, error, TAKING).await),
        }
    }
}

fn do_not_end(open: Open) -> Failure {
    let sessions: Vec<String> = open.into_values().flatten().collect();
    Failure {
        objects: named(&sessions),
        ..Failure::new(
            FailureCode::StatementFailed,
            format!(
                "sessions of the account do not end within {} s: process {} of the server",
                ALONE_SESSIONS.as_secs(),
                sessions.join(", ")
            ),
        )
    }
}

fn named(processes: &[String]) -> Vec<String> {
    let named = processes.iter().map(|pid| format!("session {pid}"));
    named.collect()
}
