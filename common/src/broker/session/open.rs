//! Opens connections, one after another, until the stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use lapin::uri::AMQPUri;
use lapin::{Channel, Connection, ConnectionProperties};
use tokio::sync::{Mutex, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::publish::SPECIMENS;
use super::{DECLARE_TIMEOUT, Session};
use crate::broker::declare::{declare_all, find_queue, has_exchange, unmark_parked};
use crate::broker::login::Access;
use crate::broker::owner::{Taken, claim_first};
use crate::broker::publishers::{Closing, Publishers};
use crate::broker::wire::{Outgoing, Routes};
use crate::broker::{BrokerError, CONNECT_TIMEOUT, Options, Part, RECONNECT_DELAY};
use mayfly_protocol::names::{InstallationId, random_text};
use mayfly_protocol::topology;

/// The pause before a virtual host that belongs to another installation is tried again.
const TAKEN_PAUSE: Duration = Duration::from_secs(5);

/// Reads the login's files again. If one cannot be read, the login stays as it was.
fn read_login(options: &Options, access: &mut Option<Access>) {
    match options.login.read() {
        Ok(read) => *access = Some(read),
        Err(error) => {
            warn!(%error, "the broker's settings cannot be read again; the earlier ones stay in use")
        }
    }
}

/// Counters over all connections of the process.
#[derive(Default)]
pub(in crate::broker) struct Counts {
    /// Messages that could not be read.
    pub(in crate::broker) unreadable: Arc<AtomicU64>,
    /// Connections after the first.
    pub(in crate::broker) reconnects: Arc<AtomicU64>,
    /// Times that delay levels were found without a queue.
    pub(in crate::broker) losses: Arc<AtomicU64>,
}

/// What the process sees of the connection.
pub(in crate::broker) struct States {
    pub(in crate::broker) session: watch::Sender<Option<Arc<Session>>>,
    pub(in crate::broker) taken: watch::Sender<Option<Taken>>,
    /// Whether the first connection was made, or no address gave one.
    pub(in crate::broker) tried: watch::Sender<bool>,
}

pub(in crate::broker) async fn supervise(
    options: Options,
    states: States,
    counts: Counts,
    stop: CancellationToken,
) {
    let mut failures = 0_usize;
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
                info!(broker = place, "connected to the broker");
                counts
                    .reconnects
                    .fetch_add(u64::from(is_again), Ordering::Relaxed);
                is_again = true;
                if !states.hold(Arc::new(session), unused, kept, &stop).await {
                    return;
                }
                warn!(broker = place, "lost the broker; connecting again");
            }
            Err(error) => {
                failures += 1;
                if failures >= access.urls.len() {
                    states.tried.send_replace(true);
                }
                states.failed(error, failures, &place, &stop).await;
            }
        }
        if !pause(&stop).await {
            return;
        }
    }
}

impl States {
    /// Lets the process use the session until it ends, then closes it. `false`: the process stops.
    async fn hold(
        &self,
        session: Arc<Session>,
        unused: mpsc::UnboundedReceiver<Closing>,
        kept: mpsc::Receiver<Outgoing>,
        stop: &CancellationToken,
    ) -> bool {
        self.taken.send_replace(None);
        self.session.send_replace(Some(session.clone()));
        self.tried.send_replace(true);
        tokio::select! {
            () = session.watch(stop) => {}
            () = session.keep_specimens(kept) => {}
            () = session.close_unused(unused) => {}
        }
        self.session.send_replace(None);
        session.ended.cancel();
        let (reason, within) = match stop.is_cancelled() {
            true => ("bye", Duration::from_secs(2)),
            // The connection may still be open, as after a confirm that never came.
            false => ("given up", Duration::from_millis(500)),
        };
        let closing = session.connection.close(200, reason.into());
        let _ = tokio::time::timeout(within, closing).await;
        !stop.is_cancelled()
    }

    /// Logs some of the failures in a row. Waits if the virtual host belongs to another installation.
    async fn failed(
        &self,
        error: BrokerError,
        failures: usize,
        place: &str,
        stop: &CancellationToken,
    ) {
        let BrokerError::Taken(by) = error else {
            // The failure is logged at once, then about every 30 s.
            if failures % 60 == 1 {
                warn!(broker = place, %error, "the broker cannot be reached; trying again");
            }
            return;
        };
        // The failure is logged at once, then about every minute.
        if failures % 12 == 1 {
            error!(broker = place, "{by}");
        }
        self.taken.send_replace(Some(by));
        tokio::select! {
            () = stop.cancelled() => {}
            () = tokio::time::sleep(TAKEN_PAUSE) => {}
        }
    }
}

/// Waits before the next connection. `false`: the process stops.
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
            owner = Some((url.vhost.clone(), *installation));
            let (vhost, channel) = (&url.vhost, &mut admin);
            found_absent =
                claim_and_declare(&connection, channel, (vhost, installation), losses).await?;
            Routes {
                reply_to: Some(topology::dispatcher_queue(&name, "replies")),
                entrances: false,
                entry: AtomicBool::new(true),
                probes: topology::probe_word(&name),
            }
        }
        Part::Engine => engine_routes(&connection, &mut admin).await?,
    };
    let (publishers, unused) = Publishers::new();
    // A dispatcher may have declared one of the two exchanges between the two look-ups.
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
        answers: Mutex::default(),
        broken: Arc::default(),
        ended: CancellationToken::new(),
        unreadable,
    };
    if let Part::Dispatcher(replies, _) = &options.part {
        session.take_replies(replies.clone()).await?;
    }
    // A connection on which no publisher channel can be opened fails here, not at its first publish.
    let mut first = session.publishers.turn().await?;
    first
        .channel(async || session.open_publisher().await)
        .await?;
    first.give_back();
    Ok((session, unused))
}

/// Claims the virtual host for the installation, then declares everything. Returns the delay levels that had no queue.
async fn claim_and_declare(
    connection: &Connection,
    admin: &mut Channel,
    (vhost, installation): (&str, &InstallationId),
    losses: &AtomicU64,
) -> Result<Vec<u32>, BrokerError> {
    // The claim comes before anything else is declared or consumed.
    claim_first(connection, vhost, installation).await?;
    let absent = absent_levels_of(connection, admin).await?;
    if !absent.is_empty() {
        losses.fetch_add(1, Ordering::Relaxed);
        match unmark_parked(admin).await {
            // A user with the permissions of an earlier version cannot delete the mark.
            Err(BrokerError::NotAllowed(_)) => *admin = connection.create_channel().await?,
            unmarked => unmarked?,
        }
    }
    declare_all(admin).await?;
    Ok(absent)
}

/// Finds the exchanges by which an engine parks. The broker closes a channel that looks for an absent exchange.
async fn engine_routes(
    connection: &Connection,
    admin: &mut Channel,
) -> Result<Routes, BrokerError> {
    // If this exchange is absent, a dispatcher of an earlier version has declared the others.
    let entrances = has_exchange(admin, topology::PARK).await?;
    if !entrances {
        *admin = connection.create_channel().await?;
    }
    let entry = has_exchange(admin, topology::ENTRY).await?;
    if !entry {
        *admin = connection.create_channel().await?;
    }
    Ok(Routes {
        reply_to: None,
        entrances,
        entry: AtomicBool::new(entry),
        probes: String::new(),
    })
}

/// The delay levels without a queue. The broker closes a channel that looks for an absent queue.
pub(super) async fn absent_levels_of(
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
