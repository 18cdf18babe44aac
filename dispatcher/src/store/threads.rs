//! Threads that serve the store's jobs, and their end.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Threads that end when there are no more jobs for them.
#[derive(Clone, Default)]
pub(super) struct Threads(Arc<Mutex<Vec<JoinHandle<()>>>>);

impl Threads {
    /// Starts another one.
    ///
    /// # Errors
    /// The system gives no more threads.
    pub(super) fn spawn(
        &self,
        name: &str,
        work: impl FnOnce() + Send + 'static,
    ) -> Result<(), std::io::Error> {
        let started = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(work)?;
        self.all().push(started);
        Ok(())
    }

    /// Waits until all have ended: each finishes the job that it has begun.
    pub(super) async fn ended(&self) {
        let all = std::mem::take(&mut *self.all());
        let waiting = tokio::task::spawn_blocking(move || {
            for thread in all {
                // One that panicked has ended too.
                let _ = thread.join();
            }
        });
        let _ = waiting.await;
    }

    fn all(&self) -> std::sync::MutexGuard<'_, Vec<JoinHandle<()>>> {
        // Nothing panics while it is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
