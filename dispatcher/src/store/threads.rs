//! Threads that serve the store's jobs, and their end.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Maximum wait for threads to end.
const LIMIT: Duration = Duration::from_secs(5);
/// Pause between two checks whether they have ended.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Threads that end when there are no more jobs for them.
#[derive(Clone, Default)]
pub(super) struct Threads(Arc<Mutex<Vec<JoinHandle<()>>>>);

impl Threads {
    /// Starts one more thread.
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

    /// Waits until all threads have ended. Each finishes its present job. A thread that waits for a server is left
    /// after 5 s, so that it does not delay the end of the process.
    pub(super) async fn ended(&self) {
        let all = std::mem::take(&mut *self.all());
        let ending = async {
            while !all.iter().all(JoinHandle::is_finished) {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        let _ = tokio::time::timeout(LIMIT, ending).await;
    }

    fn all(&self) -> std::sync::MutexGuard<'_, Vec<JoinHandle<()>>> {
        // No code panics while it holds this lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
