//! Ends the roles of leases, in batches for one server. It takes their logins, ends their sessions and drops them.
//! [`super::cleanup`] removes what prevents a drop.
//!
//! A batch does the quick steps for all of its roles. A role that needs more time is ended alone
//! ([`super::revoke_alone`]), so that the others do not wait for it. Such a role is held by another transaction, has
//! a session that does not end, or owns something.
//!
//! A second run finds the role absent. A role with the same name and another comment is not changed, and does not
//! count as absent.

use std::collections::HashSet;
use std::time::Duration;

use mayfly_common::fault;
use mayfly_protocol::task::{Failure, FailureCode, Revoke};
use tokio::time::Instant;
use tracing::debug;

use super::disable_logins::disable_logins;
use super::drop_roles::{self, drop_roles};
use super::due::{Candidate, Due, Results};
use super::end_sessions::{end_sessions, end_those_left};
use super::jobs;
use super::left_behind;
use super::moved;
use super::parts::Parts;
use super::servers::Servers;
use super::session::Session;
use super::standbys::end_on_standbys;
use super::uncommitted;
use mayfly_protocol::revocation::Ended;

/// Time limit of a batch. Roles that are left then are ended one by one.
const BATCH_WITHIN: Duration = Duration::from_secs(3);
/// Maximum wait for the end of a batch's sessions.
const BATCH_SESSIONS: Duration = Duration::from_millis(800);

/// Revokes a batch of tasks with the same target. The flag of a task says whether absence of its role is final.
/// Returns one result for each task, in their order. `None`: it must be done by [`super::revoke_alone`].
pub(crate) async fn revoke(
    servers: &Servers,
    tasks: &[(&Revoke, bool)],
) -> Vec<Option<Result<Ended, Failure>>> {
    let Some((first, _)) = tasks.first() else {
        return vec![];
    };
    let mut results = Results {
        list: vec![None; tasks.len()],
    };
    let done = match open(servers, first).await {
        Ok(mut home) => match batch(servers, &mut home, tasks, &mut results).await {
            Ok(()) => {
                home.release();
                Ok(())
            }
            Err(failure) => {
                home.give_up().await;
                Err(failure)
            }
        },
        Err(failure) => Err(failure),
    };
    if let Err(failure) = done {
        // Tasks that have no result of their own get this failure.
        for result in &mut results.list {
            result.get_or_insert_with(|| Err(failure.clone()));
        }
    }
    results.list
}

/// Opens a connection to the server of a task, or takes the kept one if no other can be opened.
pub(super) async fn open<'s>(servers: &'s Servers, task: &Revoke) -> Result<Session<'s>, Failure> {
    // A person requested either all revocations of a batch, or none of them.
    let home = match servers.home_for(&task.target, task.asked).await {
        // A pooler in front of a full server does not report that the server is full. It keeps the connection
        // waiting.
        Err(failure) if failure.full || failure.code == FailureCode::DatabaseUnreachable => {
            let kept = servers.kept_session(&task.target).await;
            kept.ok_or(failure)
        }
        home => home,
    };
    home.map(Session::for_ends)
}

/// Whether this server is known not to be the server on which the role was made.
pub(super) fn is_other_server(task: &Revoke, identity: &str) -> bool {
    task.server.as_ref().is_some_and(|known| known != identity)
}

pub(super) const TAKING: &str = "taking the login away";

/// Does the quick steps for all roles of a batch. A role without a result must be ended alone.
async fn batch(
    servers: &Servers,
    home: &mut Session<'_>,
    tasks: &[(&Revoke, bool)],
    results: &mut Results,
) -> Result<(), Failure> {
    let identity = home.facts().identity.clone();
    let until = Instant::now() + BATCH_WITHIN;
    let (candidates, elsewhere) = sort_out(tasks, &identity, results);
    for (index, result) in moved::look(home, &elsewhere).await? {
        results.set(index, result);
    }
    let due = disable(home, candidates, until, results).await?;
    if results.has_one_not_due()
        && let Some((task, _)) = tasks.first()
    {
        servers.want_one(&task.target);
    }
    if due.is_empty() {
        return Ok(());
    }
    fault::point("revoke", "login_taken").await;
    let ended = end_sessions_of(home, due, until).await?;
    fault::point("revoke", "sessions_ended").await;
    if ended.is_empty() {
        return Ok(());
    }
    end_on_standbys(servers, home, &ended).await;
    if let Err(failure) = jobs::unschedule(servers, home, &ended).await {
        // Each role is then ended alone, because only one of them has the job.
        debug!(
            reason = failure.message,
            "scheduled jobs of accounts prevent their end"
        );
        return Ok(());
    }
    left_behind::take_away_soon(servers, home, &ended).await;
    let gone = drop_those_free(home, ended, until, results).await?;
    if !gone.is_empty() {
        fault::point("revoke", "dropped").await;
        end_those_left(home, &gone).await;
    }
    Ok(())
}

/// The candidates of a batch, and the tasks whose role was made on another server, with their places. If two
/// revocations name the same role, the second revocation gets its result here: it waits.
fn sort_out<'t>(
    tasks: &[(&'t Revoke, bool)],
    identity: &str,
    results: &mut Results,
) -> (Vec<Candidate<'t>>, Vec<(usize, &'t Revoke)>) {
    let (mut candidates, mut elsewhere) = (Vec::new(), Vec::new());
    let mut seen = HashSet::new();
    for (index, (task, conclusive)) in tasks.iter().copied().enumerate() {
        // An example is a reconciler's copy together with the original message.
        if !seen.insert((task.lease, &task.role)) {
            results.set(index, Ok(Ended::NotTried));
        } else if is_other_server(task, identity) {
            elsewhere.push((index, task));
        } else {
            candidates.push(Candidate {
                index,
                task,
                conclusive,
            });
        }
    }
    (candidates, elsewhere)
}

/// Takes the login from the roles that are due, and returns those.
async fn disable<'t>(
    home: &mut Session<'_>,
    candidates: Vec<Candidate<'t>>,
    until: Instant,
    results: &mut Results,
) -> Result<Vec<Due<'t>>, Failure> {
    let identity = home.facts().identity.clone();
    let mut due = Vec::new();
    let mut parts = Parts::of(candidates.clone(), until);
    while let Some(part) = parts.next(home) {
        match disable_logins(home, &part, &identity, results).await {
            Ok(some) => due.extend(some),
            Err(error) => parts.failed(part, error, home, TAKING)?,
        }
    }
    look_for_uncommitted(home, &candidates, results).await?;
    Ok(due)
}

/// Ends sessions, and returns the roles that have none left.
async fn end_sessions_of<'t>(
    home: &mut Session<'_>,
    due: Vec<Due<'t>>,
    until: Instant,
) -> Result<Vec<Due<'t>>, Failure> {
    let mut ended = Vec::new();
    let mut parts = Parts::of(due, until);
    while let Some(part) = parts.next(home) {
        match end_sessions(home, &part, BATCH_SESSIONS).await {
            // [`super::revoke_alone`] handles a session that does not end.
            Ok(open) => ended.extend(part.into_iter().filter(|one| !open.contains_key(&one.oid))),
            Err(error) => parts.failed(part, error, home, ENDING)?,
        }
    }
    Ok(ended)
}

/// Drops the roles whose drop nothing prevents, and returns those.
async fn drop_those_free<'t>(
    home: &mut Session<'_>,
    mut ended: Vec<Due<'t>>,
    until: Instant,
    results: &mut Results,
) -> Result<Vec<Due<'t>>, Failure> {
    let identity = home.facts().identity.clone();
    let held = drop_roles::held(home, &ended).await;
    let held = held.map_err(|error| error.into_failure("looking for what holds the accounts"))?;
    ended.retain(|role| !held.contains(&role.oid));
    let mut gone = Vec::new();
    let mut parts = Parts::of(ended, until);
    while let Some(part) = parts.next(home) {
        match drop_roles(home, &part).await {
            Ok(dropped) => {
                results.dropped(&part, dropped, &identity);
                gone.extend(part);
            }
            Err(error) => parts.failed(part, error, home, "dropping the role")?,
        }
    }
    Ok(gone)
}

pub(super) const ENDING: &str = "ending the account's sessions (the admin needs pg_signal_backend)";

/// Removes the result "absent for good" from roles that another transaction is making.
async fn look_for_uncommitted(
    home: &Session<'_>,
    candidates: &[Candidate<'_>],
    results: &mut Results,
) -> Result<(), Failure> {
    let is_absent = |one: &&Candidate<'_>| {
        one.conclusive && matches!(results.list[one.index], Some(Ok(Ended::Absent { .. })))
    };
    let absent: Vec<Candidate<'_>> = candidates.iter().filter(is_absent).copied().collect();
    let names: Vec<&str> = absent.iter().map(|one| one.task.role.as_str()).collect();
    let made = uncommitted::being_made(home, &names).await;
    let made = match made {
        Ok(made) => made,
        Err(error) if error.is_lost() => return Err(error.into_failure(LOOKING)),
        // Each role is then ended alone, which shows the reason.
        Err(_) => names.iter().map(|name| (*name).to_owned()).collect(),
    };
    for one in absent {
        if made.iter().any(|name| name == one.task.role.as_str()) {
            results.list[one.index] = None;
        }
    }
    Ok(())
}

pub(super) const LOOKING: &str = "looking whether the account is being made";

#[cfg(test)]
mod tests {
    use super::*;
    use mayfly_protocol::fixtures::revocation;

    #[test]
    fn a_batch_is_sorted_by_server_and_has_each_role_once() {
        let on = |server: Option<&str>| Revoke {
            server: server.map(str::to_owned),
            ..revocation()
        };
        let (here, there, unknown) = (on(Some("here")), on(Some("there")), on(None));
        // Two leases may name the same role. The role's comment decides to which it belongs.
        let same_role = on(Some("here"));
        let tasks = [
            (&here, true),
            (&there, true),
            (&here, false),
            (&unknown, false),
            (&same_role, true),
            (&there, true),
        ];
        let mut results = Results {
            list: vec![None; tasks.len()],
        };
        let (candidates, elsewhere) = sort_out(&tasks, "here", &mut results);
        let places: Vec<_> = candidates
            .iter()
            .map(|one| (one.index, one.conclusive))
            .collect();
        // The server of an account is unknown before an engine has answered. Then this server is searched.
        assert_eq!(places, [(0, true), (3, false), (4, true)]);
        let places: Vec<_> = elsewhere.iter().map(|(index, _)| *index).collect();
        assert_eq!(places, [1]);
        for (index, result) in results.list.iter().enumerate() {
            let waits = matches!(result, Some(Ok(Ended::NotTried)));
            assert_eq!(waits, [2, 5].contains(&index), "{index}");
            assert!(waits || result.is_none(), "{index}");
        }
    }
}
