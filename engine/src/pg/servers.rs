//! The engine's connections to PostgreSQL servers: opened when needed, shared, and closed after a short time
//! without use (an idle admin connection would keep its database from being dropped).

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mayfly_protocol::target::Target;
use mayfly_protocol::task::Failure;
use parking_lot::{Mutex, MutexGuard};

use super::breaker::Reached;
use super::budget::Connections;
use super::connect::{Connected, Names};
use super::hosts::Hosts;
use super::jobs::Schedulers;
use super::kept::{Kept, Lent};
use super::limits::ServerLimits;
use super::refused::{Refused, is_of_the_database};
use super::seen::Seen;
use super::session::Session;
use super::sharing::{Resting, Wanted};
use super::standbys::Later;
use super::target_key::Key;

/// A database that most servers have.
pub(super) const HOME_OF_ALL: &str = "postgres";
/// How long requests other than creates wait for a server without a free connection slot, and the pause between
/// their tries.
const FULL_PATIENCE: Duration = Duration::from_secs(3);
const FULL_PAUSE: Duration = Duration::from_millis(250);
/// The connections of this engine, and its facts about their servers.
#[derive(Default)]
pub(crate) struct Servers {
    /// The hosts to which it may connect.
    pub(super) hosts: Hosts,
    /// Maximum number of connections to one server.
    connections: Connections,
    idle: Mutex<HashMap<Key, Vec<Resting>>>,
    limits_by_server: Mutex<HashMap<String, Arc<ServerLimits>>>,
    pub(super) seen: Seen,
    pub(super) kept: Kept,
    pub(super) later: Later,
    pub(super) schedulers: Schedulers,
    /// Number of objects that accounts left to their grant roles and that were moved to the quarantine role.
    pub(super) quarantined: AtomicU64,
}

impl Servers {
    /// Servers without connections yet. `hosts` are the allowed hosts; `connections` is the limit for one server.
    pub(crate) fn to(hosts: Hosts, connections: Connections) -> Self {
        Self {
            hosts,
            connections,
            ..Self::default()
        }
    }

    /// The hosts to which it may connect.
    pub(super) fn hosts(&self) -> &Hosts {
        &self.hosts
    }

    /// A connection to a database of the target, as its admin.
    ///
    /// # Errors
    /// `database_unreachable`, `database_refused_login`, `no_such_object` (no such database).
    pub(crate) async fn session(
        &self,
        target: &Target,
        database: &str,
    ) -> Result<Session<'_>, Failure> {
        let to = (database, Names::OfDatabase);
        let session = self.session_for(target, to, false).await;
        session.map_err(|refused| refused.failure)
    }

    /// A connection to the admin's own database, for objects of the whole server, such as roles.
    ///
    /// # Errors
    /// As [`Servers::session`].
    pub(crate) async fn home(&self, target: &Target) -> Result<Session<'_>, Failure> {
        let to = (target.database.as_str(), Names::OfServer);
        let session = self.session_for(target, to, false).await;
        session.map_err(|refused| refused.failure)
    }

    /// Like [`Servers::session`], for a task that already has a connection to the server.
    ///
    /// # Errors
    /// As [`Servers::session`].
    pub(crate) async fn session_beside(
        &self,
        target: &Target,
        database: &str,
    ) -> Result<Session<'_>, Failure> {
        let beside = Wanted::beside(Names::OfDatabase);
        let session = self.new_session(target, database, beside).await;
        session.map_err(|refused| refused.failure)
    }

    /// Like [`Servers::session_beside`], for names of roles and databases.
    ///
    /// # Errors
    /// As [`Servers::session`].
    pub(super) async fn session_of_server(
        &self,
        target: &Target,
        database: &str,
    ) -> Result<Session<'_>, Failure> {
        let beside = Wanted::beside(Names::OfServer);
        let session = self.new_session(target, database, beside).await;
        session.map_err(|refused| refused.failure)
    }

    async fn session_for(
        &self,
        target: &Target,
        (database, names): (&str, Names),
        asked: bool,
    ) -> Result<Session<'_>, Refused> {
        let wanted = Wanted {
            asked,
            ..Wanted::first(names)
        };
        self.new_session(target, database, wanted).await
    }

    /// Like [`Servers::home`], but always a new connection.
    pub(crate) async fn fresh_session(
        &self,
        target: &Target,
        database: &str,
    ) -> Result<Session<'_>, Failure> {
        let wanted = Wanted {
            fresh: true,
            ..Wanted::first(Names::OfServer)
        };
        let session = self.new_session(target, database, wanted).await;
        session.map_err(|refused| refused.failure)
    }

    /// Like [`Servers::fresh_session`], for the kept connection. The error has the server's SQLSTATE.
    pub(super) async fn session_to_keep(
        &self,
        target: &Target,
        database: &str,
    ) -> Result<Session<'_>, Refused> {
        let wanted = Wanted {
            used: None,
            fresh: true,
            ..Wanted::first(Names::OfServer)
        };
        self.new_session(target, database, wanted).await
    }

    /// A kept connection as a session.
    pub(super) fn lent_session(
        &self,
        target: &Target,
        database: &str,
        connected: Connected,
        lent: Lent,
    ) -> Session<'_> {
        let key = Key::of(target, database);
        Session::new(self, connected, key, self.limits(target), false, None).lent(lent)
    }

    /// The largest difference between this machine's clock and a server's, in seconds. 0: there was no connection in
    /// the last 10 min.
    pub(crate) fn clock_skew(&self) -> f64 {
        self.seen.clock_skew()
    }

    /// Number of objects that accounts left to their grant roles and that were moved to the quarantine role.
    pub(crate) fn quarantined(&self) -> u64 {
        self.quarantined.load(Ordering::Relaxed)
    }

    /// The limits and the state of the target's server.
    pub(crate) fn limits(&self, target: &Target) -> Arc<ServerLimits> {
        let mut limits_by_server = self.limits_by_server.lock();
        limits_by_server
            .entry(ServerLimits::key(target))
            .or_insert_with(|| Arc::new(ServerLimits::new(target, self.connections)))
            .clone()
    }

    /// A connection to the admin's own database, or to `postgres` if that database is gone or refuses connections.
    /// Waits up to 3 s for a server without a free connection slot.
    ///
    /// # Errors
    /// As [`Servers::session`].
    pub(crate) async fn home_or_postgres(&self, target: &Target) -> Result<Session<'_>, Failure> {
        let until = Instant::now() + FULL_PATIENCE;
        loop {
            match self.home_for(target, false).await {
                Err(failure) if failure.full && Instant::now() < until => {
                    tokio::time::sleep(FULL_PAUSE).await;
                }
                done => return done,
            }
        }
    }

    /// Like [`Servers::home_or_postgres`], without the wait. `asked`: a person requested it, so it is tried even if
    /// the circuit breaker is open.
    ///
    /// # Errors
    /// As [`Servers::session`].
    pub(crate) async fn home_for(
        &self,
        target: &Target,
        asked: bool,
    ) -> Result<Session<'_>, Failure> {
        let [home, elsewhere] =
            [target.database.as_str(), HOME_OF_ALL].map(|database| (database, Names::OfServer));
        let key = Key::of(target, &target.database);
        if self.seen.hung_lately(&key).is_some()
            && let Ok(session) = self.session_for(target, elsewhere, asked).await
        {
            return Ok(session);
        }
        let refused = match self.session_for(target, home, asked).await {
            Ok(session) => {
                self.seen.forget_hung(&key);
                return Ok(session);
            }
            Err(refused) => refused,
        };
        let hangs = refused.found == Reached::Unreachable;
        if home != elsewhere && (hangs || refused.state.as_ref().is_some_and(is_of_the_database)) {
            let session = self.session_for(target, elsewhere, asked).await;
            if hangs && session.is_ok() {
                self.seen.put_hung(key, &refused.failure);
            }
            return session.map_err(|_| refused.failure);
        }
        Err(refused.failure)
    }

    pub(super) fn idle(&self) -> MutexGuard<'_, HashMap<Key, Vec<Resting>>> {
        self.idle.lock()
    }

    /// Closes the idle connections of this target. If one of them led to the wrong server or was ended, the others
    /// may too.
    pub(super) fn close_idle_of(&self, target: &str) {
        self.idle().retain(|key, _| key.target != target);
    }

    /// Closes connections that were idle for too long, and forgets servers whose state need not be remembered. It is
    /// called about twice a second.
    pub(crate) fn close_idle(&self) {
        self.seen.forget_old();
        self.limits_by_server
            .lock()
            .retain(|_, limits| Arc::strong_count(limits) > 1 || !limits.is_forgettable());
        self.idle().retain(|_, list| {
            list.retain(Resting::is_good);
            !list.is_empty()
        });
    }
}
