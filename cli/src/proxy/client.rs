//! A client, from its first packet to the end of its session.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};

use super::cancels::{Cancels, own_key, put_key};
use super::errors::{State, fatal};
use super::frames::message;
use super::hold::Hold;
use super::leaving::Leaving;
use super::metrics::Reason;
use super::relay::{Seat, relay};
use super::scram::{Exchange, MECHANISM, Verifier};
use super::site::{Site, Use};
use super::startup::{self, First, Startup};
use super::stream::Stream;
use super::upstream::LoggedIn;
use super::vanished::Vanished;
use super::wires::Ended;

/// Maximum time until a client has sent its first packet and, if it is requested, its password.
const STARTUP_TIMEOUT: Duration = Duration::from_secs(10);
/// Clients ask for TLS and for GSSAPI encryption at most once each.
const ENCRYPTION_TRIES: usize = 2;
/// Largest message of a client's login, in bytes.
const PASSWORD_MAX: usize = 4096;
/// Pause before a wrong password is answered.
const WRONG_PASSWORD: Duration = Duration::from_millis(500);
/// Maximum time of a last message to a client.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);
/// Maximum time of a cancel request at the server.
const CANCEL: Duration = Duration::from_secs(10);

/// The state that all clients of the process share.
pub(super) struct Shared {
    cancels: Cancels,
    /// Places for sessions, `most` in all.
    sessions: Arc<Semaphore>,
    most: usize,
    vanished: watch::Sender<Vanished>,
}

impl Shared {
    /// Shared state with `most` places for sessions. A session ends when one of its peers is in `vanished`.
    pub(super) fn new(most: usize, vanished: watch::Sender<Vanished>) -> Self {
        Self {
            vanished,
            cancels: Cancels::default(),
            sessions: Arc::new(Semaphore::new(most)),
            most,
        }
    }
}

/// Serves a client until its session ends.
pub(super) async fn serve(mut stream: Stream, site: Arc<Site>, shared: Arc<Shared>) {
    let Ok(place) = site.starting.clone().try_acquire_owned() else {
        site.counted.refused(Reason::Limit);
        let text = "mayfly proxy is at its limit of sessions that are starting";
        return say(&mut stream, &fatal(State::TooManyConnections, text, None)).await;
    };
    let first = timeout(STARTUP_TIMEOUT, first(&mut stream, &site)).await;
    let startup = match first {
        Ok(Ok(First::Session(startup))) => startup,
        Ok(Ok(First::Cancel(key))) => return cancel(&shared, &key).await,
        Ok(Ok(First::Encryption) | Err(None)) | Err(_) => {
            return site.counted.refused(Reason::Startup);
        }
        Ok(Err(Some(error))) => return say(&mut stream, &error).await,
    };
    let Ok(_session) = shared.sessions.clone().try_acquire_owned() else {
        site.counted.refused(Reason::Limit);
        let text = format!("mayfly proxy has {} sessions, its limit", shared.most);
        return say(&mut stream, &fatal(State::TooManyConnections, &text, None)).await;
    };
    // The states of a login are larger than those of the session that follows, so they are freed after the login.
    let opened = Box::pin(open(&mut stream, &site, &startup)).await;
    drop(place);
    let (usage, mut session, key) = match opened {
        Ok(opened) => opened,
        Err(error) => return say(&mut stream, &error).await,
    };
    let greeting = std::mem::take(&mut session.greeting);
    let hold = site
        .holds
        .then(|| Hold::new(site.clone(), startup, &greeting));
    drop(greeting);
    let at_server = session.at_server(&usage);
    let mut seat = Seat {
        cancellable: shared.cancels.enter(key, at_server.clone()),
        at_server,
        leaving: Leaving::new(usage.0.clone()),
        usage,
        hold,
        vanished: shared.vanished.subscribe(),
        ends: [stream.ends(), session.stream.ends()],
        counted: &site.counted,
    };
    site.counted.opened.inc();
    match relay(stream, session, &mut seat).await {
        Ended::BySides => {}
        Ended::Moved => site.counted.moved.inc(),
        Ended::Cut => {
            site.counted.cut.inc();
            // Nobody reads the result of a request that the server still works on.
            let _ = timeout(CLOSE_LIMIT, seat.at_server.cancel()).await;
        }
    }
}

/// Reads packets up to the first one that does not request encryption. If clients need a password, the client has
/// proved it by then.
async fn first(stream: &mut Stream, site: &Site) -> Result<First, Option<Vec<u8>>> {
    for _ in 0..=ENCRYPTION_TRIES {
        let packet = packet(stream).await.map_err(|_| None)?;
        let parsed = startup::parse(&packet);
        let parsed = parsed.inspect_err(|error| {
            if error.is_some() {
                site.counted.refused(Reason::Startup);
            }
        });
        match parsed? {
            First::Encryption => {
                // The proxy offers neither TLS nor GSSAPI: the connection is on this machine, or the network is
                // trusted.
                stream.write_all(b"N").await.map_err(|_| None)?;
            }
            First::Session(startup) => {
                if let Some(password) = &site.password {
                    let proved = prove(stream, password).await.map_err(|_| None)?;
                    if !proved {
                        site.counted.refused(Reason::Password);
                        sleep(WRONG_PASSWORD).await;
                        let text = "password authentication failed at mayfly proxy";
                        return Err(Some(fatal(State::InvalidPassword, text, None)));
                    }
                }
                return Ok(First::Session(startup));
            }
            cancel @ First::Cancel(_) => return Ok(cancel),
        }
    }
    Err(None)
}

/// A packet of the start, without its length.
async fn packet(stream: &mut Stream) -> io::Result<Vec<u8>> {
    let length = usize::try_from(stream.read_u32().await?).map_err(io::Error::other)?;
    if !(startup::PACKET_MIN..=startup::PACKET_MAX).contains(&length) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut packet = vec![0; length - 4];
    stream.read_exact(&mut packet).await?;
    Ok(packet)
}

/// Asks for the password by SCRAM (PostgreSQL documentation, "SASL Authentication"). Returns whether it was right.
async fn prove(stream: &mut Stream, verifier: &Verifier) -> io::Result<bool> {
    let request = |code: u32, data: &[u8]| message(b'R', &[&code.to_be_bytes(), data].concat());
    let offered = format!("{MECHANISM}\0\0");
    stream.write_all(&request(10, offered.as_bytes())).await?;
    let initial = password_message(stream).await?;
    // The mechanism, a zero byte, the length of the message, the message.
    let chosen = format!("{MECHANISM}\0");
    let Some(first) = initial
        .strip_prefix(chosen.as_bytes())
        .and_then(|it| it.get(4..))
    else {
        return Ok(false);
    };
    let Some(exchange) = Exchange::begin(verifier, first) else {
        return Ok(false);
    };
    stream
        .write_all(&request(11, exchange.server_first().as_bytes()))
        .await?;
    match exchange.finish(&password_message(stream).await?) {
        Some(last) => {
            stream.write_all(&request(12, last.as_bytes())).await?;
            Ok(true)
        }
        None => Ok(false),
    }
}

async fn password_message(stream: &mut Stream) -> io::Result<Vec<u8>> {
    let kind = stream.read_u8().await?;
    let length = usize::try_from(stream.read_u32().await?).map_err(io::Error::other)?;
    if kind != b'p' || !(4..=PASSWORD_MAX).contains(&length) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut body = vec![0; length - 4];
    stream.read_exact(&mut body).await?;
    Ok(body)
}

/// Opens the server's session and sends the greeting to the client. Returns the key that the client gets. An error
/// is a message for the client.
async fn open(
    stream: &mut Stream,
    site: &Site,
    startup: &Startup,
) -> Result<(Use, LoggedIn, Vec<u8>), Vec<u8>> {
    let (usage, mut session) = site.log_in(startup).await?;
    let mut greeting = std::mem::take(&mut session.negotiation);
    greeting.extend_from_slice(&session.greeting);
    let key = match site.holds {
        // The server's cancel key is valid for only one of the sessions that this client will have.
        true => {
            let own = own_key(&session.key);
            put_key(&mut greeting, &session.key, &own);
            own
        }
        false => session.key.clone(),
    };
    // The relay notices a client that has left.
    let _ = timeout(STARTUP_TIMEOUT, stream.write_all(&greeting)).await;
    Ok((usage, session, key))
}

/// Passes a cancel request on to the server of its session. A client learns nothing, as with PostgreSQL.
async fn cancel(shared: &Shared, key: &[u8]) {
    if let Some(session) = shared.cancels.find(key) {
        let _ = timeout(CANCEL, session.cancel()).await;
    }
}

async fn say(stream: &mut Stream, error: &[u8]) {
    let say = async {
        stream.write_all(error).await?;
        stream.shutdown().await
    };
    let _ = timeout(CLOSE_LIMIT, say).await;
}
