//! The one door to RabbitMQ (the only file that names lapin): a connection that comes back by
//! itself, publishing with confirms, consuming, and what is declared with which arguments.
//!
//! It refuses to hide a loss: a publish is `Ok` only when the broker has confirmed it.
//!
//! lapin's own recovery is not used: a pending confirm hangs until the reconnect there. Here a
//! lost connection fails what was under way, and everything is opened and declared anew.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use jiff::Timestamp;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    ConfirmSelectOptions, ExchangeBindOptions, ExchangeDeclareOptions, QueueBindOptions,
    QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::uri::AMQPUri;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, ExchangeKind, Queue,
};
use tokio::sync::{Mutex, Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, error, info, warn};

use crate::names::{EngineName, PoolName};
use crate::secret::Secret;
use crate::task::{Head, Kind};
use crate::topology;
use crate::trace::Span;

/// A dead peer is noticed after this time (AMQP 0-9-1, heartbeat), in seconds.
const HEARTBEAT_SECONDS: u16 = 10;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest a publish waits for its turn. What waits longer was certainly not sent.
const PERMIT_TIMEOUT: Duration = Duration::from_secs(30);
const DECLARE_TIMEOUT: Duration = Duration::from_secs(30);
const RECONNECT_DELAY: Duration = Duration::from_millis(500);
/// Publisher channels. Each has one publish under way, because lapin mixes up the returns of
/// pipelined ones.
const PUBLISHERS: usize = 8;
/// RabbitMQ 4 drops a message delivered more often than 20 times unless told otherwise. No
/// engine ever gives a task back, so only lost connections count here.
const DELIVERY_LIMIT: i32 = 1_000_000;
/// Outcomes kept while no dispatcher runs. Older ones go first; the reconciler asks again.
const OUTCOMES_MAX: i32 = 500_000;

/// Why the broker did not do it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BrokerError {
    /// No connection now.
    #[error("the broker is not connected")]
    Down,
    /// The connection or channel failed on the way, or no confirm came in time: the message may
    /// or may not be with the broker.
    #[error("the broker did not confirm: {0}")]
    Unconfirmed(String),
    /// Confirmed to be nowhere: no queue has this name.
    #[error("the broker has no queue for this message")]
    Unroutable,
    /// An address that cannot be one.
    #[error("{0}")]
    BadUrl(String),
}

impl BrokerError {
    /// One word for spans.
    fn word(&self) -> &'static str {
        match self {
            Self::Down => "broker_down",
            Self::Unconfirmed(_) => "unconfirmed",
            Self::Unroutable => "unroutable",
            Self::BadUrl(_) => "bad_url",
        }
    }
}

impl From<lapin::Error> for BrokerError {
    fn from(error: lapin::Error) -> Self {
        Self::Unconfirmed(error.to_string())
    }
}

/// Where a message goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// Straight to a queue.
    Queue(String),
    /// To a pool's revoke queue after a delay.
    Delayed(Duration, PoolName),
    /// To every dispatcher.
    Engines,
}

/// A message on its way out.
#[derive(Debug, Clone)]
pub struct Message {
    /// Where to.
    pub to: Address,
    /// The clear part.
    pub head: Head,
    /// The sealed part.
    pub body: Vec<u8>,
    /// Whether an answer is expected, under this name.
    pub reply_as: Option<String>,
    /// Name of the request this answers.
    pub answers: Option<String>,
    /// Time after which an unread message goes away.
    pub expires: Option<Duration>,
}

/// A message that came in. Dropped unsettled, it comes again (to somebody).
#[derive(Debug)]
pub struct Incoming {
    /// The clear part.
    pub head: Head,
    /// The sealed part.
    pub body: Vec<u8>,
    /// Where an answer goes.
    pub reply_to: Option<String>,
    /// Name of the request, or of the request this answers.
    pub correlation: Option<String>,
    /// When it arrived here.
    pub arrived: Instant,
    /// The work on it, until it is settled.
    pub span: Option<Span>,
    settle: Option<Settle>,
}

#[derive(Debug)]
struct Settle {
    delivery: lapin::message::Delivery,
    /// Keeps the channel open until the last delivery from it is settled.
    channel: Channel,
}

impl Incoming {
    /// Whether the channel it came on is gone: it is, or will be, delivered to somebody again.
    pub fn is_stale(&self) -> bool {
        self.settle
            .as_ref()
            .is_some_and(|settle| !settle.channel.status().connected())
    }

    /// Tells the broker that this message is done with. Last of all steps.
    pub async fn ack(self) {
        if let Some(settle) = self.settle {
            // A failed ack means a lost connection: the message comes again, to somebody.
            if let Err(error) = settle.delivery.ack(BasicAckOptions::default()).await {
                debug!(%error, "not acknowledged; the message will be delivered again");
            }
        }
    }
}

/// What to consume.
#[derive(Debug, Clone)]
pub enum Source {
    /// A pool's create tasks.
    Creates(PoolName),
    /// A pool's revoke tasks.
    Revokes(PoolName),
    /// The pings of one engine; an exclusive queue.
    Pings(EngineName),
    /// Revoke outcomes.
    Outcomes,
    /// Heartbeats; an exclusive queue of this connection.
    Heartbeats,
    /// What no binding wanted.
    Unroutable,
}

/// Options of a [`Broker`].
pub struct Options {
    /// `amqp://` or `amqps://`; several, comma-separated, are tried in turn.
    pub url: Secret,
    /// Shown in RabbitMQ's list of connections.
    pub name: String,
    /// Where answers to requests go; none for a process that asks nothing.
    pub replies: Option<mpsc::Sender<Incoming>>,
}

/// A connection to RabbitMQ that comes back by itself.
#[derive(Clone)]
pub struct Broker(Arc<Inner>);

struct Inner {
    session: watch::Receiver<Option<Arc<Session>>>,
    next_message: AtomicU64,
}

/// One life of the connection.
struct Session {
    connection: Connection,
    publishers: Mutex<Vec<Channel>>,
    permits: Semaphore,
    replies: Option<mpsc::Sender<Incoming>>,
    /// For declaring and counting; one call at a time.
    admin: Mutex<Channel>,
    broken: AtomicBool,
    ended: CancellationToken,
}

/// Messages of a pool that wait for an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiting {
    /// In its create queue.
    pub create: u32,
    /// In its revoke queue.
    pub revoke: u32,
}

impl Broker {
    /// Begins to connect, and goes on for ever, until `stop`.
    ///
    /// # Errors
    /// [`BrokerError::BadUrl`]; nothing else: a broker that is away is waited for.
    pub fn start(
        options: Options,
        tasks: &TaskTracker,
        stop: CancellationToken,
    ) -> Result<Self, BrokerError> {
        let urls = parse_urls(&options.url)?;
        let (sender, session) = watch::channel(None);
        tasks.spawn(supervise(urls, options, sender, stop));
        Ok(Self(Arc::new(Inner {
            session,
            next_message: AtomicU64::new(0),
        })))
    }

    /// Whether the connection stands.
    pub fn is_up(&self) -> bool {
        self.0.session.borrow().is_some()
    }

    /// Waits for the connection. Ends only when the broker door is closed for good, with `false`.
    pub async fn up(&self) -> bool {
        self.0
            .session
            .clone()
            .wait_for(Option::is_some)
            .await
            .is_ok()
    }

    fn session(&self) -> Result<Arc<Session>, BrokerError> {
        self.0.session.borrow().clone().ok_or(BrokerError::Down)
    }

    /// Publishes and waits for the broker's confirm, at most 5 s.
    ///
    /// # Errors
    /// Anything but a confirm of a routed message. After [`BrokerError::Unconfirmed`] the message
    /// may be there all the same.
    pub async fn publish(&self, mut message: Message) -> Result<(), BrokerError> {
        let session = self.session()?;
        let id = self.0.next_message.fetch_add(1, Ordering::Relaxed);
        let head = &mut message.head;
        let name = format!("send {}", head.kind.as_str());
        let mut span = Span::produce(name, &head.traceparent);
        if let Some(span) = &mut span {
            describe(span, head);
            if let Address::Delayed(delay, _) = &message.to {
                span.tag("mayfly.delay_seconds", delay.as_secs_f64());
            }
            head.traceparent = span.context().to_string();
        }
        let sent = session.publish(message, id).await;
        if let (Err(error), Some(span)) = (&sent, &mut span) {
            span.fail(error.word());
        }
        sent
    }

    /// How many engines consume a pool's create queue at this moment.
    ///
    /// # Errors
    /// The broker is away.
    pub async fn engines_of(&self, pool: &PoolName) -> Result<u32, BrokerError> {
        let session = self.session()?;
        let queue = session
            .on_admin(async |channel| declare_create_queue(channel, pool).await)
            .await?;
        Ok(queue.consumer_count())
    }

    /// How many messages wait in a pool's create and revoke queues, without those an engine is at
    /// work on.
    ///
    /// # Errors
    /// The broker is away.
    pub async fn waiting(&self, pool: &PoolName) -> Result<Waiting, BrokerError> {
        let session = self.session()?;
        session
            .on_admin(async |channel| {
                Ok(Waiting {
                    create: declare_create_queue(channel, pool).await?.message_count(),
                    revoke: declare_revoke_queue(channel, pool).await?.message_count(),
                })
            })
            .await
    }

    /// Declares what a pool needs. Safe to repeat.
    ///
    /// # Errors
    /// The broker is away.
    pub async fn declare_pool(&self, pool: &PoolName) -> Result<(), BrokerError> {
        let session = self.session()?;
        session
            .on_admin(async |channel| {
                declare_create_queue(channel, pool).await?;
                declare_revoke_queue(channel, pool).await.map(drop)
            })
            .await
    }

    /// Deletes a pool's queues.
    ///
    /// # Errors
    /// The broker is away.
    pub async fn delete_pool(&self, pool: &PoolName) -> Result<(), BrokerError> {
        let session = self.session()?;
        session
            .on_admin(async |channel| {
                for queue in [topology::create_queue(pool), topology::revoke_queue(pool)] {
                    channel
                        .queue_delete(queue.into(), QueueDeleteOptions::default())
                        .await?;
                }
                Ok(())
            })
            .await
    }

    /// How many messages wait in the delay levels. Those on their way from one to the next may
    /// be counted twice or not at all.
    ///
    /// # Errors
    /// The broker is away, or a level is not there.
    pub async fn parked(&self) -> Result<u64, BrokerError> {
        let session = self.session()?;
        session
            .on_admin(async |channel| {
                declare_all(channel).await?;
                let passive = QueueDeclareOptions {
                    passive: true,
                    durable: true,
                    ..Default::default()
                };
                let mut parked = 0;
                for n in 0..topology::LEVELS {
                    let queue = topology::level(n);
                    let found = channel
                        .queue_declare(queue.as_str().into(), passive, FieldTable::default())
                        .await?;
                    parked += u64::from(found.message_count());
                }
                Ok(parked)
            })
            .await
    }

    /// Declares everything again, after something of it was found missing.
    ///
    /// # Errors
    /// The broker is away.
    pub async fn redeclare(&self) -> Result<(), BrokerError> {
        self.session()?
            .on_admin(async |channel| declare_all(channel).await)
            .await
    }

    /// Sends what `source` has into `sink` until `stop`, across reconnects. `attached` tells
    /// whether the broker is delivering now. At most `prefetch` messages are unsettled at a time.
    pub async fn consume(
        &self,
        source: Source,
        prefetch: u16,
        sink: mpsc::Sender<Incoming>,
        stop: CancellationToken,
        attached: watch::Sender<bool>,
    ) {
        let mut sessions = self.0.session.clone();
        loop {
            let session = tokio::select! {
                () = stop.cancelled() => return,
                found = sessions.wait_for(Option::is_some) => match found {
                    Ok(session) => session.clone(),
                    Err(_) => return,
                },
            };
            let Some(session) = session else { continue };
            let ended = session
                .consume(&source, prefetch, &sink, &stop, &attached)
                .await;
            attached.send_replace(false);
            if let Err(error) = ended {
                debug!(?source, %error, "consuming ended; it starts again");
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(RECONNECT_DELAY) => {}
            }
        }
    }
}

fn parse_urls(urls: &Secret) -> Result<Vec<AMQPUri>, BrokerError> {
    urls.expose()
        .split(',')
        .map(|url| {
            // lapin's message would repeat the URL, and with it the password.
            let mut uri: AMQPUri = url.trim().parse().map_err(|_| {
                BrokerError::BadUrl(
                    "amqp.url must be amqp://user:password@host:port/vhost (or amqps://…), several with commas; the vhost `/` is written %2f".to_owned(),
                )
            })?;
            // By the letter `…:5672/` names a virtual host without a name, of which there is none;
            // RabbitMQ's Cluster Operator writes it so and means the default one.
            if uri.vhost.is_empty() {
                "/".clone_into(&mut uri.vhost);
            }
            uri.query.heartbeat = Some(HEARTBEAT_SECONDS);
            uri.query.connection_timeout = Some(CONNECT_TIMEOUT.as_millis() as u64);
            Ok(uri)
        })
        .collect()
}

/// Checks `amqp.url` without connecting.
///
/// # Errors
/// [`BrokerError::BadUrl`].
pub fn check_url(url: &Secret) -> Result<(), BrokerError> {
    parse_urls(url).map(drop)
}

async fn supervise(
    urls: Vec<AMQPUri>,
    options: Options,
    sender: watch::Sender<Option<Arc<Session>>>,
    stop: CancellationToken,
) {
    let mut failures = 0_u32;
    for url in urls.iter().cycle() {
        let opened = tokio::select! {
            () = stop.cancelled() => return,
            opened = tokio::time::timeout(DECLARE_TIMEOUT, open(url, &options)) => opened,
        };
        let place = format!("{}:{}", url.authority.host, url.authority.port);
        match opened.unwrap_or_else(|_| Err(BrokerError::Unconfirmed("time-out".to_owned()))) {
            Ok(session) => {
                failures = 0;
                info!(broker = place, "connected to the broker");
                let session = Arc::new(session);
                sender.send_replace(Some(session.clone()));
                session.watch(&stop).await;
                sender.send_replace(None);
                session.ended.cancel();
                if stop.is_cancelled() {
                    let closing = session.connection.close(200, "bye".into());
                    let _ = tokio::time::timeout(Duration::from_secs(2), closing).await;
                    return;
                }
                // Where it still stands, as after a confirm that never came, it is not needed.
                let closing = session.connection.close(200, "given up".into());
                let _ = tokio::time::timeout(Duration::from_millis(500), closing).await;
                warn!(broker = place, "lost the broker; connecting again");
            }
            Err(error) => {
                failures += 1;
                // Said at once, then about every half minute.
                if failures % 60 == 1 {
                    warn!(broker = place, %error, "the broker cannot be reached; trying on");
                }
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(RECONNECT_DELAY) => {}
        }
    }
}

async fn open(url: &AMQPUri, options: &Options) -> Result<Session, BrokerError> {
    let properties =
        ConnectionProperties::default().with_connection_name(options.name.as_str().into());
    let connecting = Connection::connect_uri(url.clone(), properties);
    let connection = tokio::time::timeout(CONNECT_TIMEOUT, connecting)
        .await
        .map_err(|_| BrokerError::Unconfirmed("time-out while connecting".to_owned()))??;
    let admin = connection.create_channel().await?;
    declare_all(&admin).await?;
    let session = Session {
        connection,
        publishers: Mutex::new(Vec::new()),
        permits: Semaphore::new(PUBLISHERS),
        replies: options.replies.clone(),
        admin: Mutex::new(admin),
        broken: AtomicBool::new(false),
        ended: CancellationToken::new(),
    };
    // The first publish must not find that this cannot be done.
    let first = session.open_publisher().await?;
    session.publishers.lock().await.push(first);
    Ok(session)
}

impl Session {
    /// Returns when the connection is no more, or at `stop`.
    async fn watch(&self, stop: &CancellationToken) {
        let mut events = self.connection.events_listener();
        let mut tick = tokio::time::interval(Duration::from_millis(500));
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                event = events.next() => match event {
                    None => return,
                    Some(lapin::Event::ConnectionBlocked(reason)) => {
                        error!(reason, "the broker takes no messages (memory or disk alarm)");
                    }
                    Some(_) => {}
                },
                _ = tick.tick() => {}
            }
            if !self.connection.status().connected() || self.broken.load(Ordering::Relaxed) {
                return;
            }
        }
    }

    async fn open_publisher(&self) -> Result<Channel, BrokerError> {
        let channel = self.connection.create_channel().await?;
        channel
            .confirm_select(ConfirmSelectOptions::default())
            .await?;
        if let Some(replies) = self.replies.clone() {
            let options = BasicConsumeOptions {
                no_ack: true,
                ..Default::default()
            };
            let mut consumer = channel
                .basic_consume(
                    topology::REPLY_TO.into(),
                    "".into(),
                    options,
                    FieldTable::default(),
                )
                .await?;
            let ended = self.ended.clone();
            // Ends with its channel, at the latest with the session.
            tokio::spawn(async move {
                loop {
                    let delivery = tokio::select! {
                        () = ended.cancelled() => return,
                        delivery = consumer.next() => delivery,
                    };
                    let Some(Ok(delivery)) = delivery else { return };
                    let Some(head) = parse_head(&delivery.properties) else {
                        continue;
                    };
                    if replies.send(incoming(head, delivery, None)).await.is_err() {
                        return;
                    }
                }
            });
        }
        Ok(channel)
    }

    async fn publish(&self, message: Message, id: u64) -> Result<(), BrokerError> {
        let permit = tokio::time::timeout(PERMIT_TIMEOUT, self.permits.acquire()).await;
        let _permit = permit
            .map_err(|_| BrokerError::Down)?
            .map_err(|_| BrokerError::Down)?;
        let pooled = self.publishers.lock().await.pop();
        let channel = match pooled {
            Some(channel) if channel.status().connected() => channel,
            _ => tokio::time::timeout(CONFIRM_TIMEOUT, self.open_publisher())
                .await
                .map_err(|_| BrokerError::Down)??,
        };
        let sent = tokio::time::timeout(CONFIRM_TIMEOUT, publish_on(&channel, message, id)).await;
        match sent {
            Ok(Ok(())) => {}
            // The channel is sound; only the message had nowhere to go.
            Ok(Err(BrokerError::Unroutable)) => {
                self.publishers.lock().await.push(channel);
                return Err(BrokerError::Unroutable);
            }
            // A channel that failed is not used again.
            Ok(Err(error)) => return Err(error),
            Err(_) => {
                // A connection that does not answer is given up for a new one.
                self.broken.store(true, Ordering::Relaxed);
                return Err(BrokerError::Unconfirmed("no confirm in time".to_owned()));
            }
        }
        self.publishers.lock().await.push(channel);
        Ok(())
    }

    /// Runs calls on the admin channel, with a time-out. A failed channel is replaced.
    async fn on_admin<T>(
        &self,
        work: impl AsyncFnOnce(&Channel) -> Result<T, BrokerError>,
    ) -> Result<T, BrokerError> {
        let mut admin = self.admin.lock().await;
        let working = async {
            if !admin.status().connected() {
                *admin = self.connection.create_channel().await?;
            }
            work(&admin).await
        };
        tokio::time::timeout(DECLARE_TIMEOUT, working)
            .await
            .map_err(|_| BrokerError::Unconfirmed("time-out".to_owned()))?
    }

    async fn consume(
        &self,
        source: &Source,
        prefetch: u16,
        sink: &mpsc::Sender<Incoming>,
        stop: &CancellationToken,
        attached: &watch::Sender<bool>,
    ) -> Result<(), BrokerError> {
        let channel = self.connection.create_channel().await?;
        let queue = declare_source(&channel, source).await?;
        channel
            .basic_qos(prefetch, BasicQosOptions::default())
            .await?;
        let mut consumer = channel
            .basic_consume(
                queue.into(),
                "".into(),
                BasicConsumeOptions::default(),
                FieldTable::default(),
            )
            .await?;
        attached.send_replace(true);
        let mut is_cancelled = false;
        loop {
            let delivery = tokio::select! {
                () = stop.cancelled(), if !is_cancelled => {
                    channel.basic_cancel(consumer.tag(), BasicCancelOptions::default()).await?;
                    // What was delivered before that is still to come, and then the end. Nobody
                    // else gets it as long as anything from this channel is unsettled.
                    is_cancelled = true;
                    attached.send_replace(false);
                    continue;
                }
                () = self.ended.cancelled() => return Ok(()),
                delivery = consumer.next() => delivery,
            };
            let Some(delivery) = delivery else {
                return Ok(());
            };
            let delivery = delivery?;
            let Some(head) = parse_head(&delivery.properties) else {
                // Nobody can do anything with a message that lacks its head: it is no task.
                error!(
                    ?source,
                    "a message without Mayfly's headers was taken off the queue"
                );
                delivery.ack(BasicAckOptions::default()).await?;
                continue;
            };
            if sink
                .send(incoming(head, delivery, Some(channel.clone())))
                .await
                .is_err()
            {
                return Ok(());
            }
        }
    }
}

async fn publish_on(channel: &Channel, message: Message, id: u64) -> Result<(), BrokerError> {
    let id = id.to_string();
    let (exchange, key) = match &message.to {
        Address::Queue(queue) => (String::new(), queue.clone()),
        Address::Delayed(delay, pool) => topology::delay_route(*delay, pool),
        Address::Engines => (topology::ENGINES.to_owned(), String::new()),
    };
    // A heartbeat may find no dispatcher. An answer is delivered to its pseudo-queue and yet
    // reported as returned (3.10). Anything else must find a queue.
    let mandatory = message.to != Address::Engines && message.answers.is_none();
    let confirm = channel
        .basic_publish(
            exchange.into(),
            key.into(),
            BasicPublishOptions {
                mandatory,
                immediate: false,
            },
            &message.body,
            properties(&message, &id),
        )
        .await?
        .await?;
    match confirm {
        Confirmation::Ack(None) => Ok(()),
        Confirmation::Ack(Some(returned)) => {
            let returned_id = returned.delivery.properties.message_id().as_ref();
            if returned_id.is_some_and(|returned| returned.as_str() == id) {
                Err(BrokerError::Unroutable)
            } else {
                Err(BrokerError::Unconfirmed(
                    "a return came for another message".to_owned(),
                ))
            }
        }
        Confirmation::Nack(_) => Err(BrokerError::Unconfirmed(
            "refused (its queue is full, or has no leader now)".to_owned(),
        )),
        Confirmation::NotRequested => Err(BrokerError::Unconfirmed("no confirms".to_owned())),
    }
}

const H_POOL: &str = "mayfly-pool";
const H_LEASE: &str = "mayfly-lease";
const H_ISSUED: &str = "mayfly-issued-ms";
const H_DEADLINE: &str = "mayfly-deadline-ms";
const H_ATTEMPT: &str = "mayfly-attempt";
const H_SETTLING: &str = "mayfly-settling";
const H_TRACE: &str = "traceparent";

/// Fresh properties for every publish: brokers before 4.0.1 swallow a message that comes with
/// the `x-death` of an earlier life.
fn properties(message: &Message, id: &str) -> BasicProperties {
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
    if let Some(name) = &message.reply_as {
        properties = properties
            .with_reply_to(topology::REPLY_TO.into())
            .with_correlation_id(name.as_str().into());
    }
    if let Some(name) = &message.answers {
        properties = properties.with_correlation_id(name.as_str().into());
    }
    properties
}

fn parse_head(properties: &BasicProperties) -> Option<Head> {
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
    let moment = |name: &str| number(name).and_then(|ms| Timestamp::from_millisecond(ms).ok());
    Some(Head {
        kind: Kind::parse(properties.kind().as_ref()?.as_str())?,
        pool: text(H_POOL)?.parse().ok()?,
        lease: text(H_LEASE).and_then(|id| id.parse().ok()),
        issued: moment(H_ISSUED)?,
        deadline: moment(H_DEADLINE),
        attempt: number(H_ATTEMPT)
            .and_then(|n| u32::try_from(n).ok())
            .unwrap_or(0),
        settling: matches!(headers.get(H_SETTLING), Some(AMQPValue::Boolean(true))),
        traceparent: text(H_TRACE).unwrap_or_default().to_owned(),
    })
}

/// What a span says of a message (OpenTelemetry's conventions for messaging).
fn describe(span: &mut Span, head: &Head) {
    span.tag("messaging.system", "rabbitmq");
    span.tag("mayfly.pool", &head.pool);
    if let Some(lease) = head.lease {
        span.tag("mayfly.lease", lease);
    }
}

fn incoming(
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
        arrived: Instant::now(),
        settle: channel.map(|channel| Settle { delivery, channel }),
    }
}

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
async fn declare_all(channel: &Channel) -> Result<(), BrokerError> {
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

/// No dead-letter exchange: an expired request just goes.
async fn declare_create_queue(channel: &Channel, pool: &PoolName) -> Result<Queue, BrokerError> {
    let arguments = table([
        ("x-queue-type", value("quorum")),
        ("x-delivery-limit", AMQPValue::LongInt(DELIVERY_LIMIT)),
    ]);
    let queue = topology::create_queue(pool);
    Ok(channel
        .queue_declare(queue.into(), durable(), arguments)
        .await?)
}

async fn declare_revoke_queue(channel: &Channel, pool: &PoolName) -> Result<Queue, BrokerError> {
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
async fn declare_source(channel: &Channel, source: &Source) -> Result<String, BrokerError> {
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_url_does_not_repeat_its_password() {
        for bad in ["http://u:hunter2@h", "amqp://u:hunter2@h:port/", "hunter2"] {
            let error = check_url(&Secret::new(bad)).unwrap_err().to_string();
            assert!(!error.contains("hunter2"), "{error}");
        }
        check_url(&Secret::new("amqp://u:p@a:1/%2f, amqps://u:p@b/v")).unwrap();
    }

    #[test]
    fn the_virtual_host_is_the_default_one_unless_named() {
        for (url, vhost) in [
            ("amqp://u:p@a:5672/", "/"),
            ("amqp://u:p@a:5672", "/"),
            ("amqp://u:p@a/%2f", "/"),
            ("amqp://u:p@a/mayfly", "mayfly"),
        ] {
            let parsed = parse_urls(&Secret::new(url)).unwrap();
            assert_eq!(parsed[0].vhost, vhost, "{url}");
        }
    }
}
