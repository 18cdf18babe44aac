//! Jobs about one lease, in PostgreSQL. Each is a transaction of its own, in one of several sessions that each take
//! a slot ([`super::turn`]). So leases of all dispatchers are recorded side by side. Two jobs wait for each other
//! only on rows that must be exact: the row of the lease, and the row of the secret or the token whose quota or key
//! counts.

use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use tokio::sync::mpsc;
use tracing::debug;

use super::health::Health;
use super::open::Place;
use super::readers::{connection, take};
use super::row_queues::RowQueues;
use super::sealer::Sealing;
use super::sql::{Connection, Query};
use super::threads::Threads;
use super::{Job, Observer, Offset, QUEUE, Role, StoreError, Work, keys};

/// Sessions for jobs whose callers wait. Such a job waits twice for the network, and once for an fsync.
const NOW: usize = 6;
/// Sessions for the reports of engines.
const LATER: usize = 2;

/// The channels through which slots get jobs.
#[derive(Clone)]
pub(super) struct Slots {
    pub(super) now: mpsc::Sender<Job>,
    pub(super) later: mpsc::Sender<Job>,
    /// The queues of jobs that lock a row until their end.
    pub(super) rows: RowQueues,
    threads: Threads,
}

/// The writer, and the observer of commit times.
pub(super) type Writer = (mpsc::Sender<Job>, Arc<OnceLock<Observer>>);

impl Slots {
    /// Starts the slots on an open store. A job that they cannot begin goes to the writer.
    ///
    /// # Errors
    /// A thread cannot be made.
    pub(super) fn start(
        place: &Place,
        follows: (&Sealing, &Offset),
        health: &Arc<Health>,
        writer: &Writer,
    ) -> Result<Self, std::io::Error> {
        let threads = Threads::default();
        let lane = |count: usize, kind: fn(Work) -> Job| {
            let (jobs, waiting) = mpsc::channel(QUEUE);
            let waiting = Arc::new(Mutex::new(waiting));
            for _ in 0..count {
                let connection = connection(place, Role::Slot, follows, health.clone())?;
                let (waiting, writer) = (waiting.clone(), writer.clone());
                threads.spawn("store-slot", move || {
                    serve(&connection, &waiting, &writer, kind);
                })?;
            }
            Ok::<_, std::io::Error>(jobs)
        };
        Ok(Self {
            now: lane(NOW, Job::Work)?,
            later: lane(LATER, Job::Later)?,
            rows: RowQueues::default(),
            threads,
        })
    }

    /// Ends the threads after all earlier jobs.
    pub(super) async fn close(&self) {
        for jobs in [&self.now, &self.later] {
            if jobs.send(Job::Close).await.is_ok() {
                jobs.closed().await;
            }
        }
        self.threads.ended().await;
    }
}

/// Serves jobs. If a transaction cannot begin, its job goes to the writer; `kind` makes the writer's form of a job.
fn serve(
    connection: &Connection,
    jobs: &Mutex<mpsc::Receiver<Job>>,
    writer: &Writer,
    kind: fn(Work) -> Job,
) {
    let (to_writer, commits) = writer;
    let mut one = Vec::new();
    while take(jobs, 1, &mut one) {
        let Some(mut work) = one.pop() else { continue };
        match begin(connection, std::mem::take(&mut work.ahead)) {
            Ok(()) => finish(connection, work, commits),
            Err(error) => {
                debug!(%error, "a slot of the lease store cannot be taken; the writer does the job");
                connection.roll_back();
                let _ = to_writer.blocking_send(kind(work));
            }
        }
    }
}

fn begin(connection: &Connection, ahead: Vec<Query>) -> Result<(), String> {
    match keys::begin_with(connection, ahead) {
        Ok(false) => Ok(()),
        Ok(true) => Err("an upgrade is over, and the writer must finish it".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

fn finish(connection: &Connection, work: Work, commits: &OnceLock<Observer>) {
    let answer = (work.run)(connection);
    if connection.has_failed() {
        connection.roll_back();
        // The caller gets the error of the job.
        return answer(Ok(()));
    }
    let begun = Instant::now();
    let committed = connection.commit().map_err(StoreError::from);
    if let Some(observe) = commits.get() {
        observe(begun.elapsed());
    }
    if committed.is_err() {
        connection.roll_back();
    }
    answer(committed);
}
