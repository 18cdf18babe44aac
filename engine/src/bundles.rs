//! Bundles of certificate authorities that this engine has read, by the digest of their text. A message names this
//! digest inside its seal.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use jiff::{SignedDuration, Timestamp};
use mayfly_protocol::authorities::{Authorities, Digest};
use mayfly_protocol::target::Target;
use parking_lot::{Mutex, MutexGuard};

/// A bundle is offered to dispatchers for this time after it was published. Then a dispatcher publishes it
/// again.
const OFFERED_FOR: SignedDuration = SignedDuration::from_hours(30 * 24);
/// A bundle is removed after this time. No lease lives longer without another bundle in its messages.
const KEPT_FOR: SignedDuration = SignedDuration::from_hours(400 * 24);
/// Maximum number of bundles that are offered. Each adds 46 bytes to each heartbeat.
const OFFERED: usize = 64;
/// Maximum number of bundles kept in memory.
const MOST: usize = 256;
/// A bundle that was read.
#[derive(Debug)]
struct Known {
    pem: String,
    /// When it was sealed, by the dispatcher's clock.
    issued: Timestamp,
    /// Whether the queue had it at the last read.
    is_there: bool,
}

/// The bundles that were read.
#[derive(Debug, Default)]
pub(crate) struct Bundles {
    known: Mutex<HashMap<Digest, Known>>,
    /// Whether the queue exists and this user may read it.
    pub(crate) is_ready: AtomicBool,
    /// Number of messages in the queue at the last read. It is locked during a read.
    pub(crate) count: tokio::sync::Mutex<Option<usize>>,
    missed: Mutex<HashMap<Digest, Instant>>,
    /// When the broker last refused the queue to this user. Each refusal costs a channel.
    refused: Mutex<Option<Instant>>,
}

impl Bundles {
    fn known(&self) -> MutexGuard<'_, HashMap<Digest, Known>> {
        self.known.lock()
    }

    pub(crate) fn missed(&self) -> MutexGuard<'_, HashMap<Digest, Instant>> {
        self.missed.lock()
    }

    pub(crate) fn refused(&self) -> MutexGuard<'_, Option<Instant>> {
        self.refused.lock()
    }

    /// The bundles that dispatchers may name in messages. `None`: the queue cannot be read.
    pub(crate) fn offered(&self) -> Option<Vec<Digest>> {
        if !self.is_ready.load(Ordering::Relaxed) {
            return None;
        }
        let since = Timestamp::now() - OFFERED_FOR;
        let known = self.known();
        let mut offered: Vec<_> = known
            .iter()
            .filter(|(_, known)| known.is_there && known.issued > since)
            .map(|(digest, known)| (known.issued, *digest))
            .collect();
        offered.sort_unstable();
        let newest = offered.into_iter().rev().take(OFFERED);
        Some(newest.map(|(_, digest)| digest).collect())
    }

    /// Replaces the name of a bundle by its text, if the text is in memory. Returns whether no text is missing.
    pub(crate) fn fill(&self, target: &mut Target) -> bool {
        let Some(Authorities::Named { sha256 }) = &target.sslrootcert else {
            return true;
        };
        let pem = self.known().get(sha256).map(|known| known.pem.clone());
        let found = pem.is_some();
        if let Some(pem) = pem {
            target.sslrootcert = Some(Authorities::Pem(pem));
        }
        found
    }

    /// Reads the messages of the queue, oldest first. Returns which of them stay in the queue: those that are
    /// neither duplicates nor too old. A message that this engine cannot open may be for another key.
    pub(crate) fn take_in(
        &self,
        read: Vec<(Option<Timestamp>, Option<String>)>,
        now: Timestamp,
    ) -> Vec<bool> {
        let mut known = self.known();
        for one in known.values_mut() {
            one.is_there = false;
        }
        let mut stays = vec![true; read.len()];
        for (n, (issued, pem)) in read.into_iter().enumerate().rev() {
            let Some(issued) = issued else {
                // Mayfly did not publish this message.
                stays[n] = false;
                continue;
            };
            if issued < now - KEPT_FOR {
                stays[n] = false;
                continue;
            }
            let Some(pem) = pem else { continue };
            let one = known.entry(Digest::of(&pem)).or_insert_with(|| Known {
                pem,
                issued,
                is_there: false,
            });
            stays[n] = !one.is_there;
            if !one.is_there {
                one.is_there = true;
                one.issued = issued;
            }
        }
        if known.len() > MOST {
            known.retain(|_, one| one.is_there);
        }
        stays
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn at(day: i64) -> Timestamp {
        Timestamp::UNIX_EPOCH + SignedDuration::from_hours(24 * day)
    }

    fn one(day: i64, pem: &str) -> (Option<Timestamp>, Option<String>) {
        (Some(at(day)), Some(pem.to_owned()))
    }

    #[test]
    fn the_newest_of_each_stays_and_nothing_of_long_ago() {
        let bundles = Bundles::default();
        let other_key = (Some(at(450)), None);
        let read = vec![
            one(1, "old"),
            (None, None),
            one(400, "a"),
            one(410, "b"),
            other_key,
            one(500, "a"),
        ];
        let stays = bundles.take_in(read, at(500));
        assert_eq!(stays, [false, false, false, true, true, true]);
        let known = bundles.known();
        assert_eq!(known.len(), 2);
        assert_eq!(known[&Digest::of("a")].issued, at(500));
    }

    #[test]
    fn what_is_gone_from_the_queue_is_not_offered_and_still_known() {
        let bundles = Bundles::default();
        assert_eq!(bundles.offered(), None);
        bundles.is_ready.store(true, Ordering::Relaxed);
        let now = Timestamp::now();
        let there = |days: i64| Some(now - SignedDuration::from_hours(24 * days));
        let read = vec![
            (there(1), Some("a".to_owned())),
            (there(31), Some("b".to_owned())),
        ];
        bundles.take_in(read, now);
        assert_eq!(bundles.offered(), Some(vec![Digest::of("a")]));
        bundles.take_in(vec![], now);
        assert_eq!(bundles.offered(), Some(vec![]));
        assert!(bundles.known().contains_key(&Digest::of("a")));
    }
}
