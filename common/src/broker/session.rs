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
use tokio::sync::{Mutex, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::declare::{
    declare_all, declare_heartbeats, declare_own, declare_probes, declare_replies, find_queue,
    has_exchange, unmark_parked,
};
use super::login::Access;
use super::owner::{Taken, claim_first, claim_on};
use super::publishers::{Closing, Publishers};
use super::wire::{Outgoing, Routes, again, incoming, outgoing, parse_head, specimen};
use super::{
    Address, BrokerError, CONNECT_TIMEOUT, Incoming, Message, Options, Part, RECONNECT_DELAY,
    Source,
};
use mayfly_protocol::names::{InstallationId, PoolName, random_text};
use mayfly_protocol::task::{Head, Kind};
use mayfly_protocol::topology;

const CONFIRM_TIMEOUT: Duration = Duration::from_secs(5);
const DECLARE_TIMEOUT: Duration = Duration::from_secs(30);
/// The pause before a virtual host that belongs to another installation is tried again.
const TAKEN_PAUSE: Duration = Duration::from_secs(5);
/// How often the connection is looked at.
const WATCH_EVERY: Duration = Duration::from_millis(500);
/// Messages that cannot be read and wait to be kept; the others are only counted.
const SPECIMENS: usize = 64;
/// Between two of them: a flood of messages must not keep the broker busy with copies.
const SPECIMEN_PAUSE: Duration = Duration::from_millis(10);
/// Of a flood of messages that cannot be read every thousandth is logged.
const LOGGED_OF_UNREADABLE: u64 = 1000;

/// One life of the connection.
pub(super) struct Session {
    connection: Connection,
    publishers: Publishers,
    routes: Routes,
    /// A name for the queues of this connection.
    name: String,
    is_engine: bool,
    /// Of a dispatcher: whose virtual host this must be.
    owner: Option<(String, InstallationId)>,
    /// An engine's exchanges were not all there when this connection was opened.
    is_outdated: bool,
    /// Delay levels without a queue when a dispatcher's connection was opened; told once.
    found_absent: std::sync::Mutex<Vec<u32>>,
    specimens: mpsc::Sender<Outgoing>,
    /// For declaring and counting; one call at a time.
    admin: Mutex<Channel>,
    broken: Arc<AtomicBool>,
    ended: CancellationToken,
    /// Messages that could not be read, of all sessions.
    unreadable: Arc<AtomicU64>,
}

/// Where the broker is and how to log in, as the settings and their files say now; what cannot be read
/// leaves it as it was.
fn read_login(options: &Options, access: &mut Option<Access>) {
    match options.login.read() {
        Ok(read) => *access = Some(read),
        // It was right at the start.
        Err(error) => {
            warn!(%error, "the broker's settings cannot be read again; what they were is used")
        }
    }
}

/// What is counted over all lives of the connection.
#[derive(Default)]
pub(super) struct Counts {
    /// Messages that could not be read.
    pub(super) unreadable: Arc<AtomicU64>,
    /// Lives after the first.
    pub(super) reconnects: Arc<AtomicU64>,
    /// Times that delay levels were found without a queue.
    pub(super) losses: Arc<AtomicU64>,
}

pub(super) async fn supervise(
    options: Options,
    (sender, taken): (
        watch::Sender<Option<Arc<Session>>>,
        watch::Sender<Option<Taken>>,
    ),
    counts: Counts,
    stop: CancellationToken,
) {
    let mut failures = 0_u32;
    let mut access = None;
    let mut is_again = false;
    for turn in 0_usize.. {
        read_login(&options, &mut access);
        let Some(access) = &access else {
            if pause(&stop).await {
                continue;
            } else {
                return;
            };
        };
        let Some(url) = access.urls.get(turn % access.urls.len().max(1)) else {
            continue;
        };
        let (specimens, kept) = mpsc::channel(SPECIMENS);
        let opening = open(
            (access, url),
            &options,
            (counts.unreadable.clone(), &counts.losses),
            specimens,
        );
        let opened = tokio::select! {
            () = stop.cancelled() => return,
            opened = tokio::time::timeout(DECLARE_TIMEOUT, opening) => opened,
        };
        let place = format!("{}:{}", url.authority.host, url.authority.port);
        match opened.unwrap_or_else(|_| Err(BrokerError::Unconfirmed("time-out".to_owned()))) {
            Ok((session, unused)) => {
                failures = 0;
                taken.send_replace(None);
                info!(broker = place, "connected to the broker");
                counts
                    .reconnects
                    .fetch_add(u64::from(is_again), Ordering::Relaxed);
                is_again = true;
                let session = Arc::new(session);
                sender.send_replace(Some(session.clone()));
                tokio::select! {
                    () = session.watch(&stop) => {}
                    () = session.keep_specimens(kept) => {}
                    () = session.close_unused(unused) => {}
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
            Err(BrokerError::Taken(by)) => {
                failures += 1;
                // Said at once, then about every minute.
                if failures % 12 == 1 {
                    error!(broker = place, "{by}");
                }
                taken.send_replace(Some(by));
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = tokio::time::sleep(TAKEN_PAUSE) => {}
                }
            }
            Err(error) => {
                failures += 1;
                // Said at once, then about every half minute.
                if failures % 60 == 1 {
                    warn!(broker = place, %error, "the broker cannot be reached; trying on");
                }
            }
        }
        if !pause(&stop).await {
            return;
        }
    }
}

/// Waits before the next connection; `false`: stopped meanwhile.
async fn pause(stop: &CancellationToken) -> bool {
    tokio::select! {
        () = stop.cancelled() => false,
        () = tokio::time::sleep(RECONNECT_DELAY) => true,
    }
}

async fn open(
    (access, url): (&Access, &AMQPUri),
    options: &Options,
    (unreadable, losses): (Arc<AtomicU64>, &AtomicU64),
    specimens: mpsc::Sender<Outgoing>,
) -> Result<(Session, mpsc::UnboundedReceiver<Closing>), BrokerError> {
    let properties =
        ConnectionProperties::default().with_connection_name(options.name.as_str().into());
    let connecting = access.connect(url, properties);
    let connection = tokio::time::timeout(CONNECT_TIMEOUT, connecting)
        .await
        .map_err(|_| BrokerError::Unconfirmed("time-out while connecting".to_owned()))??;
    let mut admin = connection.create_channel().await?;
    let name = random_text(16);
    let mut found_absent = Vec::new();
    let mut owner = None;
    let routes = match &options.part {
        Part::Dispatcher(_, installation) => {
            // Before anything else is declared, or taken.
            claim_first(&connection, &url.vhost, installation).await?;
            owner = Some((url.vhost.clone(), *installation));
            found_absent = absent_levels_of(&connection, &mut admin).await?;
            if !found_absent.is_empty() {
                losses.fetch_add(1, Ordering::Relaxed);
                match unmark_parked(&admin).await {
                    // One with older rights cannot leave word.
                    Err(BrokerError::NotAllowed(_)) => admin = connection.create_channel().await?,
                    unmarked => unmarked?,
                }
            }
            declare_all(&admin).await?;
            Routes {
                reply_to: Some(topology::dispatcher_queue(&name, "replies")),
                entrances: false,
                entry: AtomicBool::new(true),
                probes: topology::probe_word(&name),
            }
        }
        Part::Engine => {
            // Without them, what is there was declared by a dispatcher of an earlier version.
            let entrances = has_exchange(&admin, topology::PARK).await?;
            if !entrances {
                admin = connection.create_channel().await?;
            }
            let entry = has_exchange(&admin, topology::ENTRY).await?;
            if !entry {
                admin = connection.create_channel().await?;
            }
            Routes {
                reply_to: None,
                entrances,
                entry: AtomicBool::new(entry),
                probes: String::new(),
            }
        }
    };
    let (publishers, unused) = Publishers::new();
    // A dispatcher may have declared the one between the two looks, and the other not yet.
    let is_outdated = !(routes.entrances && routes.entry.load(Ordering::Relaxed));
    let session = Session {
        connection,
        publishers,
        is_outdated,
        found_absent: std::sync::Mutex::new(found_absent),
        routes,
        name,
        is_engine: matches!(options.part, Part::Engine),
        owner,
        specimens,
        admin: Mutex::new(admin),
        broken: Arc::default(),
        ended: CancellationToken::new(),
        unreadable,
    };
    if let Part::Dispatcher(replies, _) = &options.part {
        session.take_replies(replies.clone()).await?;
    }
    // The first publish must not find that this cannot be done.
    let mut first = session.publishers.turn().await?;
    first
        .channel(async || session.open_publisher().await)
        .await?;
    first.give_back();
    Ok((session, unused))
}

/// Which delay levels have no queue. A look that finds none closes its channel.
async fn absent_levels_of(
    connection: &Connection,
    channel: &mut Channel,
) -> Result<Vec<u32>, BrokerError> {
    let mut absent = Vec::new();
    for n in 0..topology::LEVELS {
        if !channel.status().connected() {
            *channel = connection.create_channel().await?;
        }
        if find_queue(channel, topology::level(n)).await?.is_none() {
            absent.push(n);
        }
    }
    if !channel.status().connected() {
        *channel = connection.create_channel().await?;
    }
    Ok(absent)
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
        if !self.is_engine || !self.is_outdated {
            return false;
        }
        // What is missing: the newest last.
        let missing = match self.routes.entrances {
            true => topology::ENTRY,
            false => topology::PARK,
        };
        let looking = self.on_admin(async |channel| has_exchange(channel, missing).await);
        matches!(
            tokio::time::timeout(CONFIRM_TIMEOUT, looking).await,
            Ok(Ok(true))
        )
    }

    pub(super) async fn open_channel(&self) -> Result<Channel, BrokerError> {
        Ok(self.connection.create_channel().await?)
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
        let sent = self
            .publish(outgoing(&message, id.clone(), &self.routes))
            .await;
        match (sent, &message.to) {
            (Err(BrokerError::NotAllowed(_)), Address::Delayed(..)) if self.has_older_rights() => {
                self.publish(outgoing(&message, id, &self.routes)).await
            }
            (sent, _) => sent,
        }
    }

    /// Whether an engine has just been refused at the new entry; ends go by the older one from now on.
    fn has_older_rights(&self) -> bool {
        let refused = self.is_engine && self.routes.entry.swap(false, Ordering::Relaxed);
        if refused {
            error!(
                "this engine's user of the broker may not write to {}: ends are parked by {}, where a missing delay level goes unseen; import deploy/rabbitmq/definitions.json again",
                topology::ENTRY,
                topology::PARK
            );
        }
        refused
    }

    /// Parks one of a newer version.
    pub(super) async fn park_again(
        &self,
        message: &Incoming,
        after: Duration,
        pool: &PoolName,
        id: String,
    ) -> Result<(), BrokerError> {
        let copy = || again(message, after, pool, id.clone(), &self.routes);
        // An answer is never parked.
        let sent = self.publish(copy().ok_or(BrokerError::Unroutable)?).await;
        match sent {
            Err(BrokerError::NotAllowed(_)) if self.has_older_rights() => {
                self.publish(copy().ok_or(BrokerError::Unroutable)?).await
            }
            sent => sent,
        }
    }

    pub(super) async fn publish(&self, message: Outgoing) -> Result<(), BrokerError> {
        if self.is_blocked() {
            return Err(BrokerError::Down);
        }
        let mut turn = self.publishers.turn().await?;
        let open = async || {
            let opening = tokio::time::timeout(CONFIRM_TIMEOUT, self.open_publisher());
            opening.await.unwrap_or_else(|_| {
                self.give_up();
                Err(BrokerError::Down)
            })
        };
        let channel = turn.channel(open).await?;
        match tokio::time::timeout(CONFIRM_TIMEOUT, publish_on(channel, message)).await {
            // A refused publish leaves the channel usable.
            Ok(Ok(answer)) => {
                turn.give_back();
                answer
            }
            Ok(Err(error)) => Err(error),
            Err(_) => {
                self.give_up();
                Err(BrokerError::Unconfirmed("no confirm in time".to_owned()))
            }
        }
    }

    /// A connection that does not answer is given up for a new one; but not one the broker has stopped,
    /// whose end it would not hear of either.
    fn give_up(&self) {
        if !self.is_blocked() {
            self.broken.store(true, Ordering::Relaxed);
        }
    }

    /// Closes publisher channels that are not used again, until the session ends.
    async fn close_unused(&self, mut unused: mpsc::UnboundedReceiver<Closing>) {
        while let Some(one) = unused.recv().await {
            if !one.done().await {
                self.give_up();
            }
        }
    }

    /// Looks whether the virtual host is still this dispatcher's installation's. One that is not, as after it
    /// was wiped and another came first, or after `--take-over-broker`, is left at once.
    pub(super) async fn claim(&self) -> Result<(), BrokerError> {
        let Some((vhost, installation)) = &self.owner else {
            return Ok(());
        };
        if self.is_blocked() {
            return Err(BrokerError::Down);
        }
        let claiming = claim_on(&self.connection, vhost, installation);
        let late = |_| Err(BrokerError::Unconfirmed("time-out".to_owned()));
        let claimed = tokio::time::timeout(CONFIRM_TIMEOUT, claiming).await;
        match claimed.unwrap_or_else(late) {
            Err(BrokerError::Taken(taken)) => {
                error!("{taken}");
                self.broken.store(true, Ordering::Relaxed);
                Err(BrokerError::Taken(taken))
            }
            // Said when the connection was opened.
            Err(BrokerError::NotAllowed(_)) => Ok(()),
            done => done,
        }
    }

    /// Which delay levels have no queue.
    pub(super) async fn absent_levels(&self) -> Result<Vec<u32>, BrokerError> {
        if self.is_blocked() {
            return Err(BrokerError::Down);
        }
        let looking = async {
            let mut admin = self.admin.lock().await;
            absent_levels_of(&self.connection, &mut admin).await
        };
        tokio::time::timeout(DECLARE_TIMEOUT, looking)
            .await
            .map_err(|_| BrokerError::Unconfirmed("time-out".to_owned()))?
    }

    /// The delay levels without a queue when this connection was opened; the second time nothing.
    pub(super) fn found_absent(&self) -> Vec<u32> {
        let mut found = self.found_absent.lock();
        let found = found.as_deref_mut().map(std::mem::take);
        found.unwrap_or_default()
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
            Source::Probes => {
                let queue = topology::dispatcher_queue(&self.name, "probes");
                declare_probes(channel, &queue, &self.routes.probes).await?;
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

/// Publishes, and gives the broker's answer. An error leaves the channel in doubt.
async fn publish_on(
    channel: &Channel,
    message: Outgoing,
) -> Result<Result<(), BrokerError>, BrokerError> {
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
    let unconfirmed = |why: &str| BrokerError::Unconfirmed(why.to_owned());
    match confirm {
        Confirmation::Ack(None) => Ok(Ok(())),
        Confirmation::Ack(Some(returned)) => {
            let returned_id = returned.delivery.properties.message_id().as_ref();
            match returned_id.is_some_and(|returned| returned.as_str() == message.id) {
                true => Ok(Err(BrokerError::Unroutable)),
                false => Err(unconfirmed("a return came for another message")),
            }
        }
        // basic.nack: the message was not taken, and nothing is wrong with the channel.
        Confirmation::Nack(_) => Ok(Err(unconfirmed(
            "refused (its queue is full, or has no leader now)",
        ))),
        Confirmation::NotRequested => Err(unconfirmed("no confirms")),
    }
}
