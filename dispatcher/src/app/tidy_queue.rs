//! Servers that wait to be tidied. They are in memory only, and a restart forgets them.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use mayfly_protocol::names::PoolName;
use mayfly_protocol::target::Target;

use crate::store::BaseFacts;

/// Pauses between the tries while accounts still use the roles.
const TRIES_AFTER: [Duration; 5] = [
    Duration::from_secs(1),
    Duration::from_secs(15),
    Duration::from_secs(45),
    Duration::from_secs(120),
    Duration::from_secs(300),
];
/// Maximum number of servers that wait.
const WAITING: usize = 1000;

#[derive(Default)]
pub(crate) struct TidyQueue(Mutex<Vec<Waiting>>);

pub(crate) struct Waiting {
    base: String,
    pub(crate) pool: PoolName,
    pub(crate) target: Target,
    tries: usize,
    due: Instant,
}

impl TidyQueue {
    fn waiting(&self) -> std::sync::MutexGuard<'_, Vec<Waiting>> {
        // No code panics while it holds this lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A dynamic secret was deleted.
    pub(crate) fn add(&self, facts: BaseFacts) {
        self.put(Waiting {
            base: facts.base.id,
            pool: facts.pool.name,
            target: facts.target,
            tries: 0,
            due: Instant::now() + TRIES_AFTER[0],
        });
    }

    fn put(&self, new: Waiting) {
        let mut waiting = self.waiting();
        waiting.retain(|old| old.base != new.base);
        if waiting.len() < WAITING {
            waiting.push(new);
        }
    }

    /// The next server whose time has come.
    pub(crate) fn take_due(&self) -> Option<Waiting> {
        let mut waiting = self.waiting();
        let index = waiting.iter().position(|one| one.due <= Instant::now())?;
        Some(waiting.swap_remove(index))
    }

    /// Puts a server back into the queue after a try. `is_left`: another try may remove more. The server is not put
    /// back after the last of [`TRIES_AFTER`], or if a later delete has already added it.
    pub(crate) fn again(&self, mut tried: Waiting, is_left: bool) {
        tried.tries += 1;
        let Some(after) = TRIES_AFTER.get(tried.tries) else {
            return;
        };
        if is_left && !self.has(&tried.base) {
            tried.due = Instant::now() + *after;
            self.put(tried);
        }
    }

    fn has(&self, base: &str) -> bool {
        self.waiting().iter().any(|one| one.base == base)
    }
}
