//! Large bundles of certificate authorities: put at the broker once for all messages of a pool, and named
//! in these. Where it is not certain that each engine of the pool finds the bundle, it goes inside.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use mayfly_common::authorities::{Authorities, Bundle, Digest, INLINE_MAX_BYTES};
use mayfly_common::broker::{Address, BrokerError, Message};
use mayfly_common::names::PoolName;
use mayfly_common::target::Target;
use mayfly_common::task::{Head, Kind};
use mayfly_common::topology;
use tracing::{info, warn};

use crate::app::App;
use crate::keys::Generation;
use crate::store::Recipient;

/// A bundle counts as present for this time after it was published. By then engines have read it, and say so
/// every 2 s.
const TRUSTED_FOR: Duration = Duration::from_secs(30);
/// After a refused publish, as where the queue is full, bundles go inside messages for this time.
const REFUSED_FOR: Duration = Duration::from_secs(60);

/// A bundle as it is sealed: for whom, and by which of the dispatcher's keys.
type Sealed = (PoolName, Digest, String, Generation);

/// What was put at the broker lately.
#[derive(Default)]
pub(crate) struct Bundles {
    put: Mutex<HashMap<Sealed, (Instant, bool)>>,
    /// One puts a bundle there, and the others wait.
    putting: tokio::sync::Mutex<()>,
}

impl Bundles {
    fn put(&self) -> MutexGuard<'_, HashMap<Sealed, (Instant, bool)>> {
        // No code panics while it holds the lock.
        self.put.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is there, or could not be put there, as was seen lately.
    fn lately(&self, bundle: &Sealed) -> Option<bool> {
        let (at, is_there) = *self.put().get(bundle)?;
        let good_for = if is_there { TRUSTED_FOR } else { REFUSED_FOR };
        (at.elapsed() < good_for).then_some(is_there)
    }

    fn remember(&self, bundle: Sealed, is_there: bool) {
        let mut put = self.put();
        put.retain(|_, (at, _)| at.elapsed() < REFUSED_FOR);
        put.insert(bundle, (Instant::now(), is_there));
    }

    /// An engine of the pool did not find what it was sent the name of.
    pub(crate) fn forget(&self, pool: &PoolName) {
        self.put().retain(|(of, ..), _| of != pool);
    }
}

/// The target as a message to this pool names it.
pub(crate) async fn refer(
    app: &App,
    pool: &PoolName,
    recipient: &Recipient,
    target: Target,
) -> Target {
    let Some(Authorities::Pem(pem)) = &target.sslrootcert else {
        return target;
    };
    if pem.len() <= INLINE_MAX_BYTES {
        return target;
    }
    // Each that may take the message must have said that it reads the queue.
    let Ok(engines) = app.broker.engines_of(pool).await else {
        return target;
    };
    let sha256 = Digest::of(pem);
    let is_there = match app.registry.offer(pool, &sha256, engines) {
        None => false,
        Some(true) => true,
        Some(false) => is_put(app, pool, recipient, (sha256, pem)).await,
    };
    match is_there {
        true => Target {
            sslrootcert: Some(Authorities::Named { sha256 }),
            ..target
        },
        false => target,
    }
}

/// Puts a bundle at the broker where it was not put there lately. Whether it is there.
async fn is_put(
    app: &App,
    pool: &PoolName,
    recipient: &Recipient,
    (sha256, pem): (Digest, &str),
) -> bool {
    let key = recipient.key.to_base64();
    let bundle = (pool.clone(), sha256, key, recipient.from);
    let bundles = &app.authorities;
    if let Some(is_there) = bundles.lately(&bundle) {
        return is_there;
    }
    let _one = bundles.putting.lock().await;
    if let Some(is_there) = bundles.lately(&bundle) {
        return is_there;
    }
    let sent = publish(app, pool, recipient, pem).await;
    match &sent {
        Ok(()) => {
            info!(%pool, %sha256, bytes = pem.len(), "certificate authorities are at the broker for all messages")
        }
        Err(error) => {
            warn!(%pool, %sha256, %error, "certificate authorities go inside each message of this pool");
        }
    }
    bundles.remember(bundle, sent.is_ok());
    sent.is_ok()
}

async fn publish(
    app: &App,
    pool: &PoolName,
    recipient: &Recipient,
    pem: &str,
) -> Result<(), BrokerError> {
    let head = Head {
        kind: Kind::Authorities,
        pool: pool.clone(),
        lease: None,
        issued: Timestamp::now(),
        deadline: None,
        attempt: 0,
        settling: false,
        traceparent: String::new(),
    };
    let pem = pem.to_owned();
    let message = Message {
        to: Address::Queue(topology::authorities_queue(pool)),
        body: app.seal(&head, recipient, &Bundle { pem })?,
        head,
        reply_as: None,
        answers: None,
        expires: None,
    };
    app.broker.publish(message).await
}
