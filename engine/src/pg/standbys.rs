//! Sessions of accounts on standbys. `DROP ROLE` is replicated to a standby like every change, but ends no session
//! there. So the accounts' sessions are ended at each host of the base secret that is a standby of the server. This
//! happens after the standby has replayed the loss of the login, so that no new session begins. A standby that lags
//! behind or is unreachable is looked at again for [`LOOKED_FOR`]. Standbys that the base secret does not name are
//! not known here.

use std::time::{Duration, Instant};

use mayfly_protocol::target::{Endpoint, Target};
use parking_lot::{Mutex, MutexGuard};
use tracing::{debug, info, warn};

use super::due::Due;
use super::end_sessions::end_sessions_of;
use super::servers::Servers;
use super::session::Session;
use super::sql::literal;
use futures_util::future::join_all;

/// Maximum time for which the end of accounts waits for standbys that lag behind, and for the end of their sessions.
const BEHIND: Duration = Duration::from_millis(500);
const SESSIONS: Duration = Duration::from_millis(800);
/// Time limit for all standbys of a batch.
const WITHIN: Duration = Duration::from_secs(2);
/// Pause between two looks at the replay position of a standby.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long a standby that lagged behind or was unreachable is looked at again, and the pause between two looks.
const LOOKED_FOR: Duration = Duration::from_secs(600);
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// Maximum number of standbys to look at again. Each batch counts them separately.
const MOST: usize = 1000;

/// Looks that are still to be made.
#[derive(Default)]
pub(super) struct Later {
    looks: Mutex<Vec<Look>>,
    looked: Mutex<Option<Instant>>,
}

/// What is to be ended on a standby.
#[derive(Clone)]
struct Look {
    target: Target,
    endpoint: Endpoint,
    identity: String,
    /// The primary's WAL position when the login was gone.
    gone_at: String,
    oids: Vec<u32>,
    since: Instant,
}

impl Later {
    fn looks(&self) -> MutexGuard<'_, Vec<Look>> {
        self.looks.lock()
    }

    fn add(&self, look: Look) {
        let mut looks = self.looks();
        if looks.len() < MOST {
            looks.push(look);
        }
    }

    fn is_time(&self) -> bool {
        let mut looked = self.looked.lock();
        if looked.is_some_and(|at| at.elapsed() < LOOK_AGAIN) {
            return false;
        }
        *looked = Some(Instant::now());
        true
    }
}

/// Ends the sessions of accounts on the standbys among the target's hosts. Their login is gone.
pub(super) async fn end_on_standbys(servers: &Servers, home: &Session<'_>, due: &[Due<'_>]) {
    let Some(one) = due.first() else { return };
    let target = &one.task.target;
    let endpoints = target.endpoints().unwrap_or_default();
    if endpoints.len() < 2 {
        return;
    }
    let rows = home.transact("SELECT pg_current_wal_lsn()").await;
    let Some(gone_at) = rows
        .ok()
        .and_then(|rows| rows.first()?.get(0).map(str::to_owned))
    else {
        return;
    };
    let looks = endpoints
        .into_iter()
        .filter(|endpoint| endpoint != home.endpoint())
        .map(|endpoint| async {
            let look = Look {
                target: target.clone(),
                endpoint,
                identity: home.facts().identity.clone(),
                gone_at: gone_at.clone(),
                oids: due.iter().map(|role| role.oid).collect(),
                since: Instant::now(),
            };
            let done = tokio::time::timeout(WITHIN, end_there(servers, &look)).await;
            match done {
                Ok(Ok(true)) => {}
                Ok(Ok(false)) | Err(_) => servers.later.add(look),
                Ok(Err(reason)) => {
                    debug!(endpoint = %look.endpoint, reason, "sessions on a standby are looked for again");
                    servers.later.add(look);
                }
            }
        });
    join_all(looks).await;
}

/// Whether the accounts cannot have a session on that host any more.
async fn end_there(servers: &Servers, look: &Look) -> Result<bool, String> {
    let opened = servers.standby(&look.target, &look.endpoint, &look.identity);
    let standby = match opened.await {
        Ok(Some(standby)) => standby,
        // The host is no standby, or was unreachable within the last 5 s.
        Ok(None) => return Ok(!servers.seen.is_unreachable(&look.endpoint)),
        Err(failure) => return Err(failure.message),
    };
    let behind = format!(
        "SELECT pg_last_wal_replay_lsn() >= {}::pg_lsn",
        literal(&look.gone_at)
    );
    let until = Instant::now() + BEHIND;
    let knows = loop {
        let rows = standby.transact(&behind).await;
        let rows = rows.map_err(|error| {
            error
                .into_failure("reading the standby's replay position")
                .message
        })?;
        let is_there = rows.first().is_some_and(|row| row.flag(0));
        if is_there || Instant::now() > until {
            break is_there;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    };
    // Sessions are ended even if new ones can still begin.
    let open = end_sessions_of(&standby, &look.oids, SESSIONS).await;
    let open = open.map_err(|error| error.into_failure("ending sessions on a standby").message)?;
    standby.release();
    Ok(knows && open.is_empty())
}

impl Servers {
    /// Looks again at standbys that were behind or unreachable. Called about twice a second.
    pub(crate) async fn tend_standbys(&self) {
        if !self.later.is_time() {
            return;
        }
        let looks = std::mem::take(&mut *self.later.looks());
        let looking = looks.into_iter().map(|look| async {
            let ending = tokio::time::timeout(WITHIN, end_there(self, &look)).await;
            match ending.unwrap_or(Ok(false)) {
                Ok(true) => {
                    info!(endpoint = %look.endpoint, accounts = look.oids.len(), "a standby no longer has sessions of ended accounts");
                }
                Ok(false) | Err(_) if look.since.elapsed() < LOOKED_FOR => self.later.add(look),
                Ok(false) => {
                    warn!(endpoint = %look.endpoint, accounts = look.oids.len(), "sessions of ended accounts may continue at a standby that lags behind");
                }
                Err(reason) => {
                    warn!(endpoint = %look.endpoint, accounts = look.oids.len(), reason, "sessions of ended accounts may continue at a standby");
                }
            }
        });
        join_all(looking).await;
    }
}
