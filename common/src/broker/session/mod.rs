//! One connection, from its opening to its end: watched, with a channel for declarations. Opening is in `open`,
//! publishing in `publish`, consuming in `consume`.

mod consume;
mod open;
mod publish;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use lapin::{Channel, Connection};
use tokio::sync::{Mutex, mpsc};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use self::open::absent_levels_of;
pub(super) use self::open::{Counts, States, supervise};
use super::BrokerError;
use super::declare::has_exchange;
use super::owner::claim_on;
use super::publishers::Publishers;
use super::wire::{Outgoing, Routes};
use mayfly_protocol::names::InstallationId;
use mayfly_protocol::topology;

const CONFIRM_TIMEOUT: Duration = Duration::from_secs(5);
const DECLARE_TIMEOUT: Duration = Duration::from_secs(30);
/// Pause between two checks of the connection.
const WATCH_EVERY: Duration = Duration::from_millis(500);

/// One connection to the broker, from its opening to its end.
pub(super) struct Session {
    connection: Connection,
    publishers: Publishers,
    routes: Routes,
    /// A random part of the names of this connection's queues.
    name: String,
    is_engine: bool,
    /// The virtual host of a dispatcher, and the installation that must own it. `None`: an engine.
    owner: Option<(String, InstallationId)>,
    /// Whether an exchange of engines was absent when this connection was opened.
    is_outdated: bool,
    /// Delay levels that had no queue when a dispatcher opened this connection. The first call takes them.
    found_absent: std::sync::Mutex<Vec<u32>>,
    specimens: mpsc::Sender<Outgoing>,
    /// For declarations and counts, one call at a time.
    admin: Mutex<Channel>,
    /// For answers, which have no confirms. `None`: there was none yet.
    answers: Mutex<Option<Channel>>,
    broken: Arc<AtomicBool>,
    ended: CancellationToken,
    /// Messages that could not be read, of all sessions.
    unreadable: Arc<AtomicU64>,
}

impl Session {
    /// Returns when the connection is lost or must be opened again, or at `stop`.
    async fn watch(&self, stop: &CancellationToken) {
        let mut events = self.connection.events_listener();
        let mut tick = tokio::time::interval(WATCH_EVERY);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                event = events.next() => match event {
                    None => return,
                    Some(lapin::Event::ConnectionBlocked(reason)) => {
                        error!(reason, "the broker accepts no messages (memory or disk alarm)");
                    }
                    Some(_) => {}
                },
                _ = tick.tick() => {}
            }
            if !self.connection.status().connected() || self.broken.load(Ordering::Relaxed) {
                return;
            }
            if self.is_outdated().await {
                info!("a dispatcher has declared the absent queues; connecting again");
                return;
            }
        }
    }

    /// Whether an exchange of engines exists now that was absent when this connection was opened.
    async fn is_outdated(&self) -> bool {
        if !self.is_engine || !self.is_outdated {
            return false;
        }
        // The newest exchange is declared last.
        let missing = match self.routes.entrances {
            true => topology::ENTRY,
            false => topology::PARK,
        };
        let looking = self.on_admin(async |channel| has_exchange(channel, missing).await);
        matches!(
            tokio::time::timeout(CONFIRM_TIMEOUT, looking).await,
            Ok(Ok(true))
        )
    }

    pub(super) async fn open_channel(&self) -> Result<Channel, BrokerError> {
        Ok(self.connection.create_channel().await?)
    }

    /// Checks that the virtual host still belongs to this dispatcher's installation. If not, the connection ends at
    /// once: another installation has claimed the virtual host after it was wiped, or with `--take-over-broker`.
    pub(super) async fn claim(&self) -> Result<(), BrokerError> {
        let Some((vhost, installation)) = &self.owner else {
            return Ok(());
        };
        if self.is_blocked() {
            return Err(BrokerError::Down);
        }
        let claiming = claim_on(&self.connection, vhost, installation);
        let late = |_| Err(BrokerError::Unconfirmed("time-out".to_owned()));
        let claimed = tokio::time::timeout(CONFIRM_TIMEOUT, claiming).await;
        match claimed.unwrap_or_else(late) {
            Err(BrokerError::Taken(taken)) => {
                error!("{taken}");
                self.broken.store(true, Ordering::Relaxed);
                Err(BrokerError::Taken(taken))
            }
            // This was logged when the connection was opened.
            Err(BrokerError::NotAllowed(_)) => Ok(()),
            done => done,
        }
    }

    /// Which delay levels have no queue.
    pub(super) async fn absent_levels(&self) -> Result<Vec<u32>, BrokerError> {
        if self.is_blocked() {
            return Err(BrokerError::Down);
        }
        let looking = async {
            let mut admin = self.admin.lock().await;
            absent_levels_of(&self.connection, &mut admin).await
        };
        tokio::time::timeout(DECLARE_TIMEOUT, looking)
            .await
            .map_err(|_| BrokerError::Unconfirmed("time-out".to_owned()))?
    }

    /// The delay levels without a queue when this connection was opened. Empty from the second call on.
    pub(super) fn found_absent(&self) -> Vec<u32> {
        let mut found = self.found_absent.lock();
        let found = found.as_deref_mut().map(std::mem::take);
        found.unwrap_or_default()
    }

    /// Whether the broker has blocked publishing, for lack of memory or disk. lapin then writes nothing until it is
    /// unblocked: a publish that was not begun is certainly not sent.
    pub(super) fn is_blocked(&self) -> bool {
        self.connection.status().blocked()
    }

    /// Runs calls on the admin channel, with a time-out. A failed channel is replaced.
    pub(super) async fn on_admin<T>(
        &self,
        work: impl AsyncFnOnce(&Channel) -> Result<T, BrokerError>,
    ) -> Result<T, BrokerError> {
        if self.is_blocked() {
            return Err(BrokerError::Down);
        }
        let working = async {
            let mut admin = self.admin.lock().await;
            if !admin.status().connected() {
                *admin = self.connection.create_channel().await?;
            }
            work(&admin).await
        };
        tokio::time::timeout(DECLARE_TIMEOUT, working)
            .await
            .map_err(|_| BrokerError::Unconfirmed("time-out".to_owned()))?
    }
}
