//! Reads run beside the writer: a job that only reads does not wait for writes. Each reader is a thread with a
//! connection of its own. A job sees everything that was committed before its request, because its transaction
//! begins later: a WAL snapshot in SQLite (<https://www.sqlite.org/isolation.html>), `REPEATABLE READ` in
//! PostgreSQL. So a deleted token is refused by the next request, on every dispatcher. No job is answered from
//! memory.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc;
use tracing::debug;

use super::open::{Backend, Place, reading_sqlite};
use super::postgres::Postgres;
use super::sealer::Sealing;
use super::sql::{Connection, Database};
use super::threads::Threads;
use super::{Job, Offset, QUEUE, Role, Work, keys};
use crate::store::health::Health;

/// The kind of a read. A list never delays the read of a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lane {
    /// A caller or an engine waits for a few rows.
    Rows,
    /// Pages of lists, and counts.
    Pages,
}

/// Threads of each lane with a SQLite store, where a read takes microseconds.
const OF_SQLITE: usize = 1;
/// Sessions of [`Lane::Rows`] with a PostgreSQL store, where a read waits for the network.
const OF_POSTGRES: usize = 4;
/// Jobs in one transaction in SQLite. In PostgreSQL each job has its own, because a failed statement ends a
/// transaction.
const BATCH: usize = 32;

/// The channels through which readers get jobs.
#[derive(Clone)]
pub(super) struct Readers {
    rows: mpsc::Sender<Job>,
    pages: mpsc::Sender<Job>,
    threads: Threads,
}

impl Readers {
    /// Starts the readers on an open store. A job whose transaction cannot begin goes to the `writer`.
    ///
    /// # Errors
    /// A thread or a connection cannot be made.
    pub(super) fn start(
        place: &Place,
        follows: (&Sealing, &Offset),
        health: &Arc<Health>,
        writer: &mpsc::Sender<Job>,
    ) -> Result<Self, std::io::Error> {
        let of_rows = match place.backend {
            Backend::Sqlite(_) => OF_SQLITE,
            Backend::Postgres(_) => OF_POSTGRES,
        };
        let threads = Threads::default();
        let lane = |count: usize, kind: fn(Work) -> Job| {
            let (jobs, waiting) = mpsc::channel(QUEUE);
            let waiting = Arc::new(Mutex::new(waiting));
            for _ in 0..count {
                let connection = connection(place, Role::Reads, follows, health.clone())?;
                let (waiting, writer) = (waiting.clone(), writer.clone());
                threads.spawn("store-reads", move || {
                    serve(&connection, &waiting, &writer, kind);
                })?;
            }
            Ok::<_, std::io::Error>(jobs)
        };
        Ok(Self {
            rows: lane(of_rows, Job::Work)?,
            pages: lane(1, Job::Later)?,
            threads,
        })
    }

    pub(super) fn lane(&self, lane: Lane) -> &mpsc::Sender<Job> {
        match lane {
            Lane::Rows => &self.rows,
            Lane::Pages => &self.pages,
        }
    }

    /// Ends the threads after all earlier jobs.
    pub(super) async fn close(&self) {
        for jobs in [&self.rows, &self.pages] {
            if jobs.send(Job::Close).await.is_ok() {
                jobs.closed().await;
            }
        }
        self.threads.ended().await;
    }
}

/// A connection besides the writer's.
pub(super) fn connection(
    place: &Place,
    role: Role,
    (sealing, offset): (&Sealing, &Offset),
    health: Arc<Health>,
) -> Result<Connection, std::io::Error> {
    let database = match &place.backend {
        Backend::Sqlite(file) => {
            Database::Sqlite(reading_sqlite(file).map_err(std::io::Error::other)?)
        }
        Backend::Postgres(url) => {
            let postgres = Postgres::beside(role, (**url).clone(), offset.clone());
            Database::Postgres(Box::new(postgres.map_err(std::io::Error::other)?))
        }
    };
    let mut connection = Connection::beside(role, database, health);
    keys::share(&mut connection, &place.key_files(), sealing.clone());
    Ok(connection)
}

fn locked(jobs: &Mutex<mpsc::Receiver<Job>>) -> MutexGuard<'_, mpsc::Receiver<Job>> {
    // No code panics while it holds this lock.
    jobs.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for jobs and takes at most `most` of them. `false`: no more jobs will come.
pub(super) fn take(jobs: &Mutex<mpsc::Receiver<Job>>, most: usize, batch: &mut Vec<Work>) -> bool {
    let mut jobs = locked(jobs);
    let mut next = jobs.blocking_recv();
    while let Some(job) = next {
        match job {
            Job::Work(work) | Job::Later(work) => batch.push(work),
            // Earlier requests are still served.
            Job::Close => jobs.close(),
        }
        if batch.len() == most {
            break;
        }
        next = match batch.is_empty() {
            true => jobs.blocking_recv(),
            false => jobs.try_recv().ok(),
        };
    }
    !batch.is_empty()
}

/// Serves jobs. If a transaction cannot begin, its jobs go to the writer; `kind` makes the writer's form of a job.
fn serve(
    connection: &Connection,
    jobs: &Mutex<mpsc::Receiver<Job>>,
    writer: &mpsc::Sender<Job>,
    kind: fn(Work) -> Job,
) {
    let most = if connection.is_shared() { 1 } else { BATCH };
    let mut batch = Vec::new();
    while take(jobs, most, &mut batch) {
        let ahead = batch.iter_mut().flat_map(|work| work.ahead.drain(..));
        match keys::begin_with(connection, ahead) {
            Ok(_) => {
                for work in batch.drain(..) {
                    // A read needs no commit.
                    (work.run)(connection)(Ok(()));
                }
            }
            Err(error) => {
                // For example, the server accepts no more sessions. Only the writer knows whether the store is
                // unreachable.
                debug!(%error, "a reader of the lease store cannot begin; the writer reads");
                for work in batch.drain(..) {
                    let _ = writer.blocking_send(kind(work));
                }
            }
        }
        connection.roll_back();
    }
}
