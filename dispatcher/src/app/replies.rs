//! Records who waits for which answer. A reply is opened with the key of the pool to which the request went,
//! so an engine of another pool cannot answer it. It counts once, for the request that it names inside its
//! seal. If the broker's operator sends an old answer again, under any name, it is refused.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use mayfly_protocol::names::PoolName;
use mayfly_protocol::request::RequestId;
use mayfly_protocol::seal::PublicKey;
use mayfly_protocol::task::{Failure, FailureCode, Kind, Reply, ReplyResult};
use mayfly_protocol::timing::timing;
use tokio::sync::oneshot;

use crate::store::Pool;
/// Maximum number of remembered requests whose callers have left. If one of them is forgotten and made an account,
/// the reconciler ends the account.
const LATE_MOST: usize = 20_000;

struct Waiter {
    kind: Kind,
    pool: PoolName,
    pool_keys: Vec<PublicKey>,
    request: RequestId,
    waits: Waits,
}

enum Waits {
    /// The caller of the request still waits for the answer.
    For(oneshot::Sender<Reply>),
    /// The caller of the request left at this time.
    Left(Instant),
}

/// The requests in progress, by the name of their answer.
#[derive(Clone, Default)]
pub(crate) struct Replies(Arc<Mutex<HashMap<String, Waiter>>>);

/// A request in progress. When it is dropped, nobody waits for its answer.
pub(crate) struct Expected {
    name: String,
    request: RequestId,
    replies: Replies,
    answer: oneshot::Receiver<Reply>,
}

/// The result of the delivery of an answer.
#[derive(Debug)]
pub(crate) enum Delivered {
    /// The caller has got the answer.
    Taken,
    /// The caller has left; or the answer reports a new account for a request that is not known. The report is
    /// recorded, and nobody gets the credential.
    Late(Reply),
    /// The answer belongs to no request of this dispatcher. The values are a stable code and a message for
    /// operators.
    Refused(&'static str, &'static str),
}

/// Whether an answer counts that does not name its request. Only engines of earlier versions send such answers. A
/// created account is bound to its lease, and is made once. A false failure can only deny a request, and a person who
/// can send it can also do that by other means.
fn needs_no_name(kind: Kind, result: &ReplyResult) -> bool {
    matches!(
        (kind, result),
        (_, ReplyResult::Failed(_)) | (Kind::Create, ReplyResult::Created(_))
    )
}

impl Replies {
    fn waiters(&self) -> MutexGuard<'_, HashMap<String, Waiter>> {
        // No code panics while it holds this lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to wait for the answer called `name` to a request of this kind.
    pub(crate) fn expect(
        &self,
        kind: Kind,
        name: String,
        pool: PoolName,
        pool_keys: Vec<PublicKey>,
    ) -> Expected {
        let (sender, answer) = oneshot::channel();
        let request = RequestId::random();
        let waiter = Waiter {
            kind,
            pool,
            pool_keys,
            request,
            waits: Waits::For(sender),
        };
        self.waiters().insert(name.clone(), waiter);
        Expected {
            name,
            request,
            replies: self.clone(),
            answer,
        }
    }

    /// The keys with which an answer called `name` from `pool` can be opened. `None`: nobody waits for this answer.
    pub(crate) fn keys(&self, name: &str, pool: &PoolName) -> Option<Vec<PublicKey>> {
        self.waiters()
            .get(name)
            .filter(|waiter| waiter.pool == *pool)
            .map(|waiter| waiter.pool_keys.clone())
    }

    /// Drops the keys that a pool no longer has. They cannot answer earlier requests either.
    pub(crate) fn retire_keys(&self, pool: &Pool) {
        let mut waiters = self.waiters();
        for waiter in waiters.values_mut().filter(|one| one.pool == pool.name) {
            let is_good = |key: &PublicKey| {
                pool.distrusted.is_none() && pool.previous_key.as_ref() != Some(key)
            };
            waiter.pool_keys.retain(is_good);
        }
    }

    /// Hands over an answer that named `request` inside its seal.
    pub(crate) fn deliver(
        &self,
        name: &str,
        request: Option<RequestId>,
        mut reply: Reply,
    ) -> Delivered {
        let mut waiters = self.waiters();
        let Some(waiter) = waiters.get(name) else {
            return match reply.result {
                ReplyResult::Created(_) => Delivered::Late(reply),
                _ => Delivered::Refused("not_asked", "no request waits for this answer"),
            };
        };
        match request {
            Some(request) if request == waiter.request => {}
            Some(_) => {
                return Delivered::Refused("other_request", "the answer is to another request");
            }
            None if needs_no_name(waiter.kind, &reply.result) => {
                if let ReplyResult::Failed(failure) = &mut reply.result {
                    // This flag would settle a lease, so it counts only if the answer names its request.
                    failure.nothing_made = false;
                }
            }
            None => reply.result = ReplyResult::Failed(too_old(&reply)),
        }
        let Some(waiter) = waiters.remove(name) else {
            return Delivered::Refused("not_asked", "no request waits for this answer");
        };
        match waiter.waits {
            Waits::For(sender) => match sender.send(reply) {
                Ok(()) => Delivered::Taken,
                Err(reply) => Delivered::Late(reply),
            },
            Waits::Left(_) => Delivered::Late(reply),
        }
    }
}

fn too_old(reply: &Reply) -> Failure {
    Failure::new(
        FailureCode::NotUnderstood,
        format!(
            "the version of engine {} is too old: its answers do not name their requests; upgrade it",
            reply.engine
        ),
    )
}

impl Expected {
    /// The name that the request must have inside its seal.
    pub(crate) fn request(&self) -> RequestId {
        self.request
    }

    /// Waits for the answer. It is cancel safe.
    pub(crate) async fn answer(&mut self) -> Option<Reply> {
        (&mut self.answer).await.ok()
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        let mut waiters = self.replies.waiters();
        // Another caller may wait under the same name.
        let Some(waiter) = waiters
            .get_mut(&self.name)
            .filter(|waiter| waiter.request == self.request)
        else {
            return;
        };
        waiter.waits = Waits::Left(Instant::now());
        if waiters.len() > LATE_MOST {
            waiters.retain(|_, waiter| matches!(waiter.waits, Waits::For(_)));
        } else if waiters.len().is_power_of_two() {
            waiters.retain(|_, waiter| match waiter.waits {
                Waits::For(_) => true,
                Waits::Left(at) => at.elapsed() < timing().caller_memory,
            });
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use jiff::Timestamp;
    use mayfly_protocol::task::{Created, Rotated};

    fn reply(result: ReplyResult) -> Reply {
        Reply {
            engine: "e1".parse().unwrap(),
            result,
        }
    }

    fn changed() -> Reply {
        reply(ReplyResult::Rotated(Rotated::Changed {
            server: "s".to_owned(),
        }))
    }

    fn created() -> Reply {
        reply(ReplyResult::Created(Created {
            expiration: Timestamp::UNIX_EPOCH,
            server: "s".to_owned(),
            warnings: vec![],
        }))
    }

    fn asked(replies: &Replies, kind: Kind) -> Expected {
        replies.expect(kind, "n".to_owned(), "pool1".parse().unwrap(), Vec::new())
    }

    #[tokio::test]
    async fn an_answer_counts_once_for_the_request_it_names() {
        let replies = Replies::default();
        let first = asked(&replies, Kind::Rotate);
        let old = first.request();
        assert!(matches!(
            replies.deliver("n", Some(old), changed()),
            Delivered::Taken
        ));
        drop(first);
        let mut second = asked(&replies, Kind::Rotate);
        let refused = replies.deliver("n", Some(old), changed());
        assert!(
            matches!(refused, Delivered::Refused("other_request", _)),
            "{refused:?}"
        );
        let new = Some(second.request());
        assert!(matches!(
            replies.deliver("n", new, changed()),
            Delivered::Taken
        ));
        assert!(second.answer().await.is_some(), "the replay took its place");
        let again = replies.deliver("n", new, changed());
        assert!(
            matches!(again, Delivered::Refused("not_asked", _)),
            "{again:?}"
        );
    }

    #[tokio::test]
    async fn an_engine_too_old_to_name_the_request_is_named_itself() {
        let replies = Replies::default();
        for kind in [Kind::Rotate, Kind::Renew, Kind::Sweep, Kind::Check] {
            let mut waiting = asked(&replies, kind);
            replies.deliver("n", None, changed());
            let Some(ReplyResult::Failed(failure)) = waiting.answer().await.map(|r| r.result)
            else {
                panic!("{kind:?}: it was believed");
            };
            assert!(failure.message.contains("engine e1"), "{failure}");
        }
        let mut waiting = asked(&replies, Kind::Create);
        replies.deliver("n", None, created());
        let answer = waiting.answer().await.unwrap().result;
        assert!(matches!(answer, ReplyResult::Created(_)));
    }

    #[test]
    fn an_answer_that_comes_too_late_is_heard() {
        let replies = Replies::default();
        let waiting = asked(&replies, Kind::Create);
        let request = Some(waiting.request());
        drop(waiting);
        let late = replies.deliver("n", request, created());
        assert!(matches!(late, Delivered::Late(_)), "{late:?}");
        let again = replies.deliver("n", request, created());
        assert!(matches!(again, Delivered::Late(_)), "{again:?}");
        let waiting = asked(&replies, Kind::Renew);
        let request = Some(waiting.request());
        drop(waiting);
        let renewed = || reply(ReplyResult::Renewed(Timestamp::UNIX_EPOCH));
        let late = replies.deliver("n", request, renewed());
        assert!(matches!(late, Delivered::Late(_)), "{late:?}");
        let again = replies.deliver("n", request, renewed());
        assert!(matches!(again, Delivered::Refused(..)), "{again:?}");
    }

    #[test]
    fn who_has_left_is_forgotten() {
        let replies = Replies::default();
        for n in 0..2 * LATE_MOST {
            let pool = "pool1".parse().unwrap();
            drop(replies.expect(Kind::Create, n.to_string(), pool, Vec::new()));
            assert!(replies.waiters().len() <= LATE_MOST);
        }
    }
}
