//! Secrets whose last read failed. They are in memory only.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mayfly_protocol::names::SecretPath;

/// After this time a secret is read without a trial again.
const REMEMBERED: Duration = Duration::from_secs(600);
/// Maximum number of secrets that are remembered. Others are read without a trial.
const MOST: usize = 10_000;

/// Secrets whose last read failed, with the time.
#[derive(Default)]
pub(crate) struct FailedReads(Mutex<HashMap<SecretPath, Instant>>);

impl FailedReads {
    fn failed(&self) -> MutexGuard<'_, HashMap<SecretPath, Instant>> {
        // No code panics while it holds this lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether its last read failed, less than 10 min ago.
    pub(crate) fn has(&self, path: &SecretPath) -> bool {
        let failed = self.failed();
        failed.get(path).is_some_and(|at| at.elapsed() < REMEMBERED)
    }

    pub(crate) fn remember(&self, path: &SecretPath, failed_now: bool) {
        let mut failed = self.failed();
        if !failed_now {
            failed.remove(path);
            return;
        }
        if failed.len() >= MOST {
            failed.retain(|_, at| at.elapsed() < REMEMBERED);
        }
        if failed.len() < MOST {
            failed.insert(path.clone(), Instant::now());
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_tried_while_its_last_read_came_to_nothing() {
        let reads = FailedReads::default();
        let (one, other) = ("db:one".parse().unwrap(), "db:other".parse().unwrap());
        assert!(!reads.has(&one));
        reads.remember(&one, true);
        assert!(reads.has(&one) && !reads.has(&other));
        reads.remember(&one, false);
        assert!(!reads.has(&one));
    }
}
