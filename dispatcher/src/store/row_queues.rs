//! Jobs that lock the same row wait here for each other. In PostgreSQL each would wait in a session of its own, and
//! reads of one secret with a quota would take all sessions from other reads.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::{Mutex as Queue, OwnedMutexGuard};

/// The queues of rows that are in use.
#[derive(Clone, Default)]
pub(super) struct RowQueues(Arc<Mutex<HashMap<String, Weak<Queue<()>>>>>);

impl RowQueues {
    /// Waits until no other job of this dispatcher has the row. The next job gets it when the result is dropped.
    pub(super) async fn wait(&self, row: String) -> OwnedMutexGuard<()> {
        let queue = self.queue(row);
        queue.lock_owned().await
    }

    fn queue(&self, row: String) -> Arc<Queue<()>> {
        // No code panics while it holds this lock.
        let mut queues = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(queue) = queues.get(&row).and_then(Weak::upgrade) {
            return queue;
        }
        queues.retain(|_, queue| queue.strong_count() > 0);
        let queue = Arc::default();
        queues.insert(row, Arc::downgrade(&queue));
        queue
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt as _;

    #[tokio::test]
    async fn one_has_the_row_at_a_time() {
        let queues = RowQueues::default();
        let first = queues.wait("a".to_owned()).await;
        let second = queues.wait("a".to_owned());
        tokio::pin!(second);
        assert!((&mut second).now_or_never().is_none());
        let other = queues.wait("b".to_owned()).now_or_never();
        assert!(other.is_some(), "another row");
        drop(first);
        drop(second.await);
        drop(other);
        drop(queues.wait("c".to_owned()).await);
        let kept = queues.0.lock().map(|queues| queues.len());
        assert_eq!(kept.ok(), Some(1), "unused queues are dropped");
    }
}
