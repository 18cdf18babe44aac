//! The health of the store. A transaction may begin although its statements fail: the disk is full, a
//! directory for temporary files is absent, the file is read-only. Every failed statement is counted here, so
//! that `/readyz`, `mayfly_dispatcher_store_up` and the alert show it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rusqlite::ErrorCode;

/// After a failure the store counts as failing for at least this time, and until a row was written. The row that is
/// written every 5 s does not show that all kinds of work succeed.
const HOLD: Duration = Duration::from_secs(15);

/// Why the store does not work. A caller is never the cause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// No room on the disk, or another resource is used up.
    Full,
    /// The disk, the file system or the server's system failed.
    Io,
    /// The store cannot be written to.
    ReadOnly,
    /// The file, or a page of it, is damaged.
    Damaged,
    /// The server is unreachable, or the file's lock is taken.
    Away,
    /// Something else, such as a missing privilege.
    Other,
}

impl Cause {
    /// All causes. The metric shows each from the start.
    pub(crate) const ALL: [Self; 6] = [
        Self::Full,
        Self::Io,
        Self::ReadOnly,
        Self::Damaged,
        Self::Away,
        Self::Other,
    ];

    /// The cause's label in metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Io => "io",
            Self::ReadOnly => "read_only",
            Self::Damaged => "damaged",
            Self::Away => "away",
            Self::Other => "other",
        }
    }

    /// The cause as a message for operators.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::Full => "its disk is full",
            Self::Io => "its disk or its files cannot be used",
            Self::ReadOnly => "it is read-only",
            Self::Damaged => "it is damaged",
            Self::Away => "it is unreachable",
            Self::Other => "it accepts no rows",
        }
    }

    /// Whether waiting can help.
    pub(crate) fn may_pass(self) -> bool {
        match self {
            Self::Full | Self::Io | Self::ReadOnly | Self::Away => true,
            Self::Damaged | Self::Other => false,
        }
    }

    /// The cause for a result code of SQLite. `None`: the statement itself is wrong.
    /// <https://www.sqlite.org/rescode.html>
    pub(super) fn of_sqlite(error: &rusqlite::Error) -> Option<Self> {
        match error.sqlite_error_code()? {
            ErrorCode::DiskFull => Some(Self::Full),
            ErrorCode::SystemIoFailure
            | ErrorCode::CannotOpen
            | ErrorCode::OutOfMemory
            | ErrorCode::FileLockingProtocolFailed
            | ErrorCode::NoLargeFileSupport => Some(Self::Io),
            ErrorCode::ReadOnly | ErrorCode::PermissionDenied => Some(Self::ReadOnly),
            ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase => Some(Self::Damaged),
            ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked => Some(Self::Away),
            _ => None,
        }
    }

    /// The cause for a SQLSTATE. `None`: the statement itself is wrong.
    /// <https://www.postgresql.org/docs/current/errcodes-appendix.html>
    pub(super) fn of_sqlstate(state: &str) -> Option<Self> {
        match (state, state.get(..2)?) {
            // too_many_connections: the server runs and serves other sessions.
            ("53300", _) => Some(Self::Away),
            // read_only_sql_transaction: the server is a standby, or is set to read only.
            ("25006", _) => Some(Self::ReadOnly),
            (_, "53" | "54") => Some(Self::Full),
            (_, "58") => Some(Self::Io),
            ("XX001" | "XX002", _) => Some(Self::Damaged),
            (_, "08" | "57") => Some(Self::Away),
            _ => None,
        }
    }
}

/// Counts of the work that was done. Tests assert what an issue costs.
#[derive(Debug, Default)]
pub(super) struct Tally {
    jobs: AtomicU64,
    /// Committed transactions that may have written. Each costs at most one fsync.
    transactions: AtomicU64,
    statements: AtomicU64,
    /// Number of times that the store waited for a server.
    round_trips: AtomicU64,
    /// The text of each statement, without values.
    #[cfg(test)]
    texts: Mutex<std::collections::BTreeSet<String>>,
}

impl Tally {
    pub(super) fn job(&self) {
        self.jobs.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn transaction(&self) {
        self.transactions.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn statement(&self) {
        self.statements.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn round_trips(&self, count: u64) {
        self.round_trips.fetch_add(count, Ordering::Relaxed);
    }

    /// Counts a statement with rows or parameters.
    #[cfg_attr(not(test), allow(unused_variables))]
    pub(super) fn text(&self, sql: &str) {
        self.statement();
        #[cfg(test)]
        if let Ok(mut texts) = self.texts.lock() {
            texts.insert(sql.to_owned());
        }
    }

    #[cfg(test)]
    pub(super) fn texts(&self) -> Vec<String> {
        self.texts
            .lock()
            .map_or_else(|_| vec![], |texts| texts.iter().cloned().collect())
    }

    /// Jobs, transactions, statements and round trips.
    #[cfg(test)]
    pub(super) fn all(&self) -> [u64; 4] {
        [
            &self.jobs,
            &self.transactions,
            &self.statements,
            &self.round_trips,
        ]
        .map(|n| n.load(Ordering::Relaxed))
    }
}

/// The state of the store's health.
#[derive(Debug, Default)]
pub(crate) struct Health {
    pub(super) tally: Tally,
    last: Mutex<Option<Cause>>,
    failing: Mutex<Option<(Cause, Instant)>>,
    failures: [AtomicU64; Cause::ALL.len()],
}

impl Health {
    fn failing(&self) -> MutexGuard<'_, Option<(Cause, Instant)>> {
        self.failing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a failure by its cause. An unreachable store is noticed by the next transaction, which cannot begin.
    pub(super) fn failed(&self, cause: Cause) {
        self.failures[cause as usize].fetch_add(1, Ordering::Relaxed);
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(cause);
        if cause != Cause::Away {
            *self.failing() = Some((cause, Instant::now()));
        }
    }

    /// A row was written and committed.
    pub(super) fn written(&self) {
        self.written_at(Instant::now());
    }

    fn written_at(&self, now: Instant) {
        let mut failing = self.failing();
        if failing.is_some_and(|(_, at)| now.duration_since(at) >= HOLD) {
            *failing = None;
        }
    }

    /// The last cause of a failure.
    pub(super) fn last(&self) -> Option<Cause> {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why it counts as failing now.
    pub(super) fn cause(&self) -> Option<Cause> {
        self.failing().map(|(cause, _)| cause)
    }

    /// Number of failures, by cause.
    pub(super) fn failures(&self) -> impl Iterator<Item = (Cause, u64)> {
        let count = |cause: Cause| self.failures[cause as usize].load(Ordering::Relaxed);
        Cause::ALL.map(|cause| (cause, count(cause))).into_iter()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sqlite(code: i32) -> rusqlite::Error {
        rusqlite::Error::SqliteFailure(rusqlite::ffi::Error::new(code), None)
    }

    #[test]
    fn a_failure_of_the_disk_is_told_from_one_of_the_statement() {
        use rusqlite::ffi;
        for (code, cause) in [
            (ffi::SQLITE_FULL, Some(Cause::Full)),
            (ffi::SQLITE_IOERR, Some(Cause::Io)),
            (ffi::SQLITE_IOERR_GETTEMPPATH, Some(Cause::Io)),
            (ffi::SQLITE_IOERR_FSYNC, Some(Cause::Io)),
            (ffi::SQLITE_CANTOPEN, Some(Cause::Io)),
            (ffi::SQLITE_READONLY, Some(Cause::ReadOnly)),
            (ffi::SQLITE_CORRUPT, Some(Cause::Damaged)),
            (ffi::SQLITE_BUSY, Some(Cause::Away)),
            (ffi::SQLITE_CONSTRAINT, None),
            (ffi::SQLITE_ERROR, None),
        ] {
            assert_eq!(Cause::of_sqlite(&sqlite(code)), cause, "{code}");
        }
        for (state, cause) in [
            ("53100", Some(Cause::Full)),
            ("53200", Some(Cause::Full)),
            ("53300", Some(Cause::Away)),
            ("58030", Some(Cause::Io)),
            ("58P01", Some(Cause::Io)),
            ("25006", Some(Cause::ReadOnly)),
            ("57P03", Some(Cause::Away)),
            ("XX001", Some(Cause::Damaged)),
            // A managed server may not report its timeline: the query for it may fail.
            ("42501", None),
            ("23505", None),
            ("40P01", None),
            ("", None),
        ] {
            assert_eq!(Cause::of_sqlstate(state), cause, "{state}");
        }
    }

    #[test]
    fn it_recovers_when_rows_were_written_for_a_while() {
        let health = Health::default();
        let begun = Instant::now();
        health.failed(Cause::Away);
        assert_eq!(health.cause(), None, "the next transaction tells");
        health.failed(Cause::Full);
        health.written_at(begun + Duration::from_secs(1));
        assert_eq!(health.cause(), Some(Cause::Full), "other work may fail");
        health.failed(Cause::Io);
        assert_eq!(health.cause(), Some(Cause::Io));
        health.written_at(Instant::now() + HOLD);
        assert_eq!(health.cause(), None);
        let counted: Vec<u64> = health.failures().map(|(_, count)| count).collect();
        assert_eq!(counted, [1, 1, 0, 0, 1, 0]);
    }
}
