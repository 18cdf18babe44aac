//! Messages to engines that have no answer: the ends of accounts, parked or due at once, and verdicts. Each is
//! sealed to its pool.

use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use futures_util::StreamExt;
use jiff::Timestamp;
use mayfly_common::broker::{Address, BrokerError, Message};
use mayfly_common::trace;
use mayfly_protocol::names::{EngineName, PoolName};
use mayfly_protocol::task::{Also, Head, Instead, Kind, LEASES_MAX, Revoke, RevokeMode, Verdict};
use mayfly_protocol::timing::timing;
use mayfly_protocol::topology;
use tracing::warn;

use super::seal::{seal, seal_often};
use super::{authorities, declare};
use crate::app::App;
use crate::error::ApiError;
use crate::store::{LeaseAccess, Pool, Recipient};
use mayfly_protocol::lease::{Lease, State};

/// The longest time for which an engine parks a failed revocation.
const INSTEAD_MAX: Duration = Duration::from_secs(3600);
/// Maximum number of concurrent publishes. It is half of the connection's publisher channels, so that a read finds a
/// free one.
const AT_ONCE: usize = 16;
/// The longest time for which an engine waits for a verdict.
const VERDICT_LIFE: Duration = Duration::from_secs(2);

/// Parks the end of an account that is about to be made.
///
/// # Errors
/// See [`mayfly_common::broker::Broker::publish`].
pub(crate) async fn park_end(app: &App, access: &LeaseAccess) -> Result<(), BrokerError> {
    let lease = &access.lease;
    let delay = Duration::from_secs(lease.ttl_seconds) + timing().park_margin;
    let window_ms = lease.window_ms(app.now() + delay);
    park(app, access, delay, window_ms).await
}

/// Parks the end of a live account again, for its remaining life.
///
/// # Errors
/// See [`mayfly_common::broker::Broker::publish`].
pub(crate) async fn park_rest(app: &App, access: &LeaseAccess) -> Result<(), BrokerError> {
    let lease = &access.lease;
    let status = &lease.status;
    let now = app.now();
    let end = status
        .expiration
        .map_or(now, |end| status.to_store_clock(end));
    let left = Duration::try_from(end.duration_since(now)).unwrap_or(Duration::ZERO);
    let delay = left + timing().park_margin;
    let window_ms = lease.window_ms(now).saturating_sub(millis(delay));
    park(app, access, delay, window_ms).await
}

async fn park(
    app: &App,
    access: &LeaseAccess,
    delay: Duration,
    window_ms: u64,
) -> Result<(), BrokerError> {
    let lease = &access.lease;
    let body = revoke(app, access, RevokeMode::Expire, window_ms);
    let to = Address::Delayed(delay, lease.pool.clone());
    publish_end(app, access, to, body).await
}

/// Publishes a revocation that is due at once.
///
/// # Errors
/// See [`mayfly_common::broker::Broker::publish`].
pub(crate) async fn now(app: &App, access: &LeaseAccess) -> Result<(), BrokerError> {
    let lease = &access.lease;
    let body = revoke(app, access, RevokeMode::Now, lease.window_ms(app.now()));
    let to = Address::Queue(topology::revoke_queue(&lease.pool));
    publish_end(app, access, to, body).await
}

/// Publishes the end of an account that this pool has taken over, parked until the account's end or due at once. The
/// message that is parked for the other pool is of no use: this pool cannot open it.
///
/// # Errors
/// See [`mayfly_common::broker::Broker::publish`].
pub(crate) async fn taken_over(app: &App, access: &LeaseAccess) -> Result<(), BrokerError> {
    match access.lease.status.state {
        State::Active => park_rest(app, access).await,
        State::Revoking => now(app, access).await,
        State::Pending | State::Revoked | State::Failed => copy(app, access).await,
    }
}

/// Publishes a copy of a revocation: engines never park it again.
///
/// # Errors
/// See [`mayfly_common::broker::Broker::publish`].
pub(crate) async fn copy(app: &App, access: &LeaseAccess) -> Result<(), BrokerError> {
    send_copy(app, access, false, vec![]).await
}

/// Publishes copies of revocations. If the engines of a pool can read such messages, one message names all leases
/// that end in the same way. Failures are logged: the reconciler sends the revocations again.
pub(crate) async fn copies(app: &App, all: &[LeaseAccess]) {
    let mut groups: Vec<Vec<&LeaseAccess>> = Vec::new();
    for access in all {
        let together = ends_batches(app, &access.lease.pool).await;
        let has_room = |group: &&mut Vec<&LeaseAccess>| {
            together && group.len() < LEASES_MAX && group[0].is_ended_like(access)
        };
        match groups.iter_mut().rev().find(has_room) {
            Some(group) => group.push(access),
            None => groups.push(vec![access]),
        }
    }
    let send = async |group: Vec<&LeaseAccess>| {
        if let Err(error) = send_group(app, &group).await {
            for access in group {
                let lease = &access.lease;
                warn!(lease = %lease.id, trace = trace::trace_of(&lease.traceparent), %error, "a revocation was not sent; it is sent later");
            }
        }
    };
    futures_util::stream::iter(groups)
        .for_each_concurrent(AT_ONCE, send)
        .await;
}

/// Whether all engines of a pool end several leases of one message.
pub(crate) async fn ends_batches(app: &App, pool: &PoolName) -> bool {
    app.registry.ends_batches(pool, 0)
        && match app.broker.engines_of(pool).await {
            // An engine may consume before its first heartbeat.
            Ok(engines) => app.registry.ends_batches(pool, engines),
            Err(_) => false,
        }
}

async fn send_group(app: &App, group: &[&LeaseAccess]) -> Result<(), BrokerError> {
    let Some((first, others)) = group.split_first() else {
        return Ok(());
    };
    let now = app.now();
    let also = others.iter().map(|access| Also {
        lease: access.lease.id,
        role: access.lease.role.clone(),
        window_ms: access.lease.window_ms(now),
        traceparent: access.lease.traceparent.clone(),
    });
    let others = also.collect();
    send_copy(app, first, false, others).await
}

/// Publishes a copy that a person asked for: it is tried even if the circuit breaker is open.
///
/// # Errors
/// See [`mayfly_common::broker::Broker::publish`].
pub(crate) async fn asked_copy(app: &App, access: &LeaseAccess) -> Result<(), BrokerError> {
    send_copy(app, access, true, vec![]).await
}

async fn send_copy(
    app: &App,
    access: &LeaseAccess,
    asked: bool,
    others: Vec<Also>,
) -> Result<(), BrokerError> {
    let lease = &access.lease;
    let body = Revoke {
        asked,
        others,
        copy: true,
        ..revoke(app, access, lease.revoke_mode(), lease.window_ms(app.now()))
    };
    let to = Address::Queue(topology::revoke_queue(&lease.pool));
    publish_end(app, access, to, body).await
}

/// Publishes the end of a role that was found on a server. It is due at the role's own `VALID UNTIL`. The store need
/// not know the role's lease, and the role may belong to another installation.
///
/// # Errors
/// `no_engine` for a pool that is distrusted, `broker_unavailable`.
pub(crate) async fn found(app: &App, pool: &Pool, body: Revoke) -> Result<(), ApiError> {
    let recipient = pool.recipient()?;
    let head = Head {
        kind: Kind::Revoke,
        pool: pool.name.clone(),
        lease: Some(body.lease),
        issued: Timestamp::now(),
        deadline: None,
        attempt: 0,
        settling: false,
        traceparent: String::new(),
    };
    let to = Address::Queue(topology::revoke_queue(&pool.name));
    publish(app, head, &recipient, to, body)
        .await
        .map_err(|error| ApiError::broker(&error))
}

/// Seals a revocation that an engine parks for `after` in place of the failed revocation.
///
/// # Errors
/// `Down` if it cannot be sealed.
pub(crate) fn instead(
    app: &App,
    access: &LeaseAccess,
    after: Duration,
) -> Result<Instead, BrokerError> {
    let lease = &access.lease;
    let now = app.now();
    let window_ms = lease.window_ms(now + after.min(INSTEAD_MAX));
    let body = revoke(app, access, lease.revoke_mode(), window_ms);
    let head = head(lease, now);
    let sealed = seal(app, &head, &access.recipient, &body)?;
    Ok(Instead {
        issued: head.issued,
        body: BASE64_STANDARD.encode(sealed),
    })
}

/// Sends the verdict on a revocation to the engine that reported it as `reported`.
///
/// # Errors
/// See [`mayfly_common::broker::Broker::publish`].
pub(crate) async fn verdict(
    app: &App,
    engine: &EngineName,
    recipient: &Recipient,
    reported: &Head,
    verdict: Verdict,
) -> Result<(), BrokerError> {
    let head = Head {
        kind: Kind::Verdict,
        issued: Timestamp::now(),
        deadline: None,
        attempt: 0,
        settling: false,
        ..reported.clone()
    };
    let body = seal(app, &head, recipient, &verdict)?;
    to_engine(app, engine, head, body, None, VERDICT_LIFE).await
}

/// Publishes to the queue of one engine of the head's pool.
pub(super) async fn to_engine(
    app: &App,
    engine: &EngineName,
    head: Head,
    body: Vec<u8>,
    reply_as: Option<String>,
    life: Duration,
) -> Result<(), BrokerError> {
    let message = Message {
        to: Address::Queue(topology::engine_queue(&head.pool, engine)),
        head,
        body,
        reply_as,
        answers: None,
        expires: Some(life),
    };
    match app.broker.publish(message.clone()).await {
        // An engine of an earlier version has no such queue.
        Err(BrokerError::Unroutable) => {
            let to = Address::Queue(topology::earlier_engine_queue(engine));
            app.broker.publish(Message { to, ..message }).await
        }
        sent => sent,
    }
}

fn revoke(app: &App, access: &LeaseAccess, mode: RevokeMode, window_ms: u64) -> Revoke {
    let lease = &access.lease;
    Revoke {
        lease: lease.id,
        installation: app.identity.installation,
        target: access.target.clone(),
        role: lease.role.clone(),
        mode,
        owned_objects: lease.owned_objects.clone(),
        server: access.server.clone(),
        place: Some(access.place()),
        window_ms,
        copy: false,
        asked: false,
        reads_batches: true,
        others: vec![],
    }
}

async fn publish_end(
    app: &App,
    access: &LeaseAccess,
    to: Address,
    body: Revoke,
) -> Result<(), BrokerError> {
    let head = head(&access.lease, Timestamp::now());
    publish(app, head, &access.recipient, to, body).await
}

async fn publish(
    app: &App,
    head: Head,
    recipient: &Recipient,
    to: Address,
    mut body: Revoke,
) -> Result<(), BrokerError> {
    body.target = authorities::refer(app, &head.pool, recipient, body.target).await;
    let message = Message {
        to,
        body: seal_often(app, &head, recipient, &body, None).await?,
        head,
        reply_as: None,
        answers: None,
        expires: None,
    };
    declare::publish(app, message).await
}

fn head(lease: &Lease, now: Timestamp) -> Head {
    Head {
        kind: Kind::Revoke,
        pool: lease.pool.clone(),
        lease: Some(lease.id),
        issued: now,
        deadline: None,
        attempt: 0,
        settling: false,
        traceparent: lease.traceparent.clone(),
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
