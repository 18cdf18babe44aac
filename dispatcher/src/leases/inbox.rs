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
/// Outcomes in one job of the store. It takes 10 ms in SQLite, during which no read can write.
const IN_ONE_JOB: usize = 100;
/// Maximum number of messages that wait for an unusable row, which may be repaired. More would keep all other
/// messages waiting.
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

/// Calls [`outcomes::hear`]. A report that is not accepted is refused.
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
    // While the store is unreachable, this waits and the message stays unacked.
    while let Err(error) = record(app, &message, &mut left).await {
        if let StoreError::Unusable(why) = &error
            && place.is_none()
        {
            place = ROWS.try_acquire().ok();
            if place.is_none() {
                // When the row is usable again, the reconciler asks the engines again.
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
    /// The outcomes that are not recorded yet. An outcome asks for a verdict only if it is alone in its message.
    left: Vec<Outcome>,
}

impl Outcomes {
    /// Opens a message. `None`: it is refused.
    async fn open(app: &App, message: &Incoming) -> Result<Option<Self>, StoreError> {
        let head = &message.head;
        let Some(pool) = inbox::pool_of(app, head).await? else {
            return Ok(None);
        };
        let opened = inbox::open::<Outcome>(app, head, &pool.keys(), &message.body);
        let Some((first, _, key)) = opened else {
            return Ok(None);
        };
        match outcomes_of(head, first) {
            Ok(left) => Ok(Some(Self { pool, key, left })),
            Err((reason, words)) => {
                refuse(app, head, reason, words);
                Ok(None)
            }
        }
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

/// The outcomes of an opened message: the first outcome and the others in it.
///
/// # Errors
/// The message is refused: the reason as one word, and a sentence for the log.
fn outcomes_of(
    head: &Head,
    mut first: Outcome,
) -> Result<Vec<Outcome>, (&'static str, &'static str)> {
    if head.kind != Kind::Outcome || head.lease != Some(first.lease) {
        let words = "head and body name different leases or engines";
        return Err(("other_lease", words));
    }
    let others = std::mem::take(&mut first.others);
    if others.len() >= LEASES_MAX {
        return Err(("too_many", "the message has more than 200 outcomes"));
    }
    let mut all = vec![first];
    all.extend(others);
    Ok(all)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use mayfly_protocol::fixtures::{at, engine};
    use mayfly_protocol::task::{Created, Failure, FailureCode, OutcomeResult};

    fn outcome(others: usize) -> Outcome {
        Outcome {
            lease: LeaseId::random(),
            engine: engine(),
            attempts: 1,
            role: None,
            found_at: None,
            result: OutcomeResult::NotDue {
                until: at(60),
                left_ms: None,
            },
            ticket: None,
            again_ms: None,
            others: (0..others).map(|_| outcome(0)).collect(),
        }
    }

    fn head(kind: Kind, lease: Option<LeaseId>) -> Head {
        Head {
            kind,
            pool: "pool1".parse().unwrap(),
            lease,
            issued: at(0),
            deadline: None,
            attempt: 0,
            settling: false,
            traceparent: String::new(),
        }
    }

    #[test]
    fn a_message_reports_about_the_lease_of_its_head_and_at_most_199_others() {
        let refused = |reason: &'static str| Err(reason);
        for (kind, names_lease, others, expected) in [
            (Kind::Outcome, true, 0, Ok(1)),
            (Kind::Outcome, true, 199, Ok(200)),
            (Kind::Outcome, true, 200, refused("too_many")),
            (Kind::Outcome, false, 0, refused("other_lease")),
            // Another message of this engine, sealed for another purpose.
            (Kind::Reply, true, 0, refused("other_lease")),
        ] {
            let first = outcome(others);
            let own = match names_lease {
                true => first.lease,
                false => LeaseId::random(),
            };
            let ids: Vec<LeaseId> = [first.lease]
                .into_iter()
                .chain(first.others.iter().map(|other| other.lease))
                .collect();
            let found = outcomes_of(&head(kind, Some(own)), first);
            let words = found.as_ref().map(Vec::len).map_err(|(reason, _)| *reason);
            assert_eq!(words, expected, "{kind:?} {names_lease} {others}");
            if let Ok(all) = found {
                assert!(
                    all.iter().map(|one| one.lease).eq(ids),
                    "each once, in order"
                );
            }
        }
        assert!(outcomes_of(&head(Kind::Outcome, None), outcome(0)).is_err());
    }

    /// Nobody waits for these answers any more. What they report about an account still counts.
    #[test]
    fn a_late_answer_is_an_event_if_it_moved_an_account() {
        let late = |result| {
            late_event(Reply {
                engine: engine(),
                result,
            })
        };
        let created = Created {
            expiration: at(60),
            server: "s".to_owned(),
            warnings: vec![],
        };
        match late(ReplyResult::Created(created)) {
            Some(Event::Created(created, by)) => {
                assert_eq!((created.expiration, by), (at(60), engine()));
            }
            other => panic!("{other:?}"),
        }
        for result in [ReplyResult::Renewed(at(90)), ReplyResult::Moved(at(90))] {
            let event = late(result);
            assert!(
                matches!(event, Some(Event::Renewed(until)) if until == at(90)),
                "{event:?}"
            );
        }
        // The account may exist nevertheless. Its parked revocation ends it.
        let failed = Failure::new(FailureCode::StatementFailed, "x");
        assert!(late(ReplyResult::Failed(failed)).is_none());
        assert!(late(ReplyResult::Refreshed { in_use: true }).is_none());
    }
}
