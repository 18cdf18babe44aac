//! The thread that writes. It runs waiting jobs in one transaction, first those whose callers wait, and answers
//! after the COMMIT. So the end of thousands of leases delays a read by one short transaction.

use std::collections::VecDeque;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tracing::{debug, error};

use super::sql::Connection;
use super::{Answer, Job, Observer, StoreError, Work, keys};

/// Maximum number of jobs of each kind in one transaction.
const BATCH: usize = 256;
/// A transaction with a job whose caller waits begins no other such job after this time.
const WITHIN: Duration = Duration::from_millis(10);
/// The same limit for a transaction without such a job. A job that arrives meanwhile waits for at most this time.
const LATER_WITHIN: Duration = Duration::from_millis(40);

/// A transaction with a job whose caller waits runs other jobs until this time, and at least one of them. Otherwise
/// many callers could prevent that ends are recorded.
const SHARED_WITHIN: Duration = Duration::from_millis(20);

/// Jobs that were taken from the channel.
#[derive(Default)]
struct Waiting {
    now: VecDeque<Work>,
    later: VecDeque<Work>,
    is_closing: bool,
}

impl Waiting {
    fn add(&mut self, job: Job) {
        match job {
            Job::Work(work) => self.now.push_back(work),
            Job::Later(work) => self.later.push_back(work),
            Job::Close => self.is_closing = true,
        }
    }

    /// Takes the jobs that have arrived, at most a batch of each kind.
    fn take(&mut self, jobs: &mut mpsc::Receiver<Job>) {
        while !self.is_closing && self.now.len() < BATCH && self.later.len() < BATCH {
            let Ok(job) = jobs.try_recv() else { return };
            self.add(job);
        }
    }

    fn is_empty(&self) -> bool {
        self.now.is_empty() && self.later.is_empty()
    }

    /// The next job of this transaction.
    fn next(&mut self, transaction: &mut Transaction) -> Option<Work> {
        if transaction.is_over() {
            let is_full = transaction.later > 0 && transaction.begun.elapsed() >= SHARED_WITHIN;
            if is_full || !transaction.is_awaited {
                return None;
            }
        } else if let Some(work) = self.now.pop_front() {
            transaction.is_awaited = true;
            return Some(work);
        }
        transaction.later += 1;
        self.later.pop_front()
    }
}

/// The progress of a transaction.
struct Transaction {
    begun: Instant,
    /// Whether the caller of one of its jobs waits.
    is_awaited: bool,
    /// Number of its jobs that nobody waits for.
    later: usize,
}

impl Transaction {
    fn is_over(&self) -> bool {
        let within = if self.is_awaited {
            WITHIN
        } else {
            LATER_WITHIN
        };
        self.begun.elapsed() >= within
    }
}

pub(super) fn serve(
    connection: &Connection,
    mut jobs: mpsc::Receiver<Job>,
    reached: &AtomicBool,
    commits: &OnceLock<Observer>,
) {
    let mut waiting = Waiting::default();
    loop {
        if waiting.is_empty() && !waiting.is_closing {
            match jobs.blocking_recv() {
                Some(job) => waiting.add(job),
                None => break,
            }
        }
        waiting.take(&mut jobs);
        if waiting.is_empty() && waiting.is_closing {
            break;
        }
        let begun = commit(connection, &mut waiting, &mut jobs, commits);
        reached.store(begun, Ordering::Relaxed);
    }
    if let Err(error) = connection.tidy() {
        error!(%error, "the lease store was not closed cleanly; the next start repairs it");
    }
    // `jobs` is dropped here, which fails every caller that still waits.
}

/// Begins a transaction in which the store is unlocked with the present master key.
fn begin(connection: &Connection) -> Result<(), String> {
    let ready = keys::begin_with(connection, []).and_then(|upgrade_is_over| {
        if upgrade_is_over {
            keys::finish_upgrade(connection)?;
            connection.commit()?;
            keys::begin_with(connection, [])?;
        }
        Ok(())
    });
    if ready.is_err() && !connection.is_autocommit() {
        let _ = connection.execute_batch("ROLLBACK");
    }
    ready.map_err(|error| error.to_string())
}

/// Runs jobs in one transaction and answers their callers. A job that is dropped here fails its caller. Returns
/// whether the transaction could begin.
fn commit(
    connection: &Connection,
    waiting: &mut Waiting,
    jobs: &mut mpsc::Receiver<Job>,
    commits: &OnceLock<Observer>,
) -> bool {
    if let Err(error) = begin(connection) {
        // The connection has logged its own failures.
        debug!(%error, "the lease store cannot begin a transaction");
        waiting.now.clear();
        waiting.later.clear();
        return false;
    }
    let mut transaction = Transaction {
        begun: Instant::now(),
        is_awaited: false,
        later: 0,
    };
    let mut answers: Vec<Answer> = Vec::new();
    while answers.len() < BATCH
        && let Some(work) = waiting.next(&mut transaction)
    {
        answers.push((work.run)(connection));
        waiting.take(jobs);
    }
    let committed = if connection.is_autocommit() {
        Err(StoreError::Unavailable(
            "the transaction was lost".to_owned(),
        ))
    } else {
        let begun = Instant::now();
        let committed = connection.commit().map_err(StoreError::from);
        if let Some(observe) = commits.get() {
            observe(begun.elapsed());
        }
        committed
    };
    if committed.is_err() && !connection.is_autocommit() {
        let _ = connection.execute_batch("ROLLBACK");
    }
    for answer in answers {
        answer(committed.clone());
    }
    true
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn work() -> Work {
        Work {
            ahead: vec![],
            run: Box::new(|_| Box::new(|_| {})),
        }
    }

    /// What a transaction of this age still takes, until it takes no more: jobs of callers, and others.
    fn taken(age: Duration, is_awaited: bool) -> (usize, usize) {
        let mut waiting = Waiting::default();
        for _ in 0..3 {
            waiting.add(Job::Work(work()));
            waiting.add(Job::Later(work()));
        }
        let mut transaction = Transaction {
            begun: Instant::now().checked_sub(age).unwrap(),
            is_awaited,
            later: 0,
        };
        while waiting.next(&mut transaction).is_some() {}
        (3 - waiting.now.len(), 3 - waiting.later.len())
    }

    #[test]
    fn callers_come_first_and_keep_nothing_else_out() {
        let long_ago = Duration::from_secs(1);
        assert_eq!(taken(long_ago, true), (0, 1), "one of the others");
        assert_eq!(taken(long_ago, false), (0, 0), "a caller waits for its end");
        let mut waiting = Waiting::default();
        waiting.add(Job::Later(work()));
        waiting.add(Job::Work(work()));
        let mut transaction = Transaction {
            begun: Instant::now(),
            is_awaited: false,
            later: 0,
        };
        assert!(waiting.next(&mut transaction).is_some());
        assert_eq!((waiting.now.len(), waiting.later.len()), (0, 1));
    }
}
