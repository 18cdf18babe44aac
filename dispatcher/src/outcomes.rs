//! What comes back from engines: answers, outcomes of revocations, heartbeats; and messages the
//! broker had no queue for. Each is opened, believed only from its own pool, stored, and then
//! acknowledged. Every message may come twice: the second changes nothing.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use jiff::Timestamp;
use mayfly_common::broker::{Incoming, Source};
use mayfly_common::fault;
use mayfly_common::names::LeaseId;
use mayfly_common::panics::caught;
use mayfly_common::request::RequestId;
use mayfly_common::seal::PublicKey;
use mayfly_common::task::{
    FailureCode, Head, Heartbeat, Instead, Kind, Outcome, OutcomeResult, Reply, ReplyResult,
    Verdict,
};
use mayfly_common::trace;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, error, info, warn};

use crate::app::App;
use crate::issue::send_what_follows;
use crate::lease::{Event, Lease};
use crate::replies::Delivered;
use crate::requests::may_answer;
use crate::store::{Found, Heard, Pool, Recipient, Said, StoreError};

/// Messages in hand at a time, of one kind.
const PREFETCH: u16 = 128;
/// Of these, worked on at a time; they share the store's commits.
const AT_ONCE: usize = 64;
const STORE_RETRY: Duration = Duration::from_millis(500);

/// Starts to take in all that comes, until `stop`.
pub(crate) fn start(
    app: &Arc<App>,
    replies: mpsc::Receiver<Incoming>,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) {
    tasks.spawn(each(app.clone(), replies, async |app, message| {
        reply(app, message).await
    }));
    let consume = |source: Source| {
        let (sink, messages) = mpsc::channel(usize::from(PREFETCH));
        let (broker, stop) = (app.broker.clone(), stop.clone());
        tasks.spawn(async move {
            broker
                .consume(source, PREFETCH, sink, stop, watch::channel(false).0)
                .await;
        });
        messages
    };
    let outcomes = consume(Source::Outcomes);
    let until = stop.clone();
    tasks.spawn(each(app.clone(), outcomes, async move |app, message| {
        outcome(app, message, &until).await
    }));
    tasks.spawn(each(
        app.clone(),
        consume(Source::Heartbeats),
        async |app, message| heartbeat(app, message).await,
    ));
    tasks.spawn(each(
        app.clone(),
        consume(Source::Unroutable),
        async |app, message| unroutable(app, message).await,
    ));
}

async fn each(
    app: Arc<App>,
    messages: mpsc::Receiver<Incoming>,
    work: impl AsyncFn(&App, Incoming),
) {
    let messages = futures_util::stream::unfold(messages, async |mut messages| {
        messages.recv().await.map(|message| (message, messages))
    });
    messages
        .for_each_concurrent(AT_ONCE, async |message| {
            caught("a message", work(&app, message)).await;
        })
        .await;
}

/// Opens a body that must come from the pool in its head, sealed with one of its keys. Gives the
/// request it names, and which key it was.
fn open<T: serde::de::DeserializeOwned>(
    app: &App,
    head: &Head,
    keys: &[PublicKey],
    body: &[u8],
) -> Option<(T, Option<RequestId>, PublicKey)> {
    let mut refused = None;
    for key in keys {
        match head.open_request(&app.identity.keys, key, body) {
            Ok((body, request)) => return Some((body, request, key.clone())),
            Err(error) => refused = Some(error),
        }
    }
    if let Some(error) = refused {
        refuse(app, head, error.reason(), &error.to_string());
    }
    None
}

fn refuse(app: &App, head: &Head, reason: &str, words: &str) {
    app.metrics.refused(reason);
    warn!(kind = head.kind.as_str(), pool = %head.pool, lease = ?head.lease, trace = trace(head),
        reason, "a message is refused: {words}");
}

fn trace(head: &Head) -> String {
    trace::trace_of(&head.traceparent)
}

/// A text with NUL would be refused by the store for ever. None of PostgreSQL's has one.
fn clean(text: &mut String) {
    if text.contains('\0') {
        *text = text.replace('\0', "\u{fffd}");
    }
}

/// The pool of a message; none where nothing is to be heard of it.
async fn pool_of(app: &App, head: &Head) -> Result<Option<Pool>, StoreError> {
    match app.store.pool(head.pool.clone()).await {
        Ok(pool) if pool.distrusted.is_none() => Ok(Some(pool)),
        Ok(_) => {
            refuse(app, head, "distrusted_pool", "its pool is distrusted");
            Ok(None)
        }
        Err(StoreError::NotFound(_)) => {
            refuse(app, head, "unknown_pool", "there is no such pool");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

async fn reply(app: &App, message: Incoming) {
    let Some(name) = message.correlation.clone() else {
        return;
    };
    let head = &message.head;
    if head.kind != Kind::Reply {
        return refuse(app, head, "other_kind", "not an answer");
    }
    let keys = match app.replies.keys(&name, &head.pool) {
        Some(keys) => Some(keys),
        // Nobody waits; but an account that was made too late, or twice, must go.
        None => pool_of(app, head)
            .await
            .unwrap_or(None)
            .map(|pool| pool.keys()),
    };
    let Some(keys) = keys else { return };
    let Some((mut answer, request, _)) = open::<Reply>(app, head, &keys, &message.body) else {
        return;
    };
    if let ReplyResult::Created(created) = &mut answer.result {
        clean(&mut created.server);
    }
    // The name is not authenticated; the lease in the head is.
    if head.lease.is_some_and(|lease| !may_answer(&name, &lease)) {
        return refuse(app, head, "other_lease", "the answer is for another lease");
    }
    let late = match app.replies.deliver(&name, request, answer) {
        Delivered::Taken => return,
        Delivered::Late(late) => late,
        Delivered::Refused(reason, words) => return refuse(app, head, reason, words),
    };
    let event = match late.result {
        ReplyResult::Created(created) => Event::Created(created, late.engine),
        ReplyResult::Renewed(until) | ReplyResult::Moved(until) => Event::Renewed(until),
        _ => return,
    };
    let Some(lease) = head.lease else { return };
    info!(%lease, trace = trace(head), "an answer came too late");
    let said = Said {
        pool: head.pool.clone(),
        role: None,
        found: None,
        event,
        late: true,
    };
    if let Err(error) = happened(app, head, lease, said).await {
        warn!(%lease, %error, "a late answer was not recorded; the reconciler looks after its account");
    }
}

/// Lets an event of a lease happen that a message reports, if it is the message's pool's to speak of.
async fn happened(
    app: &App,
    head: &Head,
    id: LeaseId,
    said: Said,
) -> Result<Option<Lease>, StoreError> {
    let refused = match app.store.hear(id, said, app.now()).await? {
        Heard::Applied(applied) => Ok(*applied),
        Heard::NotYet => return Ok(None),
        Heard::Unknown => {
            debug!(lease = %id, trace = trace(head), "a message about a lease this store does not have");
            return Ok(None);
        }
        Heard::OtherPool => Err(("other_pool", "an engine spoke for a lease of another pool")),
        Heard::OtherRole => Err((
            "other_role",
            "an engine spoke of a role that is not the lease's",
        )),
    };
    let applied = match refused {
        Ok(applied) => applied,
        Err((reason, words)) => {
            refuse(app, head, reason, words);
            return Ok(None);
        }
    };
    let status = &applied.lease.status;
    if applied.before != status.state {
        info!(lease = %id, trace = trace(head), from = applied.before.as_str(), to = status.state.as_str(), "lease");
    }
    if status.stuck && !status.state.is_settled() {
        warn!(lease = %id, trace = trace(head), attempts = status.attempts,
            last_error = status.last_error, "a revocation is stuck; it is tried again");
    }
    send_what_follows(app, &applied).await;
    Ok(Some(applied.lease))
}

async fn outcome(app: &App, message: Incoming, stop: &CancellationToken) {
    // A store that is away is waited for: the message stays unacknowledged meanwhile.
    while let Err(error) = record_outcome(app, &message).await {
        debug!(%error, "an outcome waits for the store");
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(STORE_RETRY) => {}
        }
    }
    fault::point("outcome", "recorded").await;
    message.ack().await;
}

async fn record_outcome(app: &App, message: &Incoming) -> Result<(), StoreError> {
    let head = &message.head;
    let Some(pool) = pool_of(app, head).await? else {
        return Ok(());
    };
    let Some((outcome, _, key)) = open::<Outcome>(app, head, &pool.keys(), &message.body) else {
        return Ok(());
    };
    if head.kind != Kind::Outcome || head.lease != Some(outcome.lease) {
        refuse(app, head, "other_lease", "head and body differ");
        return Ok(());
    }
    let by = outcome.engine.clone();
    let again = outcome.again_ms.map(Duration::from_millis);
    let found = match (&outcome.result, outcome.found_at) {
        (
            OutcomeResult::Dropped { server, .. } | OutcomeResult::Moved { server },
            Some(address),
        ) => {
            let mut server = server.clone();
            clean(&mut server);
            Some(Found { address, server })
        }
        _ => None,
    };
    // It may name authorities that are at the broker no more; what is given instead has them inside.
    let is_unread = matches!(&outcome.result, OutcomeResult::Failing(failure) if failure.code == FailureCode::NotUnderstood);
    let event = match outcome.result {
        OutcomeResult::Dropped {
            at,
            mut server,
            conclusive,
        }
        | OutcomeResult::Absent {
            at,
            mut server,
            conclusive,
        } => {
            clean(&mut server);
            Event::Gone {
                at,
                server,
                by,
                conclusive,
                seen: head.issued,
            }
        }
        OutcomeResult::NotDue { until, left_ms } => Event::NotDue {
            until,
            left: left_ms.map(Duration::from_millis),
        },
        // It is about to be ended there.
        OutcomeResult::Moved { .. } => Event::Found,
        OutcomeResult::Failing(mut failure) => {
            clean(&mut failure.message);
            failure.objects.iter_mut().for_each(clean);
            Event::Failing {
                failure,
                attempts: outcome.attempts,
                again,
            }
        }
    };
    let said = Said {
        pool: head.pool.clone(),
        role: outcome.role,
        found,
        event,
        late: false,
    };
    let lease = happened(app, head, outcome.lease, said).await?;
    if let Some(ticket) = outcome.ticket {
        let mut verdict = Verdict {
            ticket,
            retire: false,
            instead: None,
        };
        // One that the store does not know may be one that a restored store has forgotten.
        if let Some(lease) = &lease {
            verdict.retire = needs_no_more_tries(lease);
            verdict.instead = better_way(app, lease, outcome.attempts, again, is_unread).await?;
        } else {
            verdict.retire = is_anothers(app, head, outcome.lease).await?;
        }
        let asker = Recipient {
            key,
            ..pool.recipient()?
        };
        if let Err(error) = app
            .send_verdict(&outcome.engine, &asker, head, verdict)
            .await
        {
            debug!(lease = %outcome.lease, %error, "a verdict was not sent; the revocation is parked");
        }
    }
    Ok(())
}

/// Whether the lease is another pool's to end, as after it was taken over: then the message of this
/// one can go, and the reconciler sees to its end.
async fn is_anothers(app: &App, head: &Head, id: LeaseId) -> Result<bool, StoreError> {
    match app.store.lease(id).await {
        Ok(lease) => Ok(lease.pool != head.pool),
        Err(StoreError::NotFound(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether the message of a failing revocation can go.
fn needs_no_more_tries(lease: &Lease) -> bool {
    // One that is to be looked after once more may need it.
    lease.status.state.is_settled() && lease.status.next_reconcile.is_none()
}

/// Another way to end the account, for the message of the failing revocation: the engine parks it
/// in that one's place. Where it has given up waiting, nothing is sent that would be one too many.
async fn better_way(
    app: &App,
    lease: &Lease,
    attempts: u32,
    again: Option<Duration>,
    is_unread: bool,
) -> Result<Option<Instead>, StoreError> {
    if lease.status.state.is_settled() {
        return Ok(None);
    }
    let Some(revocation) = app.store.revocation(lease.id, attempts).await? else {
        return Ok(None);
    };
    if revocation.ways < 2 && !revocation.new_key && !is_unread {
        return Ok(None);
    }
    // A key that is refused is told in the log.
    Ok(app
        .seal_instead(&revocation, again.unwrap_or(Duration::ZERO))
        .ok())
}

async fn heartbeat(app: &App, message: Incoming) {
    let head = &message.head;
    if let Ok(Some(pool)) = pool_of(app, head).await
        && let Some((beat, _, key)) = open::<Heartbeat>(app, head, &pool.keys(), &message.body)
    {
        if head.kind == Kind::Heartbeat && beat.pool == head.pool {
            let heard = app.registry.hear(beat, key, head.issued, Timestamp::now());
            if let Err(ignored) = heard {
                refuse(app, head, ignored.reason(), ignored.words());
            }
        } else {
            refuse(app, head, "other_pool", "head and body differ");
        }
    }
    message.ack().await;
}

/// Something the topology should have taken: it is declared again, and the reconciler covers
/// the lease. The parked end of a lease that ended early, of a pool that is gone, is no alarm.
async fn unroutable(app: &App, message: Incoming) {
    let head = &message.head;
    if head.kind == Kind::Probe {
        crate::delays::astray(app, &message);
        return message.ack().await;
    }
    let settled = match head.lease {
        Some(id) => match app.store.lease(id).await {
            Ok(lease) => lease.status.state.is_settled(),
            Err(StoreError::NotFound(_)) => true,
            Err(_) => false,
        },
        None => false,
    };
    app.metrics.unroutable(!settled);
    if settled {
        info!(kind = head.kind.as_str(), pool = %head.pool, lease = ?head.lease, "a message of a settled lease found no queue");
    } else {
        error!(kind = head.kind.as_str(), pool = %head.pool, lease = ?head.lease, trace = trace(head),
            "a message found no queue; everything is declared again");
        crate::delays::mend(app).await;
        crate::reconciler::declare_pools(app, false).await;
    }
    message.ack().await;
}
