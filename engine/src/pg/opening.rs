//! Opens connections: the limits of the server, the order of its hosts, and the conclusions from a failed attempt.

use std::sync::Arc;
use std::time::Duration;

use mayfly_protocol::target::{Endpoint, Target};
use mayfly_protocol::task::{Failure, FailureCode};
use tracing::debug;

use super::breaker::Reached;
use super::connect::{Connected, Names, limit_for, login_of, open, open_any};
use super::limits::{ServerLimits, server_name};
use super::refused::{Refused, all_refused, silent};
use super::servers::{HOME_OF_ALL, Servers};
use super::session::Session;
use super::sharing::{Place, Resting, SLOT_PATIENCE, Wanted};
use super::slot::Slot;
use super::sql;
use super::target_key::Key;

/// How long a connection to a standby may take.
const STANDBY_TIMEOUT: Duration = Duration::from_secs(1);

/// A failure of this engine itself, without an attempt to connect.
fn of_ours(failure: Failure) -> Refused {
    Refused {
        state: None,
        failure,
        found: Reached::Aborted,
    }
}

impl Servers {
    /// Returns an idle connection, or opens a new one.
    pub(super) async fn new_session(
        &self,
        target: &Target,
        database: &str,
        wanted: Wanted,
    ) -> Result<Session<'_>, Refused> {
        let key = Key::of(target, database);
        let is_home = [target.database.as_str(), HOME_OF_ALL].contains(&database);
        if let Some(refused) = self.refused_early(&key, is_home) {
            return Err(refused);
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
            let gives_way = self.make_room(&limits, &opened, slot.as_ref());
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
                        self.seen.put_hung(key, &refused.failure);
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

    /// Why a connection to this database is not tried at present.
    fn refused_early(&self, key: &Key, is_home: bool) -> Option<Refused> {
        if key.database.contains(sql::NOT_UTF8) {
            return Some(of_ours(Failure::new(
                FailureCode::StatementFailed,
                "the name of the database is not UTF-8, so the engine cannot connect to it; rename it with ALTER DATABASE … RENAME from a database of its encoding",
            )));
        }
        // The owner of a database can make every login to it hang. Such a login shows nothing about the server.
        let failure = self.seen.hung_lately(key).filter(|_| !is_home)?;
        Some(Refused {
            found: Reached::Unreachable,
            ..of_ours(failure)
        })
    }

    /// Closes idle connections if this connection took the last free slot. Returns whether this connection must be
    /// closed too, because other clients need the slot or this engine has other connections to the server.
    fn make_room(
        &self,
        limits: &Arc<ServerLimits>,
        opened: &Result<Connected, Refused>,
        slot: Option<&Slot>,
    ) -> bool {
        let is_over = match opened {
            Ok(connected) => connected.facts.slots_left == Some(0),
            Err(refused) => refused.failure.full,
        };
        let gives_way = is_over && slot.is_some_and(Slot::gives_way);
        if is_over {
            self.close_idle_at(limits);
        }
        gives_way
    }

    /// A connection to one of the target's other hosts, if it is a standby of this server. `None`: it is
    /// another primary, or did not answer within the last 5 s.
    ///
    /// # Errors
    /// As [`Servers::session`].
    pub(super) async fn standby(
        &self,
        target: &Target,
        endpoint: &Endpoint,
        identity: &str,
    ) -> Result<Option<Session<'_>>, Failure> {
        if self.seen.is_unreachable(endpoint) {
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
                self.seen.put_useless(endpoint.clone(), refused.found);
                return Err(refused.failure);
            }
        };
        let facts = &connected.facts;
        if !facts.standby || facts.identity != identity {
            return Ok(None);
        }
        let key = Key::of(target, format!("{} at {endpoint}", target.database));
        let limits = self.limits(target);
        Ok(Some(Session::new(self, connected, key, limits, true, None)))
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
        for endpoint in self.seen.in_order(endpoints) {
            let opening = open(&self.hosts, target, &endpoint, to, &login);
            let opened = tokio::time::timeout(limit, opening).await;
            let opened = opened.unwrap_or_else(|_| Err(silent(&endpoint, limit)));
            match opened {
                Ok(connected) => {
                    let facts = &connected.facts;
                    self.seen
                        .put_connected(&endpoint, &facts.identity, facts.clock_skew);
                    return Ok(connected);
                }
                Err(refused) if one_of_several => {
                    debug!(%endpoint, reason = refused.failure.message, "not this host");
                    self.seen.put_useless(endpoint, refused.found);
                    refusals.push(refused);
                }
                Err(refused) => return Err(refused),
            }
        }
        Err(all_refused(refusals))
    }
}
