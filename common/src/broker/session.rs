//! One life of the connection: opened, watched and given up, publishing on it and consuming.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    ConfirmSelectOptions,
};
use lapin::types::FieldTable;
use lapin::uri::AMQPUri;
use lapin::{Channel, Confirmation, Connection, ConnectionProperties};
use tokio::sync::{Mutex, Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::declare::{declare_all, declare_source};
use super::wire::{Outgoing, again, incoming, parse_head};
use super::{BrokerError, CONNECT_TIMEOUT, Incoming, Options, RECONNECT_DELAY, Source};
use crate::task::Kind;
use crate::topology;

const CONFIRM_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest a publish waits for its turn. What waits longer was certainly not sent.
const PERMIT_TIMEOUT: Duration = Duration::from_secs(30);
const DECLARE_TIMEOUT: Duration = Duration::from_secs(30);
/// When a revocation comes again that this version cannot read.
const UNREADABLE_AGAIN: Duration = Duration::from_secs(60);
/// Publisher channels. Each has one publish under way, because lapin mixes up the returns of
/// pipelined ones.
const PUBLISHERS: usize = 8;

/// One life of the connection.
pub(super) struct Session {
    connection: Connection,
    publishers: Mutex<Vec<Channel>>,
    permits: Semaphore,
    replies: Option<mpsc::Sender<Incoming>>,
    /// For declaring and counting; one call at a time.
    admin: Mutex<Channel>,
    broken: AtomicBool,
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
        let opened = tokio::select! {
            () = stop.cancelled() => return,
            opened = tokio::time::timeout(DECLARE_TIMEOUT, open(url, &options, unreadable.clone())) => opened,
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

async fn open(
    url: &AMQPUri,
    options: &Options,
    unreadable: Arc<AtomicU64>,
) -> Result<Session, BrokerError> {
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
        unreadable,
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

    /// What has no head that this version can read. Among the revocations it may be one all the
    /// same, of a newer version: it comes again as it is, and another engine may know it. Anywhere
    /// else it is nothing that anybody waits for.
    async fn set_aside(&self, source: &Source, delivery: Delivery) -> Result<(), BrokerError> {
        let n = self.unreadable.fetch_add(1, Ordering::Relaxed);
        error!(?source, "a message that cannot be read");
        if let Source::Revokes(pool) = source {
            let id = format!("unreadable-{n}");
            self.publish(again(&delivery, UNREADABLE_AGAIN, pool, id))
                .await?;
        }
        delivery.ack(BasicAckOptions::default()).await?;
        Ok(())
    }

    /// The broker has ended a consumer by itself: somebody deleted its queue, and maybe others, whose
    /// consumers are not told if these were declared again in the same moment (RabbitMQ before
    /// 4.0). So everything is opened and declared anew.
    fn begin_anew(&self, source: &Source) {
        if self.connection.status().connected() && !self.ended.is_cancelled() {
            error!(
                ?source,
                "somebody has deleted a queue; it is declared again, with all there is"
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
                if !is_cancelled && channel.status().connected() {
                    self.begin_anew(source);
                }
                return Ok(());
            };
            let delivery = delivery?;
            let head = match (parse_head(&delivery.properties), source) {
                (None, _) => None,
                (Some(head), Source::Revokes(_)) if head.kind != Kind::Revoke => None,
                (head, _) => head,
            };
            let Some(head) = head else {
                self.set_aside(source, delivery).await?;
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
