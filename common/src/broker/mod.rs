//! RabbitMQ: a connection that is opened again by itself, publishing with confirms, consuming. Only this module
//! names lapin. One connection is in `session`, what is declared with which arguments in `declare`, a message's form
//! in `wire`.
//!
//! It never hides a loss: a publish is `Ok` only after the broker's confirm.
//!
//! lapin's own recovery is not used: there a pending confirm hangs until the reconnect. Here a lost connection
//! fails the calls in progress, and everything is opened and declared again.

mod declare;
mod error;
mod lasting;
mod levels;
mod login;
mod message;
mod owner;
mod pools;
mod publishers;
mod session;
mod wire;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

pub use self::error::BrokerError;
pub use self::login::{AmqpSettings, Login};
pub use self::message::{Address, Incoming, Message, Source};
pub use self::owner::{Taken, take_over};
use self::pools::CountCache;
pub use self::pools::Waiting;
use self::session::{Counts, Session, States, supervise};
use self::wire::describe;
use crate::trace::Span;
use mayfly_protocol::names::{InstallationId, PoolName};

/// A dead peer is noticed after this time (AMQP 0-9-1, heartbeat), in seconds.
const HEARTBEAT_SECONDS: u16 = 10;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const RECONNECT_DELAY: Duration = Duration::from_millis(500);

/// Options of a [`Broker`].
pub struct Options {
    /// Addresses and user. Several addresses are tried in turn.
    pub login: Login,
    /// Shown in RabbitMQ's list of connections.
    pub name: String,
    /// The part of Mayfly that connects.
    pub part: Part,
}

/// A part of Mayfly at the broker.
pub enum Part {
    /// Declares what is shared and what pools need, on a virtual host that belongs to its installation alone.
    /// The answers to its requests go into the channel.
    Dispatcher(mpsc::Sender<Incoming>, InstallationId),
    /// Declares only its own queue, and waits until a dispatcher has declared the rest.
    Engine,
}

/// A connection to RabbitMQ that is opened again by itself.
#[derive(Clone)]
pub struct Broker(Arc<Inner>);

struct Inner {
    session: watch::Receiver<Option<Arc<Session>>>,
    taken: watch::Receiver<Option<Taken>>,
    tried: watch::Receiver<bool>,
    next_message: AtomicU64,
    unreadable: Arc<AtomicU64>,
    reconnects: Arc<AtomicU64>,
    losses: Arc<AtomicU64>,
    counted: CountCache,
    /// When everything was last declared again. Locked during a declaration.
    redeclared: tokio::sync::Mutex<Option<Instant>>,
}

impl Broker {
    /// Connects in the background, and again after each loss, until `stop`.
    pub fn start(options: Options, tasks: &TaskTracker, stop: CancellationToken) -> Self {
        let (sender, session) = watch::channel(None);
        let counts = Counts::default();
        let (unreadable, reconnects) = (counts.unreadable.clone(), counts.reconnects.clone());
        let losses = counts.losses.clone();
        let (taken_sender, taken) = watch::channel(None);
        let (tried_sender, tried) = watch::channel(false);
        let states = States {
            session: sender,
            taken: taken_sender,
            tried: tried_sender,
        };
        tasks.spawn(supervise(options, states, counts, stop));
        Self(Arc::new(Inner {
            session,
            taken,
            tried,
            next_message: AtomicU64::new(0),
            unreadable,
            reconnects,
            losses,
            counted: CountCache::default(),
            redeclared: tokio::sync::Mutex::default(),
        }))
    }

    /// Number of unreadable messages since the start: without Mayfly's headers, or not sealed.
    pub fn unreadable(&self) -> u64 {
        self.0.unreadable.load(Ordering::Relaxed)
    }

    /// Number of reconnects since the start.
    pub fn reconnects(&self) -> u64 {
        self.0.reconnects.load(Ordering::Relaxed)
    }

    /// Whether there is a connection and the broker takes messages.
    pub fn is_up(&self) -> bool {
        let session = self.0.session.borrow();
        session
            .as_ref()
            .is_some_and(|session| !session.is_blocked())
    }

    /// Whether the process was connected once, or has tried each address of the broker without success.
    pub fn was_tried(&self) -> bool {
        *self.0.tried.borrow()
    }

    /// The other installation that owns the virtual host, as of the last try to connect.
    pub fn taken(&self) -> Option<Taken> {
        self.0.taken.borrow().clone()
    }

    /// Returns if the first connection finds that the virtual host belongs to another installation; never otherwise.
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

    /// Waits for the connection. `false`: there will be none, because the process stops.
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

    /// Publishes and waits for the broker's confirm, at most 5 s. An answer has no confirm.
    ///
    /// # Errors
    /// Anything but a confirm of a routed message. After [`BrokerError::Unconfirmed`] the broker may have the
    /// message.
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
        let sent = match message.to {
            Address::Answer(_) => session.answer(&message, id.to_string()).await,
            _ => session.send(message, id.to_string()).await,
        };
        if let (Err(error), Some(span)) = (&sent, &mut span) {
            span.fail(error.word());
        }
        sent
    }

    /// Parks a message of a newer version for `after`, unchanged except for its count, with a confirm as in
    /// [`Broker::publish`]. The caller must still acknowledge the message.
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

    /// Settles a message that is not one of Mayfly's: counts it, and keeps a copy for the operator while there is
    /// room.
    pub async fn set_aside(&self, mut message: Incoming) {
        if let (Ok(session), Some(settle)) = (self.session(), &mut message.settle) {
            session.keep_specimen(&settle.delivery.properties, &message.body);
        }
        message.ack().await;
    }

    /// Sends the messages of `source` into `sink` until `stop`, across reconnects. `attached` is whether the broker
    /// delivers at the moment. At most `prefetch` messages are unsettled at a time.
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
                // The queue is absent until the first dispatcher has started, or until a deleted queue is declared
                // again.
                Err(error @ BrokerError::Absent(_)) => {
                    if failures.is_multiple_of(120) {
                        warn!(%error, "waiting to consume");
                    }
                    failures = failures.saturating_add(1);
                }
                Err(error) => {
                    failures = failures.saturating_add(1);
                    // One failure is usual after a lost connection. So the first line is logged after 2 s, and then
                    // one each minute.
                    if failures % 120 == 4 {
                        warn!(?source, %error, "consuming cannot begin; trying again (does another engine have this name, or does the user lack a permission?)");
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
