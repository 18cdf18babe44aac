//! How far the clock of each database server is ahead of the store's. An engine's answer has a timestamp of the
//! database. It was taken between the sending of the request and the arrival of the answer, so the difference is
//! known within bounds.
//!
//! With the difference a create is limited by the database's clock before an engine has it. An engine's own clocks
//! stand still while its machine is suspended.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use mayfly_protocol::names::PoolName;

/// An answer that took longer is not used: the clock's difference would be too uncertain.
const QUICK: SignedDuration = SignedDuration::from_secs(5);
/// Maximum number of remembered servers. Creates at other servers are limited by their engines only.
const MOST: usize = 10_000;

/// Base secret and pool. What the engines of a pool report counts for the creates of that pool only.
type Key = (String, PoolName);

#[derive(Debug, Default)]
pub(crate) struct Clocks(Mutex<HashMap<Key, Ahead>>);

/// How far a clock is ahead of the store's, in milliseconds: at least, and at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ahead {
    least: i64,
    most: i64,
}

impl Clocks {
    fn known(&self) -> MutexGuard<'_, HashMap<Key, Ahead>> {
        // No code panics while it holds this lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The database's clock showed `there` at a time between `sent` and `heard`.
    pub(crate) fn learn(
        &self,
        base: &str,
        pool: &PoolName,
        there: Timestamp,
        (sent, heard): (Timestamp, Timestamp),
    ) {
        if heard.duration_since(sent) > QUICK || heard < sent {
            return;
        }
        let ahead = |here: Timestamp| there.as_millisecond() - here.as_millisecond();
        let new = Ahead {
            least: ahead(heard),
            most: ahead(sent),
        };
        let mut known = self.known();
        let is_full = known.len() >= MOST;
        match known.get_mut(&(base.to_owned(), pool.clone())) {
            Some(old) => *old = both(*old, new),
            None if is_full => {}
            None => drop(known.insert((base.to_owned(), pool.clone()), new)),
        }
    }

    /// A create failed, perhaps because it was too late. One of the clocks may have been set.
    pub(crate) fn forget(&self, base: &str, pool: &PoolName) {
        self.known().remove(&(base.to_owned(), pool.clone()));
    }

    /// The latest time that the database's clock can show when the store's clock is `after` past `here`. `None`: the
    /// database's clock is not known yet.
    pub(crate) fn there(
        &self,
        base: &str,
        pool: &PoolName,
        here: Timestamp,
        after: Duration,
    ) -> Option<Timestamp> {
        let most = self.known().get(&(base.to_owned(), pool.clone()))?.most;
        let after = i64::try_from(after.as_millis()).ok()?;
        let ms = here
            .as_millisecond()
            .checked_add(most)?
            .checked_add(after)?;
        Timestamp::from_millisecond(ms).ok()
    }
}

/// The bounds from two answers. If the answers contradict each other, the clock was set, and the later answer counts.
fn both(old: Ahead, new: Ahead) -> Ahead {
    let both = Ahead {
        least: old.least.max(new.least),
        most: old.most.min(new.most),
    };
    if both.least <= both.most { both } else { new }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_known_within_the_bounds_of_the_answers() {
        let at = |ms: i64| Timestamp::from_millisecond(1_000_000 + ms).unwrap();
        let (clocks, pool) = (Clocks::default(), "pool1".parse().unwrap());
        let there = |here| clocks.there("db", &pool, here, Duration::from_secs(1));
        assert_eq!(there(at(0)), None);
        // The database's clock is 300 s ahead. It was read 20 ms after the question, and the answer came 80 ms later.
        clocks.learn("db", &pool, at(300_020), (at(0), at(100)));
        assert_eq!(there(at(0)), Some(at(301_020)), "never sooner than it is");
        clocks.learn("db", &pool, at(310_001), (at(10_000), at(10_002)));
        assert_eq!(there(at(0)), Some(at(301_001)));
        // A slow answer is not used, and a less exact answer does not widen the bounds.
        clocks.learn("db", &pool, at(9_000), (at(0), at(6_000)));
        clocks.learn("db", &pool, at(320_900), (at(20_000), at(21_000)));
        assert_eq!(there(at(0)), Some(at(301_001)));
        // The clock was set back by five minutes.
        clocks.learn("db", &pool, at(30_000), (at(30_000), at(30_010)));
        assert_eq!(there(at(0)), Some(at(1_000)));
        let other = "pool2".parse().unwrap();
        assert_eq!(clocks.there("db", &other, at(0), Duration::ZERO), None);
        clocks.forget("db", &pool);
        assert_eq!(there(at(0)), None);
    }
}
