//! Finds the owner of a token. Each look-up is a read of the store. A flood of wrong tokens must not take all
//! readers from callers with right tokens. So after 50 wrong tokens in 10 s, unknown tokens go into a slow lane: one
//! query looks up 32 of them, every 100 ms. A right token is slower there once and is known afterwards. No request
//! is answered from memory, so a change of a token counts at once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use mayfly_protocol::secret::Secret;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::error::{ApiError, Code, Limit};
use crate::metrics::Metrics;
use crate::store::{Bearer, Store, StoreError, token_hash};

/// Wrong tokens in a [`WINDOW`], of all callers together, that are looked up one by one.
const WRONG_AT_ONCE: u32 = 50;
const WINDOW: Duration = Duration::from_secs(10);
/// Pause between two jobs of the slow lane.
const SLOW: Duration = Duration::from_millis(100);
/// Maximum number of different tokens that wait in the slow lane. One job looks them up.
const SLOW_MOST: usize = 256;
/// Maximum number of requests that wait for the same token.
const SAME_MOST: usize = 64;
/// Maximum number of right tokens that are remembered, by their hashes.
const KNOWN_MOST: usize = 10_000;

type Hash = Vec<u8>;
type Found = Result<Option<Bearer>, StoreError>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lane {
    Fast,
    Slow,
}

/// What is known of tokens. Pure: timestamps are arguments.
struct Known {
    right: HashMap<Hash, Instant>,
    window: Instant,
    wrong: u32,
}

impl Known {
    fn new(now: Instant) -> Self {
        Self {
            right: HashMap::new(),
            window: now,
            wrong: 0,
        }
    }

    fn lane(&mut self, hash: &Hash, now: Instant) -> Lane {
        if now.duration_since(self.window) >= WINDOW {
            self.window = now;
            self.wrong = 0;
        }
        if self.wrong < WRONG_AT_ONCE || self.right.contains_key(hash) {
            Lane::Fast
        } else {
            Lane::Slow
        }
    }

    fn found(&mut self, hash: Hash, is_right: bool, now: Instant) {
        if !is_right {
            self.right.remove(&hash);
            self.wrong = self.wrong.saturating_add(1);
            return;
        }
        if self.right.len() >= KNOWN_MOST && !self.right.contains_key(&hash) {
            let oldest = self.right.iter().min_by_key(|(_, at)| **at);
            if let Some(oldest) = oldest.map(|(hash, _)| hash.clone()) {
                self.right.remove(&oldest);
            }
        }
        self.right.insert(hash, now);
    }
}

struct Inner {
    known: Known,
    waiting: HashMap<Hash, Vec<oneshot::Sender<Found>>>,
}

/// The known tokens, and the requests that wait for a look-up.
#[derive(Clone)]
pub(crate) struct Tokens {
    inner: Arc<Mutex<Inner>>,
    arrived: Arc<Notify>,
}

impl Tokens {
    pub(crate) fn new() -> Self {
        Self {
            inner: Arc::new(Mutex::new(Inner {
                known: Known::new(Instant::now()),
                waiting: HashMap::new(),
            })),
            arrived: Arc::default(),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // No code panics while it holds this lock.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place in the slow lane; `None` if it is full.
    fn wait(&self, hash: Hash) -> Option<oneshot::Receiver<Found>> {
        let mut inner = self.inner();
        let is_full = inner.waiting.len() >= SLOW_MOST && !inner.waiting.contains_key(&hash);
        let same = inner.waiting.get(&hash).map_or(0, Vec::len);
        if is_full || same >= SAME_MOST {
            return None;
        }
        let (sender, receiver) = oneshot::channel();
        inner.waiting.entry(hash).or_default().push(sender);
        self.arrived.notify_one();
        Some(receiver)
    }
}

impl Tokens {
    /// The owner of this token; `None` if it is unknown or has expired.
    ///
    /// # Errors
    /// `store_unavailable`; `quota` if there are too many wrong tokens.
    pub(crate) async fn bearer(
        &self,
        store: &Store,
        metrics: &Metrics,
        presented: &Secret,
    ) -> Result<Option<Bearer>, ApiError> {
        let hash = token_hash(presented);
        let lane = self.inner().known.lane(&hash, Instant::now());
        let found = match lane {
            Lane::Fast => {
                metrics.token_lookup();
                let found = store.bearers(vec![hash.clone()]).await?.pop().flatten();
                self.note(store, metrics, hash, found.as_ref());
                found
            }
            Lane::Slow => {
                let many = || ApiError {
                    retry_at: Some(Timestamp::now() + SignedDuration::from_secs(1)),
                    limit: Some(Limit::WrongTokens),
                    ..ApiError::new(
                        Code::Quota,
                        "too many requests with wrong tokens; try again in a moment",
                    )
                };
                let waiting = self.wait(hash).ok_or_else(many)?;
                waiting.await.map_err(|_| many())??
            }
        };
        Ok(found.filter(|found| is_right(store, Some(found))))
    }

    fn note(&self, store: &Store, metrics: &Metrics, hash: Hash, found: Option<&Bearer>) {
        let is_right = is_right(store, found);
        if !is_right {
            metrics.token_refused();
        }
        self.inner().known.found(hash, is_right, Instant::now());
    }

    /// Runs the slow lane until `stop`.
    pub(crate) async fn run(&self, store: Store, metrics: Metrics, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = self.arrived.notified() => {}
                () = stop.cancelled() => return,
            }
            tokio::time::sleep(SLOW).await;
            let waiting = std::mem::take(&mut self.inner().waiting);
            if waiting.is_empty() {
                continue;
            }
            let (hashes, askers): (Vec<_>, Vec<_>) = waiting.into_iter().unzip();
            metrics.token_lookup();
            let found = store.bearers(hashes.clone()).await;
            let mut each: Vec<Found> = match found {
                Ok(found) => found.into_iter().map(Ok).collect(),
                Err(error) => hashes.iter().map(|_| Err(error.clone())).collect(),
            };
            for ((hash, askers), found) in hashes.into_iter().zip(askers).zip(each.drain(..)) {
                if let Ok(found) = &found {
                    self.note(&store, &metrics, hash, found.as_ref());
                }
                for asker in askers {
                    // A caller that has left needs no answer.
                    let _ = asker.send(found.clone());
                }
            }
        }
    }
}

fn is_right(store: &Store, found: Option<&Bearer>) -> bool {
    match found {
        None => false,
        Some(Bearer::Root) => true,
        Some(Bearer::Reader(token)) => token.expiration > store.now(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_some_wrong_ones_only_what_was_right_is_fast() {
        let begun = Instant::now();
        let mut known = Known::new(begun);
        let (right, new) = (vec![1], vec![2]);
        known.found(right.clone(), true, begun);
        for n in 0..WRONG_AT_ONCE {
            assert_eq!(known.lane(&new, begun), Lane::Fast, "{n}");
            known.found(vec![3, 3], false, begun);
        }
        assert_eq!(known.lane(&new, begun), Lane::Slow);
        assert_eq!(known.lane(&right, begun), Lane::Fast);
        // The token was revoked: it now waits like any unknown token.
        known.found(right.clone(), false, begun);
        assert_eq!(known.lane(&right, begun), Lane::Slow);
        let later = begun + WINDOW;
        assert_eq!(known.lane(&new, later), Lane::Fast);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let begun = Instant::now();
        let mut known = Known::new(begun);
        for n in 0..KNOWN_MOST + 10 {
            let at = begun + Duration::from_millis(u64::try_from(n).unwrap_or(0));
            known.found(n.to_be_bytes().to_vec(), true, at);
        }
        assert_eq!(known.right.len(), KNOWN_MOST);
        assert!(!known.right.contains_key(0usize.to_be_bytes().as_slice()));
    }
}
