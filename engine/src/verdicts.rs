//! Failed revocations that wait for the dispatcher's verdict: they need no more tries, or they get the next
//! credential candidate.

use std::collections::HashMap;
use std::time::Duration;

use mayfly_protocol::task::{FailureCode, Verdict};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::oneshot;

/// Maximum wait for a verdict. Without one the revocation is parked.
const PATIENCE: Duration = Duration::from_secs(1);
/// The first 25 attempts at an unreachable server follow each other closely. Only every eighth of them asks.
const AWAY_OFTEN: u32 = 25;
const AWAY_ASK_EVERY: u32 = 8;

/// The waiting revocations by their tickets.
#[derive(Debug, Default)]
pub(crate) struct Verdicts(Mutex<HashMap<u64, oneshot::Sender<Verdict>>>);

/// A place in [`Verdicts`]; it is freed when dropped.
pub(crate) struct Awaited<'v> {
    /// The ticket that the verdict will have.
    pub(crate) ticket: u64,
    verdicts: &'v Verdicts,
    answer: oneshot::Receiver<Verdict>,
}

/// Whether the dispatcher may know more about a failure: the lease may be settled, or other credentials, another
/// address or another key may end it.
pub(crate) fn is_worth_asking(code: FailureCode, attempt: u32) -> bool {
    match code {
        // Of the first 25 attempts only every eighth asks. All later attempts ask.
        FailureCode::DatabaseUnreachable => attempt > AWAY_OFTEN || attempt % AWAY_ASK_EVERY == 1,
        FailureCode::DatabaseRefusedLogin
        | FailureCode::AdminLacksRights
        | FailureCode::OtherServer
        | FailureCode::ForeignRole
        | FailureCode::NotUnderstood => attempt > 0,
        _ => false,
    }
}

impl Verdicts {
    fn waiting(&self) -> MutexGuard<'_, HashMap<u64, oneshot::Sender<Verdict>>> {
        self.0.lock()
    }

    /// Begins to wait for a verdict.
    pub(crate) fn await_one(&self) -> Awaited<'_> {
        let (sender, answer) = oneshot::channel();
        let ticket = rand::random();
        self.waiting().insert(ticket, sender);
        Awaited {
            ticket,
            verdicts: self,
            answer,
        }
    }

    /// Passes a verdict to the revocation that waits for it.
    pub(crate) fn deliver(&self, verdict: Verdict) {
        if let Some(waiting) = self.waiting().remove(&verdict.ticket) {
            let _ = waiting.send(verdict);
        }
    }
}

impl Awaited<'_> {
    /// The verdict. `None`: there was none within 1 s.
    pub(crate) async fn heard(mut self) -> Option<Verdict> {
        let answer = tokio::time::timeout(PATIENCE, &mut self.answer).await;
        answer.ok()?.ok()
    }
}

impl Drop for Awaited<'_> {
    fn drop(&mut self) {
        self.verdicts.waiting().remove(&self.ticket);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_verdict_is_heard_by_its_ticket() {
        let verdicts = Verdicts::default();
        let (one, two) = (verdicts.await_one(), verdicts.await_one());
        let verdict = Verdict {
            ticket: one.ticket,
            retire: true,
            instead: None,
        };
        verdicts.deliver(verdict.clone());
        assert_eq!(one.heard().await, Some(verdict));
        assert_eq!(two.heard().await, None, "nobody spoke of this one");
        assert!(verdicts.waiting().is_empty());
    }
}
