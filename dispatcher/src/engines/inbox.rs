//! Messages from engines: answers and heartbeats; and messages that the broker returned. Each is opened and
//! accepted only from its own pool. Every message may arrive twice: the second changes nothing.
//! `leases/inbox.rs` takes what they report about leases.

use std::sync::Arc;

use futures_util::StreamExt;
use jiff::Timestamp;
use mayfly_common::broker::{Incoming, Source};
use mayfly_common::panics::caught;
use mayfly_common::trace;
use mayfly_protocol::names::LeaseId;
use mayfly_protocol::request::RequestId;
use mayfly_protocol::seal::PublicKey;
use mayfly_protocol::task::{Head, Heartbeat, Kind, Reply, ReplyResult};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use super::call::may_answer;
use super::{declare, delays};
use crate::app::App;
use crate::app::replies::Delivered;
use crate::store::{Pool, StoreError};

/// Maximum number of unacked messages of one kind.
const PREFETCH: u16 = 512;
/// Maximum number of messages that are worked on at a time. Their outcomes share the store's commits, so one commit
/// records at most this many.
const AT_ONCE: usize = 256;
/// Longest text of an engine that is stored, in bytes. All texts of a page of leases are in memory together.
const TEXT_MAX: usize = 4 * 1024;

/// Consumes heartbeats and returned messages until `stop`.
pub(crate) fn start(app: &Arc<App>, tasks: &TaskTracker, stop: &CancellationToken) {
    let heartbeats = consume(app, Source::Heartbeats, tasks, stop);
    tasks.spawn(each(app.clone(), heartbeats, async |app, message| {
        heartbeat(app, message).await
    }));
    let returned = consume(app, Source::Unroutable, tasks, stop);
    tasks.spawn(each(app.clone(), returned, async |app, message| {
        unroutable(app, message).await
    }));
}

/// Consumes messages of this source until `stop`.
pub(crate) fn consume(
    app: &App,
    source: Source,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) -> mpsc::Receiver<Incoming> {
    let (sink, messages) = mpsc::channel(usize::from(PREFETCH));
    let (broker, stop) = (app.broker.clone(), stop.clone());
    tasks.spawn(async move {
        broker
            .consume(source, PREFETCH, sink, stop, watch::channel(false).0)
            .await;
    });
    messages
}

/// Does the work for each message, at most [`AT_ONCE`] at a time, until no more come.
pub(crate) async fn each(
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
/// and the key. `None`: it was refused.
pub(crate) fn open<T: serde::de::DeserializeOwned>(
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

/// Counts a message that is not accepted, and logs why.
pub(crate) fn refuse(app: &App, head: &Head, reason: &str, words: &str) {
    app.metrics.refused(reason);
    warn!(kind = head.kind.as_str(), pool = %head.pool, lease = ?head.lease, trace = trace(head),
        reason, "a message is refused: {words}");
}

/// The trace of a message, for log lines.
pub(crate) fn trace(head: &Head) -> String {
    trace::trace_of(&head.traceparent)
}

/// The pool of a message; `None` if its messages are refused.
///
/// # Errors
/// The errors of the store.
pub(crate) async fn pool_of(app: &App, head: &Head) -> Result<Option<Pool>, StoreError> {
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

/// An answer whose caller has left, and the lease that it is about.
pub(crate) struct LateAnswer {
    pub(crate) lease: LeaseId,
    pub(crate) answer: Reply,
}

/// Gives an answer to the caller that waits for it. If the caller has left, returns the answer: an account
/// that was made too late, or twice, must end.
pub(crate) async fn reply(app: &App, message: &Incoming) -> Option<LateAnswer> {
    let name = message.correlation.as_deref()?;
    let head = &message.head;
    if head.kind != Kind::Reply {
        refuse(app, head, "other_kind", "the message is not an answer");
        return None;
    }
    let keys = match app.replies.keys(name, &head.pool) {
        Some(keys) => keys,
        None => pool_of(app, head).await.unwrap_or(None)?.keys(),
    };
    let (mut answer, request, _) = open::<Reply>(app, head, &keys, &message.body)?;
    if let ReplyResult::Created(created) = &mut answer.result {
        created.server = storable(&created.server);
    }
    // The name is not authenticated; the lease in the head is.
    if head.lease.is_some_and(|lease| !may_answer(name, &lease)) {
        refuse(app, head, "other_lease", "the answer is for another lease");
        return None;
    }
    match app.replies.deliver(name, request, answer) {
        Delivered::Taken => None,
        Delivered::Late(answer) => head.lease.map(|lease| LateAnswer { lease, answer }),
        Delivered::Refused(reason, words) => {
            refuse(app, head, reason, words);
            None
        }
    }
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

/// Handles a message that no queue took: declares the queues again, and makes the reconciler end the lease. It is no
/// alarm if the message is the parked end of a lease that has ended in a deleted pool.
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
            "a message found no queue; all queues are declared again");
        declare::mend(app).await;
        declare::declare_pools(app, false).await;
    }
    message.ack().await;
}

/// A text of an engine as it is stored: at most [`TEXT_MAX`] bytes, and without NUL, which a store in PostgreSQL
/// refuses. No text of a PostgreSQL server has a NUL.
pub(crate) fn storable(text: &str) -> String {
    let most = text.floor_char_boundary(TEXT_MAX);
    text[..most].replace('\0', "\u{fffd}")
}
