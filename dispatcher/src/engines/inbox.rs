//! Messages from engines: answers, outcomes of revocations, heartbeats; and messages that the broker
//! returned. Each is opened, accepted only from its own pool, stored, and then acked. Every message may
//! arrive twice: the second changes nothing.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use jiff::Timestamp;
use mayfly_common::broker::{Incoming, Source};
use mayfly_common::fault;
use mayfly_common::panics::caught;
use mayfly_common::trace;
use mayfly_protocol::names::LeaseId;
use mayfly_protocol::request::RequestId;
use mayfly_protocol::seal::PublicKey;
use mayfly_protocol::task::{Head, Heartbeat, Kind, Outcome, Reply, ReplyResult};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, error, info, warn};

use super::call::may_answer;
use super::replies::Delivered;
use super::{declare, delays, outbox};
use crate::app::App;
use crate::leases::outcomes::{self, Disbelieved};
use crate::store::{Pool, Recipient, Report, StoreError};
use mayfly_protocol::lease::{Event, Lease};

/// Maximum number of unacked messages of one kind.
const PREFETCH: u16 = 128;
/// Maximum number of these that are worked on at a time. They share the store's commits.
const AT_ONCE: usize = 64;
const STORE_RETRY: Duration = Duration::from_millis(500);

/// Consumes all these messages until `stop`.
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

/// Opens a body that must be sealed with a key of the pool in its head. Returns the request that it names,
/// and the key.
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

/// The pool of a message; `None` if its messages are refused.
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
        return refuse(app, head, "other_kind", "the message is not an answer");
    }
    let keys = match app.replies.keys(&name, &head.pool) {
        Some(keys) => Some(keys),
        // Nobody waits, but an account that was made too late, or twice, must end.
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
        created.server = outcomes::clean(&created.server);
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
    let (Some(event), Some(lease)) = (late_event(late), head.lease) else {
        return;
    };
    info!(%lease, trace = trace(head), "an answer came too late");
    let report = Report {
        pool: head.pool.clone(),
        role: None,
        found: None,
        event,
        late: true,
    };
    if let Err(error) = hear(app, head, lease, report).await {
        warn!(%lease, %error, "a late answer was not recorded; the reconciler ends its account");
    }
}

/// The event for a lease from an answer whose caller has left.
fn late_event(late: Reply) -> Option<Event> {
    match late.result {
        ReplyResult::Created(created) => Some(Event::Created(created, late.engine)),
        ReplyResult::Renewed(until) | ReplyResult::Moved(until) => Some(Event::Renewed(until)),
        _ => None,
    }
}

/// [`outcomes::hear`]; a report that is not accepted is refused.
async fn hear(
    app: &App,
    head: &Head,
    id: LeaseId,
    report: Report,
) -> Result<Option<Lease>, StoreError> {
    match outcomes::hear(app, id, report, &trace(head)).await? {
        Ok(lease) => Ok(lease),
        Err(Disbelieved(reason, words)) => {
            refuse(app, head, reason, words);
            Ok(None)
        }
    }
}

async fn outcome(app: &App, message: Incoming, stop: &CancellationToken) {
    // While the store is away, this waits and the message stays unacked.
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
        refuse(
            app,
            head,
            "other_lease",
            "head and body name different leases or engines",
        );
        return Ok(());
    }
    let report = outcomes::report(head.pool.clone(), head.issued, &outcome);
    let lease = hear(app, head, outcome.lease, report).await?;
    let verdict = outcomes::verdict(app, &head.pool, &outcome, lease.as_ref()).await?;
    if let Some(verdict) = verdict {
        let asker = Recipient {
            key,
            ..pool.recipient()?
        };
        let sent = outbox::verdict(app, &outcome.engine, &asker, head, verdict).await;
        if let Err(error) = sent {
            debug!(lease = %outcome.lease, %error, "a verdict was not sent; the engine parks the revocation");
        }
    }
    Ok(())
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
            refuse(
                app,
                head,
                "other_pool",
                "head and body name different leases or engines",
            );
        }
    }
    message.ack().await;
}

/// A message that a queue should have taken: the queues are declared again, and the reconciler ends the
/// lease. The parked end of a lease that has ended, of a deleted pool, is no alarm.
async fn unroutable(app: &App, message: Incoming) {
    let head = &message.head;
    if head.kind == Kind::Probe {
        delays::astray(app, &message);
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
        declare::mend(app).await;
        declare::declare_pools(app, false).await;
    }
    message.ack().await;
}
