//! Privileges that grant roles lack now and get in the background: on objects that another transaction holds, and
//! those for which a create had no time. The list is in memory only. If it is lost, the next read of the secret
//! looks again.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use tracing::{debug, info, warn};

use super::grant_refresh::{grant, oid};
use super::grant_set::{GrantSet, Key, OwnedSet};
use super::grant_verdict::{Sum, Waiting};
use super::servers::Servers;
use futures_util::future::join_all;

/// Maximum number of grant roles that are worked on in the background. Others get the rest at the next read.
const ROLES: usize = 256;
/// Maximum number of grant roles that are worked on at the same time.
const SIDE_BY_SIDE: usize = 4;
/// Time limit of one turn of a role.
const TURN: Duration = Duration::from_secs(20);
const TURN_ALLOWANCE: Duration = Duration::from_secs(20);
/// Pause between two turns of a role that waits for locks: 1 s, doubling, at most 30 s.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// Maximum number of failed turns in a row. After that the role waits for the next read.
const FAILURES: u32 = 20;

/// The grant roles that lack something now.
#[derive(Default)]
pub(super) struct Later(Mutex<HashMap<Key, Work>>);

struct Work {
    set: Arc<OwnedSet>,
    waiting: Waiting,
    due: Instant,
    pause: Duration,
    failures: u32,
    is_running: bool,
    /// When a turn last took it, or when it was last added or put back.
    touched: Instant,
}

impl Later {
    fn work(&self) -> MutexGuard<'_, HashMap<Key, Work>> {
        self.0.lock()
    }

    /// Records what a role lacks after a refresh.
    pub(super) fn put(&self, key: Key, set: &GrantSet<'_>, waiting: Waiting) {
        let mut all = self.work();
        if waiting.is_none() {
            all.remove(&key);
            return;
        }
        if let Some(work) = all.get_mut(&key) {
            work.due = work.due.min(Instant::now() + pause(&waiting, work.pause));
            work.waiting = waiting;
            work.touched = Instant::now();
            return;
        }
        if all.len() >= ROLES {
            return;
        }
        let work = Work {
            set: Arc::new(OwnedSet::of(set)),
            due: Instant::now() + pause(&waiting, PAUSE_FIRST),
            waiting,
            pause: PAUSE_FIRST,
            failures: 0,
            is_running: false,
            touched: Instant::now(),
        };
        all.insert(key, work);
    }

    /// What a role lacks. `None`: it lacks nothing.
    pub(super) fn waiting(&self, key: &Key) -> Option<Waiting> {
        self.work().get(key).map(|work| work.waiting.clone())
    }

    /// Whether a turn of this role is running, or is about to begin because time ran out. After 40 s without an end
    /// a turn no longer counts, so that reads grant again.
    pub(super) fn is_running(&self, key: &Key) -> bool {
        let all = self.work();
        all.get(key).is_some_and(|work| {
            (work.is_running || work.waiting.not_reached > 0)
                && work.touched.elapsed() < TURN + TURN_ALLOWANCE
        })
    }

    /// Takes the roles whose turn is due.
    fn take(&self) -> Vec<Key> {
        let now = Instant::now();
        let mut all = self.work();
        let due = all.iter_mut().filter(|(_, work)| work.due <= now);
        due.take(SIDE_BY_SIDE)
            .map(|(key, work)| {
                work.is_running = true;
                work.touched = now;
                key.clone()
            })
            .collect()
    }

    /// Records the result of a turn.
    fn done(&self, key: &Key, result: TurnResult) {
        let mut all = self.work();
        let Some(work) = all.get_mut(key) else {
            return;
        };
        work.is_running = false;
        work.touched = Instant::now();
        let goes_on = match result {
            TurnResult::Granted(sum) if sum.waiting.is_none() => {
                info!(role = %key.1, "granted the rest");
                false
            }
            TurnResult::Granted(sum) => {
                let is_less = sum.waiting.pairs() < work.waiting.pairs();
                work.pause = match is_less {
                    true => PAUSE_FIRST,
                    false => (work.pause * 2).min(PAUSE_MAX),
                };
                work.due = Instant::now() + pause(&sum.waiting, work.pause);
                work.waiting = sum.waiting;
                work.failures = 0;
                true
            }
            TurnResult::Failed => {
                work.failures += 1;
                work.pause = (work.pause * 2).min(PAUSE_MAX);
                work.due = Instant::now() + work.pause;
                work.failures < FAILURES
            }
            TurnResult::Gone => false,
        };
        if !goes_on {
            all.remove(key);
        }
    }

    /// Number of pairs of object and privilege that all grant roles lack now.
    pub(super) fn pairs(&self) -> usize {
        self.work().values().map(|work| work.waiting.pairs()).sum()
    }
}

/// The pause before the next turn. If only time ran out, it is zero.
fn pause(waiting: &Waiting, otherwise: Duration) -> Duration {
    match waiting.not_reached {
        0 => otherwise,
        _ => Duration::ZERO,
    }
}

/// The result of a role's turn.
enum TurnResult {
    Granted(Sum),
    Failed,
    /// The role is not needed any more.
    Gone,
}

impl Later {
    /// Grants what the roles whose turn is due lack. It is called about twice a second. It may be dropped at any
    /// time: what it granted is committed.
    pub(super) async fn go_on(&self, servers: &Servers) {
        let due = self.take();
        join_all(due.iter().map(|key| async {
            let result = self.turn(servers, key).await;
            self.done(key, result);
        }))
        .await;
    }

    async fn turn(&self, servers: &Servers, key: &Key) -> TurnResult {
        let Some(set) = self.work().get(key).map(|work| work.set.clone()) else {
            return TurnResult::Gone;
        };
        let set = set.as_set();
        // The role is never made here: an absent role has no members.
        let found = match servers.session(set.target, &set.target.database).await {
            Ok(home) => {
                let found = oid(&home, &key.1).await;
                home.release();
                found
            }
            Err(failure) => Err(failure),
        };
        match found {
            Ok(Some(_)) => {}
            Ok(None) => return TurnResult::Gone,
            Err(failure) => {
                debug!(role = %key.1, reason = failure.message, "the rest of the grants failed in this turn");
                return TurnResult::Failed;
            }
        }
        match grant(servers, &set, &key.1, Instant::now() + TURN).await {
            Ok(sum) => TurnResult::Granted(sum),
            Err(failure) => {
                warn!(role = %key.1, code = failure.code.as_str(), reason = failure.message, "the rest of the grants failed in this turn");
                TurnResult::Failed
            }
        }
    }
}
