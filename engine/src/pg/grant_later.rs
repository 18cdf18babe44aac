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

impl Work {
    /// Records the result of a turn that ended at `now`. Returns whether there will be another.
    fn after(&mut self, result: TurnResult, now: Instant) -> bool {
        self.is_running = false;
        self.touched = now;
        match result {
            TurnResult::Granted(sum) if sum.waiting.is_none() => false,
            TurnResult::Granted(sum) => {
                let is_less = sum.waiting.pairs() < self.waiting.pairs();
                self.pause = match is_less {
                    true => PAUSE_FIRST,
                    false => (self.pause * 2).min(PAUSE_MAX),
                };
                self.due = now + pause(&sum.waiting, self.pause);
                self.waiting = sum.waiting;
                self.failures = 0;
                true
            }
            TurnResult::Failed => {
                self.failures += 1;
                self.pause = (self.pause * 2).min(PAUSE_MAX);
                self.due = now + self.pause;
                self.failures < FAILURES
            }
            TurnResult::Gone => false,
        }
    }
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
        if matches!(&result, TurnResult::Granted(sum) if sum.waiting.is_none()) {
            info!(role = %key.1, "a grant role now has the privileges that it lacked");
        }
        let goes_on = work.after(result, Instant::now());
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use mayfly_protocol::fixtures::target;
    use mayfly_protocol::names::InstallationId;

    fn key(name: &str) -> Key {
        ("server".to_owned(), name.parse().unwrap())
    }

    fn lacks(locked: usize, not_reached: usize) -> Waiting {
        let mut waiting = Waiting::default();
        (waiting.locked, waiting.not_reached) = (locked, not_reached);
        waiting
    }

    fn granted(locked: usize, not_reached: usize) -> TurnResult {
        let mut sum = Sum::default();
        sum.waiting = lacks(locked, not_reached);
        TurnResult::Granted(sum)
    }

    /// Grant roles that lack privileges on objects that others hold.
    fn later(names: &[&str], waiting: &Waiting) -> Later {
        let (installation, target) = (InstallationId::random(), target());
        let set = GrantSet {
            installation: &installation,
            target: &target,
            database: "d",
            grants: &[],
        };
        let later = Later::default();
        for name in names {
            later.put(key(name), &set, waiting.clone());
        }
        later
    }

    /// A role waits for locks with growing pauses, and soon again when some are gone.
    #[test]
    fn a_turn_decides_about_the_next() {
        let seconds = Duration::from_secs;
        let later = later(&["r"], &lacks(5, 0));
        let mut all = later.work();
        let work = all.get_mut(&key("r")).unwrap();
        for (result, wait) in [
            (granted(5, 0), 2),
            (granted(5, 0), 4),
            (TurnResult::Failed, 8),
            (granted(6, 0), 16),
            (granted(6, 0), 30),
            (TurnResult::Failed, 30),
            // One object is no longer locked.
            (granted(5, 0), 1),
            (granted(5, 0), 2),
            // Only the time was over: the next turn begins at once.
            (granted(5, 7), 0),
        ] {
            let now = Instant::now();
            work.is_running = true;
            assert!(work.after(result, now));
            assert_eq!(work.due, now + seconds(wait));
            assert!(!work.is_running && work.touched == now);
        }
        assert_eq!(work.waiting, lacks(5, 7));
        assert!(
            !work.after(granted(0, 0), Instant::now()),
            "it has everything"
        );
        assert!(!work.after(TurnResult::Gone, Instant::now()));
    }

    #[test]
    fn a_role_that_fails_twenty_times_in_a_row_waits_for_the_next_read() {
        let later = later(&["r"], &lacks(5, 0));
        let mut all = later.work();
        let work = all.get_mut(&key("r")).unwrap();
        let fails = |work: &mut Work| work.after(TurnResult::Failed, Instant::now());
        assert!((0..19).all(|_| fails(work)));
        assert!(!fails(work));
        assert!(work.after(granted(5, 0), Instant::now()));
        assert!((0..19).all(|_| fails(work)), "counted from the start");
    }

    #[test]
    fn a_read_does_not_grant_beside_a_turn() {
        let locked = later(&["r"], &lacks(5, 0));
        assert!(!locked.is_running(&key("r")), "it waits for others");
        assert!(locked.take().is_empty(), "not before its pause of 1 s");
        let late = later(&["r"], &lacks(5, 1));
        assert!(late.is_running(&key("r")), "its turn is about to come");
        assert_eq!(late.take(), [key("r")]);
        late.done(&key("r"), granted(5, 0));
        assert!(!late.is_running(&key("r")));
        locked.work().get_mut(&key("r")).unwrap().is_running = true;
        assert!(locked.is_running(&key("r")));
        // A turn that does not end does not prevent reads for ever.
        let since = Instant::now().checked_sub(TURN + TURN_ALLOWANCE).unwrap();
        locked.work().get_mut(&key("r")).unwrap().touched = since;
        assert!(!locked.is_running(&key("r")));
    }

    #[test]
    fn the_list_is_bounded_and_worked_on_in_parts() {
        let names: Vec<String> = (0..=ROLES).map(|n| format!("r{n}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let later = later(&names, &lacks(0, 1));
        assert_eq!(later.pairs(), ROLES);
        assert!(later.waiting(&key("r0")).is_some());
        assert!(later.waiting(&key(&format!("r{ROLES}"))).is_none());
        assert_eq!(later.take().len(), SIDE_BY_SIDE);
        later.done(&key("r0"), granted(0, 0));
        assert!(later.waiting(&key("r0")).is_none());
    }
}
