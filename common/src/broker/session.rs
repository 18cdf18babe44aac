//! One life of the connection: opened, watched and given up, publishing on it and consuming.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    ConfirmSelectOptions,
};
use lapin::types::FieldTable;
use lapin::uri::AMQPUri;
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use tokio::sync::{Mutex, Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::declare::{
    declare_all, declare_heartbeats, declare_own, declare_replies, find_queue, has_exchange,
};
use super::wire::{Outgoing, Routes, again, incoming, outgoing, parse_head, specimen};
use super::{
    BrokerError, CONNECT_TIMEOUT, Incoming, Message, Options, Part, RECONNECT_DELAY, Source,
};
use crate::names::{PoolName, random_text};
use crate::task::{Head, Kind};
use crate::topology;

const CONFIRM_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest a publish waits for its turn. What waits longer was certainly not sent.
const PERMIT_TIMEOUT: Duration = Duration::from_secs(30);
const DECLARE_TIMEOUT: Duration = Duration::from_secs(30);
/// How often the connection is looked at.
const WATCH_EVERY: Duration = Duration::from_millis(500);
/// Messages that cannot be read and wait to be kept; the others are only counted.
const SPECIMENS: usize = 64;
/// Between two of them: a flood of messages must not keep the broker busy with copies.
const SPECIMEN_PAUSE: Duration = Duration::from_millis(10);
/// Of a flood of messages that cannot be read every thousandth is logged.
const LOGGED_OF_UNREADABLE: u64 = 1000;
/// Publisher channels. Each has one publish under way, because lapin mixes up the returns of
/// pipelined ones.
const PUBLISHERS: usize = 8;

/// One life of the connection.
pub(super) struct Session {
    connection: Connection,
    publishers: Mutex<Vec<Channel>>,
    permits: Semaphore,
    routes: Routes,
    /// A name for the queues of this connection.
    name: String,
    is_engine: bool,
    specimens: mpsc::Sender<Outgoing>,
    /// For declaring and counting; one call at a time.
    admin: Mutex<Channel>,
    broken: Arc<AtomicBool>,
    ended: CancellationToken,
    /// Messages that could not be read, of all sessions.
    unreadable: Arc<AtomicU64>,
}

pub(super) async fn supervise(
    urls: Vec<AMQPUri>,
    options: Options,
    sender: watch::Sender<Option<Arc<Session>>>,
    unreadable: Arc<AtomicU64>,
    stop: CancellationToken,
) {
    let mut failures = 0_u32;
    for url in urls.iter().cycle() {
        let (specimens, kept) = mpsc::channel(SPECIMENS);
        let opening = open(url, &options, unreadable.clone(), specimens);
        let opened = tokio::select! {
            () = stop.cancelled() => return,
            opened = tokio::time::timeout(DECLARE_TIMEOUT, opening) => opened,
        };
        let place = format!("{}:{}", url.authority.host, url.authority.port);
        match opened.unwrap_or_else(|_| Err(BrokerError::Unconfirmed("time-out".to_owned()))) {
            Ok(session) => {
                failures = 0;
                info!(broker = place, "connected to the broker");
                let session = Arc::new(session);
                sender.send_replace(Some(session.clone()));
                tokio::select! {
                    () = session.watch(&stop) => {}
                    () = session.keep_specimens(kept) => {}
                }
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

async fn open(
    url: &AMQPUri,
    options: &Options,
    unreadable: Arc<AtomicU64>,
    specimens: mpsc::Sender<Outgoing>,
) -> Result<Session, BrokerError> {
    let properties =
        ConnectionProperties::default().with_connection_name(options.name.as_str().into());
    let connecting = Connection::connect_uri(url.clone(), properties);
    let connection = tokio::time::timeout(CONNECT_TIMEOUT, connecting)
        .await
        .map_err(|_| BrokerError::Unconfirmed("time-out while connecting".to_owned()))??;
    let mut admin = connection.create_channel().await?;
    let name = random_text(16);
    let routes = match &options.part {
        Part::Dispatcher(_) => {
            declare_all(&admin).await?;
            Routes {
                reply_to: Some(topology::dispatcher_queue(&name, "replies")),
                entrances: false,
            }
        }
        Part::Engine => {
            // Without them, what is there was declared by a dispatcher of an earlier version.
            let entrances = has_exchange(&admin, topology::PARK).await?;
            if !entrances {
                admin = connection.create_channel().await?;
            }
            Routes {
                reply_to: None,
                entrances,
            }
        }
    };
    let session = Session {
        connection,
        publishers: Mutex::new(Vec::new()),
        permits: Semaphore::new(PUBLISHERS),
        routes,
        name,
        is_engine: matches!(options.part, Part::Engine),
        specimens,
        admin: Mutex::new(admin),
        broken: Arc::default(),
        ended: CancellationToken::new(),
        unreadable,
    };
    if let Part::Dispatcher(replies) = &options.part {
        session.take_replies(replies.clone()).await?;
    }
    // The first publish must not find that this cannot be done.
    let first = session.open_publisher().await?;
    session.publishers.lock().await.push(first);
    Ok(session)
}

/// Whether a source may bring messages of a kind. Among the revocations may be one of a newer
/// version.
fn may_bring(source: &Source, head: &Head) -> bool {
    !matches!(source, Source::Revokes(_)) || matches!(head.kind, Kind::Revoke | Kind::Unknown)
}

impl Session {
    /// Returns when the connection is no more, or at `stop`.
    async fn watch(&self, stop: &CancellationToken) {
        let mut events = self.connection.events_listener();
        let mut tick = tokio::time::interval(WATCH_EVERY);
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
            if self.is_outdated().await {
                info!("a dispatcher has declared what was missing; connecting again");
                return;
            }
        }
    }

    /// Whether an engine's exchanges are there now that were absent when this connection was opened.
    async fn is_outdated(&self) -> bool {
        if !self.is_engine || self.routes.entrances {
            return false;
        }
        let looking = self.on_admin(async |channel| has_exchange(channel, topology::PARK).await);
        matches!(
            tokio::time::timeout(CONFIRM_TIMEOUT, looking).await,
            Ok(Ok(true))
        )
    }

    async fn open_publisher(&self) -> Result<Channel, BrokerError> {
        let channel = self.connection.create_channel().await?;
        channel
            .confirm_select(ConfirmSelectOptions::default())
            .await?;
        Ok(channel)
    }

    /// Hands on the answers to a dispatcher's requests.
    async fn take_replies(&self, replies: mpsc::Sender<Incoming>) -> Result<(), BrokerError> {
        let Some(queue) = &self.routes.reply_to else {
            return Ok(());
        };
        let channel = self.connection.create_channel().await?;
        declare_replies(&channel, queue).await?;
        let options = BasicConsumeOptions {
            no_ack: true,
            ..Default::default()
        };
        let mut consumer = channel
            .basic_consume(
                queue.as_str().into(),
                "".into(),
                options,
                FieldTable::default(),
            )
            .await?;
        let (ended, specimens) = (self.ended.clone(), self.specimens.clone());
        let (broken, unreadable) = (self.broken.clone(), self.unreadable.clone());
        // Ends with the session, or sooner with its queue; then the session ends, too.
        tokio::spawn(async move {
            let _open = channel;
            loop {
                let delivery = tokio::select! {
                    () = ended.cancelled() => return,
                    delivery = consumer.next() => delivery,
                };
                let Some(Ok(delivery)) = delivery else {
                    broken.store(true, Ordering::Relaxed);
                    return;
                };
                let Some(head) = parse_head(&delivery.properties) else {
                    let n = unreadable.fetch_add(1, Ordering::Relaxed);
                    let kept =
                        specimen(&delivery.properties, &delivery.data, format!("answer-{n}"));
                    let _ = specimens.try_send(kept);
                    continue;
                };
                if replies.send(incoming(head, delivery, None)).await.is_err() {
                    return;
                }
            }
        });
        Ok(())
    }

    /// Publishes a message of ours.
    pub(super) async fn send(&self, message: Message, id: String) -> Result<(), BrokerError> {
        self.publish(outgoing(message, id, &self.routes)).await
    }

    /// Parks one of a newer version.
    pub(super) async fn park_again(
        &self,
        message: &Incoming,
        after: Duration,
        pool: &PoolName,
        id: String,
    ) -> Result<(), BrokerError> {
        match again(message, after, pool, id, &self.routes) {
            Some(message) => self.publish(message).await,
            // An answer; those are never parked.
            None => Err(BrokerError::Unroutable),
        }
    }

    pub(super) async fn publish(&self, message: Outgoing) -> Result<(), BrokerError> {
        if self.is_blocked() {
            return Err(BrokerError::Down);
        }
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
        let sent = tokio::time::timeout(CONFIRM_TIMEOUT, publish_on(&channel, message)).await;
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
                // A connection that does not answer is given up for a new one; but not one the
                // broker has stopped, whose end it would not hear of either.
                if !self.is_blocked() {
                    self.broken.store(true, Ordering::Relaxed);
                }
                return Err(BrokerError::Unconfirmed("no confirm in time".to_owned()));
            }
        }
        self.publishers.lock().await.push(channel);
        Ok(())
    }

    /// Whether the broker takes no messages now, for want of memory or disk. lapin then writes
    /// nothing until it does again: what is not begun is certainly not sent.
    pub(super) fn is_blocked(&self) -> bool {
        self.connection.status().blocked()
    }

    /// Runs calls on the admin channel, with a time-out. A failed channel is replaced.
    pub(super) async fn on_admin<T>(
        &self,
        work: impl AsyncFnOnce(&Channel) -> Result<T, BrokerError>,
    ) -> Result<T, BrokerError> {
        if self.is_blocked() {
            return Err(BrokerError::Down);
        }
        let working = async {
            let mut admin = self.admin.lock().await;
            if !admin.status().connected() {
                *admin = self.connection.create_channel().await?;
            }
            work(&admin).await
        };
        tokio::time::timeout(DECLARE_TIMEOUT, working)
            .await
            .map_err(|_| BrokerError::Unconfirmed("time-out".to_owned()))?
    }

    /// Counts a message that cannot be one of ours, and keeps it for a look while there is place. It
    /// waits for nothing: whatever number of them stands before good ones does not delay these.
    pub(super) fn keep_specimen(&self, properties: &BasicProperties, body: &[u8]) {
        let n = self.unreadable.fetch_add(1, Ordering::Relaxed);
        if n.is_multiple_of(LOGGED_OF_UNREADABLE) {
            error!(
                so_far = n + 1,
                "a message that cannot be read; see the queue {}",
                topology::UNREADABLE
            );
        }
        // There is no such queue where only earlier dispatchers are.
        if !self.is_engine || self.routes.entrances {
            let _ = self
                .specimens
                .try_send(specimen(properties, body, format!("unreadable-{n}")));
        }
    }

    /// Publishes what is to be kept, until the session ends.
    async fn keep_specimens(&self, mut specimens: mpsc::Receiver<Outgoing>) {
        while let Some(one) = specimens.recv().await {
            // Only for a look: one that is lost was counted.
            if let Err(error) = self.publish(one).await {
                debug!(%error, "a message that cannot be read is not kept");
            }
            tokio::time::sleep(SPECIMEN_PAUSE).await;
        }
    }

    /// Finds the queue of a source, or declares it where it is this connection's own.
    async fn queue_of(&self, channel: &Channel, source: &Source) -> Result<String, BrokerError> {
        let shared = match source {
            Source::Creates(pool) => topology::create_queue(pool),
            Source::Revokes(pool) => topology::revoke_queue(pool),
            Source::Outcomes => topology::OUTCOMES.to_owned(),
            Source::Unroutable => topology::UNROUTABLE.to_owned(),
            Source::Pings(pool, engine) => {
                let queue = if self.routes.entrances {
                    topology::engine_queue(pool, engine)
                } else if has_exchange(channel, topology::DELIVER).await? {
                    topology::earlier_engine_queue(engine)
                } else {
                    return Err(BrokerError::Absent(topology::DELIVER.to_owned()));
                };
                declare_own(channel, &queue).await?;
                return Ok(queue);
            }
            Source::Heartbeats => {
                let queue = topology::dispatcher_queue(&self.name, "heartbeats");
                declare_heartbeats(channel, &queue).await?;
                return Ok(queue);
            }
        };
        match find_queue(channel, shared.clone()).await? {
            Some(_) => Ok(shared),
            None => Err(BrokerError::Absent(shared)),
        }
    }

    /// The broker has ended a consumer by itself: somebody deleted its queue, and maybe others, whose
    /// consumers are not told if these were declared again in the same moment (RabbitMQ before
    /// 4.0). So the connection is opened again.
    fn begin_anew(&self, source: &Source) {
        if self.connection.status().connected() && !self.ended.is_cancelled() {
            error!(
                ?source,
                "somebody has deleted a queue; the connection is opened again"
            );
            self.broken.store(true, Ordering::Relaxed);
        }
    }

    pub(super) async fn consume(
        &self,
        source: &Source,
        prefetch: u16,
        sink: &mpsc::Sender<Incoming>,
        stop: &CancellationToken,
        attached: &watch::Sender<bool>,
    ) -> Result<(), BrokerError> {
        let channel = self.connection.create_channel().await?;
        let queue = self.queue_of(&channel, source).await?;
        if self.is_outdated().await {
            self.broken.store(true, Ordering::Relaxed);
            return Ok(());
        }
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
                if !is_cancelled && channel.status().connected() {
                    self.begin_anew(source);
                }
                return Ok(());
            };
            let delivery = delivery?;
            let head = parse_head(&delivery.properties).filter(|head| may_bring(source, head));
            let Some(head) = head else {
                self.keep_specimen(&delivery.properties, &delivery.data);
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

async fn publish_on(channel: &Channel, message: Outgoing) -> Result<(), BrokerError> {
    let confirm = channel
        .basic_publish(
            message.exchange.into(),
            message.key.into(),
            BasicPublishOptions {
                mandatory: message.mandatory,
                immediate: false,
            },
            &message.body,
            message.properties,
        )
        .await?
        .await?;
    match confirm {
        Confirmation::Ack(None) => Ok(()),
        Confirmation::Ack(Some(returned)) => {
            let returned_id = returned.delivery.properties.message_id().as_ref();
            if returned_id.is_some_and(|returned| returned.as_str() == message.id) {
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
