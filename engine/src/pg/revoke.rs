//! Ending the roles of leases, a batch for one server at a time: no more logins, sessions ended,
//! roles dropped. What holds a role back goes to [`super::cleanup`].
//!
//! A batch does what is quick for all of its roles. One that needs more than that — somebody else's
//! transaction holds it, a session does not end, it owns something — is left out, so that its
//! neighbours do not wait for it, and is ended by itself ([`revoke_alone`]).
//!
//! Run twice, it finds the role absent. A role of the same name with another comment is neither
//! touched nor called absent.

use std::collections::HashSet;
use std::time::Duration;

use mayfly_common::fault;
use mayfly_protocol::task::{Failure, FailureCode, Revoke};
use tokio::time::Instant;
use tracing::debug;

use super::cleanup;
use super::disable_logins::disable_logins;
use super::drop_roles::{self, drop_one, drop_roles};
use super::end_sessions::{Open, end_sessions, end_those_left};
use super::jobs;
use super::left_behind;
use super::moved;
use super::servers::Servers;
use super::session::Session;
use super::sql_error::{LOCK_NOT_AVAILABLE, SqlError};
use super::standbys::end_on_standbys;
use super::uncommitted;
use mayfly_protocol::revocation::Ended;

/// Longest the first look may take: it reads a catalog, and shows whether the server still lives.
pub(super) const LOOK_WITHIN: Duration = Duration::from_secs(5);
/// Longest a batch waits for a lock, and the parts it is divided into where it does so in vain.
const BATCH_LOCK: Duration = Duration::from_millis(200);
const PART_LOCK: Duration = Duration::from_millis(30);
/// Longest a role by itself does, and how often.
const ALONE_LOCK: Duration = Duration::from_secs(1);
const ALONE_TRIES: u32 = 3;
/// How long a batch may take. What is left then is ended one by one.
const BATCH_WITHIN: Duration = Duration::from_secs(3);
/// How long the sessions of a batch may take to end, and those of a role by itself.
const BATCH_SESSIONS: Duration = Duration::from_millis(800);
const ALONE_SESSIONS: Duration = Duration::from_secs(5);
/// How long an account may take to appear whose transaction was made to end.
const APPEARS_WITHIN: Duration = Duration::from_secs(3);

/// A revocation, and its place in the batch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate<'t> {
    pub(super) index: usize,
    pub(super) task: &'t Revoke,
    /// Absent is absent for good.
    conclusive: bool,
}

/// A role that is due.
#[derive(Debug, Clone)]
pub(super) struct Due<'t> {
    pub(super) task: &'t Revoke,
    pub(super) oid: u32,
    pub(super) index: usize,
}

/// What became of each of a batch, in their order; none where it is to be ended by itself.
pub(super) struct Results {
    list: Vec<Option<Result<Ended, Failure>>>,
}

impl Results {
    pub(super) fn set(&mut self, index: usize, result: Result<Ended, Failure>) {
        self.list[index] = Some(result);
    }

    fn dropped(&mut self, roles: &[Due<'_>], dropped: Vec<drop_roles::Dropped>, identity: &str) {
        for (role, (at, late_seconds)) in roles.iter().zip(dropped) {
            let server = identity.to_owned();
            let ended = Ended::Dropped {
                at,
                server,
                late_seconds,
            };
            self.set(role.index, Ok(ended));
        }
    }
}

/// Revokes a batch, all with the same target, and whether what is found of each is so for good. One
/// result for each, in their order. None: it needs [`revoke_alone`].
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
        // What had no result of its own shares this one.
        for result in &mut results.list {
            result.get_or_insert_with(|| Err(failure.clone()));
        }
    }
    results.list
}

/// Revokes one, with all the time that it needs.
///
/// # Errors
/// What is in its way, by name.
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

/// A connection to the server of a task; the kept one where there is no other.
async fn open<'s>(servers: &'s Servers, task: &Revoke) -> Result<Session<'s>, Failure> {
    // A batch is all asked for by people, or none of it.
    let home = match servers.home_for(&task.target, task.asked).await {
        // A pooler in front of a full server does not say so, but keeps the connection waiting.
        Err(failure) if failure.full || failure.code == FailureCode::DatabaseUnreachable => {
            let kept = servers.kept_session(&task.target).await;
            kept.ok_or(failure)
        }
        home => home,
    };
    home.map(Session::for_ends)
}

/// Whether the server is another one than the role was made on, as far as is known.
fn is_other_server(task: &Revoke, identity: &str) -> bool {
    task.server.as_ref().is_some_and(|known| known != identity)
}

const TAKING: &str = "taking the login away";

async fn batch(
    servers: &Servers,
    home: &mut Session<'_>,
    tasks: &[(&Revoke, bool)],
    results: &mut Results,
) -> Result<(), Failure> {
    let identity = home.facts().identity.clone();
    let until = Instant::now() + BATCH_WITHIN;
    let mut candidates = Vec::new();
    let mut elsewhere = Vec::new();
    let mut seen = HashSet::new();
    for (index, (task, conclusive)) in tasks.iter().copied().enumerate() {
        // A reconciler's copy beside the message it is of: one of them waits.
        if !seen.insert((task.lease, &task.role)) {
            results.set(index, Ok(Ended::NotTried));
            continue;
        }
        if is_other_server(task, &identity) {
            elsewhere.push((index, task));
        } else {
            candidates.push(Candidate {
                index,
                task,
                conclusive,
            });
        }
    }
    for (index, result) in moved::look(home, &elsewhere).await? {
        results.set(index, result);
    }
    let mut due = Vec::new();
    let mut parts = Parts::of(candidates.clone(), until);
    while let Some(part) = parts.next(home) {
        match disable_logins(home, &part, &identity, results).await {
            Ok(some) => due.extend(some),
            Err(error) => parts.failed(part, error, home, TAKING)?,
        }
    }
    look_for_uncommitted(home, &candidates, results).await?;
    let found_one = |result: &Result<Ended, Failure>| matches!(result, Ok(Ended::NotDue { .. }));
    if results.list.iter().flatten().any(found_one) {
        servers.want_one(&tasks[0].0.target);
    }
    if due.is_empty() {
        return Ok(());
    }
    fault::point("revoke", "login_taken").await;

    let mut ended = Vec::new();
    let mut parts = Parts::of(due, until);
    while let Some(part) = parts.next(home) {
        match end_sessions(home, &part, BATCH_SESSIONS).await {
            // Those that do not end are another's matter.
            Ok(open) => ended.extend(part.into_iter().filter(|one| !open.contains_key(&one.oid))),
            Err(error) => parts.failed(part, error, home, ENDING)?,
        }
    }
    fault::point("revoke", "sessions_ended").await;
    if ended.is_empty() {
        return Ok(());
    }
    end_on_standbys(servers, home, &ended).await;
    if let Err(failure) = jobs::unschedule(servers, home, &ended).await {
        // Each by itself then: only one of them has the job.
        debug!(reason = failure.message, "jobs of accounts are in the way");
        return Ok(());
    }
    left_behind::take_away_soon(servers, home, &ended).await;

    let held = drop_roles::held(home, &ended).await;
    let held = held.map_err(|error| error.into_failure("looking what holds the accounts"))?;
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
    if !gone.is_empty() {
        fault::point("revoke", "dropped").await;
        end_those_left(home, &gone).await;
    }
    Ok(())
}

const ENDING: &str = "ending the account's sessions (the admin needs pg_signal_backend)";

/// A batch that is done at once where that is possible, and else in halves, until what is in the way
/// is by itself. That one is left to [`revoke_alone`].
struct Parts<T> {
    waiting: Vec<Vec<T>>,
    until: Instant,
    whole: bool,
}

impl<T> Parts<T> {
    fn of(all: Vec<T>, until: Instant) -> Self {
        Self {
            waiting: vec![all],
            until,
            whole: true,
        }
    }

    /// The next part, unless the time is over.
    fn next(&mut self, home: &mut Session<'_>) -> Option<Vec<T>> {
        let part = self.waiting.pop()?;
        // The first is always tried.
        if part.is_empty() || (!self.whole && Instant::now() > self.until) {
            return None;
        }
        home.wait_for_locks(if self.whole { BATCH_LOCK } else { PART_LOCK });
        self.whole = false;
        Some(part)
    }

    /// Divides a part that failed. Without the server nothing more can be done.
    fn failed(
        &mut self,
        mut part: Vec<T>,
        error: SqlError,
        home: &Session<'_>,
        doing: &str,
    ) -> Result<(), Failure> {
        if error.is_lost() || home.is_lost() {
            return Err(error.into_failure(doing));
        }
        debug!(
            sqlstate = error.code(),
            roles = part.len(),
            doing,
            "in parts"
        );
        if part.len() > 1 {
            let rest = part.split_off(part.len() / 2);
            self.waiting.extend([rest, part]);
        }
        Ok(())
    }
}

/// Takes the word back of roles that are absent for good, where somebody is making them.
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
        // Each by itself then, with the reason.
        Err(_) => names.iter().map(|name| (*name).to_owned()).collect(),
    };
    for one in absent {
        if made.iter().any(|name| name == one.task.role.as_str()) {
            results.list[one.index] = None;
        }
    }
    Ok(())
}

const LOOKING: &str = "looking whether the account is being made";

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
                    "the transaction that makes the account has not ended, as where its COMMIT waits for a synchronous standby; the account is ended as soon as it appears",
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
        // Another engine was quicker; the next look finds it absent.
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
                // A renewal may hold it whose COMMIT waits for a standby.
                if error.code() == LOCK_NOT_AVAILABLE {
                    let ended = uncommitted::end_work_on(home, &candidate.task.lease).await;
                    ended.map_err(|error| error.into_failure(TAKING))?;
                }
            }
            Err(error) => return Err(cleanup::held_by(home, error, TAKING).await),
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
