//! Ending the roles of leases, a batch for one server at a time: no more logins, sessions ended,
//! roles dropped. What holds a role back goes to [`super::cleanup`].
//!
//! Run twice, it finds the role absent. A role of the same name with another comment is neither
//! touched nor called absent.

use std::collections::HashSet;
use std::time::Duration;

use jiff::Timestamp;
use mayfly_common::fault;
use mayfly_common::task::{Failure, FailureCode, Revoke};
use tokio_postgres::error::SqlState;
use tracing::debug;

use crate::decide::{Ended, Found, Verdict, decide};

use super::cleanup;
use super::door::place;
use super::left_behind;
use super::session::{Servers, Session};
use super::sql::{ident, lease_comment, literal, literals, moment, parse_moment};
use super::sql_error::SqlError;

/// Tries of one transaction against others that write the same rows.
const TRIES: u32 = 5;
/// SQLSTATE of our own guard (class `MF` is nobody's).
const MADE_ANEW: &str = "MF005";
/// Longest the first look may take: it reads a catalog, and shows whether the server still lives.
const LOOK_WITHIN: Duration = Duration::from_secs(5);
/// How long a batch may take that must be ended role by role. What is left then makes room for
/// the tasks of other servers.
const BATCH_WITHIN: Duration = Duration::from_secs(15);
/// How long the sessions of a role may take to end.
const SESSIONS_END_WITHIN: Duration = Duration::from_secs(10);

/// A role that is due.
#[derive(Debug, Clone)]
pub(super) struct Due<'t> {
    pub(super) task: &'t Revoke,
    pub(super) oid: u32,
    index: usize,
}

/// Revokes a batch, all with the same target. One result for each, in their order.
pub(crate) async fn revoke(servers: &Servers, tasks: &[&Revoke]) -> Vec<Result<Ended, Failure>> {
    let Some(first) = tasks.first() else {
        return vec![];
    };
    // A batch is all asked for by people, or none of it.
    let home = match servers.home_for(&first.target, first.asked).await {
        Ok(home) => home,
        Err(failure) if failure.full => match servers.kept_session(&first.target).await {
            Some(home) => home,
            None => return vec![Err(failure); tasks.len()],
        },
        Err(failure) => return vec![Err(failure); tasks.len()],
    };
    let mut results = Results {
        list: vec![None; tasks.len()],
    };
    if let Err(failure) = batch(servers, &home, tasks, &mut results).await {
        home.give_up().await;
        // What had no result of its own shares this one.
        return results
            .list
            .into_iter()
            .map(|r| r.unwrap_or_else(|| Err(failure.clone())))
            .collect();
    }
    home.release();
    results
        .list
        .into_iter()
        .map(|r| {
            r.unwrap_or_else(|| {
                Err(Failure::new(
                    FailureCode::StatementFailed,
                    "the revocation has no result",
                ))
            })
        })
        .collect()
}

struct Results {
    list: Vec<Option<Result<Ended, Failure>>>,
}

impl Results {
    fn set(&mut self, index: usize, result: Result<Ended, Failure>) {
        self.list[index] = Some(result);
    }
}

async fn batch(
    servers: &Servers,
    home: &Session<'_>,
    tasks: &[&Revoke],
    results: &mut Results,
) -> Result<(), Failure> {
    let identity = &home.facts().identity;
    let until = tokio::time::Instant::now() + BATCH_WITHIN;
    let mut candidates = Vec::new();
    let mut seen = HashSet::new();
    for (index, task) in tasks.iter().copied().enumerate() {
        // A reconciler's copy beside the message it is of: one of them waits.
        if !seen.insert((task.lease, &task.role)) {
            results.set(index, Ok(Ended::NotTried));
            continue;
        }
        match &task.server {
            Some(server) if server != identity => results.set(
                index,
                Err(Failure::new(
                    FailureCode::OtherServer,
                    format!(
                        "{} is now another server than the one role {} was made on",
                        place(&task.target),
                        task.role
                    ),
                )),
            ),
            _ => candidates.push((index, task)),
        }
    }
    let mut due = match close_doors(home, &candidates, identity, results).await {
        Ok(due) => due,
        // One of the batch stands in the way of the others.
        Err(error) if candidates.len() > 1 && !error.is_lost() => {
            let mut due = Vec::new();
            for candidate in candidates {
                if tokio::time::Instant::now() > until {
                    results.set(candidate.0, Ok(Ended::NotTried));
                    continue;
                }
                match close_doors(home, &[candidate], identity, results).await {
                    Ok(one) => due.extend(one),
                    Err(error) if error.is_lost() => {
                        return Err(error.into_failure("taking the login away"));
                    }
                    Err(error) => results.set(
                        candidate.0,
                        Err(error.into_failure("taking the login away")),
                    ),
                }
            }
            due
        }
        Err(error) => return Err(error.into_failure("taking the login away")),
    };
    if results
        .list
        .iter()
        .flatten()
        .any(|result| matches!(result, Ok(Ended::NotDue { .. })))
    {
        servers.want_one(&tasks[0].target);
    }
    if due.is_empty() {
        return Ok(());
    }
    due.sort_by(|a, b| a.task.role.cmp(&b.task.role));
    fault::point("revoke", "login_taken").await;
    let due = match end_sessions(home, &due).await {
        Ok(()) => due,
        Err(_) if due.len() > 1 && !home.is_lost() => {
            let mut ended = Vec::new();
            for role in due {
                if tokio::time::Instant::now() > until {
                    results.set(role.index, Ok(Ended::NotTried));
                    continue;
                }
                match end_sessions(home, std::slice::from_ref(&role)).await {
                    Ok(()) => ended.push(role),
                    Err(failure) if home.is_lost() => return Err(failure),
                    Err(failure) => results.set(role.index, Err(failure)),
                }
            }
            ended
        }
        Err(failure) => return Err(failure),
    };
    fault::point("revoke", "sessions_ended").await;
    if let Some(one) = due.first() {
        let oids: Vec<u32> = due.iter().map(|role| role.oid).collect();
        let Revoke {
            target,
            installation,
            ..
        } = one.task;
        left_behind::take_away(servers, home, target, installation, Some(&oids)).await;
    }
    match drop_roles(home, &due).await {
        Ok(dropped) => {
            fault::point("revoke", "dropped").await;
            for (role, (at, late_seconds)) in due.iter().zip(dropped) {
                results.set(
                    role.index,
                    Ok(Ended::Dropped {
                        at,
                        server: identity.clone(),
                        late_seconds,
                    }),
                );
            }
        }
        Err(error) if error.is_lost() => return Err(error.into_failure("dropping the role")),
        Err(error) => {
            debug!(
                sqlstate = error.code(),
                roles = due.len(),
                "dropping role by role"
            );
            for role in &due {
                if tokio::time::Instant::now() > until {
                    results.set(role.index, Ok(Ended::NotTried));
                    continue;
                }
                let dropped = drop_one(servers, home, role).await;
                // Each of the others would wait in vain as long as this one did. A database that
                // cannot be reached holds back its own accounts only.
                if let Err(failure) = &dropped
                    && home.is_lost()
                {
                    return Err(failure.clone());
                }
                let dropped = dropped.map(|dropped| match dropped {
                    Some((at, late_seconds)) => Ended::Dropped {
                        at,
                        server: identity.clone(),
                        late_seconds,
                    },
                    // Another engine was quicker; the next look finds it absent.
                    None => Ended::NotTried,
                });
                results.set(role.index, dropped);
            }
        }
    }
    Ok(())
}

/// Looks the roles up and, in the same transaction, takes the login from those that are due. A
/// role whose end was moved meanwhile keeps it.
async fn close_doors<'t>(
    home: &Session<'_>,
    candidates: &[(usize, &'t Revoke)],
    identity: &str,
    results: &mut Results,
) -> Result<Vec<Due<'t>>, SqlError> {
    let mut tries = 0;
    loop {
        tries += 1;
        match close_doors_once(home, candidates, identity, results).await {
            Ok(due) => return Ok(due),
            Err(error) => {
                home.rollback().await;
                if !error.is_passing() || tries == TRIES {
                    return Err(error);
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

async fn close_doors_once<'t>(
    home: &Session<'_>,
    candidates: &[(usize, &'t Revoke)],
    identity: &str,
    results: &mut Results,
) -> Result<Vec<Due<'t>>, SqlError> {
    if candidates.is_empty() {
        return Ok(vec![]);
    }
    let names = || candidates.iter().map(|(_, task)| task.role.as_str());
    let look = look_up(names());
    let rows = home
        .query_within(&format!("{}{look}", home.begin()), LOOK_WITHIN)
        .await?;
    let mut due = Vec::new();
    for (index, task) in candidates.iter().copied() {
        let found = parse_found(&rows, task);
        match decide(task.mode, found.as_ref()) {
            Verdict::Due => {
                let oid = found.map_or(0, |found| found.oid);
                due.push(Due { task, oid, index });
            }
            Verdict::Absent => results.set(
                index,
                Ok(Ended::Absent { at: parse_now(&rows), server: identity.to_owned() }),
            ),
            Verdict::NotDue { until, left } => results.set(index, Ok(Ended::NotDue { until, left })),
            Verdict::Foreign => results.set(
                index,
                Err(Failure::new(
                    FailureCode::ForeignRole,
                    format!("role {} exists with another comment; it is somebody else's and is not touched", task.role),
                )),
            ),
        }
    }
    if due.is_empty() {
        home.query("COMMIT").await?;
        return Ok(due);
    }
    let mut sorted: Vec<&str> = due.iter().map(|role| role.task.role.as_str()).collect();
    sorted.sort_unstable();
    let mut text: Vec<String> = sorted
        .iter()
        .map(|name| format!("ALTER ROLE {} NOLOGIN", ident(name)))
        .collect();
    // The rows are ours now: what is read here cannot move any more.
    text.push(look_up(sorted.iter().copied()));
    let again = home.query(&text.join("; ")).await?;
    let moved = due.iter().any(|role| {
        let found = parse_found(&again, role.task);
        !matches!(decide(role.task.mode, found.as_ref()), Verdict::Due)
    });
    if moved {
        // A renewal won; the next look sees its date.
        return Err(SqlError::passing("a lease was renewed meanwhile"));
    }
    home.query("COMMIT").await?;
    Ok(due)
}

fn look_up<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    // `infinity` is no end; before 17 it cannot even be subtracted from.
    format!(
        "SELECT rolname, oid, shobj_description(oid, 'pg_authid'), \
           CASE WHEN isfinite(rolvaliduntil) THEN {until} END, \
           CASE WHEN isfinite(rolvaliduntil) THEN extract(epoch FROM rolvaliduntil - clock_timestamp()) END, {now} \
         FROM pg_roles WHERE rolname IN ({names}) \
         UNION ALL SELECT NULL, NULL, NULL, NULL, NULL, {now}",
        until = moment("rolvaliduntil"),
        now = moment("clock_timestamp()"),
        names = literals(names),
    )
}

/// The server's clock, in the row that is always there.
fn parse_now(rows: &super::session::Rows) -> Timestamp {
    rows.last()
        .and_then(|row| row.get(5).and_then(Option::as_deref))
        .and_then(parse_moment)
        .unwrap_or_else(Timestamp::now)
}

fn parse_found(rows: &super::session::Rows, task: &Revoke) -> Option<Found> {
    let row = rows.iter().find(|row| {
        row.first()
            .is_some_and(|cell| cell.as_deref() == Some(task.role.as_str()))
    })?;
    let cell = |n: usize| row.get(n).and_then(Option::as_deref);
    Some(Found {
        oid: cell(1)?.parse().ok()?,
        ours: cell(2) == Some(&lease_comment(&task.installation, &task.lease)),
        until: cell(3).and_then(parse_moment),
        left: cell(4).and_then(|text| text.parse().ok()),
        now: cell(5).and_then(parse_moment)?,
    })
}

/// Ends the roles' sessions and waits until they are gone. After `DROP ROLE` nobody but a
/// superuser may, and a session that did `SET ROLE` would live on.
async fn end_sessions(home: &Session<'_>, due: &[Due<'_>]) -> Result<(), Failure> {
    let oids = due
        .iter()
        .map(|role| role.oid.to_string())
        .collect::<Vec<_>>()
        .join(", ");
    let end = format!(
        "SELECT usename, count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usesysid IN ({oids}) GROUP BY usename"
    );
    let until = tokio::time::Instant::now() + SESSIONS_END_WITHIN;
    let mut pause = Duration::from_millis(5);
    let mut member = false;
    loop {
        let open = match home.transact(&end).await {
            Ok(open) => open,
            // Made without the right: the admin takes it.
            Err(error) if !member && error.code() == "42501" => {
                member = true;
                for role in due {
                    cleanup::join(home, role.task.role.as_str())
                        .await
                        .map_err(|error| {
                            error.into_failure(
                                "ending the account's sessions (the admin needs pg_signal_backend)",
                            )
                        })?;
                }
                continue;
            }
            Err(error) => return Err(error.into_failure("ending the account's sessions")),
        };
        if open.is_empty() {
            return Ok(());
        }
        if tokio::time::Instant::now() > until {
            return Err(Failure::new(
                FailureCode::StatementFailed,
                format!(
                    "sessions of the account do not end within {} s",
                    SESSIONS_END_WITHIN.as_secs()
                ),
            ));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(200));
    }
}

/// Drops roles in one transaction, if none may log in: such a one is not the one whose login was
/// taken away, but was made anew by a create that came twice. When each was dropped, and how late.
async fn drop_roles(
    home: &Session<'_>,
    due: &[Due<'_>],
) -> Result<Vec<(Timestamp, f64)>, SqlError> {
    let names = due
        .iter()
        .map(|role| ident(role.task.role.as_str()))
        .collect::<Vec<_>>()
        .join(", ");
    let look = look_up(due.iter().map(|role| role.task.role.as_str()));
    let guard = format!(
        "BEGIN IF EXISTS (SELECT FROM pg_roles WHERE rolname IN ({}) AND rolcanlogin) THEN \
           RAISE EXCEPTION 'made anew' USING ERRCODE = '{MADE_ANEW}'; END IF; END",
        literals(due.iter().map(|role| role.task.role.as_str()))
    );
    let text = format!("{look}; DO {}; DROP ROLE {names}", literal(&guard));
    let mut tries = 0;
    loop {
        tries += 1;
        match home.transact(&text).await {
            Ok(rows) => {
                return Ok(due
                    .iter()
                    .map(|role| {
                        let found = parse_found(&rows, role.task);
                        let at = found
                            .as_ref()
                            .map_or_else(Timestamp::now, |found| found.now);
                        (at, -found.and_then(|found| found.left).unwrap_or(0.0))
                    })
                    .collect());
            }
            Err(error) if error.is_passing() && error.code() != "55P03" && tries < TRIES => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Drops one role, after taking away what holds it back. None where it was gone already.
async fn drop_one(
    servers: &Servers,
    home: &Session<'_>,
    role: &Due<'_>,
) -> Result<Option<(Timestamp, f64)>, Failure> {
    let only = std::slice::from_ref(role);
    let is_gone = |error: &SqlError| error.is(&[SqlState::UNDEFINED_OBJECT]);
    match drop_roles(home, only).await {
        Ok(dropped) => return Ok(Some(dropped[0])),
        Err(error) if is_gone(&error) => return Ok(None),
        Err(error) if error.is_lost() || error.code() == MADE_ANEW => {
            return Err(error.into_failure("dropping the role"));
        }
        Err(_) => {}
    }
    cleanup::detach(servers, home, role).await?;
    match drop_roles(home, only).await {
        Ok(dropped) => Ok(Some(dropped[0])),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(cleanup::explain(home, role, error).await),
    }
}

/// The identity of a role in messages.
pub(super) fn name_literal(role: &Due<'_>) -> String {
    literal(role.task.role.as_str())
}
