//! What engines report about leases: outcomes of revocations, and answers whose caller has left. Each report
//! is recorded, and then acked. It may arrive twice: the second changes nothing.

use std::sync::Arc;
use std::time::Duration;

use mayfly_common::broker::{Incoming, Source};
use mayfly_common::fault;
use mayfly_protocol::lease::{Event, Lease};
use mayfly_protocol::names::LeaseId;
use mayfly_protocol::task::{Head, Kind, Outcome, Reply, ReplyResult};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use super::outcomes::{self, Disbelieved};
use crate::app::App;
use crate::engines::inbox::{self, LateAnswer, refuse, trace};
use crate::engines::outbox;
use crate::store::{Recipient, Report, StoreError};

const STORE_RETRY: Duration = Duration::from_millis(500);

/// Consumes answers and outcomes until `stop`.
pub(crate) fn start(
    app: &Arc<App>,
    replies: mpsc::Receiver<Incoming>,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) {
    let answered = async |app: &App, message: Incoming| {
        if let Some(late) = inbox::reply(app, &message).await {
            record_late(app, &message.head, late).await;
        }
    };
    tasks.spawn(inbox::each(app.clone(), replies, answered));
    let outcomes = inbox::consume(app, Source::Outcomes, tasks, stop);
    let until = stop.clone();
    let ended = async move |app: &App, message| outcome(app, message, &until).await;
    tasks.spawn(inbox::each(app.clone(), outcomes, ended));
}

async fn record_late(app: &App, head: &Head, late: LateAnswer) {
    let lease = late.lease;
    let Some(event) = late_event(late.answer) else {
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
    let Some(pool) = inbox::pool_of(app, head).await? else {
        return Ok(());
    };
    let Some((outcome, _, key)) = inbox::open::<Outcome>(app, head, &pool.keys(), &message.body)
    else {
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
