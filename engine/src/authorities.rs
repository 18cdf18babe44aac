//! Bundles of certificate authorities that messages only name. They are in a queue of the pool, which engines read
//! without emptying it, so that every engine can end accounts while no dispatcher runs. [`crate::bundles`] has the
//! bundles that were read.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use mayfly_common::broker::BrokerError;
use mayfly_protocol::authorities::{Authorities, Bundle};
use mayfly_protocol::target::Target;
use mayfly_protocol::task::{Failure, FailureCode, Head, Kind};
use rand::RngExt;
use tracing::{debug, info, warn};

use crate::work::Engine;

/// Maximum wait for a bundle while another engine reads the queue. It is also the pause between two reads.
const PATIENCE: Duration = Duration::from_secs(3);
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// A bundle that was not found is looked for again after this time.
const MISSED_FOR: Duration = Duration::from_secs(2);
/// A user without the right to the queue tries again after this time.
const REFUSED_FOR: Duration = Duration::from_secs(60);

/// Number of looks at the queue before a missing bundle counts as absent.
const LOOKS: u32 = 3;

impl Engine {
    /// Replaces the name of a bundle with its text.
    ///
    /// # Errors
    /// The broker does not have the bundle.
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
            // The dispatcher sends the task once more: by then the queue may have the bundle, or a dispatcher
            // publishes it.
            full: true,
            ..Failure::new(
                FailureCode::NotUnderstood,
                format!(
                    "engine {} cannot find the certificate authorities that the task names",
                    self.name
                ),
            )
        })
    }

    /// Checks the queue of bundles, and reads it if it has changed.
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
            // Another engine is reading the messages and holds them. Many engines must not do this repeatedly at the
            // same time.
            if turn + 1 < LOOKS {
                let pause = rand::rng().random_range(100..1000);
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
        }
        let mut count = self.authorities.count.lock().await;
        self.read_bundles(&mut count).await?;
        if *count < before {
            info!(
                "the broker no longer has certificate authorities of this pool; a dispatcher publishes them again"
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
