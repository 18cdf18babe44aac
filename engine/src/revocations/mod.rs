//! Revocations. They are gathered into batches for one database server, done, and reported as outcomes. Unfinished
//! ones are parked again. [`mayfly_protocol::revocation::next`] decides what happens next. The message is settled
//! last, after the broker has confirmed the message that replaces it.

mod batch;
mod item;
mod moved;
mod report;
mod settle;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use mayfly_common::broker::Incoming;
use mayfly_common::panics::caught;
use mayfly_protocol::seal::is_sealed;
use mayfly_protocol::task::{Kind, LEASES_MAX, Revoke};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::task::TaskTracker;
use tracing::error;

use crate::pg;
use crate::work::Engine;
use batch::admit;
use report::not_understood;

/// Maximum number of revocations that are delivered and not settled: four batches, which is also what a server takes
/// at a time. With only one batch, the database would wait while its outcomes are published.
pub(crate) const PREFETCH: u16 = 800;
/// Maximum number of revocations that cannot be opened and wait for the dispatcher's verdict.
pub(crate) const UNOPENED: usize = 8;
/// Maximum number of outcomes that are published at a time: most of the connection's channels, but not all.
pub(crate) const REPORTS: usize = 24;
/// Maximum number of leases in one batch, and of messages that are gathered. A message with several leases is not
/// divided.
const BATCH_MAX: usize = LEASES_MAX;
/// Maximum number of leases in batches that have begun or wait for their server: twice the
/// number of batches that a server takes at a time.
const IN_WORK: usize = 8 * BATCH_MAX;
/// How long the first message of a batch waits for others.
const GATHER: Duration = Duration::from_millis(3);
/// Works on revocations until the source ends.
pub(crate) async fn run(
    engine: Arc<Engine>,
    mut revokes: mpsc::Receiver<Incoming>,
    tasks: TaskTracker,
) {
    let mut gathered = Vec::new();
    let in_work = Arc::new(Semaphore::new(IN_WORK));
    while revokes.recv_many(&mut gathered, BATCH_MAX).await > 0 {
        if gathered.len() < BATCH_MAX {
            tokio::time::sleep(GATHER).await;
            while gathered.len() < BATCH_MAX {
                let Ok(more) = revokes.try_recv() else { break };
                gathered.push(more);
            }
        }
        for batch in batches(&engine, gathered.drain(..), &tasks) {
            let leases = batch.iter().map(|(_, task)| task.leases()).sum();
            let Some(place) = place(&in_work, leases).await else {
                return;
            };
            let engine = engine.clone();
            tasks.spawn(async move {
                let _ = caught("a batch", admit(&engine, batch)).await;
                drop(place);
            });
        }
    }
}

/// Waits until these leases fit into the limit. Waiting leases keep the form of their message.
async fn place(in_work: &Arc<Semaphore>, leases: usize) -> Option<OwnedSemaphorePermit> {
    let leases = u32::try_from(leases.min(IN_WORK)).ok()?;
    in_work.clone().acquire_many_owned(leases).await.ok()
}

/// Revocations for one server, with their messages. A revocation may name several leases.
type Batch = Vec<(Incoming, Revoke)>;

/// Opens the tasks and groups them by server. Tasks that cannot be opened go back through the delay levels, because
/// a newer engine may be able to open them.
fn batches(
    engine: &Arc<Engine>,
    gathered: impl Iterator<Item = Incoming>,
    tasks: &TaskTracker,
) -> Vec<Batch> {
    let mut by_target: HashMap<(String, bool), Batch> = HashMap::new();
    for incoming in gathered {
        if !is_sealed(&incoming.body) {
            let engine = engine.clone();
            tasks.spawn(async move { engine.broker.set_aside(incoming).await });
            continue;
        }
        let opened = engine.open::<Revoke>(&incoming);
        // Each lease counts as a task.
        let leases = opened.as_ref().map_or(1, Revoke::leases);
        (0..leases).for_each(|_| engine.metrics.begun(Kind::Revoke));
        match opened {
            _ if incoming.head.kind == Kind::Unknown => {
                engine.metrics.refused("unknown_version");
                let engine = engine.clone();
                tasks.spawn(
                    async move { not_understood(&engine, incoming, "unknown_version").await },
                );
            }
            Ok(mut task) if Some(task.lease) == incoming.head.lease => {
                if !engine.authorities.fill(&mut task.target) {
                    let engine = engine.clone();
                    tasks.spawn(async move {
                        let _ = caught("a batch", look_up(&engine, incoming, task)).await;
                    });
                    continue;
                }
                by_target
                    .entry((pg::target_key(&task.target), task.asked))
                    .or_default()
                    .push((incoming, task));
            }
            other => {
                let reason = other.map_or_else(|error| error.reason(), |_| "not_authentic");
                engine.metrics.refused(reason);
                error!(lease = ?incoming.head.lease, reason, "a revocation cannot be opened; it is tried again later");
                let engine = engine.clone();
                tasks.spawn(async move { not_understood(&engine, incoming, reason).await });
            }
        }
    }
    let leases = |(_, task): &(Incoming, Revoke)| task.leases();
    let batches = by_target.into_values();
    batches.flat_map(|batch| divided(batch, leases)).collect()
}

/// Batches of at most [`BATCH_MAX`] leases, or of one message. A message has this many leases, at least one.
fn divided<M>(messages: Vec<M>, leases: impl Fn(&M) -> usize) -> Vec<Vec<M>> {
    let (mut batches, mut sum) = (Vec::new(), BATCH_MAX);
    for message in messages {
        sum += leases(&message);
        if sum > BATCH_MAX {
            sum = leases(&message);
            batches.push(Vec::new());
        }
        if let Some(last) = batches.last_mut() {
            last.push(message);
        }
    }
    batches
}

/// Does a revocation whose certificate authorities must still be read from the broker.
async fn look_up(engine: &Engine, incoming: Incoming, mut task: Revoke) {
    match engine.find_authorities(&mut task.target).await {
        Ok(()) => admit(engine, vec![(incoming, task)]).await,
        Err(failure) => {
            let reason = "authorities_missing";
            engine.metrics.refused(reason);
            error!(lease = %task.lease, reason, "a revocation cannot be done: {failure}; it is tried again later");
            not_understood(engine, incoming, reason).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message of several leases stays whole, even if it is larger than a batch.
    #[test]
    fn a_batch_has_at_most_200_leases() {
        for (messages, expected) in [
            (vec![], vec![]),
            (vec![1, 1, 1], vec![vec![1, 1, 1]]),
            (vec![199, 1], vec![vec![199, 1]]),
            (vec![199, 2], vec![vec![199], vec![2]]),
            (vec![200, 1, 199, 1], vec![vec![200], vec![1, 199], vec![1]]),
            (vec![1, 300, 1], vec![vec![1], vec![300], vec![1]]),
        ] {
            assert_eq!(divided(messages, |leases| *leases), expected);
        }
    }
}
