//! Looks at grant roles that no create waits for: at most one at a time for each role, and two for each server. They
//! end with the engine's consumers.

use std::sync::Arc;
use std::time::Instant;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use mayfly_common::panics::caught;
use mayfly_protocol::timing::timing;
use parking_lot::Mutex;
use tokio::sync::{OwnedMutexGuard, mpsc};
use tracing::debug;

use super::grant_look::{Looks, Step};
use super::grant_role::GrantRoles;
use super::grant_set::{GrantSet, Key, OwnedSet};
use super::limits::Permit;
use super::servers::Servers;

/// Maximum number of waiting looks. The limit of each server is reached first.
const WAITING: usize = 64;

/// The looks that creates have requested.
pub(super) struct Beside {
    asked: mpsc::Sender<Look>,
    /// The receiver of requested looks. `None`: [`GrantRoles::look_beside`] has it.
    waiting: Mutex<Option<mpsc::Receiver<Look>>>,
}

impl Default for Beside {
    fn default() -> Self {
        let (asked, waiting) = mpsc::channel(WAITING);
        Self {
            asked,
            waiting: Mutex::new(Some(waiting)),
        }
    }
}

/// A look at one role, with its turn and its place at the server.
struct Look {
    set: OwnedSet,
    key: Key,
    looks: Arc<Looks>,
    asked: Instant,
    _turn: OwnedMutexGuard<()>,
    _place: Permit,
}

impl GrantRoles {
    /// Requests a look at a role that no create waits for, unless there is one already. Returns `false` if there is
    /// no place for it.
    pub(super) fn begin_look(
        &self,
        servers: &Servers,
        set: &GrantSet<'_>,
        key: &Key,
        looks: &Arc<Looks>,
    ) -> bool {
        let Ok(turn) = looks.turn.clone().try_lock_owned() else {
            return true;
        };
        let asked = Instant::now();
        // Another look may have ended meanwhile. If the set is large, the background grants the rest of it.
        if looks.last.lock().step(asked) != Step::UseAndLook || self.later.is_running(key) {
            return true;
        }
        let Some(place) = servers.limits(set.target).look() else {
            return false;
        };
        let look = Look {
            set: OwnedSet::of(set),
            key: key.clone(),
            looks: looks.clone(),
            asked,
            _turn: turn,
            _place: place,
        };
        self.beside.asked.try_send(look).is_ok()
    }

    /// Does the looks that creates have requested. It runs until it is dropped, which ends the looks in progress:
    /// what they granted is committed. `skipped` gets the number of pairs that each look skipped.
    pub(crate) async fn look_beside(&self, servers: &Servers, skipped: impl Fn(usize)) {
        let Some(mut waiting) = self.beside.waiting.lock().take() else {
            return;
        };
        let mut running = FuturesUnordered::new();
        loop {
            tokio::select! {
                Some(look) = waiting.recv() => {
                    running.push(caught("the check of a grant role", self.take(servers, look)));
                }
                Some(done) = running.next() => {
                    if let Some(passed_over) = done.flatten() {
                        skipped(passed_over);
                    }
                }
                else => return,
            }
        }
    }

    /// Does one look. If it fails, or takes longer than a create may, the next create does a look of its own.
    async fn take(&self, servers: &Servers, look: Look) -> Option<usize> {
        let limit = tokio::time::Instant::from_std(look.asked + timing().create_budget);
        let set = look.set.as_set();
        let until = look.asked + timing().grant_within;
        let work = self.look(servers, &set, &look.key, &look.looks, until);
        match tokio::time::timeout_at(limit, work).await.ok()? {
            Ok(granted) => granted.skipped,
            Err(failure) => {
                debug!(role = %look.key.1, code = failure.code.as_str(), reason = failure.message, "the check of a grant role failed");
                None
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use futures_util::FutureExt;

    use super::*;
    use crate::pg::create_sql::tests::task;
    use crate::pg::grant_look::LastLook;
    use crate::pg::target_key::target_key;

    struct World {
        servers: Servers,
        roles: GrantRoles,
        set: OwnedSet,
        key: Key,
        looks: Arc<Looks>,
    }

    /// A role whose last look is 1.5 s old, at a server that refuses connections.
    fn world() -> World {
        let mut task = task(None);
        (task.target.host, task.target.port) = ("127.0.0.1".to_owned(), 1);
        let set = OwnedSet::of(&GrantSet {
            installation: &task.installation,
            target: &task.target,
            database: &task.database,
            grants: &task.grants,
        });
        let key = (target_key(&task.target), set.as_set().role().unwrap());
        let looks = Looks::default();
        looks.last.lock().at = Instant::now().checked_sub(Duration::from_millis(1_500));
        World {
            servers: Servers::default(),
            roles: GrantRoles::default(),
            set,
            key,
            looks: Arc::new(looks),
        }
    }

    impl World {
        fn begin(&self) -> bool {
            let set = self.set.as_set();
            self.roles
                .begin_look(&self.servers, &set, &self.key, &self.looks)
        }

        fn begun(&self) -> usize {
            WAITING - self.roles.beside.asked.capacity()
        }
    }

    #[tokio::test]
    async fn one_look_at_a_time_begins_at_a_role() {
        let world = world();
        assert!(world.begin() && world.begin());
        assert_eq!(world.begun(), 1);
    }

    #[tokio::test]
    async fn a_role_that_was_just_looked_at_is_left_alone() {
        let world = world();
        *world.looks.last.lock() = LastLook::now(7);
        assert!(world.begin());
        assert_eq!(world.begun(), 0);
    }

    /// The create then waits for a look of its own, and can have the turn.
    #[tokio::test]
    async fn nothing_begins_without_a_place_at_the_server() {
        let world = world();
        let limits = world.servers.limits(world.set.as_set().target);
        let places: Vec<_> = std::iter::from_fn(|| limits.look()).collect();
        assert!(!places.is_empty());
        assert!(!world.begin());
        assert!(world.looks.turn.try_lock().is_ok());
        drop(places);
        assert!(world.begin());
        assert_eq!(world.begun(), 1);
    }

    #[tokio::test]
    async fn the_next_create_notices_a_look_that_failed() {
        let world = world();
        assert!(world.begin());
        let working = world
            .roles
            .look_beside(&world.servers, |_| panic!("it has failed"));
        let failed = async {
            while world.looks.last.lock().failed.is_none() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::select! {
            () = working => panic!("it ends only when it is dropped"),
            () = failed => {}
            () = tokio::time::sleep(Duration::from_secs(20)) => panic!("no failure"),
        }
        assert_eq!(world.looks.last.lock().step(Instant::now()), Step::Wait);
    }

    /// When the engine stops, creates in progress look themselves.
    #[tokio::test]
    async fn a_stop_gives_up_what_was_begun() {
        let world = world();
        assert!(world.begin());
        let _ = world
            .roles
            .look_beside(&world.servers, |_| ())
            .now_or_never();
        assert!(world.looks.turn.try_lock().is_ok());
        assert!(!world.begin());
        assert!(world.looks.turn.try_lock().is_ok());
    }
}
