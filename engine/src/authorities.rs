//! Bundles of certificate authorities that messages only name. They lie in a queue of the pool, which is
//! read without being emptied, so that any engine can end accounts though no dispatcher lives. What was
//! read is kept by the digest of its text: that is what a message names, inside its seal.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use mayfly_common::broker::BrokerError;
use mayfly_protocol::authorities::{Authorities, Bundle, Digest};
use mayfly_protocol::target::Target;
use mayfly_protocol::task::{Failure, FailureCode, Head, Kind};
use rand::RngExt;
use tracing::{debug, info, warn};

use crate::work::Engine;

/// A bundle is offered to dispatchers for this time after it was published. Then a dispatcher publishes it
/// again.
const OFFERED_FOR: SignedDuration = SignedDuration::from_hours(30 * 24);
/// A bundle is removed after this time. No lease lives longer without another bundle in its messages.
const KEPT_FOR: SignedDuration = SignedDuration::from_hours(400 * 24);
/// Bundles offered, at most: each costs 46 bytes of each heartbeat.
const OFFERED: usize = 64;
/// Bundles kept in memory, at most.
const MOST: usize = 256;
/// A bundle that another engine looks at in this moment is waited for.
const PATIENCE: Duration = Duration::from_secs(3);
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// A bundle that was not found is looked for again after this time.
const MISSED_FOR: Duration = Duration::from_secs(2);
/// A user without the right to the queue tries again after this time.
const REFUSED_FOR: Duration = Duration::from_secs(60);

/// Looks at the number of messages before they are read again.
const LOOKS: u32 = 3;

/// A bundle that was read.
#[derive(Debug)]
struct Known {
    pem: String,
    /// When it was sealed, by the dispatcher's clock.
    issued: Timestamp,
    /// Whether it was in the queue when that was last read.
    is_there: bool,
}

/// The bundles that were read.
#[derive(Debug, Default)]
pub(crate) struct Bundles {
    known: Mutex<HashMap<Digest, Known>>,
    /// The queue is there, and may be read.
    is_ready: AtomicBool,
    /// Messages in the queue when it was last read. Locked while it is.
    count: tokio::sync::Mutex<Option<usize>>,
    missed: Mutex<HashMap<Digest, Instant>>,
    /// When the user was last refused the queue. Each such refusal costs a channel.
    refused: Mutex<Option<Instant>>,
}

impl Bundles {
    fn known(&self) -> MutexGuard<'_, HashMap<Digest, Known>> {
        // No code panics while it holds the lock.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn missed(&self) -> MutexGuard<'_, HashMap<Digest, Instant>> {
        self.missed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refused(&self) -> MutexGuard<'_, Option<Instant>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What dispatchers may name in messages; none where the queue cannot be read.
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

    /// Puts the text in the place of its name, where it is in memory. Whether nothing is missing.
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

    /// Takes in what the queue holds, oldest first, and says which messages stay: not those that are
    /// there once more, nor those of long ago. What this engine cannot open may be for another key.
    fn take_in(&self, read: Vec<(Option<Timestamp>, Option<String>)>, now: Timestamp) -> Vec<bool> {
        let mut known = self.known();
        for one in known.values_mut() {
            one.is_there = false;
        }
        let mut stays = vec![true; read.len()];
        for (n, (issued, pem)) in read.into_iter().enumerate().rev() {
            let Some(issued) = issued else {
                // Nobody of ours has put it there.
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

impl Engine {
    /// Puts the text in the place of its name.
    ///
    /// # Errors
    /// It is not to be found at the broker.
    pub(crate) async fn find_authorities(&self, target: &mut Target) -> Result<(), Failure> {
        if self.authorities.fill(target) {
            return Ok(());
        }
        let Some(Authorities::Named { sha256 }) = target.sslrootcert.clone() else {
            return Ok(());
        };
        let lately = |at: &Instant| at.elapsed() < MISSED_FOR;
        if !self.authorities.missed().get(&sha256).is_some_and(lately) {
            let mut count = self.authorities.count.lock().await;
            let begun = Instant::now();
            while !self.authorities.fill(target) && begun.elapsed() < PATIENCE {
                if self.read_bundles(&mut count).await.is_err() {
                    break;
                }
                if !self.authorities.fill(target) {
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
            }
        }
        if self.authorities.fill(target) {
            return Ok(());
        }
        let mut missed = self.authorities.missed();
        missed.retain(|_, at| lately(at));
        missed.entry(sha256).or_insert_with(Instant::now);
        Err(Failure {
            // Once more, with what is in the queue then, or from a dispatcher that puts it there.
            full: true,
            ..Failure::new(
                FailureCode::NotUnderstood,
                format!(
                    "engine {} does not find the certificate authorities that the task names",
                    self.name
                ),
            )
        })
    }

    /// Sees to the queue of bundles, and reads it where that has changed.
    pub(crate) async fn tend_authorities(&self) {
        let last = *self.authorities.refused();
        if last.is_some_and(|at| at.elapsed() < REFUSED_FOR) {
            return;
        }
        let ready = self.tend_bundles().await;
        let is_refused = matches!(ready, Err(BrokerError::NotAllowed(_)));
        *self.authorities.refused() = is_refused.then(Instant::now);
        let was_ready = self
            .authorities
            .is_ready
            .swap(ready.is_ok(), Ordering::Relaxed);
        if let Err(error) = ready {
            match was_ready {
                true => {
                    warn!(%error, "the certificate authorities of this pool cannot be read now")
                }
                false => debug!(%error, "the certificate authorities of this pool cannot be read"),
            }
        }
    }

    async fn tend_bundles(&self) -> Result<(), BrokerError> {
        let before = *self.authorities.count.lock().await;
        for turn in 0..LOOKS {
            let there = self.broker.declare_authorities(&self.pool).await?;
            if usize::try_from(there).ok() == before {
                return Ok(());
            }
            if before.is_none() {
                break;
            }
            // Who reads them at this moment holds them. Many engines must not do so at once, again and again.
            if turn + 1 < LOOKS {
                let pause = rand::rng().random_range(100..1000);
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
        }
        let mut count = self.authorities.count.lock().await;
        self.read_bundles(&mut count).await?;
        if *count < before {
            info!(
                "certificate authorities of this pool are gone from the broker; a dispatcher puts them there again"
            );
        }
        Ok(())
    }

    async fn read_bundles(&self, count: &mut Option<usize>) -> Result<(), BrokerError> {
        let mut kept = 0;
        let keep = |messages: &[(Option<Head>, Vec<u8>)]| {
            let read = messages
                .iter()
                .map(|(head, body)| match head {
                    Some(head) if head.kind == Kind::Authorities && head.pool == self.pool => {
                        let opened = self.open_bundle(head, body);
                        (Some(head.issued), opened.map(|bundle| bundle.pem))
                    }
                    _ => (None, None),
                })
                .collect();
            let stays = self.authorities.take_in(read, Timestamp::now());
            kept = stays.iter().filter(|stays| **stays).count();
            stays
        };
        self.broker.read_authorities(&self.pool, keep).await?;
        *count = Some(kept);
        Ok(())
    }

    fn open_bundle(&self, head: &Head, body: &[u8]) -> Option<Bundle> {
        let opened = self.dispatcher.open::<Bundle>(&self.pool_keys, head, body);
        opened.ok().map(|(bundle, _)| bundle)
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
