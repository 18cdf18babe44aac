//! Large bundles of certificate authorities. A bundle is published to the broker once for all messages of a
//! pool, which then only name it. If it is not certain that every engine of the pool has read the bundle,
//! messages contain it.

use jiff::Timestamp;
use mayfly_common::broker::{Address, BrokerError, Message};
use mayfly_protocol::authorities::{Authorities, Bundle, Digest, INLINE_MAX_BYTES};
use mayfly_protocol::names::PoolName;
use mayfly_protocol::target::Target;
use mayfly_protocol::task::{Head, Kind};
use mayfly_protocol::topology;
use tracing::{info, warn};

use super::seal::seal;
use crate::app::App;
use crate::store::Recipient;

/// The target as a message to this pool has it: with the bundle, or with its name.
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
    // Each engine that may take the message must have reported that it reads the queue.
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

/// Publishes a bundle to the broker unless that was done recently. Returns whether the broker has it.
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
            info!(%pool, %sha256, bytes = pem.len(), "the pool's certificate authorities are stored at the broker")
        }
        Err(error) => {
            warn!(%pool, %sha256, %error, "each message of this pool contains the certificate authorities");
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
        body: seal(app, &head, recipient, &Bundle { pem })?,
        head,
        reply_as: None,
        answers: None,
        expires: None,
    };
    app.broker.publish(message).await
}
