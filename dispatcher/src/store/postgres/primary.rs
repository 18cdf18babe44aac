//! Finds out which server is the primary of the store's database. After a failover the former primary may still run.
//! Then neither server has what is written at the other, such as the deletion of a token. Each promotion begins
//! another timeline of the write-ahead log (PostgreSQL documentation, 26.3.6). So no session stays at a server whose
//! timeline is lower than one that this process has seen. Every 10 s the process looks for a higher timeline.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;
use tokio::sync::mpsc::Sender;
use tokio::time::timeout;
use tokio_postgres::Client;
use tokio_postgres::config::LoadBalanceHosts;
use tracing::{debug, warn};

use super::cells::first_cells;
use super::session::open;
use super::url::{CONNECT_TIMEOUT, Url};
use crate::store::Job;

/// Pause between two looks for another primary.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// Maximum time until the watching thread notices that the store is closed.
const NAP: Duration = Duration::from_millis(200);
/// Number of tries with a URL of several hosts. Each try begins with a random host. Of two servers, 8 tries miss one
/// in 1 of 128 looks.
const TRIES: u32 = 8;
/// Asks for the system identifier and the timeline. A managed server may refuse both.
const ASK: &str = "SELECT (SELECT system_identifier FROM pg_catalog.pg_control_system())::text || ' ' || \
    pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 1, 8)";

/// The timeline of a server that takes writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Timeline {
    /// System identifier. A server and its standbys have the same one.
    system: String,
    number: u32,
}

impl Timeline {
    fn parse(text: &str) -> Option<Self> {
        let (system, number) = text.split_once(' ')?;
        Some(Self {
            system: system.to_owned(),
            number: u32::from_str_radix(number, 16).ok()?,
        })
    }

    /// The timeline of a session's server. `None`: the server does not report it.
    pub(super) async fn of(client: &Client) -> Option<Self> {
        let asked = timeout(CONNECT_TIMEOUT, client.simple_query(ASK)).await;
        let cells = first_cells(&asked.ok()?.ok()?);
        Self::parse(cells.first()?)
    }
}

/// The newest timeline that any session of this process has seen.
#[derive(Debug, Default)]
pub(in crate::store) struct Primary(Mutex<Option<Timeline>>);

impl Primary {
    fn newest(&self) -> MutexGuard<'_, Option<Timeline>> {
        // No code panics while it holds this lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records the timeline of a session. Returns `false` if its server is a former primary.
    pub(super) fn saw(&self, timeline: &Timeline) -> bool {
        let mut newest = self.newest();
        let is_former = is_former(newest.as_ref(), timeline);
        if !is_former && newest.as_ref() != Some(timeline) {
            if newest
                .as_ref()
                .is_some_and(|known| known.system == timeline.system)
            {
                warn!(
                    timeline = timeline.number,
                    "another server is the primary of the store's database"
                );
            }
            *newest = Some(timeline.clone());
        }
        !is_former
    }

    /// Acts as if another server had been promoted. Returns `false` if no timeline is known.
    #[cfg(test)]
    pub(in crate::store) fn advance(&self) -> bool {
        let mut newest = self.newest();
        if let Some(timeline) = newest.as_mut() {
            timeline.number += 1;
        }
        newest.is_some()
    }

    /// Whether a server of this timeline is a former primary.
    pub(super) fn is_newer_than(&self, timeline: &Timeline) -> bool {
        is_former(self.newest().as_ref(), timeline)
    }
}

/// Whether this timeline is older than the newest one. A server with another system identifier is never a former
/// primary.
fn is_former(newest: Option<&Timeline>, timeline: &Timeline) -> bool {
    newest.is_some_and(|known| known.system == timeline.system && timeline.number < known.number)
}

/// Number of tries with a URL, so that each of its hosts was probably tried first once.
pub(super) fn tries(url: &Url) -> u32 {
    match url.config.get_hosts().len() {
        0 | 1 => 1,
        _ => TRIES,
    }
}

/// The same URL, with the host that is tried first chosen at random.
pub(super) fn shuffled(url: &Url) -> Url {
    let mut url = url.clone();
    url.config.load_balance_hosts(LoadBalanceHosts::Random);
    url
}

/// Starts a thread that looks for another primary, until the store is closed.
///
/// # Errors
/// The thread or its runtime cannot be made.
pub(in crate::store) fn watch(url: &Url, jobs: &Sender<Job>) -> Result<(), std::io::Error> {
    let (url, jobs) = (shuffled(url), jobs.downgrade());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let looking = move || {
        let mut looked = Instant::now();
        while jobs.upgrade().is_some_and(|jobs| !jobs.is_closed()) {
            std::thread::sleep(NAP);
            if looked.elapsed() < LOOK_EVERY {
                continue;
            }
            for _ in 0..tries(&url) {
                look(&url, &runtime);
            }
            looked = Instant::now();
        }
    };
    std::thread::Builder::new()
        .name("store-primary".to_owned())
        .spawn(looking)?;
    Ok(())
}

fn look(url: &Url, runtime: &Runtime) {
    let opened = runtime.block_on(async {
        let limit = CONNECT_TIMEOUT
            * u32::try_from(url.config.get_hosts().len())
                .unwrap_or(1)
                .max(1);
        let session = timeout(limit, open(url, None)).await.ok()?.ok()?;
        let timeline = Timeline::of(&session.client).await;
        Some((session, timeline))
    });
    let Some((session, timeline)) = opened else {
        debug!("no look for another primary of the store's database: it cannot be reached");
        return;
    };
    session.close(runtime);
    if let Some(timeline) = timeline {
        url.primary.saw(&timeline);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_lower_timeline_of_the_same_system_is_a_former_primary() {
        let timeline = |text| Timeline::parse(text).unwrap();
        let primary = Primary::default();
        let (first, next) = (timeline("71 00000009"), timeline("71 0000000A"));
        assert!(primary.saw(&first) && !primary.is_newer_than(&first));
        assert!(primary.saw(&next) && primary.is_newer_than(&first));
        assert!(!primary.saw(&first) && primary.saw(&next));
        // This is another cluster, as after a move by dump and restore.
        let moved = timeline("72 00000001");
        assert!(!primary.is_newer_than(&moved) && primary.saw(&moved));
        assert!(Timeline::parse("71").is_none() && Timeline::parse("71 x").is_none());
    }
}
