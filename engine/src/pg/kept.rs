//! One connection to each server is kept while accounts exist there. So an account that takes every connection slot
//! cannot delay its own end.
//!
//! It is opened before an account is made and used only for revocations that get no other. It leads to the database
//! `postgres` if the admin may connect to that, because a database with a connection cannot be dropped. It is closed
//! when the server has no role with the comment of a lease any more. There is at most one for each server, admin and
//! home database.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mayfly_protocol::secret::Secret;
use mayfly_protocol::target::Target;
use mayfly_protocol::task::{Failure, FailureCode};
use mayfly_protocol::timing::timing;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::OwnedMutexGuard;
use tracing::{debug, warn};

use super::breaker::Reached;
use super::connect::Connected;
use super::servers::Servers;
use super::session::Session;
use super::sql::{COMMENT_PREFIX, literal};
use super::target_key::target_key;
use futures_util::future::join_all;

/// Pause between two checks whether accounts exist on the server. The answer also shows that the connection works.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Time limit for the upkeep of one kept connection.
const TEND_WITHIN: Duration = Duration::from_secs(6);
/// How long a revocation waits while another revocation uses the connection.
const TURN_WITHIN: Duration = Duration::from_secs(1);
/// After this time without success the connection is no longer tried.
const TRIED_FOR: Duration = Duration::from_secs(600);

/// How long a connection is kept after a create needed it, even if the server has no accounts: the account is made
/// at most the create budget later.
fn wanted_for() -> Duration {
    timing()
        .create_budget
        .saturating_add(Duration::from_secs(1))
}

/// The kept connections of an engine.
#[derive(Default)]
pub(super) struct Kept {
    slots: Mutex<HashMap<String, Arc<Slot>>>,
}

struct Slot {
    target: Target,
    held: Arc<tokio::sync::Mutex<Held>>,
    /// When a create last needed the connection.
    wanted: Mutex<Option<Instant>>,
    /// When it was last open or requested.
    of_use: Mutex<Instant>,
    /// When it was last checked whether accounts exist on the server.
    looked: Mutex<Option<Instant>>,
}

#[derive(Default)]
pub(super) struct Held {
    connected: Option<Connected>,
    /// The credentials ([`target_key`]) and the database that `connected` was opened with.
    credentials: String,
    database: String,
}

/// A kept connection in use. Meanwhile no other task has it.
pub(super) type Lent = OwnedMutexGuard<Held>;

impl Held {
    fn is_open(&self) -> bool {
        self.connected
            .as_ref()
            .is_some_and(|connected| !connected.client.is_closed())
    }

    /// Takes a connection back after its use.
    pub(super) fn give_back(&mut self, connected: Connected) {
        self.connected = Some(connected);
    }
}

/// The key of a kept connection: all parts of a login except the password.
fn key(target: &Target) -> String {
    target_key(&Target {
        password: Secret::new(""),
        ..target.clone()
    })
}

impl Kept {
    fn slots(&self) -> MutexGuard<'_, HashMap<String, Arc<Slot>>> {
        self.slots.lock()
    }

    /// The slot of a target. It is made if it does not exist. `hold` keeps it for [`wanted_for`], even if the server
    /// has no accounts.
    fn slot(&self, target: &Target, hold: bool) -> Arc<Slot> {
        let mut slots = self.slots();
        let slot = slots
            .entry(key(target))
            .or_insert_with(|| Arc::new(Slot::new(target, Arc::default())));
        slot.is_of_use();
        if hold {
            *slot.wanted() = Some(Instant::now());
        }
        slot.clone()
    }

    /// Replaces the target with which a slot is opened.
    fn renew(&self, slot: &Slot, target: &Target) {
        let renewed = Slot::new(target, slot.held.clone());
        *renewed.wanted() = *slot.wanted();
        self.slots().insert(key(target), Arc::new(renewed));
    }

    /// Forgets a slot, unless an account is about to be made there.
    fn forget(&self, slot: &Arc<Slot>) {
        let mut slots = self.slots();
        let key = key(&slot.target);
        if slots.get(&key).is_some_and(|one| Arc::ptr_eq(one, slot)) && !slot.is_wanted() {
            slots.remove(&key);
        }
    }
}

impl Slot {
    fn new(target: &Target, held: Arc<tokio::sync::Mutex<Held>>) -> Self {
        Self {
            target: target.clone(),
            held,
            wanted: Mutex::new(None),
            of_use: Mutex::new(Instant::now()),
            looked: Mutex::default(),
        }
    }

    fn wanted(&self) -> MutexGuard<'_, Option<Instant>> {
        self.wanted.lock()
    }

    fn is_wanted(&self) -> bool {
        self.wanted().is_some_and(|at| at.elapsed() < wanted_for())
    }

    /// Whether a check is due. The caller then does it.
    fn looks(&self) -> bool {
        let mut looked = self.looked.lock();
        if looked.is_some_and(|at| at.elapsed() < LOOK_EVERY) {
            return false;
        }
        *looked = Some(Instant::now());
        true
    }

    fn is_of_use(&self) {
        *self.of_use.lock() = Instant::now();
    }

    fn was_of_use(&self) -> Duration {
        let of_use = self.of_use.lock();
        of_use.elapsed()
    }
}

impl Servers {
    /// Makes sure that a connection is kept to the target's server, before an account is made there.
    ///
    /// # Errors
    /// As [`Servers::session`]. Without the connection the account could delay its end.
    pub(crate) async fn keep_one(&self, target: &Target) -> Result<(), Failure> {
        let slot = self.kept.slot(target, true);
        // If a revocation uses the connection for longer, it returns the connection later, or the connection is
        // opened again.
        let Ok(mut held) = tokio::time::timeout(TURN_WITHIN, slot.held.lock()).await else {
            return Ok(());
        };
        let credentials = target_key(target);
        if held.is_open() && held.credentials == credentials {
            return Ok(());
        }
        if let Err(failure) = self.open_kept(target, &mut held).await {
            if failure.code != FailureCode::DatabaseUnreachable {
                *slot.wanted() = None;
            }
            return Err(failure);
        }
        if target_key(&slot.target) != credentials {
            self.kept.renew(&slot, target);
        }
        Ok(())
    }

    /// Requests that a connection is kept to a server that may have accounts. It is opened within a second.
    pub(crate) fn want_one(&self, target: &Target) {
        self.kept.slot(target, false);
    }

    /// The kept connection, for a revocation that gets no other connection.
    pub(super) async fn kept_session(&self, target: &Target) -> Option<Session<'_>> {
        let slot = self.kept.slot(target, false);
        let turn = slot.held.clone().lock_owned();
        let mut held = tokio::time::timeout(TURN_WITHIN, turn).await.ok()?;
        if !held.is_open() || held.credentials != target_key(target) {
            return None;
        }
        let connected = held.connected.take()?;
        let database = held.database.clone();
        Some(self.lent_session(target, &database, connected, held))
    }

    async fn open_kept(&self, target: &Target, held: &mut Held) -> Result<(), Failure> {
        let mut database = "postgres";
        let mut opened = self.session_to_keep(target, database).await;
        // Not every admin may connect to this database, and not every pooler has it.
        if let Err(refused) = &opened
            && target.database != database
            && refused.found == Reached::Reachable
        {
            let was_full = refused.failure.full;
            database = &target.database;
            opened = self.session_to_keep(target, database).await;
            // The server was full at the first try, and now a slot is free. So `postgres` may work too.
            if was_full
                && opened.is_ok()
                && let Ok(better) = self.session_to_keep(target, "postgres").await
            {
                (database, opened) = ("postgres", Ok(better));
            }
        }
        let session = opened.map_err(|refused| refused.failure)?;
        // A server may end idle sessions.
        session
            .transact("SELECT set_config('idle_session_timeout', '0', false)")
            .await
            .map_err(|error| error.into_failure("keeping a connection"))?;
        *held = Held {
            connected: Some(session.into_connected()),
            credentials: target_key(target),
            database: database.to_owned(),
        };
        debug!(database, "keeping a connection for revocations");
        Ok(())
    }

    /// Opens kept connections that are missing, and closes those of servers without accounts.
    /// Called about twice a second.
    pub(crate) async fn tend_kept(&self) {
        let slots: Vec<Arc<Slot>> = self.kept.slots().values().cloned().collect();
        // A server that hangs must not delay the connections to others.
        let tending = slots.iter().map(|slot| async {
            let _ = tokio::time::timeout(TEND_WITHIN, self.tend(slot)).await;
        });
        join_all(tending).await;
    }

    async fn tend(&self, slot: &Arc<Slot>) {
        // A revocation is using the connection.
        let Ok(mut held) = slot.held.clone().try_lock_owned() else {
            return;
        };
        if !held.is_open() {
            // Tasks for this server try it.
            if self.limits(&slot.target).is_breaker_open() {
                return;
            }
            if let Err(failure) = self.open_kept(&slot.target, &mut held).await {
                // If the server is full, the first free slot is taken.
                if failure.code != FailureCode::DatabaseUnreachable || slot.was_of_use() > TRIED_FOR
                {
                    debug!(
                        reason = failure.message,
                        "no connection could be kept for revocations"
                    );
                    self.kept.forget(slot);
                }
                return;
            }
        }
        slot.is_of_use();
        if !slot.looks() {
            return;
        }
        let Some(connected) = held.connected.take() else {
            return;
        };
        let database = held.database.clone();
        let session = self.lent_session(&slot.target, &database, connected, held);
        let text = format!(
            "SELECT EXISTS (SELECT 1 FROM pg_shdescription WHERE starts_with(description, {}))",
            literal(&format!("{COMMENT_PREFIX}lease:"))
        );
        match session.transact(&text).await {
            Ok(rows) => {
                session.release();
                if rows.first().is_some_and(|stand| !stand.flag(0)) {
                    self.kept.forget(slot);
                }
            }
            // The next call opens another one.
            Err(error) => warn!(sqlstate = error.code(), "a kept connection was lost"),
        }
    }
}
