//! A message's head as AMQP properties, and back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel};

use super::message::{Address, Incoming, Message, Settle};
use crate::arrival::Arrival;
use crate::trace::Span;
use mayfly_protocol::names::PoolName;
use mayfly_protocol::task::{Head, Kind};
use mayfly_protocol::topology;

const H_POOL: &str = "mayfly-pool";
const H_LEASE: &str = "mayfly-lease";
const H_ISSUED: &str = "mayfly-issued-ms";
const H_DEADLINE: &str = "mayfly-deadline-ms";
const H_ATTEMPT: &str = "mayfly-attempt";
const H_SETTLING: &str = "mayfly-settling";
const H_TRACE: &str = "traceparent";
/// Bytes that are kept of an unreadable message.
const SPECIMEN_BYTES: usize = 4096;

/// New properties for every publish: RabbitMQ before 4.0.1 drops a message that has the header `x-death` of an
/// earlier publish.
fn properties(message: &Message, id: &str, routes: &Routes) -> BasicProperties {
    let head = &message.head;
    let text = |text: String| AMQPValue::LongString(text.into());
    let mut headers = FieldTable::default();
    headers.insert(H_POOL.into(), text(head.pool.to_string()));
    headers.insert(
        H_ISSUED.into(),
        AMQPValue::LongLongInt(head.issued.as_millisecond()),
    );
    if let Some(lease) = head.lease {
        headers.insert(H_LEASE.into(), text(lease.to_string()));
    }
    if let Some(deadline) = head.deadline {
        headers.insert(
            H_DEADLINE.into(),
            AMQPValue::LongLongInt(deadline.as_millisecond()),
        );
    }
    if head.attempt > 0 {
        headers.insert(
            H_ATTEMPT.into(),
            AMQPValue::LongLongInt(i64::from(head.attempt)),
        );
    }
    if head.settling {
        headers.insert(H_SETTLING.into(), AMQPValue::Boolean(true));
    }
    if !head.traceparent.is_empty() {
        headers.insert(H_TRACE.into(), text(head.traceparent.clone()));
    }
    let mut properties = BasicProperties::default()
        .with_content_type("application/vnd.mayfly.v1+hpke".into())
        .with_type(head.kind.as_str().into())
        .with_message_id(id.into())
        .with_delivery_mode(2)
        .with_headers(headers);
    if let Some(expires) = message.expires {
        properties = properties.with_expiration(expires.as_millis().to_string().into());
    }
    if let (Some(name), Some(reply_to)) = (&message.reply_as, &routes.reply_to) {
        properties = properties
            .with_reply_to(reply_to.as_str().into())
            .with_correlation_id(name.as_str().into());
    }
    if let Some(name) = &message.answers {
        properties = properties.with_correlation_id(name.as_str().into());
    }
    properties
}

/// A message as it goes to the broker.
pub(super) struct Outgoing {
    pub(super) exchange: String,
    pub(super) key: String,
    pub(super) mandatory: bool,
    pub(super) body: Vec<u8>,
    /// Id of the message among those in progress.
    pub(super) id: String,
    pub(super) properties: BasicProperties,
}

/// The exchanges and queues through which this connection publishes.
pub(super) struct Routes {
    /// The queue from which a dispatcher takes its answers.
    pub(super) reply_to: Option<String>,
    /// Whether an engine publishes through [`topology::PARK`] and [`topology::ANSWERS`], to which its user may
    /// write. If not, it publishes as earlier versions do, which a dispatcher's user may still do.
    pub(super) entrances: bool,
    /// Whether revocations are parked through [`topology::ENTRY`], which alone proves that a level has them. `false`
    /// if all dispatchers are of an earlier version, or if the engine's user lacks the permission.
    pub(super) entry: AtomicBool,
    /// Last word of the probes that this connection takes.
    pub(super) probes: String,
}

impl Routes {
    fn delayed(&self, delay: Duration, word: &str) -> (String, String) {
        let (exchange, key) = topology::delay_route_to(delay, word);
        match (self.entry.load(Ordering::Relaxed), self.entrances) {
            (true, _) => (topology::ENTRY.to_owned(), key),
            (false, true) => (topology::PARK.to_owned(), key),
            (false, false) => (exchange, key),
        }
    }
}

pub(super) fn outgoing(message: &Message, id: String, routes: &Routes) -> Outgoing {
    let (exchange, key) = match &message.to {
        Address::Queue(queue) => (String::new(), queue.clone()),
        // A queue of an earlier dispatcher. Only the default exchange reaches it.
        Address::Answer(queue) if queue.starts_with(topology::DIRECT_REPLY_TO) => {
            (String::new(), queue.clone())
        }
        Address::Answer(queue) => (topology::ANSWERS.to_owned(), queue.clone()),
        Address::Outcomes if routes.entrances => {
            (topology::ANSWERS.to_owned(), topology::OUTCOMES.to_owned())
        }
        Address::Outcomes => (String::new(), topology::OUTCOMES.to_owned()),
        Address::Delayed(delay, pool) => routes.delayed(*delay, pool.as_str()),
        Address::Probe(delay) => routes.delayed(*delay, &routes.probes),
        Address::Engines => (topology::ENGINES.to_owned(), String::new()),
    };
    Outgoing {
        exchange,
        key,
        // A heartbeat may find no dispatcher, and an answer no waiting request. All other messages must find a queue.
        mandatory: !matches!(message.to, Address::Engines | Address::Answer(_)),
        properties: properties(message, &id, routes),
        body: message.body.clone(),
        id,
    }
}

/// The headers that the sender wrote, without those of the broker.
fn written(properties: &BasicProperties) -> FieldTable {
    let mut headers = FieldTable::default();
    let found = properties.headers().as_ref();
    for (name, value) in found.map(FieldTable::inner).into_iter().flatten() {
        if !name.as_str().starts_with("x-") {
            headers.insert(name.clone(), value.clone());
        }
    }
    headers
}

fn as_it_came(found: &BasicProperties, headers: FieldTable, id: &str) -> BasicProperties {
    let mut properties = BasicProperties::default()
        .with_message_id(id.into())
        .with_delivery_mode(2)
        .with_headers(headers);
    if let Some(kind) = found.kind() {
        properties = properties.with_type(kind.clone());
    }
    if let Some(content) = found.content_type() {
        properties = properties.with_content_type(content.clone());
    }
    properties
}

/// A message of a newer version, to be parked for `after`. Only its count changes.
pub(super) fn again(
    message: &Incoming,
    after: Duration,
    pool: &PoolName,
    id: String,
    routes: &Routes,
) -> Option<Outgoing> {
    let found = &message.settle.as_ref()?.delivery.properties;
    let (exchange, key) = routes.delayed(after, pool.as_str());
    let mut headers = written(found);
    let attempt = message.head.attempt.saturating_add(1);
    headers.insert(H_ATTEMPT.into(), AMQPValue::LongLongInt(attempt.into()));
    Some(Outgoing {
        exchange,
        key,
        mandatory: true,
        body: message.body.clone(),
        properties: as_it_came(found, headers, &id),
        id,
    })
}

/// What is kept of a message that cannot be read: the head and the beginning of its body.
pub(super) fn specimen(found: &BasicProperties, body: &[u8], id: String) -> Outgoing {
    Outgoing {
        exchange: topology::ANSWERS.to_owned(),
        key: topology::UNREADABLE.to_owned(),
        mandatory: false,
        body: body[..body.len().min(SPECIMEN_BYTES)].to_vec(),
        properties: as_it_came(found, written(found), &id),
        id,
    }
}

pub(super) fn parse_head(properties: &BasicProperties) -> Option<Head> {
    let empty = FieldTable::default();
    let headers = properties.headers().as_ref().unwrap_or(&empty).inner();
    let text = |name: &str| match headers.get(name) {
        Some(AMQPValue::LongString(text)) => std::str::from_utf8(text.as_bytes()).ok(),
        _ => None,
    };
    let number = |name: &str| match headers.get(name) {
        Some(AMQPValue::LongLongInt(number)) => Some(*number),
        _ => None,
    };
    let timestamp = |name: &str| number(name).and_then(|ms| Timestamp::from_millisecond(ms).ok());
    Some(Head {
        kind: Kind::parse(properties.kind().as_ref()?.as_str()),
        pool: text(H_POOL)?.parse().ok()?,
        lease: text(H_LEASE).and_then(|id| id.parse().ok()),
        issued: timestamp(H_ISSUED)?,
        deadline: timestamp(H_DEADLINE),
        attempt: number(H_ATTEMPT)
            .and_then(|n| u32::try_from(n).ok())
            .unwrap_or(0),
        settling: matches!(headers.get(H_SETTLING), Some(AMQPValue::Boolean(true))),
        traceparent: text(H_TRACE).unwrap_or_default().to_owned(),
    })
}

/// The attributes of a span for a message (OpenTelemetry's conventions for messaging).
pub(super) fn describe(span: &mut Span, head: &Head) {
    span.tag("messaging.system", "rabbitmq");
    span.tag("mayfly.pool", &head.pool);
    if let Some(lease) = head.lease {
        span.tag("mayfly.lease", lease);
    }
}

pub(super) fn incoming(
    mut head: Head,
    mut delivery: lapin::message::Delivery,
    channel: Option<Channel>,
) -> Incoming {
    let owned = |text: &Option<ShortString>| text.as_ref().map(|text| text.as_str().to_owned());
    let name = format!("process {}", head.kind.as_str());
    let span = Span::consume(name, &head.traceparent).map(|mut span| {
        describe(&mut span, &head);
        head.traceparent = span.context().to_string();
        span
    });
    Incoming {
        head,
        span,
        body: std::mem::take(&mut delivery.data),
        reply_to: owned(delivery.properties.reply_to()),
        correlation: owned(delivery.properties.correlation_id()),
        arrived: Arrival::now(),
        settle: channel.map(|channel| Settle { delivery, channel }),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
