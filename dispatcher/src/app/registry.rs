//! The live engines, by their heartbeats, in memory only. A heartbeat counts once: it must be recent and
//! newer than the last one of its engine. So a recorded heartbeat does not make a dead engine appear alive.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use mayfly_protocol::authorities::Digest;
use mayfly_protocol::names::{EngineName, PoolName};
use mayfly_protocol::seal::{Form, PublicKey};
use mayfly_protocol::task::Heartbeat;
use mayfly_protocol::timing::timing;

use crate::store::Pool;

/// How far the clocks of engine and dispatcher may differ.
const CLOCK_ALLOWANCE: SignedDuration = SignedDuration::from_secs(60);
/// How long the last heartbeat of an engine is remembered. By then all its earlier heartbeats are out of
/// date, even if its clock was ahead by the whole allowance. After a correction of its clock it counts as a
/// new engine.
const REMEMBERED: Duration = Duration::from_secs(150);
/// Maximum number of remembered engines of one pool, live or not.
const ENGINES_OF_A_POOL: usize = 1000;

/// Longest version that an engine can report, in bytes.
const VERSION_MAX: usize = 64;
/// Maximum number of bundles that an engine can report.
const BUNDLES_OF_AN_ENGINE: usize = 64;

/// The last heartbeat of an engine.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) heartbeat: Heartbeat,
    /// When it arrived, by this dispatcher's clock.
    pub(crate) at: Timestamp,
    /// The key with which it sealed the heartbeat.
    pub(crate) key: PublicKey,
    issued: Timestamp,
    heard: Instant,
}

impl Seen {
    fn lives(&self) -> bool {
        !self.heartbeat.leaving && self.heard.elapsed() < timing().silence
    }
}

/// Why a heartbeat does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ignored {
    /// Sealed too long ago, or in the future.
    OutOfDate,
    /// The heartbeat is not newer than the last one.
    Replayed,
    /// The pool has too many engines.
    TooMany,
}

impl Ignored {
    /// The `reason` label of refused messages.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::OutOfDate => "out_of_date",
            Self::Replayed => "replayed",
            Self::TooMany => "too_many",
        }
    }

    /// The reason as a message for operators.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::OutOfDate => {
                "the time of a heartbeat differs by more than 60 s; do the clocks of dispatcher and engine agree?"
            }
            Self::Replayed => "a heartbeat is not newer than the last one of its engine",
            Self::TooMany => "the pool has more than 1,000 engines",
        }
    }
}

/// The engines by pool and name: a name is unique only within its pool.
#[derive(Debug, Default)]
pub(crate) struct Registry(Mutex<BTreeMap<(PoolName, EngineName), Seen>>);

impl Registry {
    fn engines(&self) -> std::sync::MutexGuard<'_, BTreeMap<(PoolName, EngineName), Seen>> {
        // No code panics while it holds this lock.
        self.0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Records a heartbeat that was sealed at `issued` by the engine's clock, with the key of the pool that it
    /// names.
    ///
    /// # Errors
    /// [`Ignored`]: the heartbeat does not count.
    pub(crate) fn hear(
        &self,
        mut heartbeat: Heartbeat,
        key: PublicKey,
        issued: Timestamp,
        now: Timestamp,
    ) -> Result<(), Ignored> {
        if let Some(bundles) = &mut heartbeat.authorities {
            bundles.truncate(BUNDLES_OF_AN_ENGINE);
            bundles.shrink_to_fit();
        }
        let version = &heartbeat.version;
        // Copied, because the old text keeps the memory of the whole message.
        heartbeat.version = version[..version.floor_char_boundary(VERSION_MAX)].to_owned();
        if now.duration_since(issued).abs() > CLOCK_ALLOWANCE {
            return Err(Ignored::OutOfDate);
        }
        let mut engines = self.engines();
        engines.retain(|_, seen| seen.heard.elapsed() < REMEMBERED);
        let name = (heartbeat.pool.clone(), heartbeat.engine.clone());
        match engines.get(&name) {
            Some(known) if known.issued >= issued => return Err(Ignored::Replayed),
            Some(_) => {}
            None => {
                let pool = engines.keys().filter(|(pool, _)| *pool == heartbeat.pool);
                if pool.count() >= ENGINES_OF_A_POOL {
                    return Err(Ignored::TooMany);
                }
            }
        }
        let seen = Seen {
            at: now,
            key,
            issued,
            heard: Instant::now(),
            heartbeat,
        };
        engines.insert(name, seen);
        Ok(())
    }

    /// Whether all live engines of a pool have read this bundle of authorities. `count` is their number at the
    /// broker. `None`: not all of them report that they can read bundles.
    pub(crate) fn offer(&self, pool: &PoolName, bundle: &Digest, count: u32) -> Option<bool> {
        let engines = self.engines();
        let (mut heard, mut have) = (0, true);
        for seen in engines.values().filter(|seen| seen.lives()) {
            if seen.heartbeat.pool == *pool {
                heard += 1;
                have &= seen.heartbeat.authorities.as_ref()?.contains(bundle);
            }
        }
        (heard > 0 && heard >= count).then_some(have)
    }

    /// The form of messages that every engine of a pool can open. `count` is the number of its engines at the
    /// broker.
    pub(crate) fn form(&self, pool: &PoolName, count: u32) -> Form {
        match self.all_can(pool, count, |beat| beat.opens_shared) {
            true => Form::Shared,
            false => Form::Alone,
        }
    }

    /// Whether all engines of a pool end several leases of one message. `count` is their number at the broker.
    pub(crate) fn ends_batches(&self, pool: &PoolName, count: u32) -> bool {
        self.all_can(pool, count, |beat| beat.ends_batches)
    }

    /// Whether all engines of a pool have sent a heartbeat, and each can do something.
    fn all_can(&self, pool: &PoolName, count: u32, can: impl Fn(&Heartbeat) -> bool) -> bool {
        let engines = self.engines();
        let living = engines
            .values()
            .filter(|seen| seen.heartbeat.pool == *pool && seen.lives());
        let (mut heard, mut all) = (0, true);
        for seen in living {
            heard += 1;
            all &= can(&seen.heartbeat);
        }
        all && heard > 0 && heard >= count
    }

    /// The live engines, by pool and name.
    pub(crate) fn all(&self) -> Vec<Seen> {
        let engines = self.engines();
        engines
            .values()
            .filter(|seen| seen.lives())
            .cloned()
            .collect()
    }

    /// The live engines with this name, of all pools.
    pub(crate) fn named(&self, name: &EngineName) -> Vec<Seen> {
        let mut found = self.all();
        found.retain(|seen| seen.heartbeat.engine == *name);
        found
    }

    /// Names of the pool's engines that do not use the new key of its rotation.
    pub(crate) fn with_another_key(&self, name: &PoolName, pool: &Pool) -> Vec<String> {
        self.all()
            .iter()
            .filter(|seen| {
                seen.heartbeat.pool == *name && Some(&seen.key) != pool.next_key.as_ref()
            })
            .map(|seen| seen.heartbeat.engine.to_string())
            .collect()
    }

    /// Number of live engines in a pool.
    pub(crate) fn count(&self, pool: &PoolName) -> usize {
        self.all()
            .iter()
            .filter(|seen| seen.heartbeat.pool == *pool)
            .count()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn heartbeat(engine: &str, pool: &str, leaving: bool) -> Heartbeat {
        Heartbeat {
            engine: engine.parse().unwrap(),
            pool: pool.parse().unwrap(),
            version: "0".to_owned(),
            started: Timestamp::UNIX_EPOCH,
            in_flight: 0,
            leaving,
            authorities: None,
            opens_shared: false,
            ends_batches: false,
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_000_000 + second).unwrap()
    }

    struct Heard(Registry, PublicKey);

    impl Heard {
        fn nothing() -> Self {
            let key = mayfly_protocol::seal::KeyPair::generate().public().clone();
            Self(Registry::default(), key)
        }

        /// A heartbeat of `e1` sealed at a second and heard at another.
        fn hear(&self, pool: &str, leaving: bool, issued: i64, now: i64) -> Result<(), Ignored> {
            let beat = heartbeat("e1", pool, leaving);
            self.0.hear(beat, self.1.clone(), at(issued), at(now))
        }

        fn count(&self, pool: &str) -> usize {
            self.0.count(&pool.parse().unwrap())
        }
    }

    #[test]
    fn no_pool_takes_the_name_of_another() {
        let heard = Heard::nothing();
        heard.hear("pool1", false, 5, 5).unwrap();
        heard.hear("pool2", false, 6, 6).unwrap();
        heard.hear("pool2", true, 7, 7).unwrap();
        assert_eq!((heard.count("pool1"), heard.count("pool2")), (1, 0));
        heard.hear("pool2", false, 8, 8).unwrap();
        assert_eq!(heard.0.named(&"e1".parse().unwrap()).len(), 2);
    }

    #[test]
    fn a_recorded_heartbeat_counts_never_again() {
        let heard = Heard::nothing();
        heard.hear("pool1", false, 5, 5).unwrap();
        heard.hear("pool1", false, 7, 7).unwrap();
        heard.hear("pool1", true, 9, 9).unwrap();
        // The engine's end is remembered: no earlier heartbeat makes the engine live.
        for issued in [5, 7, 9] {
            let replayed = heard.hear("pool1", false, issued, 10);
            assert_eq!(replayed, Err(Ignored::Replayed));
        }
        assert_eq!(heard.count("pool1"), 0);
        heard.hear("pool1", false, 11, 11).unwrap();
        assert_eq!(heard.count("pool1"), 1, "another of its name may come");
    }

    #[test]
    fn a_heartbeat_must_be_in_date() {
        let heard = Heard::nothing();
        for issued in [-61, 61] {
            let late = heard.hear("pool1", false, issued, 0);
            assert_eq!(late, Err(Ignored::OutOfDate));
        }
        assert!(heard.0.all().is_empty());
        heard.hear("pool1", false, -59, 0).unwrap();
    }

    #[test]
    fn a_pool_cannot_fill_the_memory() {
        let heard = Heard::nothing();
        for n in 0..ENGINES_OF_A_POOL {
            let beat = heartbeat(&format!("e{n}"), "pool2", false);
            heard.0.hear(beat, heard.1.clone(), at(1), at(1)).unwrap();
        }
        let more = heartbeat("more", "pool2", false);
        let refused = heard.0.hear(more, heard.1.clone(), at(1), at(1));
        assert_eq!(refused, Err(Ignored::TooMany));
        heard.hear("pool1", false, 1, 1).unwrap();
        // A few large heartbeats do not use up the memory either.
        let large = Heartbeat {
            version: "é".repeat(1_000_000),
            authorities: Some(vec![Digest::of("a"); 100_000]),
            ..heartbeat("large", "pool3", false)
        };
        heard.0.hear(large, heard.1.clone(), at(1), at(1)).unwrap();
        let engines = heard.0.engines();
        let name = ("pool3".parse().unwrap(), "large".parse().unwrap());
        let kept = &engines[&name].heartbeat;
        assert_eq!(kept.version.capacity(), VERSION_MAX);
        let bundles = kept.authorities.as_ref().unwrap();
        assert!(bundles.capacity() < 2 * BUNDLES_OF_AN_ENGINE);
    }

    #[test]
    fn a_new_form_is_used_only_where_each_engine_has_said_that_it_reads_it() {
        let registry = Registry::default();
        let pool = "pool1".parse().unwrap();
        let key = mayfly_protocol::seal::KeyPair::generate().public().clone();
        let hear = |engine: &str, of: &str, opens_shared: bool, second: i64| {
            let beat = Heartbeat {
                opens_shared,
                ends_batches: opens_shared,
                ..heartbeat(engine, of, second == 9)
            };
            registry
                .hear(beat, key.clone(), at(second), at(second))
                .unwrap();
        };
        let all_can = |count| {
            let is_shared = registry.form(&pool, count) == Form::Shared;
            assert_eq!(registry.ends_batches(&pool, count), is_shared);
            is_shared
        };
        assert!(!all_can(0), "nobody is known");
        hear("one", "pool1", true, 1);
        assert!(all_can(1));
        // Another engine consumes, and has sent no heartbeat yet.
        assert!(!all_can(2));
        // This engine belongs to another pool.
        hear("two", "pool2", true, 1);
        assert!(!all_can(2));
        hear("old", "pool1", false, 1);
        assert!(!all_can(2));
        assert!(!all_can(1));
        // The engine of the earlier version leaves.
        hear("old", "pool1", false, 9);
        assert!(all_can(1));
    }

    #[test]
    fn a_bundle_is_named_only_where_each_engine_has_said_that_it_reads_the_queue() {
        let registry = Registry::default();
        let (pool, bundle) = ("pool1".parse().unwrap(), Digest::of("a"));
        let key = || mayfly_protocol::seal::KeyPair::generate().public().clone();
        let hear = |engine: &str, authorities: Option<Vec<Digest>>, second: i64| {
            let beat = Heartbeat {
                authorities,
                ..heartbeat(engine, "pool1", false)
            };
            let at = Timestamp::from_second(second).unwrap();
            registry.hear(beat, key(), at, at).unwrap();
        };
        assert_eq!(registry.offer(&pool, &bundle, 0), None);
        hear("one", Some(vec![]), 1);
        assert_eq!(registry.offer(&pool, &bundle, 1), Some(false));
        // Another engine consumes, and has sent no heartbeat yet.
        assert_eq!(registry.offer(&pool, &bundle, 2), None);
        hear("two", None, 1);
        assert_eq!(registry.offer(&pool, &bundle, 2), None);
        hear("two", Some(vec![bundle]), 2);
        assert_eq!(registry.offer(&pool, &bundle, 2), Some(false));
        hear("one", Some(vec![Digest::of("b"), bundle]), 2);
        assert_eq!(registry.offer(&pool, &bundle, 2), Some(true));
    }
}
