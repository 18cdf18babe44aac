//! What is declared in RabbitMQ, with which arguments.

use std::time::Duration;

use lapin::options::{
    ExchangeBindOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, ErrorKind, ExchangeKind, Queue};

use super::{BrokerError, Source};
use crate::names::PoolName;
use crate::topology;

/// RabbitMQ 4 drops a message delivered more often than 20 times unless told otherwise. No
/// engine ever gives a task back, so only lost connections count here.
const DELIVERY_LIMIT: i32 = 1_000_000;
/// Outcomes kept while no dispatcher runs. Older ones go first; the reconciler asks again.
const OUTCOMES_MAX: i32 = 500_000;

const NOT_FOUND: AMQPErrorKind = AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND);

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

/// Everything that does not belong to one pool. From the bottom of the levels to the top, so
/// that a dead-letter exchange exists before what points to it.
pub(super) async fn declare_all(channel: &Channel) -> Result<(), BrokerError> {
    let durable_exchange = ExchangeDeclareOptions {
        durable: true,
        ..Default::default()
    };
    let topic = async |name: String, arguments: FieldTable| {
        channel
            .exchange_declare(
                name.into(),
                ExchangeKind::Topic,
                durable_exchange,
                arguments,
            )
            .await
    };
    channel
        .exchange_declare(
            topology::UNROUTABLE.into(),
            ExchangeKind::Fanout,
            durable_exchange,
            FieldTable::default(),
        )
        .await?;
    let quorum = || ("x-queue-type", value("quorum"));
    channel
        .queue_declare(
            topology::UNROUTABLE.into(),
            durable(),
            table([quorum(), ("x-max-length", AMQPValue::LongInt(OUTCOMES_MAX))]),
        )
        .await?;
    channel
        .queue_bind(
            topology::UNROUTABLE.into(),
            topology::UNROUTABLE.into(),
            "".into(),
            QueueBindOptions::default(),
            FieldTable::default(),
        )
        .await?;
    let alternate = || table([("alternate-exchange", value(topology::UNROUTABLE))]);
    topic(topology::DELIVER.to_owned(), alternate()).await?;
    for n in 0..topology::LEVELS {
        let name = topology::level(n);
        topic(name.clone(), alternate()).await?;
        let arguments = table([
            quorum(),
            (
                "x-message-ttl",
                AMQPValue::LongLongInt(topology::level_ttl_ms(n) as i64),
            ),
            ("x-dead-letter-exchange", value(&topology::below(n))),
            ("x-dead-letter-strategy", value("at-least-once")),
            ("x-overflow", value("reject-publish")),
        ]);
        channel
            .queue_declare(name.as_str().into(), durable(), arguments)
            .await?;
        channel
            .queue_bind(
                name.as_str().into(),
                name.as_str().into(),
                topology::level_binding(n, '1').into(),
                QueueBindOptions::default(),
                FieldTable::default(),
            )
            .await?;
        channel
            .exchange_bind(
                topology::below(n).into(),
                name.as_str().into(),
                topology::level_binding(n, '0').into(),
                ExchangeBindOptions::default(),
                FieldTable::default(),
            )
            .await?;
    }
    channel
        .queue_declare(
            topology::OUTCOMES.into(),
            durable(),
            table([
                quorum(),
                ("x-max-length", AMQPValue::LongInt(OUTCOMES_MAX)),
                ("x-delivery-limit", AMQPValue::LongInt(DELIVERY_LIMIT)),
            ]),
        )
        .await?;
    channel
        .exchange_declare(
            topology::ENGINES.into(),
            ExchangeKind::Fanout,
            durable_exchange,
            FieldTable::default(),
        )
        .await?;
    Ok(())
}

/// A queue as it stands, or none where there is none: it is only looked for, and a channel that finds
/// none is closed (AMQP 0-9-1, queue.declare, passive).
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
        Err(error) => match error.kind() {
            ErrorKind::ProtocolError(error) if error.kind() == &NOT_FOUND => Ok(None),
            _ => Err(error.into()),
        },
    }
}

/// No dead-letter exchange: an expired request just goes.
pub(super) async fn declare_create_queue(
    channel: &Channel,
    pool: &PoolName,
) -> Result<Queue, BrokerError> {
    let arguments = table([
        ("x-queue-type", value("quorum")),
        ("x-delivery-limit", AMQPValue::LongInt(DELIVERY_LIMIT)),
    ]);
    let queue = topology::create_queue(pool);
    Ok(channel
        .queue_declare(queue.into(), durable(), arguments)
        .await?)
}

pub(super) async fn declare_revoke_queue(
    channel: &Channel,
    pool: &PoolName,
) -> Result<Queue, BrokerError> {
    // Back through the 8 s level: no delivery limit can end a revocation.
    let (exchange, key) = topology::delay_route(Duration::from_secs(8), pool);
    let arguments = table([
        ("x-queue-type", value("quorum")),
        ("x-delivery-limit", AMQPValue::LongInt(DELIVERY_LIMIT)),
        ("x-dead-letter-exchange", value(&exchange)),
        ("x-dead-letter-routing-key", value(&key)),
        ("x-dead-letter-strategy", value("at-least-once")),
        ("x-overflow", value("reject-publish")),
    ]);
    let queue = topology::revoke_queue(pool);
    let declared = channel
        .queue_declare(queue.as_str().into(), durable(), arguments)
        .await?;
    channel
        .queue_bind(
            queue.into(),
            topology::DELIVER.into(),
            topology::deliver_binding(pool).into(),
            QueueBindOptions::default(),
            FieldTable::default(),
        )
        .await?;
    Ok(declared)
}

/// Declares the queue of a source where that is ours to do, and names it.
pub(super) async fn declare_source(
    channel: &Channel,
    source: &Source,
) -> Result<String, BrokerError> {
    let exclusive = QueueDeclareOptions {
        exclusive: true,
        ..Default::default()
    };
    match source {
        Source::Creates(pool) => {
            declare_create_queue(channel, pool).await?;
            Ok(topology::create_queue(pool))
        }
        Source::Revokes(pool) => {
            // Also what delays: an engine must be able to park without a dispatcher.
            declare_all(channel).await?;
            declare_revoke_queue(channel, pool).await?;
            Ok(topology::revoke_queue(pool))
        }
        Source::Pings(engine) => {
            let queue = topology::engine_queue(engine);
            channel
                .queue_declare(queue.as_str().into(), exclusive, FieldTable::default())
                .await?;
            Ok(queue)
        }
        Source::Heartbeats => {
            let queue = channel
                .queue_declare("".into(), exclusive, FieldTable::default())
                .await?;
            let name = queue.name().as_str().to_owned();
            channel
                .queue_bind(
                    name.as_str().into(),
                    topology::ENGINES.into(),
                    "".into(),
                    QueueBindOptions::default(),
                    FieldTable::default(),
                )
                .await?;
            Ok(name)
        }
        Source::Outcomes => Ok(topology::OUTCOMES.to_owned()),
        Source::Unroutable => Ok(topology::UNROUTABLE.to_owned()),
    }
}
