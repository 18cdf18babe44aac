//! The connections of a listener, and which one is closed if there is no room. A new connection is accepted while any
//! other can be closed, so connections that are only held open keep no one out.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::seen::{Seen, Worth};

/// How many connections there may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Connections of all addresses.
    pub connections: usize,
    /// Connections of one address: of IPv4, or of the 64 bits of IPv6 that a site gets.
    pub connections_per_address: usize,
}

/// The address under which connections are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Site(IpAddr);

impl Site {
    fn of(address: IpAddr) -> Self {
        const PREFIX: u128 = !0 << 64;
        match address.to_canonical() {
            IpAddr::V4(address) => Self(address.into()),
            IpAddr::V6(address) => Self(IpAddr::V6((u128::from(address) & PREFIX).into())),
        }
    }
}

struct Guest {
    site: Site,
    seen: Arc<Seen>,
    leave: CancellationToken,
}

#[derive(Default)]
struct Inside {
    guests: HashMap<u64, Guest>,
    of_site: HashMap<Site, usize>,
    next: u64,
}

impl Inside {
    fn remove(&mut self, id: u64) -> Option<Guest> {
        let guest = self.guests.remove(&id)?;
        if let Some(n) = self.of_site.get_mut(&guest.site) {
            *n -= 1;
            if *n == 0 {
                self.of_site.remove(&guest.site);
            }
        }
        Some(guest)
    }

    /// The connection to close: of the least worth, then of the address with the most connections, then the oldest.
    fn least(&self, of: Option<Site>, now: Instant) -> Option<u64> {
        let mut least: Option<(Worth, std::cmp::Reverse<usize>, Instant, u64)> = None;
        for (id, guest) in &self.guests {
            if of.is_some_and(|site| site != guest.site) {
                continue;
            }
            let at = guest.seen.now();
            let Some(worth) = at.worth(now) else { continue };
            let n = self.of_site.get(&guest.site).copied().unwrap_or(0);
            let this = (worth, std::cmp::Reverse(n), at.since, *id);
            if least.is_none_or(|least| this < least) {
                least = Some(this);
            }
        }
        least.map(|(.., id)| id)
    }
}

/// All connections of a listener.
#[derive(Clone)]
pub(super) struct Guests {
    room: Room,
    inside: Arc<Mutex<Inside>>,
}

/// A place, given back when it is dropped.
pub(super) struct Place {
    guests: Guests,
    id: u64,
    /// What the connection is doing.
    pub(super) seen: Arc<Seen>,
    /// Cancelled when the connection has to make room.
    pub(super) leave: CancellationToken,
}

impl Guests {
    pub(super) fn new(room: Room) -> Self {
        Self {
            room,
            inside: Arc::default(),
        }
    }

    fn inside(&self) -> MutexGuard<'_, Inside> {
        // No code panics while it holds this lock.
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a new connection. If there is no room, another connection has to leave. `None`: all others are
    /// being served.
    pub(super) fn admit(&self, address: IpAddr, now: Instant) -> Option<Place> {
        let site = Site::of(address);
        let mut inside = self.inside();
        let of_site = inside.of_site.get(&site).copied().unwrap_or(0);
        let among = if of_site >= self.room.connections_per_address {
            Some(Some(site))
        } else if inside.guests.len() >= self.room.connections {
            Some(None)
        } else {
            None
        };
        if let Some(of) = among {
            let id = inside.least(of, now)?;
            inside.remove(id)?.leave.cancel();
        }
        let (seen, leave) = (Arc::new(Seen::new(now)), CancellationToken::new());
        let id = inside.next;
        inside.next += 1;
        *inside.of_site.entry(site).or_default() += 1;
        inside.guests.insert(
            id,
            Guest {
                site,
                seen: seen.clone(),
                leave: leave.clone(),
            },
        );
        Some(Place {
            guests: self.clone(),
            id,
            seen,
            leave,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.guests.inside().remove(self.id);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn an_address_is_a_site() {
        let same = |a: &str, b: &str| Site::of(address(a)) == Site::of(address(b));
        assert!(same("::ffff:10.0.0.1", "10.0.0.1"));
        assert!(!same("10.0.0.2", "10.0.0.1"));
        assert!(same("2001:db8:0:1::1", "2001:db8:0:1:ffff::2"));
        assert!(!same("2001:db8:0:1::1", "2001:db8:0:2::1"));
    }

    #[test]
    fn who_holds_most_and_does_least_goes_first() {
        let guests = Guests::new(Room {
            connections: 4,
            connections_per_address: 3,
        });
        let (one, two) = (address("10.0.0.1"), address("10.0.0.2"));
        let at = Instant::now();
        let mut now = at;
        let mut admit = |from: IpAddr| {
            now += std::time::Duration::from_secs(1);
            guests.admit(from, now)
        };
        let working = admit(one).unwrap();
        working.seen.asked(false, at);
        let idle = admit(one).unwrap();
        idle.seen.asked(false, at);
        idle.seen.answered(at);
        idle.seen.answer_ended();
        idle.seen.flushed(at);
        let half = admit(one).unwrap();
        let other = admit(two).unwrap();
        let gone = |place: &Place| place.leave.is_cancelled();

        // All places are taken. The connection with half a request from the address with most connections is closed,
        // although the other one is older.
        other.seen.read(at);
        let new = admit(two).unwrap();
        assert!(gone(&half) && !gone(&other) && !gone(&idle));
        drop(half);
        new.seen.asked(false, at);
        let third = admit(two).unwrap();
        assert!(gone(&other), "the only half-sent one");
        third.seen.asked(false, at);
        let fourth = admit(two).unwrap();
        assert!(gone(&idle), "nobody is half-sent");
        fourth.seen.asked(false, at);
        // All connections are being served.
        assert!(admit(two).is_none());
        assert!(admit(one).is_none());
        drop((other, idle, new));
        assert!(admit(one).is_some());
    }

    #[test]
    fn an_address_has_its_own_limit() {
        let guests = Guests::new(Room {
            connections: 10,
            connections_per_address: 2,
        });
        let site = address("10.0.0.1");
        let places: Vec<_> = (0..5)
            .map(|_| guests.admit(site, Instant::now()).unwrap())
            .collect();
        let left: Vec<bool> = places.iter().map(|p| p.leave.is_cancelled()).collect();
        assert_eq!(left, [true, true, true, false, false]);
        assert_eq!(guests.inside().guests.len(), 2);
        drop(places);
        assert!(guests.inside().of_site.is_empty());
    }
}
