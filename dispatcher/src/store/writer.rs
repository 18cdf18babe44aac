//! The thread that writes. It runs the jobs that wait in one transaction, those that a caller waits for first,
//! and answers after the COMMIT. The end of thousands of leases delays a read by one short transaction.

use std::collections::VecDeque;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tracing::{debug, error};

use super::sql::Connection;
use super::{Answer, Job, Observer, StoreError, Work, keys};

/// Jobs in one transaction.
const BATCH: usize = 256;
/// A transaction with a job that a caller waits for begins no other job after this time.
const WITHIN: Duration = Duration::from_millis(10);
/// The same without such a job: one that comes now waits no longer.
const LATER_WITHIN: Duration = Duration::from_millis(40);

/// Jobs that nobody waits for in a transaction with one that a caller waits for, when its time is over.
/// Without them callers in large numbers could keep every end from being recorded.
const LATER_AT_LEAST: usize = 8;

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

    /// Takes what has come, at most a batch of each kind.
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
            let has_had_its_share = transaction.later >= LATER_AT_LEAST;
            if has_had_its_share || !transaction.is_awaited {
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

/// What a transaction has done.
struct Transaction {
    begun: Instant,
    /// One of its jobs has a caller.
    is_awaited: bool,
    /// Jobs that nobody waits for.
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
    // `jobs` ends here, and with it every caller still waiting.
}

/// Begins a transaction in which the store is unlocked with the master key of now.
fn begin(connection: &Connection) -> Result<(), String> {
    connection.begin().map_err(|error| error.to_string())?;
    let ready = keys::follow(connection).and_then(|upgrade_is_over| {
        if upgrade_is_over {
            keys::finish_upgrade(connection)?;
            connection.commit()?;
            connection.begin()?;
            keys::follow(connection)?;
        }
        Ok(())
    });
    if ready.is_err() && !connection.is_autocommit() {
        let _ = connection.execute_batch("ROLLBACK");
    }
    ready.map_err(|error| error.to_string())
}

/// Runs jobs in one transaction and answers. A job dropped here fails its caller. Whether the
/// transaction could be begun.
fn commit(
    connection: &Connection,
    waiting: &mut Waiting,
    jobs: &mut mpsc::Receiver<Job>,
    commits: &OnceLock<Observer>,
) -> bool {
    if let Err(error) = begin(connection) {
        // If it is the connection, it has logged the reason itself.
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
        answers.push(work(connection));
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
