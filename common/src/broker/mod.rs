//! The one door to RabbitMQ (the only room that names lapin): a connection that comes back by
//! itself, publishing with confirms, consuming. A life of the connection is in `session`, what is
//! declared with which arguments in `declare`, a message's form in `wire`.
//!
//! It refuses to hide a loss: a publish is `Ok` only when the broker has confirmed it.
//!
//! lapin's own recovery is not used: a pending confirm hangs until the reconnect there. Here a
//! lost connection fails what was under way, and everything is opened and declared anew.

mod declare;
mod lasting;
mod login;
mod owner;
mod publishers;
mod session;
mod wire;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lapin::Channel;
use lapin::options::{BasicAckOptions, ConfirmSelectOptions, QueueDeleteOptions};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use self::declare::{
    declare_all, declare_entrances, find_queue, has_exchange, mark_parked, unmark_parked,
};
pub use self::login::{AmqpSettings, Login};
pub use self::owner::{Taken, take_over};
use self::session::{Counts, Session, supervise};
use self::wire::describe;
use crate::arrival::Arrival;
use crate::trace::Span;
use mayfly_protocol::names::{EngineName, InstallationId, PoolName};
use mayfly_protocol::task::Head;
use mayfly_protocol::topology;

/// A dead peer is noticed after this time (AMQP 0-9-1, heartbeat), in seconds.
const HEARTBEAT_SECONDS: u16 = 10;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const RECONNECT_DELAY: Duration = Duration::from_millis(500);
const REDECLARE_PAUSE: Duration = Duration::from_secs(2);
/// When a message is given back whose work has panicked.
const GIVEN_BACK_AFTER: Duration = Duration::from_secs(1);
/// How long the broker may take to heed an ack.
const ACK_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the number of a pool's engines is good for.
const COUNT_KEPT: Duration = Duration::from_millis(250);
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
    /// A queue or exchange is not there yet. Only dispatchers declare those that are shared.
    #[error("the broker has no `{0}` yet; a dispatcher declares it")]
    Absent(String),
    /// The broker's user has not the right.
    #[error("the broker's user has not the right: {0}")]
    NotAllowed(String),
    /// The virtual host belongs to another installation.
    #[error("{0}")]
    Taken(Taken),
    /// So many dispatchers of another installation are connected.
    #[error(
        "{0} dispatchers of the other installation are connected to this virtual host; stop them first (one that was killed counts for 15 s)"
    )]
    InUse(u32),
}

impl BrokerError {
    /// One word for spans.
    fn word(&self) -> &'static str {
        match self {
            Self::Down => "broker_down",
            Self::Unconfirmed(_) => "unconfirmed",
            Self::Unroutable => "unroutable",
            Self::Absent(_) => "absent",
            Self::NotAllowed(_) => "not_allowed",
            Self::Taken(_) => "taken",
            Self::InUse(_) => "in_use",
        }
    }
}

impl From<lapin::Error> for BrokerError {
    fn from(error: lapin::Error) -> Self {
        match declare::is_refused(&error) {
            true => Self::NotAllowed(error.to_string()),
            false => Self::Unconfirmed(error.to_string()),
        }
    }
}

/// Where a message goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// Straight to a queue; a dispatcher's way.
    Queue(String),
    /// To the queue that a request names for its answer.
    Answer(String),
    /// To the dispatchers' queue of outcomes.
    Outcomes,
    /// To a pool's revoke queue after a delay.
    Delayed(Duration, PoolName),
    /// Through the delay levels to the probes of the same connection.
    Probe(Duration),
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
    pub arrived: Arrival,
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

/// One that is dropped by a panic is given back: its place must not be lost, nor the message with
/// it. No other path gives one back.
impl Drop for Settle {
    fn drop(&mut self) {
        if !std::thread::panicking() || !self.channel.status().connected() {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        let (channel, tag) = (self.channel.clone(), self.delivery.delivery_tag);
        runtime.spawn(async move {
            // The panic may come again with it.
            tokio::time::sleep(GIVEN_BACK_AFTER).await;
            let back = lapin::options::BasicNackOptions {
                requeue: true,
                multiple: false,
            };
            if let Err(error) = channel.basic_nack(tag, back).await {
                debug!(%error, "not given back; it comes again when the connection ends");
            }
        });
    }
}

impl Incoming {
    /// Whether the channel it came on is gone: it is, or will be, delivered to somebody again.
    pub fn is_stale(&self) -> bool {
        self.settle
            .as_ref()
            .is_some_and(|settle| !settle.channel.status().connected())
    }

    /// Whether it still has the routing key of a probe. Dead-lettering keeps a message's key, unless a
    /// policy says otherwise.
    pub fn is_for_probes(&self) -> bool {
        let key = self.settle.as_ref();
        key.is_some_and(|settle| topology::is_probe_key(settle.delivery.routing_key.as_str()))
    }

    /// Tells the broker that this message is done with, and waits until the broker has heard it. Whether
    /// nobody else has had this message, nor will. A later [`Incoming::ack`] does nothing.
    pub async fn take_for_good(&mut self) -> bool {
        let Some(settle) = self.settle.take() else {
            return false;
        };
        if settle.delivery.redelivered
            || settle
                .delivery
                .ack(BasicAckOptions::default())
                .await
                .is_err()
        {
            return false;
        }
        // An ack has no answer. What a channel is asked after it is answered after it was heeded.
        let asked = settle
            .channel
            .confirm_select(ConfirmSelectOptions::default());
        matches!(tokio::time::timeout(ACK_TIMEOUT, asked).await, Ok(Ok(())))
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
    /// The pings of one engine of a pool; an exclusive queue.
    Pings(PoolName, EngineName),
    /// Revoke outcomes.
    Outcomes,
    /// Heartbeats; an exclusive queue of this connection.
    Heartbeats,
    /// What no binding wanted.
    Unroutable,
    /// Probes that have come through the delay levels; an exclusive queue of this connection.
    Probes,
}

/// Options of a [`Broker`].
pub struct Options {
    /// Where it is and who this is; several addresses are tried in turn.
    pub login: Login,
    /// Shown in RabbitMQ's list of connections.
    pub name: String,
    /// Whose connection it is.
    pub part: Part,
}

/// A part of Mayfly at the broker.
pub enum Part {
    /// Declares what is shared and what pools need, on a virtual host that is its installation's alone;
    /// takes the answers to its requests here.
    Dispatcher(mpsc::Sender<Incoming>, InstallationId),
    /// Declares its own queue only, and waits for everything else.
    Engine,
}

/// A connection to RabbitMQ that comes back by itself.
#[derive(Clone)]
pub struct Broker(Arc<Inner>);

struct Inner {
    session: watch::Receiver<Option<Arc<Session>>>,
    taken: watch::Receiver<Option<Taken>>,
    next_message: AtomicU64,
    unreadable: Arc<AtomicU64>,
    reconnects: Arc<AtomicU64>,
    losses: Arc<AtomicU64>,
    counted: CountCache,
    /// When everything was last declared again; locked while it is.
    redeclared: tokio::sync::Mutex<Option<Instant>>,
}

/// How many engines each pool had when it was last asked; none where its queue was not there.
#[derive(Default)]
struct CountCache(Mutex<HashMap<PoolName, (Instant, Option<u32>)>>);

impl CountCache {
    fn engines(&self) -> MutexGuard<'_, HashMap<PoolName, (Instant, Option<u32>)>> {
        // No code panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lately(&self, pool: &PoolName) -> Option<u32> {
        match *self.engines().get(pool)? {
            (at, _) if at.elapsed() >= COUNT_KEPT => None,
            // One may have come.
            (_, Some(0)) => None,
            // Each look at a queue that is not there costs a channel.
            (_, count) => Some(count.unwrap_or(0)),
        }
    }

    fn remember(&self, pool: &PoolName, count: Option<u32>) {
        let mut engines = self.engines();
        engines.retain(|_, (at, _)| at.elapsed() < COUNT_KEPT);
        engines.insert(pool.clone(), (Instant::now(), count));
    }
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
    /// Begins to connect, and goes on for ever, until `stop`: a broker that is away is waited for.
    pub fn start(options: Options, tasks: &TaskTracker, stop: CancellationToken) -> Self {
        let (sender, session) = watch::channel(None);
        let counts = Counts::default();
        let (unreadable, reconnects) = (counts.unreadable.clone(), counts.reconnects.clone());
        let losses = counts.losses.clone();
        let (taken_sender, taken) = watch::channel(None);
        let states = (sender, taken_sender);
        tasks.spawn(supervise(options, states, counts, stop));
        Self(Arc::new(Inner {
            session,
            taken,
            next_message: AtomicU64::new(0),
            unreadable,
            reconnects,
            losses,
            counted: CountCache::default(),
            redeclared: tokio::sync::Mutex::default(),
        }))
    }

    /// Messages since the start that could not be read: without Mayfly's headers, or not sealed.
    pub fn unreadable(&self) -> u64 {
        self.0.unreadable.load(Ordering::Relaxed)
    }

    /// How often the connection was opened again since the start.
    pub fn reconnects(&self) -> u64 {
        self.0.reconnects.load(Ordering::Relaxed)
    }

    /// Whether the connection stands, and the broker takes messages.
    pub fn is_up(&self) -> bool {
        let session = self.0.session.borrow();
        session
            .as_ref()
            .is_some_and(|session| !session.is_blocked())
    }

    /// Whose the virtual host is, where it is another installation's by the last try to connect.
    pub fn taken(&self) -> Option<Taken> {
        self.0.taken.borrow().clone()
    }

    /// Ends if the first connection finds that the virtual host belongs to another installation.
    pub async fn taken_at_start(&self) -> Taken {
        let (mut taken, mut session) = (self.0.taken.clone(), self.0.session.clone());
        let found = tokio::select! {
            found = taken.wait_for(Option::is_some) => found.ok().and_then(|found| found.clone()),
            _ = session.wait_for(Option::is_some) => None,
        };
        match found {
            Some(found) => found,
            None => std::future::pending().await,
        }
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
            if let Address::Delayed(delay, _) | Address::Probe(delay) = &message.to {
                span.tag("mayfly.delay_seconds", delay.as_secs_f64());
            }
            head.traceparent = span.context().to_string();
        }
        let sent = session.send(message, id.to_string()).await;
        if let (Err(error), Some(span)) = (&sent, &mut span) {
            span.fail(error.word());
        }
        sent
    }

    /// Parks a message of a newer version for `after`, just as it came but for its count, and with a
    /// confirm as in [`Broker::publish`]. The message itself is still to be acknowledged.
    ///
    /// # Errors
    /// See [`Broker::publish`].
    pub async fn park_again(
        &self,
        message: &Incoming,
        after: Duration,
        pool: &PoolName,
    ) -> Result<(), BrokerError> {
        let id = self.0.next_message.fetch_add(1, Ordering::Relaxed);
        self.session()?
            .park_again(message, after, pool, id.to_string())
            .await
    }

    /// Settles a message that cannot be one of Mayfly's: it is counted, and kept for a look while
    /// there is place.
    pub async fn set_aside(&self, mut message: Incoming) {
        if let (Ok(session), Some(settle)) = (self.session(), &mut message.settle) {
            session.keep_specimen(&settle.delivery.properties, &message.body);
        }
        message.ack().await;
    }

    /// How many messages are kept that could not be read.
    ///
    /// # Errors
    /// The broker is away.
    pub async fn unreadable_kept(&self) -> Result<Option<u32>, BrokerError> {
        self.session()?
            .on_admin(async |channel| message_count(channel, topology::UNREADABLE.to_owned()).await)
            .await
    }

    /// How many engines consume a pool's create queue at this moment. Many ask at once, and what
    /// one was told a moment ago is told to the others; but not that there is none.
    ///
    /// Looks only. A queue that somebody deletes must not be declared again at that moment: until
    /// 4.0 RabbitMQ then moves its consumers to the new one without a word, and brings them nothing.
    ///
    /// # Errors
    /// The broker is away.
    pub async fn engines_of(&self, pool: &PoolName) -> Result<u32, BrokerError> {
        let session = self.session()?;
        if let Some(engines) = self.0.counted.lately(pool) {
            return Ok(engines);
        }
        session
            .on_admin(async |channel| {
                // Meanwhile somebody else may have asked.
                if let Some(engines) = self.0.counted.lately(pool) {
                    return Ok(engines);
                }
                let queue = find_queue(channel, topology::create_queue(pool)).await?;
                let engines = queue.map(|queue| queue.consumer_count());
                self.0.counted.remember(pool, engines);
                Ok(engines.unwrap_or(0))
            })
            .await
    }

    /// How many messages wait in a pool's create and revoke queues, without those an engine is at
    /// work on; nothing where one of the queues is not there. Looks only: the pool may be deleted at
    /// this moment.
    ///
    /// # Errors
    /// The broker is away.
    pub async fn waiting(&self, pool: &PoolName) -> Result<Option<Waiting>, BrokerError> {
        let session = self.session()?;
        session
            .on_admin(async |channel| {
                let Some(create) = message_count(channel, topology::create_queue(pool)).await?
                else {
                    return Ok(None);
                };
                let revoke = message_count(channel, topology::revoke_queue(pool)).await?;
                Ok(revoke.map(|revoke| Waiting { create, revoke }))
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
            .on_admin(async |channel| declare::declare_pool(channel, pool).await)
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
            .await?;
        let deleting = session.on_admin(async |channel| {
            let queue = topology::authorities_queue(pool);
            let options = QueueDeleteOptions::default();
            channel.queue_delete(queue.into(), options).await?;
            Ok(())
        });
        if let Err(error) = deleting.await {
            // A dispatcher's user of before the queue has not the right.
            debug!(%pool, %error, "the pool's certificate authorities stay at the broker, for 400 days at most");
        }
        Ok(())
    }

    /// How many messages wait in the delay levels. Those on their way from one to the next may
    /// be counted twice or not at all.
    ///
    /// # Errors
    /// The broker is away.
    pub async fn parked(&self) -> Result<u64, BrokerError> {
        let session = self.session()?;
        let mut parked = 0;
        for n in 0..topology::LEVELS {
            // One that is missing is not declared here: nobody would hear that its ends are lost.
            let level =
                session.on_admin(async |channel| message_count(channel, topology::level(n)).await);
            parked += u64::from(level.await?.unwrap_or(0));
        }
        Ok(parked)
    }

    /// Declares again what engines publish to: without it no message of theirs tells of its absence.
    ///
    /// # Errors
    /// The broker is away, or a shared queue is gone.
    pub async fn declare_entrances(&self) -> Result<(), BrokerError> {
        let session = self.session()?;
        session.claim().await?;
        session
            .on_admin(async |channel| declare_entrances(channel).await)
            .await
    }

    /// Declares everything again, after something of it was found missing. Many find so at once:
    /// it is done by one of them, and not again for two seconds. Gives the delay levels that had no
    /// queue: what was parked there is lost, unless it is parked again.
    ///
    /// # Errors
    /// The broker is away.
    pub async fn redeclare(&self) -> Result<Vec<u32>, BrokerError> {
        let Ok(mut last) = self.0.redeclared.try_lock() else {
            return Ok(Vec::new());
        };
        if last.is_some_and(|at| at.elapsed() < REDECLARE_PAUSE) {
            return Ok(Vec::new());
        }
        let session = self.session()?;
        let absent = session.absent_levels().await?;
        if !absent.is_empty() {
            self.0.losses.fetch_add(1, Ordering::Relaxed);
            match session
                .on_admin(async |channel| unmark_parked(channel).await)
                .await
            {
                // One with older rights cannot leave word.
                Ok(()) | Err(BrokerError::NotAllowed(_)) => {}
                Err(error) => return Err(error),
            }
        }
        let done = session
            .on_admin(async |channel| declare_all(channel).await)
            .await;
        *last = Some(Instant::now());
        done.map(|()| absent)
    }

    /// How often delay levels were found without a queue.
    pub fn losses(&self) -> u64 {
        self.0.losses.load(Ordering::Relaxed)
    }

    /// Whether all ends are parked, as far as anybody knows; see [`topology::PARKED`].
    ///
    /// # Errors
    /// The broker is away.
    pub async fn has_all_parked(&self) -> Result<bool, BrokerError> {
        self.session()?
            .on_admin(async |channel| has_exchange(channel, topology::PARKED).await)
            .await
    }

    /// Says that all ends are parked, unless a level was lost since [`Broker::losses`] gave this number.
    ///
    /// # Errors
    /// The broker is away, or the user has not the right.
    pub async fn all_are_parked(&self, losses: u64) -> Result<(), BrokerError> {
        // No level is declared again meanwhile.
        let _one = self.0.redeclared.lock().await;
        if self.losses() != losses {
            return Ok(());
        }
        self.session()?
            .on_admin(async |channel| mark_parked(channel).await)
            .await
    }

    /// The delay levels that had no queue when this connection was opened, the first time it is asked.
    pub fn found_absent(&self) -> Vec<u32> {
        let session = self.session();
        session.map_or_else(|_| Vec::new(), |session| session.found_absent())
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
        let mut failures = 0_u32;
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
            match ended {
                Ok(()) => failures = 0,
                // At the first start of all, and while a queue that somebody deleted is not there again.
                Err(error @ BrokerError::Absent(_)) => {
                    if failures.is_multiple_of(120) {
                        warn!(%error, "waiting to consume");
                    }
                    failures = failures.saturating_add(1);
                }
                Err(error) => {
                    failures = failures.saturating_add(1);
                    // After a lost connection one is ordinary. Said after two seconds, then each minute.
                    if failures % 120 == 4 {
                        warn!(?source, %error, "consuming cannot be begun; trying on (has another engine this name, or has the user no right?)");
                    } else {
                        debug!(?source, %error, "consuming ended; it starts again");
                    }
                }
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(RECONNECT_DELAY) => {}
            }
        }
    }
}

/// Messages that are ready in a queue, where it is there.
async fn message_count(channel: &Channel, queue: String) -> Result<Option<u32>, BrokerError> {
    let found = find_queue(channel, queue).await?;
    Ok(found.map(|queue| queue.message_count()))
}
