//! Requests, creates first of all: delivery, deadline, PostgreSQL, reply, ack. Each may be run
//! twice: the second create finds the role and answers the same.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use mayfly_common::broker::Incoming;
use mayfly_common::fault;
use mayfly_common::names::{InstallationId, LeaseId};
use mayfly_common::panics::caught;
use mayfly_common::request::RequestId;
use mayfly_common::target::Target;
use mayfly_common::task::{
    Check, CheckWhat, Create, Created, Failure, FailureCode, GrantsOf, HasTarget, Kind, Refresh,
    Renew, ReplyResult, Rotate, Sweep, Tidy,
};
use mayfly_common::window::{self, Timing};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;
use tracing::{Instrument, debug, info, info_span, warn};

use crate::metrics::Ending;
use crate::pg;
use crate::work::Engine;

/// Requests delivered and not settled, at most. Of those for one server eight are worked on at a
/// time; the others wait.
pub(crate) const PREFETCH: u16 = 32;
/// How long a request waits for a place at a server that does not answer those before it.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a renewal's answer waits for its grants to be looked at.
const REFRESH_WITHIN: Duration = Duration::from_secs(3);

/// Works on requests until the source ends.
pub(crate) async fn run(
    engine: Arc<Engine>,
    mut creates: mpsc::Receiver<Incoming>,
    tasks: TaskTracker,
) {
    while let Some(incoming) = creates.recv().await {
        let engine = engine.clone();
        tasks.spawn(async move {
            let lease = incoming
                .head
                .lease
                .map(|id| id.to_string())
                .unwrap_or_default();
            let span = info_span!(
                "request",
                kind = incoming.head.kind.as_str(),
                lease,
                traceparent = incoming.head.traceparent
            );
            caught("a request", handle(&engine, incoming).instrument(span)).await;
        });
    }
}

async fn handle(engine: &Engine, mut incoming: Incoming) {
    let kind = incoming.head.kind;
    engine.metrics.begun(kind);
    let arrived = incoming.arrived;
    fault::point(kind.as_str(), "delivered").await;
    let mut name = None;
    let result = match admit(engine, &incoming) {
        Ok(()) => {
            let work = Box::pin(work(engine, &incoming, &mut name));
            let work = caught(kind.as_str(), work);
            work.await.unwrap_or_else(|| Err(engine.mistaken()))
        }
        Err(refused) => Err(refused),
    };
    let (ending, result) = match result {
        Ok(result) => (Ending::Ok, result),
        Err(mut failure) => {
            // Otherwise another engine has it, or will: that one may make the account.
            failure.nothing_made = failure.nothing_made && incoming.take_for_good().await;
            warn!(
                kind = kind.as_str(),
                code = failure.code.as_str(),
                reason = failure.message,
                "a request could not be met"
            );
            if let Some(span) = &mut incoming.span {
                span.fail(failure.code.as_str());
            }
            let ending = match failure.code {
                FailureCode::NotUnderstood | FailureCode::PastDeadline => Ending::Refused,
                _ => Ending::Failed,
            };
            (ending, ReplyResult::Failed(failure))
        }
    };
    engine.reply(&incoming, name, result).await;
    fault::point(kind.as_str(), "replied").await;
    incoming.ack().await;
    engine
        .metrics
        .ended(kind, ending, arrived.elapsed().as_secs_f64());
}

/// Refuses a request that was recorded and is sent again, by the window that dispatcher and engine
/// have in common: what an honest one may still do is bounded without comparing clocks, by its
/// expiry in the queue and by [`mayfly_common::task::CREATE_BUDGET`].
fn admit(engine: &Engine, incoming: &Incoming) -> Result<(), Failure> {
    let head = &incoming.head;
    let (reason, words) = match window::judge(head.issued, head.deadline, Timestamp::now()) {
        Timing::InTime => return Ok(()),
        Timing::Late => ("past_deadline", "takes the task for long overdue"),
        Timing::OfTheFuture => (
            "clock_behind",
            "has a clock that is behind the dispatcher's, and could not tell an old task from a new one",
        ),
    };
    engine.metrics.refused(reason);
    Err(Failure::new(
        FailureCode::PastDeadline,
        format!(
            "engine {} {words}; do the clocks of dispatcher and engine agree to {} s?",
            engine.name,
            window::CLOCK_ALLOWANCE.as_secs()
        ),
    ))
}

/// An account that was ended here is not made again: its create can only be a recorded one.
fn not_ended(engine: &Engine, lease: LeaseId) -> Result<(), Failure> {
    if !engine.ended.has(lease) {
        return Ok(());
    }
    engine.metrics.refused("ended");
    Err(Failure::new(
        FailureCode::Expired,
        format!("engine {} has ended the account of this lease", engine.name),
    ))
}

/// Opens a request, keeps the name that its answer must bear, and has the authorities that it names.
async fn open<T: DeserializeOwned + HasTarget>(
    engine: &Engine,
    incoming: &Incoming,
    name: &mut Option<RequestId>,
) -> Result<T, Failure> {
    match engine.open_request::<T>(incoming) {
        Ok((mut task, asked)) => {
            *name = asked;
            engine.find_authorities(task.target_mut()).await?;
            Ok(task)
        }
        Err(error) => {
            engine.metrics.refused(error.reason());
            Err(Failure::new(
                FailureCode::NotUnderstood,
                format!("engine {}: {error}", engine.name),
            ))
        }
    }
}

/// A request about a lease: head and body must name the same.
fn same_lease(engine: &Engine, incoming: &Incoming, lease: LeaseId) -> Result<(), Failure> {
    if incoming.head.lease == Some(lease) {
        return Ok(());
    }
    engine.metrics.refused("not_authentic");
    Err(Failure::new(
        FailureCode::NotUnderstood,
        "the task names two leases",
    ))
}

async fn work(
    engine: &Engine,
    incoming: &Incoming,
    name: &mut Option<RequestId>,
) -> Result<ReplyResult, Failure> {
    match incoming.head.kind {
        Kind::Create => {
            let task: Create = open(engine, incoming, name).await?;
            same_lease(engine, incoming, task.lease)?;
            not_ended(engine, task.lease)?;
            let created = create(engine, incoming, &task).await?;
            Ok(ReplyResult::Created(created))
        }
        Kind::Renew => {
            let task: Renew = open(engine, incoming, name).await?;
            same_lease(engine, incoming, task.lease)?;
            let _place = engine.servers.door(&task.target).request(PATIENCE).await?;
            let renewed = pg::renew(&engine.servers, &task).await?;
            if let Some(of) = &task.of {
                let looking = refresh(engine, task.installation, &task.target, of);
                // The end is moved; the background look does what this one does not.
                match tokio::time::timeout(REFRESH_WITHIN, looking).await {
                    Ok(Ok(_)) => {}
                    Ok(Err(failure)) => {
                        warn!(role = %task.role, code = failure.code.as_str(), reason = failure.message, "an account was renewed, but its grants were not looked at");
                    }
                    Err(_) => {
                        debug!(role = %task.role, "an account was renewed; its grants take longer");
                    }
                }
            }
            match renewed {
                pg::Renewed::Until(until) => {
                    info!(role = %task.role, expiration = %until, "renewed an account");
                    Ok(ReplyResult::Renewed(until))
                }
                pg::Renewed::MovedMeanwhile(until) => Ok(ReplyResult::Moved(until)),
            }
        }
        Kind::Sweep => {
            let task: Sweep = open(engine, incoming, name).await?;
            let _place = engine.servers.door(&task.target).request(PATIENCE).await?;
            let ledger = pg::sweep(&engine.servers, &task).await?;
            Ok(ReplyResult::Ledger(ledger))
        }
        Kind::Refresh => {
            let task: Refresh = open(engine, incoming, name).await?;
            let _place = engine.servers.door(&task.target).request(PATIENCE).await?;
            let in_use = refresh(engine, task.installation, &task.target, &task.of).await?;
            Ok(ReplyResult::Refreshed { in_use })
        }
        Kind::Rotate => {
            let task: Rotate = open(engine, incoming, name).await?;
            let _place = engine.servers.door(&task.target).request(PATIENCE).await?;
            let rotated = pg::rotate(&engine.servers, &task, incoming.arrived).await?;
            Ok(ReplyResult::Rotated(rotated))
        }
        Kind::Check => {
            let task: Check = open(engine, incoming, name).await?;
            let _place = engine.servers.door(&task.target).request(PATIENCE).await?;
            if let CheckWhat::Ready { database, grants } = &task.what {
                let set = pg::GrantSet {
                    installation: &task.installation,
                    target: &task.target,
                    database,
                    grants,
                };
                let arrived = incoming.arrived.instant();
                pg::prepare(&engine.servers, &engine.grant_roles, &set, arrived).await?;
                return Ok(ReplyResult::Checked(Vec::new()));
            }
            let findings = pg::check(&engine.servers, &task).await?;
            Ok(ReplyResult::Checked(findings))
        }
        Kind::Tidy => {
            let task: Tidy = open(engine, incoming, name).await?;
            let _place = engine.servers.door(&task.target).request(PATIENCE).await?;
            let tidied = pg::tidy(&engine.servers, &task).await?;
            for role in &tidied.removed {
                info!(role, "removed a role nothing needs");
            }
            Ok(ReplyResult::Tidied(tidied))
        }
        kind => {
            engine.metrics.refused("unknown_version");
            Err(Failure::new(
                FailureCode::NotUnderstood,
                format!("engine {} takes no {} request", engine.name, kind.as_str()),
            ))
        }
    }
}

/// Brings a grant role up to date where it has members. Whether it has.
async fn refresh(
    engine: &Engine,
    installation: InstallationId,
    target: &Target,
    of: &GrantsOf,
) -> Result<bool, Failure> {
    let set = pg::GrantSet {
        installation: &installation,
        target,
        database: &of.database,
        grants: &of.grants,
    };
    let granted = engine
        .grant_roles
        .refresh_in_use(&engine.servers, &set)
        .await?;
    if let Some(skipped) = granted.as_ref().and_then(|granted| granted.skipped) {
        engine.metrics.skipped(skipped);
    }
    Ok(granted.is_some())
}

async fn create(engine: &Engine, incoming: &Incoming, task: &Create) -> Result<Created, Failure> {
    let mut notes = pg::Notes::default();
    let created = async {
        let _place = engine.servers.door(&task.target).request(PATIENCE).await?;
        pg::create(
            &engine.servers,
            &engine.grant_roles,
            task,
            incoming.arrived,
            &mut notes,
        )
        .await
    };
    let created = created.await;
    let mut created = created.map_err(|failure| Failure {
        nothing_made: !notes.begun,
        ..failure
    });
    if created.is_ok() {
        pg::wait_for_replicas(&engine.servers, task, incoming.arrived, &mut notes).await;
    }
    for reason in &notes.retries {
        engine.metrics.retried(reason);
    }
    if let Some(skipped) = notes.skipped {
        engine.metrics.skipped(skipped);
    }
    if let Ok(created) = &mut created {
        created.warnings = std::mem::take(&mut notes.warnings);
        info!(role = %task.role, expiration = %created.expiration, "made an account");
    }
    created
}
