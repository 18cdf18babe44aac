//! The engine's connections to PostgreSQL servers: opened when needed, shared for a moment, gone at rest
//! (an idle admin connection would keep its database from being dropped).

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mayfly_protocol::authorities::{Authorities, Digest};
use mayfly_protocol::target::{Endpoint, Target};
use mayfly_protocol::task::{Failure, FailureCode};
use tracing::debug;

use super::breaker::Reached;
use super::budget::{Connections, Slot};
use super::connect::{
    Connected, Names, Refused, all_refused, is_of_the_database, limit_for, login_of, open,
    open_any, silent,
};
use super::hosts::Hosts;
use super::jobs::Schedulers;
use super::kept::{Kept, Lent};
use super::limits::{ServerLimits, server_name};
use super::session::Session;
use super::sharing::{Place, Resting, SLOT_PATIENCE, Wanted};
use super::sql;
use super::standbys::Later;

/// A host that was of no use is tried after the others for so long.
const HOST_LAST_FOR: Duration = Duration::from_secs(5);
/// How long a connection to a standby may take.
const STANDBY_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a database in which a connection hung is left alone.
const HUNG_FOR: Duration = Duration::from_secs(15);
/// Every server has it, mostly.
const HOME_OF_ALL: &str = "postgres";
/// How long requests other than creates wait for a server without a free connection slot, and how
/// often they try meanwhile.
const FULL_PATIENCE: Duration = Duration::from_secs(3);
const FULL_PAUSE: Duration = Duration::from_millis(250);
/// How long a difference of clocks is told of that was seen when connecting.
const SKEW_KEPT: Duration = Duration::from_secs(600);

/// The connections of this engine, kept for a moment between two uses.
#[derive(Default)]
pub(crate) struct Servers {
    /// Where connections may lead.
    hosts: Hosts,
    /// Most to one server.
    connections: Connections,
    idle: Mutex<HashMap<Key, Vec<Resting>>>,
    limits_by_server: Mutex<HashMap<String, Arc<ServerLimits>>>,
    /// Hosts of several that were of no use: when, and whether they answered.
    useless: Mutex<HashMap<Endpoint, (Instant, Reached)>>,
    /// Databases of servers that are there, in which a connection hung, and when.
    hung: Mutex<HashMap<Key, (Instant, Failure)>>,
    /// By a server's identity: this machine's clock less the server's in seconds, and when.
    skews: Mutex<HashMap<String, (Instant, f64)>>,
    pub(super) kept: Kept,
    pub(super) later: Later,
    pub(super) schedulers: Schedulers,
    /// Objects that accounts left to their grant roles and that were taken away.
    pub(super) quarantined: AtomicU64,
}

/// Same server, admin, credentials and database.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) target: String,
    database: String,
}

impl Servers {
    /// None yet; only to these hosts, and no more than so many to one server.
    pub(crate) fn to(hosts: Hosts, connections: Connections) -> Self {
        Self {
            hosts,
            connections,
            ..Self::default()
        }
    }

    /// Where connections may lead.
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

    /// A connection to the admin's own database, for what belongs to the whole server: roles.
    ///
    /// # Errors
    /// As [`Servers::session`].
    pub(crate) async fn home(&self, target: &Target) -> Result<Session<'_>, Failure> {
        let to = (target.database.as_str(), Names::OfServer);
        let session = self.session_for(target, to, false).await;
        session.map_err(|refused| refused.failure)
    }

    /// Like [`Servers::session`], for a task that has a connection to the server already.
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

    /// Likewise, for what is called as it is on the whole server.
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

    /// Like [`Servers::home`], but never one that was used before.
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

    /// Likewise, to be kept; with what the server said where it refuses.
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

    async fn new_session(
        &self,
        target: &Target,
        database: &str,
        wanted: Wanted,
    ) -> Result<Session<'_>, Refused> {
        let of_ours = |failure| Refused {
            state: None,
            failure,
            found: Reached::Aborted,
        };
        if database.contains(sql::NOT_UTF8) {
            return Err(of_ours(Failure::new(
                FailureCode::StatementFailed,
                "the name of the database is not UTF-8, and it cannot be connected to; ALTER DATABASE … RENAME in a database of its encoding helps",
            )));
        }
        let key = Key {
            target: target_key(target),
            database: database.to_owned(),
        };
        // The owner of a database can have every login to it wait, and that is no news of the server.
        let is_home = [target.database.as_str(), HOME_OF_ALL].contains(&database);
        if !is_home && let Some(failure) = self.hung_lately(&key) {
            return Err(Refused {
                found: Reached::Unreachable,
                ..of_ours(failure)
            });
        }
        let limits = self.limits(target);
        let until = tokio::time::Instant::now() + SLOT_PATIENCE;
        loop {
            let mut slot = None;
            if let Some(used) = wanted.used {
                match self.place(&limits, &key, (used, wanted), until).await {
                    Ok(Place::Resting(resting)) => {
                        let Resting {
                            connected, slot, ..
                        } = *resting;
                        return Ok(Session::new(
                            self,
                            connected,
                            key,
                            limits,
                            false,
                            Some(slot),
                        ));
                    }
                    Ok(Place::New(new)) => slot = Some(new),
                    Err(failure) => return Err(of_ours(failure)),
                }
            }
            let attempt = limits.permit_connect(wanted.asked).map_err(of_ours)?;
            let opened = self.open(target, (database, wanted.names)).await;
            let is_over = match &opened {
                Ok(connected) => connected.facts.slots_left == Some(0),
                Err(refused) => refused.failure.full,
            };
            // The room is for others, or for those that this engine has there already.
            let gives_way = is_over && slot.as_ref().is_some_and(Slot::gives_way);
            if is_over {
                self.close_idle_at(&limits);
            }
            match opened {
                Ok(_) if gives_way => attempt.ended(Reached::Reachable, None),
                Ok(connected) => {
                    attempt.ended(Reached::Reachable, None);
                    return Ok(Session::new(self, connected, key, limits, true, slot));
                }
                Err(refused) => {
                    if refused.failure.full && !gives_way {
                        limits.is_full();
                    }
                    if refused.found == Reached::Unreachable && !is_home {
                        self.hangs(key, &refused.failure);
                        return Err(refused);
                    }
                    attempt.ended(refused.found, Some(&refused.failure));
                    if !gives_way {
                        return Err(refused);
                    }
                }
            }
        }
    }

    /// A connection to one of the target's other hosts, if it is a standby of this server. None: it is
    /// another primary, or was of no use a moment ago.
    ///
    /// # Errors
    /// As [`Servers::session`].
    pub(super) async fn standby(
        &self,
        target: &Target,
        endpoint: &Endpoint,
        identity: &str,
    ) -> Result<Option<Session<'_>>, Failure> {
        if self.is_away(endpoint) {
            return Ok(None);
        }
        let login = login_of(target)
            .map_err(|reason| Failure::new(FailureCode::DatabaseUnreachable, reason))?;
        let to = (target.database.as_str(), Names::OfServer);
        let opening = open_any(&self.hosts, target, endpoint, to, &login);
        let opened = tokio::time::timeout(STANDBY_TIMEOUT, opening).await;
        let opened = opened.unwrap_or_else(|_| Err(silent(endpoint, STANDBY_TIMEOUT)));
        let connected = match opened {
            Ok(connected) => connected,
            Err(refused) => {
                let seen = (Instant::now(), refused.found);
                self.useless().insert(endpoint.clone(), seen);
                return Err(refused.failure);
            }
        };
        let facts = &connected.facts;
        if !facts.standby || facts.identity != identity {
            return Ok(None);
        }
        let key = Key {
            target: target_key(target),
            database: format!("{} at {endpoint}", target.database),
        };
        let limits = self.limits(target);
        Ok(Some(Session::new(self, connected, key, limits, true, None)))
    }

    /// Whether a host did not answer a moment ago.
    pub(super) fn is_away(&self, endpoint: &Endpoint) -> bool {
        let useless = self.useless();
        let seen = useless.get(endpoint);
        seen.is_some_and(|(at, found)| {
            *found == Reached::Unreachable && at.elapsed() < HOST_LAST_FOR
        })
    }

    /// A kept connection as a session.
    pub(super) fn lent_session(
        &self,
        target: &Target,
        database: &str,
        connected: Connected,
        lent: Lent,
    ) -> Session<'_> {
        let key = Key {
            target: target_key(target),
            database: database.to_owned(),
        };
        Session::new(self, connected, key, self.limits(target), false, None).lent(lent)
    }

    /// Connects to the first host that takes writes.
    async fn open(&self, target: &Target, to: (&str, Names)) -> Result<Connected, Refused> {
        let unusable = |reason: String| Refused {
            state: None,
            found: Reached::Aborted,
            failure: Failure::new(FailureCode::DatabaseUnreachable, reason),
        };
        let endpoints = target
            .endpoints()
            .map_err(|reason| unusable(format!("host: {reason}")))?;
        let login = login_of(target)
            .map_err(|reason| unusable(format!("{}: {reason}", server_name(target))))?;
        let one_of_several = endpoints.len() > 1;
        let limit = limit_for(&endpoints);
        let mut refusals: Vec<Refused> = Vec::new();
        for endpoint in self.in_order(endpoints) {
            let opening = open(&self.hosts, target, &endpoint, to, &login);
            let opened = tokio::time::timeout(limit, opening).await;
            let opened = opened.unwrap_or_else(|_| Err(silent(&endpoint, limit)));
            match opened {
                Ok(connected) => {
                    self.useless().remove(&endpoint);
                    let facts = &connected.facts;
                    let seen = (Instant::now(), facts.clock_skew);
                    self.skews().insert(facts.identity.clone(), seen);
                    return Ok(connected);
                }
                Err(refused) if one_of_several => {
                    debug!(%endpoint, reason = refused.failure.message, "not this host");
                    self.useless()
                        .insert(endpoint, (Instant::now(), refused.found));
                    refusals.push(refused);
                }
                Err(refused) => return Err(refused),
            }
        }
        Err(all_refused(refusals))
    }

    /// As written, but those of no use a moment ago last, and the silent ones last of all.
    fn in_order(&self, mut endpoints: Vec<Endpoint>) -> Vec<Endpoint> {
        if endpoints.len() > 1 {
            let useless = self.useless();
            endpoints.sort_by_key(|endpoint| match useless.get(endpoint) {
                Some((at, found)) if at.elapsed() < HOST_LAST_FOR => {
                    if *found == Reached::Reachable { 1 } else { 2 }
                }
                _ => 0,
            });
        }
        endpoints
    }

    fn useless(&self) -> MutexGuard<'_, HashMap<Endpoint, (Instant, Reached)>> {
        self.useless.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hung(&self) -> MutexGuard<'_, HashMap<Key, (Instant, Failure)>> {
        self.hung.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hung_lately(&self, key: &Key) -> Option<Failure> {
        let hung = self.hung();
        let (at, failure) = hung.get(key)?;
        (at.elapsed() < HUNG_FOR).then(|| failure.clone())
    }

    fn hangs(&self, key: Key, failure: &Failure) {
        self.hung().insert(key, (Instant::now(), failure.clone()));
    }

    fn skews(&self) -> MutexGuard<'_, HashMap<String, (Instant, f64)>> {
        self.skews.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This machine's clock less that of the server that differs most, in seconds; 0 where no
    /// server was spoken to lately.
    pub(crate) fn clock_skew(&self) -> f64 {
        let mut skews = self.skews();
        skews.retain(|_, (at, _)| at.elapsed() < SKEW_KEPT);
        let differences = skews.values().map(|(_, skew)| *skew);
        differences
            .max_by(|one, other| one.abs().total_cmp(&other.abs()))
            .unwrap_or(0.0)
    }

    /// How many objects that accounts left to their grant roles were taken away.
    pub(crate) fn quarantined(&self) -> u64 {
        self.quarantined.load(Ordering::Relaxed)
    }

    /// What is known of the target's server.
    pub(crate) fn limits(&self, target: &Target) -> Arc<ServerLimits> {
        let mut limits_by_server = self
            .limits_by_server
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        limits_by_server
            .entry(ServerLimits::key(target))
            .or_insert_with(|| Arc::new(ServerLimits::new(target, self.connections)))
            .clone()
    }

    /// A connection to the admin's own database, or to `postgres` where that one is gone or its
    /// owner lets nobody in. Waits up to 3 s for a server without a free connection slot.
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

    /// Likewise; also at a server taken for away, where a person asked for it.
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
        let key = Key {
            target: target_key(target),
            database: target.database.clone(),
        };
        if self.hung_lately(&key).is_some()
            && let Ok(session) = self.session_for(target, elsewhere, asked).await
        {
            return Ok(session);
        }
        let refused = match self.session_for(target, home, asked).await {
            Ok(session) => {
                self.hung().remove(&key);
                return Ok(session);
            }
            Err(refused) => refused,
        };
        let hangs = refused.found == Reached::Unreachable;
        if home != elsewhere && (hangs || refused.state.as_ref().is_some_and(is_of_the_database)) {
            let session = self.session_for(target, elsewhere, asked).await;
            if hangs && session.is_ok() {
                self.hangs(key, &refused.failure);
            }
            return session.map_err(|_| refused.failure);
        }
        Err(refused.failure)
    }

    pub(super) fn idle(&self) -> MutexGuard<'_, HashMap<Key, Vec<Resting>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes what others keep of this target: where one connection led to the wrong server, or
    /// was ended, all do.
    pub(super) fn close_idle_of(&self, target: &str) {
        self.idle().retain(|key, _| key.target != target);
    }

    /// Closes what was not used for a moment, and forgets the servers nothing is to be remembered
    /// of. Called about twice a second.
    pub(crate) fn close_idle(&self) {
        self.useless()
            .retain(|_, (at, _)| at.elapsed() < HOST_LAST_FOR);
        self.hung().retain(|_, (at, _)| at.elapsed() < HUNG_FOR);
        self.limits_by_server
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|_, limits| Arc::strong_count(limits) > 1 || !limits.is_forgettable());
        self.idle().retain(|_, list| {
            list.retain(Resting::is_good);
            !list.is_empty()
        });
    }
}

fn authorities_key(target: &Target) -> String {
    match &target.sslrootcert {
        None => String::new(),
        Some(Authorities::Pem(pem)) => Digest::of(pem).into(),
        Some(Authorities::Named { sha256 }) => (*sha256).into(),
    }
}

/// Identifies server, admin and credentials without keeping the password as text.
pub(crate) fn target_key(target: &Target) -> String {
    sql::short_hash(&[
        &target.host,
        &target.port.to_string(),
        &target.database,
        &target.username,
        target.password.expose(),
        &format!(
            "{:?} {:?} {:?}",
            target.sslmode, target.auth, target.channel_binding
        ),
        &authorities_key(target),
        target.sslcert.as_deref().unwrap_or_default(),
        target.sslkey.as_ref().map_or("", |key| key.expose()),
    ])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use mayfly_protocol::target::endpoints;

    #[test]
    fn the_worst_clock_is_told_of() {
        let servers = Servers::default();
        assert_eq!(servers.clock_skew(), 0.0);
        let now = Instant::now();
        let old = now.checked_sub(SKEW_KEPT).unwrap();
        for (server, at, skew) in [("a", now, 0.1), ("b", now, -20.0), ("c", old, 500.0)] {
            servers.skews().insert(server.to_owned(), (at, skew));
        }
        assert_eq!(servers.clock_skew(), -20.0);
    }

    #[test]
    fn hosts_of_no_use_are_tried_last() {
        let servers = Servers::default();
        let written = endpoints("a,b,c,d", 1).unwrap();
        let now = Instant::now();
        let old = now.checked_sub(HOST_LAST_FOR * 2).unwrap();
        for (n, at, found) in [
            (0, now, Reached::Unreachable),
            (1, now, Reached::Reachable),
            (2, old, Reached::Unreachable),
        ] {
            servers.useless().insert(written[n].clone(), (at, found));
        }
        let order: Vec<String> = servers
            .in_order(written)
            .into_iter()
            .map(|endpoint| endpoint.host)
            .collect();
        assert_eq!(order, ["c", "d", "b", "a"]);
    }
}
