//! Who waits for which answer. A reply is opened with the key of the pool the request went to,
//! so an engine of another pool cannot answer it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mayfly_common::names::PoolName;
use mayfly_common::seal::PublicKey;
use mayfly_common::task::Reply;
use tokio::sync::oneshot;

use crate::store::Pool;

struct Waiter {
    pool: PoolName,
    pool_keys: Vec<PublicKey>,
    answer: oneshot::Sender<Reply>,
}

/// The requests under way, by the name each is answered under.
#[derive(Clone, Default)]
pub(crate) struct Replies(Arc<Mutex<HashMap<String, Waiter>>>);

/// A request under way; waits no longer when dropped.
pub(crate) struct Expected {
    name: String,
    replies: Replies,
    answer: oneshot::Receiver<Reply>,
}

impl Replies {
    fn waiters(&self) -> MutexGuard<'_, HashMap<String, Waiter>> {
        // No code panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to wait for the answer called `name`.
    pub(crate) fn expect(
        &self,
        name: String,
        pool: PoolName,
        pool_keys: Vec<PublicKey>,
    ) -> Expected {
        let (sender, answer) = oneshot::channel();
        self.waiters().insert(
            name.clone(),
            Waiter {
                pool,
                pool_keys,
                answer: sender,
            },
        );
        Expected {
            name,
            replies: self.clone(),
            answer,
        }
    }

    /// The keys an answer called `name` from `pool` opens with, where somebody waits for it.
    pub(crate) fn keys(&self, name: &str, pool: &PoolName) -> Option<Vec<PublicKey>> {
        self.waiters()
            .get(name)
            .filter(|waiter| waiter.pool == *pool)
            .map(|waiter| waiter.pool_keys.clone())
    }

    /// A key that was retired is of no use to answer a request from before, either.
    pub(crate) fn retire_keys(&self, pool: &Pool) {
        let mut waiters = self.waiters();
        for waiter in waiters.values_mut().filter(|one| one.pool == pool.name) {
            let is_good = |key: &PublicKey| {
                pool.distrusted.is_none() && pool.previous_key.as_ref() != Some(key)
            };
            waiter.pool_keys.retain(is_good);
        }
    }

    /// Hands an answer over; gives it back where nobody waits any more.
    pub(crate) fn deliver(&self, name: &str, reply: Reply) -> Result<(), Reply> {
        match self.waiters().remove(name) {
            Some(waiter) => waiter.answer.send(reply),
            None => Err(reply),
        }
    }
}

impl Expected {
    /// The answer. Safe to begin again after it was interrupted.
    pub(crate) async fn answer(&mut self) -> Option<Reply> {
        (&mut self.answer).await.ok()
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        self.replies.waiters().remove(&self.name);
    }
}
