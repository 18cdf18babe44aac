//! Which engines live, by their heartbeats, in memory only.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use mayfly_common::names::{EngineName, PoolName};
use mayfly_common::seal::PublicKey;
use mayfly_common::task::Heartbeat;

use crate::store::Pool;

/// An engine not heard of for so long is gone. It speaks every 2 s.
const SILENCE: Duration = Duration::from_secs(8);

/// An engine as it was last heard.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    /// What it said.
    pub(crate) heartbeat: Heartbeat,
    /// When it came, by this dispatcher's clock.
    pub(crate) at: Timestamp,
    /// The key it speaks with.
    pub(crate) key: PublicKey,
    issued: Timestamp,
    heard: Instant,
}

/// The living engines.
#[derive(Debug, Default)]
pub(crate) struct Registry(Mutex<BTreeMap<EngineName, Seen>>);

impl Registry {
    fn engines(&self) -> std::sync::MutexGuard<'_, BTreeMap<EngineName, Seen>> {
        // No code panics while it holds the lock.
        self.0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Takes a heartbeat that was sealed at `issued` by the engine's clock. An older one than
    /// the last is a replay and changes nothing; nor can an engine take the name of one that
    /// lives in another pool.
    pub(crate) fn hear(
        &self,
        heartbeat: Heartbeat,
        key: PublicKey,
        issued: Timestamp,
        now: Timestamp,
    ) {
        let mut engines = self.engines();
        if let Some(known) = engines.get(&heartbeat.engine)
            && known.heard.elapsed() < SILENCE
            && (known.issued > issued || known.heartbeat.pool != heartbeat.pool)
        {
            return;
        }
        if heartbeat.leaving {
            engines.remove(&heartbeat.engine);
        } else {
            let seen = Seen {
                at: now,
                key,
                issued,
                heard: Instant::now(),
                heartbeat,
            };
            engines.insert(seen.heartbeat.engine.clone(), seen);
        }
    }

    /// The living engines, by name.
    pub(crate) fn all(&self) -> Vec<Seen> {
        let mut engines = self.engines();
        engines.retain(|_, seen| seen.heard.elapsed() < SILENCE);
        engines.values().cloned().collect()
    }

    /// A living engine.
    pub(crate) fn get(&self, name: &EngineName) -> Option<Seen> {
        self.engines()
            .get(name)
            .filter(|seen| seen.heard.elapsed() < SILENCE)
            .cloned()
    }

    /// Names of those of a pool that do not speak with the key of its rotation.
    pub(crate) fn with_another_key(&self, name: &PoolName, pool: &Pool) -> Vec<String> {
        self.all()
            .iter()
            .filter(|seen| {
                seen.heartbeat.pool == *name && Some(&seen.key) != pool.next_key.as_ref()
            })
            .map(|seen| seen.heartbeat.engine.to_string())
            .collect()
    }

    /// How many live in a pool.
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

    fn heartbeat(pool: &str, leaving: bool) -> Heartbeat {
        Heartbeat {
            engine: "e1".parse().unwrap(),
            pool: pool.parse().unwrap(),
            version: "0".to_owned(),
            started: Timestamp::UNIX_EPOCH,
            in_flight: 0,
            leaving,
        }
    }

    #[test]
    fn an_engine_comes_and_goes() {
        let registry = Registry::default();
        let at = |second| Timestamp::from_second(second).unwrap();
        let key = mayfly_common::seal::KeyPair::generate().public().clone();
        registry.hear(heartbeat("pool1", false), key.clone(), at(5), at(5));
        registry.hear(heartbeat("pool2", false), key.clone(), at(6), at(6));
        registry.hear(heartbeat("pool1", true), key.clone(), at(4), at(6));
        assert_eq!(
            registry.count(&"pool1".parse().unwrap()),
            1,
            "neither a stranger nor a replay ends it"
        );
        registry.hear(heartbeat("pool1", true), key.clone(), at(7), at(7));
        assert!(registry.all().is_empty());
    }
}
