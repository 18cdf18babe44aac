//! What is declared in RabbitMQ, with which arguments.

use std::time::Duration;

use lapin::options::{
    ExchangeBindOptions, ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions,
    QueueDeclareOptions,
};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, ErrorKind, ExchangeKind, Queue};

use super::BrokerError;
use mayfly_protocol::names::PoolName;
use mayfly_protocol::topology;

/// Without this argument RabbitMQ 4 drops a message after 20 deliveries. No engine ever requeues a task, so only lost
/// connections count here.
const DELIVERY_LIMIT: i32 = 1_000_000;
/// Outcomes that the queue keeps while no dispatcher runs. The oldest are dropped first; the reconciler asks again.
const OUTCOMES_MAX: i32 = 500_000;
/// Maximum number of unreadable messages that are kept for the operator, the newest of them, for a week.
const UNREADABLE_MAX: i32 = 1_000;
const UNREADABLE_MAX_BYTES: i32 = 16 * 1024 * 1024;
const UNREADABLE_KEPT_MS: i32 = 7 * 86_400 * 1000;

/// Maximum number of bundles of authorities that a pool's queue keeps. Further bundles are sent inside messages.
const AUTHORITIES_MAX: i32 = 256;
const AUTHORITIES_MAX_BYTES: i32 = 64 * 1024 * 1024;
/// Without an engine of the pool the bundles are kept for 400 days: longer than the longest lease.
const AUTHORITIES_UNUSED_MS: i64 = 400 * 86_400 * 1000;

const NOT_FOUND: AMQPErrorKind = AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND);

const ACCESS_REFUSED: AMQPErrorKind = AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED);

fn table(entries: impl IntoIterator<Item = (&'static str, AMQPValue)>) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in entries {
        table.insert(name.into(), value);
    }
    table
}

fn value(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}

fn durable() -> QueueDeclareOptions {
    QueueDeclareOptions {
        durable: true,
        ..Default::default()
    }
}

/// Declares everything that does not belong to one pool. Only dispatchers call it. The levels are declared from the
/// lowest to the highest, so that a dead-letter exchange exists before a queue names it. What engines look for
/// ([`topology::PARK`]) comes last.
pub(super) async fn declare_all(channel: &Channel) -> Result<(), BrokerError> {
    exchange(channel, topology::UNROUTABLE, ExchangeKind::Fanout, None).await?;
    queue(
        channel,
        topology::UNROUTABLE,
        [("x-max-length", AMQPValue::LongInt(OUTCOMES_MAX))],
    )
    .await?;
    bind(channel, topology::UNROUTABLE, topology::UNROUTABLE, "").await?;
    queue(
        channel,
        topology::OUTCOMES,
        [
            ("x-max-length", AMQPValue::LongInt(OUTCOMES_MAX)),
            ("x-delivery-limit", AMQPValue::LongInt(DELIVERY_LIMIT)),
        ],
    )
    .await?;
    queue(
        channel,
        topology::UNREADABLE,
        [
            ("x-max-length", AMQPValue::LongInt(UNREADABLE_MAX)),
            (
                "x-max-length-bytes",
                AMQPValue::LongInt(UNREADABLE_MAX_BYTES),
            ),
            ("x-message-ttl", AMQPValue::LongInt(UNREADABLE_KEPT_MS)),
        ],
    )
    .await?;
    topic(channel, topology::DELIVER).await?;
    for n in 0..topology::LEVELS {
        let name = topology::level(n);
        topic(channel, &name).await?;
        queue(
            channel,
            &name,
            [
                (
                    "x-message-ttl",
                    AMQPValue::LongLongInt(topology::level_ttl_ms(n) as i64),
                ),
                ("x-dead-letter-exchange", value(&topology::below(n))),
                ("x-dead-letter-strategy", value("at-least-once")),
                ("x-overflow", value("reject-publish")),
            ],
        )
        .await?;
        bind(channel, &name, &name, &topology::level_binding(n, '1')).await?;
        let pass = topology::level_binding(n, '0');
        bind_exchange(channel, &topology::below(n), &name, &pass).await?;
    }
    declare_entrances(channel).await?;
    for n in 0..topology::LEVELS {
        let (level, key) = (topology::level(n), topology::park_binding(n));
        bind_exchange(channel, &level, topology::PARK, &key).await?;
    }
    Ok(())
}

/// Sets the mark that all revocations are parked; see [`topology::PARKED`].
pub(super) async fn mark_parked(channel: &Channel) -> Result<(), BrokerError> {
    exchange(channel, topology::PARKED, ExchangeKind::Topic, None).await
}

/// Removes the mark that all revocations are parked. Safe to repeat.
pub(super) async fn unmark_parked(channel: &Channel) -> Result<(), BrokerError> {
    let options = ExchangeDeleteOptions::default();
    Ok(channel
        .exchange_delete(topology::PARKED.into(), options)
        .await?)
}

/// Declares the exchanges that engines publish to. Engines cannot report their absence, so a dispatcher declares
/// them regularly.
pub(super) async fn declare_entrances(channel: &Channel) -> Result<(), BrokerError> {
    exchange(channel, topology::ENTRY, ExchangeKind::Topic, None).await?;
    for n in 0..topology::LEVELS {
        let (queue, key) = (topology::level(n), topology::park_binding(n));
        bind(channel, &queue, topology::ENTRY, &key).await?;
    }
    exchange(channel, topology::ENGINES, ExchangeKind::Fanout, None).await?;
    exchange(channel, topology::ANSWERS, ExchangeKind::Direct, None).await?;
    for queue in [topology::OUTCOMES, topology::UNREADABLE] {
        bind(channel, queue, topology::ANSWERS, queue).await?;
    }
    topic(channel, topology::PARK).await
}

/// Declares a topic exchange of the delay levels. Messages that it cannot route go to [`topology::UNROUTABLE`].
async fn topic(channel: &Channel, name: &str) -> Result<(), BrokerError> {
    exchange(
        channel,
        name,
        ExchangeKind::Topic,
        Some(topology::UNROUTABLE),
    )
    .await
}

async fn exchange(
    channel: &Channel,
    name: &str,
    kind: ExchangeKind,
    alternate: Option<&str>,
) -> Result<(), BrokerError> {
    let options = ExchangeDeclareOptions {
        durable: true,
        ..Default::default()
    };
    let arguments = table(alternate.map(|name| ("alternate-exchange", value(name))));
    Ok(channel
        .exchange_declare(name.into(), kind, options, arguments)
        .await?)
}

/// A durable quorum queue.
async fn queue(
    channel: &Channel,
    name: &str,
    arguments: impl IntoIterator<Item = (&'static str, AMQPValue)>,
) -> Result<(), BrokerError> {
    let quorum = [("x-queue-type", value("quorum"))];
    let arguments = table(quorum.into_iter().chain(arguments));
    channel
        .queue_declare(name.into(), durable(), arguments)
        .await?;
    Ok(())
}

async fn bind(channel: &Channel, queue: &str, to: &str, key: &str) -> Result<(), BrokerError> {
    let options = QueueBindOptions::default();
    Ok(channel
        .queue_bind(
            queue.into(),
            to.into(),
            key.into(),
            options,
            FieldTable::default(),
        )
        .await?)
}

async fn bind_exchange(
    channel: &Channel,
    exchange: &str,
    to: &str,
    key: &str,
) -> Result<(), BrokerError> {
    let options = ExchangeBindOptions::default();
    Ok(channel
        .exchange_bind(
            exchange.into(),
            to.into(),
            key.into(),
            options,
            FieldTable::default(),
        )
        .await?)
}

/// Whether an exchange exists. It is not declared. The broker closes a channel that looks for an absent exchange.
pub(super) async fn has_exchange(channel: &Channel, name: &str) -> Result<bool, BrokerError> {
    let passive = ExchangeDeclareOptions {
        passive: true,
        ..Default::default()
    };
    let found = channel
        .exchange_declare(
            name.into(),
            ExchangeKind::Topic,
            passive,
            FieldTable::default(),
        )
        .await;
    match found {
        Ok(()) => Ok(true),
        Err(error) if is_not_found(&error) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whether the user lacks the permission.
pub(super) fn is_refused(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(error) if error.kind() == &ACCESS_REFUSED)
}

fn is_not_found(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(error) if error.kind() == &NOT_FOUND)
}

/// A queue with its counts, or `None` if it is absent. It is not declared. The broker closes a channel that
/// looks for an absent queue (AMQP 0-9-1, queue.declare, passive).
pub(super) async fn find_queue(
    channel: &Channel,
    queue: String,
) -> Result<Option<Queue>, BrokerError> {
    let passive = QueueDeclareOptions {
        passive: true,
        ..durable()
    };
    let found = channel
        .queue_declare(queue.into(), passive, FieldTable::default())
        .await;
    match found {
        Ok(queue) => Ok(Some(queue)),
        Err(error) if is_not_found(&error) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Declares a pool's queues. Only dispatchers do: a user who may bind a queue to [`topology::DELIVER`] can read the
/// revocations of every pool.
pub(super) async fn declare_pool(channel: &Channel, pool: &PoolName) -> Result<(), BrokerError> {
    // No dead-letter exchange: an expired request is dropped.
    queue(
        channel,
        &topology::create_queue(pool),
        [("x-delivery-limit", AMQPValue::LongInt(DELIVERY_LIMIT))],
    )
    .await?;
    // A revocation that reaches its delivery limit comes back through the 8 s level, so no limit can end it.
    let (exchange, key) = topology::delay_route(Duration::from_secs(8), pool);
    let revoke = topology::revoke_queue(pool);
    queue(
        channel,
        &revoke,
        [
            ("x-delivery-limit", AMQPValue::LongInt(DELIVERY_LIMIT)),
            ("x-dead-letter-exchange", value(&exchange)),
            ("x-dead-letter-routing-key", value(&key)),
            ("x-dead-letter-strategy", value("at-least-once")),
            ("x-overflow", value("reject-publish")),
        ],
    )
    .await?;
    let key = topology::deliver_binding(pool);
    bind(channel, &revoke, topology::DELIVER, &key).await
}

/// Declares the queue of a pool's authorities. Engines call it. The broker deletes the queue when nobody has looked
/// at it for its expiry.
pub(super) async fn declare_authorities(
    channel: &Channel,
    pool: &PoolName,
) -> Result<u32, BrokerError> {
    let arguments = table([
        ("x-queue-type", value("quorum")),
        ("x-delivery-limit", AMQPValue::LongInt(DELIVERY_LIMIT)),
        ("x-max-length", AMQPValue::LongInt(AUTHORITIES_MAX)),
        (
            "x-max-length-bytes",
            AMQPValue::LongInt(AUTHORITIES_MAX_BYTES),
        ),
        ("x-overflow", value("reject-publish")),
        ("x-expires", AMQPValue::LongLongInt(AUTHORITIES_UNUSED_MS)),
    ]);
    let name = topology::authorities_queue(pool);
    let queue = channel
        .queue_declare(name.into(), durable(), arguments)
        .await?;
    Ok(queue.message_count())
}

/// Declares a queue of this connection alone. It is deleted when the connection ends.
pub(super) async fn declare_own(channel: &Channel, name: &str) -> Result<(), BrokerError> {
    let exclusive = QueueDeclareOptions {
        exclusive: true,
        ..Default::default()
    };
    channel
        .queue_declare(name.into(), exclusive, FieldTable::default())
        .await?;
    Ok(())
}

/// A dispatcher's own queue of heartbeats.
pub(super) async fn declare_heartbeats(channel: &Channel, name: &str) -> Result<(), BrokerError> {
    declare_own(channel, name).await?;
    bind(channel, name, topology::ENGINES, "").await
}

/// A dispatcher's own queue of probes that have come through the delay levels.
pub(super) async fn declare_probes(
    channel: &Channel,
    name: &str,
    word: &str,
) -> Result<(), BrokerError> {
    declare_own(channel, name).await?;
    bind(
        channel,
        name,
        topology::DELIVER,
        &topology::binding_of(word),
    )
    .await
}

/// Declares a dispatcher's own queue of answers. Requests name it.
pub(super) async fn declare_replies(channel: &Channel, name: &str) -> Result<(), BrokerError> {
    declare_own(channel, name).await?;
    bind(channel, name, topology::ANSWERS, name).await
}

/// Messages that are ready in a queue. `None`: the queue is absent.
pub(super) async fn message_count(
    channel: &Channel,
    queue: String,
) -> Result<Option<u32>, BrokerError> {
    let found = find_queue(channel, queue).await?;
    Ok(found.map(|queue| queue.message_count()))
}
