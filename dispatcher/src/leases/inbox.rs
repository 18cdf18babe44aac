//! What engines report about leases: outcomes of revocations, of one lease or several, and answers whose caller
//! has left. Each report is recorded, and then acked. It may arrive twice: the second changes nothing.

use std::sync::Arc;
use std::time::Duration;

use mayfly_common::broker::{Incoming, Source};
use mayfly_common::fault;
use mayfly_protocol::lease::{Event, Lease};
use mayfly_protocol::names::LeaseId;
use mayfly_protocol::seal::PublicKey;
use mayfly_protocol::task::{Head, Kind, LEASES_MAX, Outcome, Reply, ReplyResult};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use super::outcomes::{self, Disbelieved};
use crate::app::App;
use crate::engines::inbox::{self, LateAnswer, refuse, trace};
use crate::engines::outbox;
use crate::store::{Pool, Recipient, Report, StoreError};

const STORE_RETRY: Duration = Duration::from_millis(500);
/// Outcomes in one job of the store, in which reads wait for their turn to write: 10 ms in SQLite.
const IN_ONE_JOB: usize = 100;
/// Messages that wait for a row that cannot be used, and may be repaired. More would keep all others waiting.
static ROWS: Semaphore = Semaphore::const_new(32);

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
    if let Err(error) = hear(app, head, vec![(lease, report)]).await {
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
    reports: Vec<(LeaseId, Report)>,
) -> Result<Vec<Option<Lease>>, StoreError> {
    let heard = outcomes::hear(app, reports).await?;
    let accepted = heard.into_iter().map(|heard| {
        heard.unwrap_or_else(|Disbelieved(reason, words)| {
            refuse(app, head, reason, words);
            None
        })
    });
    Ok(accepted.collect())
}

async fn outcome(app: &App, message: Incoming, stop: &CancellationToken) {
    let (mut left, mut place) = (None, None);
    // While the store is away, this waits and the message stays unacked.
    while let Err(error) = record(app, &message, &mut left).await {
        if let StoreError::Unusable(why) = &error
            && place.is_none()
        {
            place = ROWS.try_acquire().ok();
            if place.is_none() {
                // When the row can be used again, the reconciler asks engines again.
                warn!(lease = ?message.head.lease, why, "an outcome is not recorded: a row of its lease or pool cannot be used");
                break;
            }
        }
        debug!(%error, "an outcome waits for the store");
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(STORE_RETRY) => {}
        }
    }
    fault::point("outcome", "recorded").await;
    message.ack().await;
}

/// Records the outcomes of a message. What is not recorded yet stays in `left`.
async fn record(
    app: &App,
    message: &Incoming,
    left: &mut Option<Outcomes>,
) -> Result<(), StoreError> {
    if left.is_none() {
        *left = Outcomes::open(app, message).await?;
    }
    match left {
        Some(outcomes) => outcomes.record(app, &message.head).await,
        None => Ok(()),
    }
}

/// The outcomes of a message that are to be recorded.
struct Outcomes {
    pool: Pool,
    /// The key with which the engine sealed them.
    key: PublicKey,
    /// The only one of its message may ask for a verdict.
    left: Vec<Outcome>,
}

impl Outcomes {
    /// Opens a message. `None`: it is refused.
    async fn open(app: &App, message: &Incoming) -> Result<Option<Self>, StoreError> {
        let head = &message.head;
        let Some(pool) = inbox::pool_of(app, head).await? else {
            return Ok(None);
        };
        let Some((mut first, _, key)) =
            inbox::open::<Outcome>(app, head, &pool.keys(), &message.body)
        else {
            return Ok(None);
        };
        if head.kind != Kind::Outcome || head.lease != Some(first.lease) {
            refuse(
                app,
                head,
                "other_lease",
                "head and body name different leases or engines",
            );
            return Ok(None);
        }
        let others = std::mem::take(&mut first.others);
        if others.len() >= LEASES_MAX {
            let words = "the message has more than 200 outcomes";
            refuse(app, head, "too_many", words);
            return Ok(None);
        }
        let mut left = vec![first];
        left.extend(others);
        Ok(Some(Self { pool, key, left }))
    }

    /// Records what is left: together, or one by one if the row of one lease cannot be used.
    async fn record(&mut self, app: &App, head: &Head) -> Result<(), StoreError> {
        let report = |outcome: &Outcome| {
            let report = outcomes::report(head.pool.clone(), head.issued, outcome);
            (outcome.lease, report)
        };
        if let [only] = self.left.as_slice() {
            let leases = hear(app, head, vec![report(only)]).await?;
            let lease = leases.into_iter().next().flatten();
            return self.answer(app, head, only, lease.as_ref()).await;
        }
        while !self.left.is_empty() {
            let part = self.left.len().min(IN_ONE_JOB);
            let reports = self.left[..part].iter().map(report).collect();
            if hear(app, head, reports).await.is_err() {
                break;
            }
            self.left.drain(..part);
        }
        let mut last = Ok(());
        let mut each = std::mem::take(&mut self.left).into_iter();
        while let Some(outcome) = each.next() {
            if let Err(error) = hear(app, head, vec![report(&outcome)]).await {
                last = Err(error);
                self.left.push(outcome);
                if !app.store.is_reached() {
                    self.left.extend(each);
                    break;
                }
            }
        }
        last
    }

    /// Sends the engine the verdict on an outcome, if it waits for one.
    async fn answer(
        &self,
        app: &App,
        head: &Head,
        outcome: &Outcome,
        lease: Option<&Lease>,
    ) -> Result<(), StoreError> {
        let verdict = outcomes::verdict(app, &head.pool, outcome, lease).await?;
        if let Some(verdict) = verdict {
            let asker = Recipient {
                key: self.key.clone(),
                ..self.pool.recipient()?
            };
            let sent = outbox::verdict(app, &outcome.engine, &asker, head, verdict).await;
            if let Err(error) = sent {
                debug!(lease = %outcome.lease, %error, "a verdict was not sent; the engine parks the revocation");
            }
        }
        Ok(())
    }
}
