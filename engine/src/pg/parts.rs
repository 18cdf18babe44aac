//! A batch in parts: done at once if possible, or else in halves.

use std::time::Duration;

use mayfly_protocol::task::Failure;
use tokio::time::Instant;
use tracing::debug;

use super::session::Session;
use super::sql_error::SqlError;

/// Maximum wait of a batch for a lock. If it does not get the lock, it is divided into parts, and each part waits
/// for at most `PART_LOCK`.
const BATCH_LOCK: Duration = Duration::from_millis(200);
const PART_LOCK: Duration = Duration::from_millis(30);

/// A batch that is done at once if possible. If it fails, it is halved until the role that causes the failure is
/// alone. [`super::revoke_alone`] ends that role.
pub(super) struct Parts<T> {
    waiting: Vec<Vec<T>>,
    until: Instant,
    whole: bool,
}

impl<T> Parts<T> {
    pub(super) fn of(all: Vec<T>, until: Instant) -> Self {
        Self {
            waiting: vec![all],
            until,
            whole: true,
        }
    }

    /// The next part, unless the time is over.
    pub(super) fn next(&mut self, home: &mut Session<'_>) -> Option<Vec<T>> {
        let part = self.waiting.pop()?;
        // The first part is always tried.
        if part.is_empty() || (!self.whole && Instant::now() > self.until) {
            return None;
        }
        home.wait_for_locks(if self.whole { BATCH_LOCK } else { PART_LOCK });
        self.whole = false;
        Some(part)
    }

    /// Divides a part that failed. If the server is lost, nothing more can be done.
    pub(super) fn failed(
        &mut self,
        mut part: Vec<T>,
        error: SqlError,
        home: &Session<'_>,
        doing: &str,
    ) -> Result<(), Failure> {
        if error.is_lost() || home.is_lost() {
            return Err(error.into_failure(doing));
        }
        debug!(
            sqlstate = error.code(),
            roles = part.len(),
            doing,
            "in parts"
        );
        if part.len() > 1 {
            let rest = part.split_off(part.len() / 2);
            self.waiting.extend([rest, part]);
        }
        Ok(())
    }
}
