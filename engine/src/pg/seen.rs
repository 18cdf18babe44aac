//! Short-lived facts about servers that this engine connected to: hosts that could not be used, databases in which a
//! connection hung, and clocks.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use mayfly_protocol::target::Endpoint;
use mayfly_protocol::task::Failure;
use parking_lot::{Mutex, MutexGuard};

use super::breaker::Reached;
use super::target_key::Key;

/// For this time a host that could not be used is tried after the others.
const HOST_LAST_FOR: Duration = Duration::from_secs(5);
/// How long a database in which a connection hung is not used.
const HUNG_FOR: Duration = Duration::from_secs(15);
/// How long a difference between clocks is reported after it was seen.
const SKEW_KEPT: Duration = Duration::from_secs(600);

/// The facts that an engine remembers.
#[derive(Default)]
pub(super) struct Seen {
    /// Hosts that could not be used, if the target has several: when, and whether they answered.
    useless: Mutex<HashMap<Endpoint, (Instant, Reached)>>,
    /// Databases of reachable servers in which a connection hung, and when.
    hung: Mutex<HashMap<Key, (Instant, Failure)>>,
    /// By a server's identity: this machine's clock minus the server's in seconds, and when it was read.
    skews: Mutex<HashMap<String, (Instant, f64)>>,
}

impl Seen {
    fn useless(&self) -> MutexGuard<'_, HashMap<Endpoint, (Instant, Reached)>> {
        self.useless.lock()
    }

    fn hung(&self) -> MutexGuard<'_, HashMap<Key, (Instant, Failure)>> {
        self.hung.lock()
    }

    fn skews(&self) -> MutexGuard<'_, HashMap<String, (Instant, f64)>> {
        self.skews.lock()
    }

    /// Remembers a host that could not be used, and whether it answered.
    pub(super) fn put_useless(&self, endpoint: Endpoint, found: Reached) {
        self.useless().insert(endpoint, (Instant::now(), found));
    }

    /// Remembers a connection to a host, and the difference between this machine's clock and the server's.
    pub(super) fn put_connected(&self, endpoint: &Endpoint, identity: &str, skew: f64) {
        self.useless().remove(endpoint);
        self.skews()
            .insert(identity.to_owned(), (Instant::now(), skew));
    }

    /// Whether a host did not answer within the last 5 s.
    pub(super) fn is_unreachable(&self, endpoint: &Endpoint) -> bool {
        let useless = self.useless();
        let seen = useless.get(endpoint);
        seen.is_some_and(|(at, found)| {
            *found == Reached::Unreachable && at.elapsed() < HOST_LAST_FOR
        })
    }

    /// Sorts the hosts: first the usable ones in their given order, then those that refused, then those that did not
    /// answer.
    pub(super) fn in_order(&self, mut endpoints: Vec<Endpoint>) -> Vec<Endpoint> {
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

    /// Why a database is not used, if a connection hung there within the last 15 s.
    pub(super) fn hung_lately(&self, key: &Key) -> Option<Failure> {
        let hung = self.hung();
        let (at, failure) = hung.get(key)?;
        (at.elapsed() < HUNG_FOR).then(|| failure.clone())
    }

    /// Remembers a database in which a connection hung.
    pub(super) fn put_hung(&self, key: Key, failure: &Failure) {
        self.hung().insert(key, (Instant::now(), failure.clone()));
    }

    /// Forgets that a connection hung in a database.
    pub(super) fn forget_hung(&self, key: &Key) {
        self.hung().remove(key);
    }

    /// The largest difference between this machine's clock and a server's, in seconds. 0: there was no connection in
    /// the last 10 min.
    pub(super) fn clock_skew(&self) -> f64 {
        let mut skews = self.skews();
        skews.retain(|_, (at, _)| at.elapsed() < SKEW_KEPT);
        let differences = skews.values().map(|(_, skew)| *skew);
        differences
            .max_by(|one, other| one.abs().total_cmp(&other.abs()))
            .unwrap_or(0.0)
    }

    /// Forgets old facts. It is called about twice a second.
    pub(super) fn forget_old(&self) {
        self.useless()
            .retain(|_, (at, _)| at.elapsed() < HOST_LAST_FOR);
        self.hung().retain(|_, (at, _)| at.elapsed() < HUNG_FOR);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use mayfly_protocol::target::endpoints;

    #[test]
    fn the_largest_clock_difference_is_reported() {
        let seen = Seen::default();
        assert_eq!(seen.clock_skew(), 0.0);
        let now = Instant::now();
        let old = now.checked_sub(SKEW_KEPT).unwrap();
        for (server, at, skew) in [("a", now, 0.1), ("b", now, -20.0), ("c", old, 500.0)] {
            seen.skews().insert(server.to_owned(), (at, skew));
        }
        assert_eq!(seen.clock_skew(), -20.0);
    }

    #[test]
    fn hosts_of_no_use_are_tried_last() {
        let seen = Seen::default();
        let written = endpoints("a,b,c,d", 1).unwrap();
        let now = Instant::now();
        let old = now.checked_sub(HOST_LAST_FOR * 2).unwrap();
        for (n, at, found) in [
            (0, now, Reached::Unreachable),
            (1, now, Reached::Reachable),
            (2, old, Reached::Unreachable),
        ] {
            seen.useless().insert(written[n].clone(), (at, found));
        }
        let order: Vec<String> = seen
            .in_order(written)
            .into_iter()
            .map(|endpoint| endpoint.host)
            .collect();
        assert_eq!(order, ["c", "d", "b", "a"]);
    }
}
