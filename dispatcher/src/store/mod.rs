//! The lease store: SQLite for a dispatcher alone, PostgreSQL for several (their libraries are named only below this
//! folder). One thread owns the connection that writes, and callers send jobs to it. It takes all waiting jobs, runs
//! them in one transaction with a savepoint each, and answers after the COMMIT. In this way many callers share one
//! fsync. No two such transactions run at the same time, also not those of several dispatchers, so each job sees the
//! store alone. Jobs that only read run beside it ([`readers`]).

mod authentic;
mod backup;
mod bases;
mod bound;
mod candidates;
mod cell;
mod commands;
mod copying;
mod counts;
mod due_together;
mod error;
mod generations;
mod health;
mod heard;
mod key_files;
mod keys;
mod leader;
mod lease_pages;
mod lease_row;
mod leases;
mod migrations;
mod open;
mod pool_removal;
mod pools;
mod postgres;
mod quotas;
mod readers;
mod rekey;
mod reseal;
mod revoke_below;
mod ring;
mod rotations;
mod row_queues;
mod sealer;
mod secret_row;
mod secrets;
pub(crate) mod shown;
mod slots;
mod sql;
mod synthetic;
mod takeover;
mod threads;
mod tokens;
mod turn;
mod unproven;
mod upkeep;
mod writer;

use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tracing::error;

pub(crate) use authentic::refused as refused_rows;
pub(crate) use backup::{back_up, restore};
pub(crate) use bases::{Base, BaseFacts};
pub(crate) use candidates::LeaseAccess;
pub(crate) use commands::{finish_upgrade, installation, mark_restored, new_root_token};
pub(crate) use copying::copy_store;
pub(crate) use due_together::AfterEnd;
pub(crate) use error::StoreError;
pub(crate) use health::Cause;
use health::Health;
pub(crate) use heard::{Found, Heard, Report};
pub(crate) use lease_pages::Filter;
pub(crate) use leases::{Applied, OfState};
pub(crate) use open::{Backend, Identity, OpenError, Place};
pub(crate) use pools::{Pool, Recipient};
pub(crate) use postgres::Url;
pub(crate) use quotas::{Admission, Conditions};
use readers::{Lane, Readers};
pub(crate) use rekey::{Rekey, rekey};
pub(crate) use revoke_below::{Marked, RevokeBelow};
pub(crate) use ring::{Generation, Keys};
pub(crate) use rotations::{Opening, Rotation};
use sealer::Sealer;
pub(crate) use secret_row::{Record, Revised};
use slots::Slots;
use sql::{Connection, Query};
pub use synthetic::add_history;
pub(crate) use tokens::{Bearer, Token, hash as token_hash};
pub(crate) use unproven::Doubt;
pub(crate) use upkeep::PoolCount;

/// Maximum number of jobs in the queue of the store's thread. More jobs wait outside.
const QUEUE: usize = 1024;

/// A function that gets the duration of each COMMIT.
type Observer = Box<dyn Fn(Duration) + Send + Sync>;
/// The store's clock minus this machine's, in milliseconds.
type Offset = Arc<AtomicI64>;
type Answer = Box<dyn FnOnce(Result<(), StoreError>) + Send>;

/// The work of one job.
struct Work {
    /// Queries of the job that can be sent together with BEGIN.
    ahead: Vec<Query>,
    run: Box<dyn FnOnce(&Connection) -> Answer + Send>,
}

enum Job {
    /// A job whose caller waits.
    Work(Work),
    /// A job that may come in thousands. It waits for jobs of the other kind.
    Later(Work),
    Close,
}

/// The kind of jobs of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// The connection's jobs see the store alone.
    Alone,
    /// Each of the connection's jobs is about one lease. Jobs in other slots run at the same time.
    Slot,
    /// The connection's jobs write nothing, and take no lock.
    Reads,
}

impl Role {
    /// The end of a query whose rows must not change until the job ends. A job that sees the store alone needs no
    /// row locks.
    fn for_update(self) -> &'static str {
        match self {
            Self::Slot => " FOR UPDATE",
            Self::Alone | Self::Reads => "",
        }
    }
}

#[derive(Clone)]
pub(crate) struct Store {
    jobs: mpsc::Sender<Job>,
    readers: Readers,
    /// The slots of PostgreSQL. `None` for SQLite, which has one writer.
    slots: Option<Slots>,
    sealer: Arc<Sealer>,
    offset: Offset,
    /// Whether the last batch could begin.
    reached: Arc<AtomicBool>,
    commits: Arc<OnceLock<Observer>>,
    health: Arc<Health>,
}

impl Store {
    fn start(
        place: &Place,
        connection: Connection,
        offset: Offset,
    ) -> Result<Self, std::io::Error> {
        let sealer = connection
            .ring()
            .map_err(std::io::Error::other)?
            .sealer
            .clone();
        let (jobs, waiting) = mpsc::channel(QUEUE);
        let reached = Arc::new(AtomicBool::new(true));
        let reaches = reached.clone();
        let commits = Arc::<OnceLock<Observer>>::default();
        let observed = commits.clone();
        let health = connection.health();
        let readers = Readers::start(place, (&sealer.sealing(), &offset), &health, &jobs)?;
        let slots = match place.backend {
            Backend::Sqlite(_) => None,
            Backend::Postgres(_) => Some(Slots::start(
                place,
                (&sealer.sealing(), &offset),
                &health,
                &(jobs.clone(), commits.clone()),
            )?),
        };
        if let Backend::Postgres(url) = &place.backend {
            postgres::watch_primary(url, &jobs)?;
        }
        std::thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || writer::serve(&connection, waiting, &reaches, &observed))?;
        Ok(Self {
            jobs,
            readers,
            slots,
            sealer,
            offset,
            reached,
            commits,
            health,
        })
    }

    /// The clock that decides about the status of leases. If several dispatchers share a store, it is the store's
    /// clock, because one dispatcher writes a deadline and another judges it.
    pub(crate) fn now(&self) -> jiff::Timestamp {
        let offset = jiff::SignedDuration::from_millis(self.offset.load(Ordering::Relaxed));
        jiff::Timestamp::now() + offset
    }

    /// Reports the duration of each COMMIT to `observer`. Only the first call has an effect.
    pub(crate) fn observe_commits(&self, observer: impl Fn(Duration) + Send + Sync + 'static) {
        let _ = self.commits.set(Box::new(observer));
    }

    /// Whether the store works, as far as is known. It gets a job every second, and a row is written every 5 s.
    ///
    /// # Errors
    /// The reason why it does not, as a message for operators.
    pub(crate) fn ready(&self) -> Result<(), String> {
        if self.jobs.is_closed() {
            return Err("the lease store is closed".to_owned());
        }
        if !self.is_reached() {
            return Err("the lease store is unreachable".to_owned());
        }
        match self.health.cause() {
            Some(cause) => Err(format!("the lease store fails: {}", cause.words())),
            None => Ok(()),
        }
    }

    /// Whether the last batch of jobs could begin.
    pub(crate) fn is_reached(&self) -> bool {
        self.reached.load(Ordering::Relaxed)
    }

    /// Failures of the store's disk or server since the start, by cause.
    pub(crate) fn failures(&self) -> impl Iterator<Item = (Cause, u64)> {
        self.health.failures()
    }

    /// Ends the threads after all earlier jobs. Later calls fail.
    pub(crate) async fn close(&self) {
        self.readers.close().await;
        if let Some(slots) = &self.slots {
            slots.close().await;
        }
        if self.jobs.send(Job::Close).await.is_ok() {
            self.jobs.closed().await;
        }
    }

    /// Runs a job on the store's thread. `Ok` means committed; an `Err` of the job undoes what
    /// it did. Once begun it runs to its end, even if its caller has left.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        ask(&self.jobs, Job::Work, vec![], work).await
    }

    /// Like [`Store::run`], behind the jobs whose callers wait.
    async fn run_later<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        ask(&self.jobs, Job::Later, vec![], work).await
    }

    /// Runs a job about one lease. In PostgreSQL it runs beside jobs about other leases. It must lock the rows that
    /// it relies on ([`Connection::for_update`]), except secrets, pools, tokens and keys, which only change in jobs
    /// that see the store alone. `ahead` is called for a store in PostgreSQL only. It returns queries that the job
    /// makes before it writes, see [`Connection::begin`].
    async fn run_beside<T: Send + 'static>(
        &self,
        ahead: impl FnOnce() -> Vec<Query>,
        work: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        match &self.slots {
            Some(slots) => ask(&slots.now, Job::Work, ahead(), work).await,
            None => self.run(work).await,
        }
    }

    /// Like [`Store::run_beside`], behind the jobs whose callers wait.
    async fn run_beside_later<T: Send + 'static>(
        &self,
        ahead: impl FnOnce() -> Vec<Query>,
        work: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        match &self.slots {
            Some(slots) => ask(&slots.later, Job::Later, ahead(), work).await,
            None => self.run_later(work).await,
        }
    }

    /// Runs a job that only reads, beside the writer. It sees what was committed before this call.
    async fn read<T: Send + 'static>(
        &self,
        lane: Lane,
        work: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        ask(self.readers.lane(lane), Job::Work, vec![], work).await
    }

    /// Like [`Store::read`], with queries `ahead` as in [`Store::run_beside`].
    async fn read_rows<T: Send + 'static>(
        &self,
        ahead: impl FnOnce() -> Vec<Query>,
        work: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let ahead = self.slots.as_ref().map(|_| ahead());
        let jobs = self.readers.lane(Lane::Rows);
        ask(jobs, Job::Work, ahead.unwrap_or_default(), work).await
    }
}

async fn ask<T: Send + 'static>(
    jobs: &mpsc::Sender<Job>,
    job: impl FnOnce(Work) -> Job,
    ahead: Vec<Query>,
    work: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    let (sender, receiver) = oneshot::channel();
    let run = Box::new(move |connection: &Connection| {
        let done = alone(connection, work);
        let answer: Answer = Box::new(move |committed| {
            // The caller may have left.
            let _ = sender.send(committed.and(done));
        });
        answer
    });
    let closed = || StoreError::Unavailable("it is closed or unreachable".to_owned());
    let work = Work { ahead, run };
    jobs.send(job(work)).await.map_err(|_| closed())?;
    receiver.await.map_err(|_| closed())?
}

/// Runs a job so that its failure affects no other job. It has a savepoint if other jobs of its transaction came
/// before it.
fn alone<T>(
    connection: &Connection,
    work: impl FnOnce(&Connection) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    connection.job();
    let is_one_of_many = connection.role() == Role::Alone;
    // With a savepoint SQLite keeps a copy of every page that the job changes.
    let is_first = is_one_of_many && connection.is_untouched();
    if is_one_of_many && !is_first {
        connection.execute_batch("SAVEPOINT job")?;
    }
    // A panic in one job must not end the thread and fail all other callers. The savepoint undoes what the
    // job has changed.
    let done = std::panic::catch_unwind(AssertUnwindSafe(|| work(connection)));
    let done = done.unwrap_or_else(|_| {
        error!("a job of the lease store failed because of a mistake in this program; it is rolled back");
        Err(StoreError::Unavailable("a job ended early".to_owned()))
    });
    connection.end_job(done.is_err());
    match (&done, is_one_of_many) {
        (Ok(_), true) if is_first => {}
        (Ok(_), true) => connection.execute_batch("RELEASE job")?,
        (Err(_), true) if is_first => begin_again(connection)?,
        (Err(_), true) => connection.execute_batch("ROLLBACK TO job; RELEASE job")?,
        (Ok(_), false) => {}
        (Err(_), false) => connection.fail(),
    }
    done
}

/// Undoes a transaction, and begins another for the jobs that follow.
fn begin_again(connection: &Connection) -> Result<(), StoreError> {
    connection.roll_back();
    // If an upgrade is over, the next transaction notices it too.
    keys::begin_with(connection, []).map(drop)
}

/// Whether a query has a row.
fn exists(connection: &Connection, sql: &str, key: &str) -> Result<bool, StoreError> {
    Ok(!connection.prepare(sql)?.query([key])?.is_empty())
}

/// A column that does not hold what this program writes there.
fn unreadable(column: &str) -> StoreError {
    error!(
        column,
        "the lease store has data that this version cannot read"
    );
    StoreError::Unusable(format!("unreadable {column}"))
}

/// The smallest text after every `prefix:…`, for ranges over paths.
fn after_children(prefix: &str) -> String {
    // `;` follows `:` in ASCII.
    format!("{prefix};")
}

/// The text after which an ascending list continues. SQLite stores texts with any bytes. A text that is not UTF-8 is
/// read with the replacement character U+FFFD, which may sort before the text itself; then the same rows would be
/// read again and again. No dispatcher writes such a text, so the list continues after all texts that begin in the
/// same way.
fn onward(text: String) -> String {
    let Some(at) = text.find(char::REPLACEMENT_CHARACTER) else {
        return text;
    };
    let mut before = text[..at].to_owned();
    let next = before
        .pop()
        .and_then(|last| char::from_u32(u32::from(last) + 1));
    before.push(next.unwrap_or(char::MAX));
    before
}

fn timestamp(ms: i64) -> Result<jiff::Timestamp, StoreError> {
    jiff::Timestamp::from_millisecond(ms).map_err(|_| unreadable("moment"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
