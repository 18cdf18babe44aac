//! The HTTP/1 server of the API and of the admin listeners. A slow client does not keep others out: each part of a
//! connection has limits of size and time, and if there is no room, the least useful connection is closed.
//!
//! `axum::serve` does none of this: it has no timers and takes every connection.

mod listen;
mod refusal;
mod room;
mod seen;
mod tls;
mod watched;

use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

pub use listen::listen;
pub use refusal::Refusal;
pub use room::Room;
use room::{Guests, Place};
use seen::Seen;
pub use tls::{ListenSettings, Listening, Tls, TlsSettings};

/// Largest head of a request, in bytes. A larger head is answered with 431.
const HEAD_MAX_BYTES: usize = 16 * 1024;
/// Most bytes that are read or written at once.
const BUFFER_MAX_BYTES: usize = 16 * 1024;
/// Files and sockets that a process needs besides connections of callers.
const OWN_FILES: u64 = 256;
/// Pause after the system had no socket for a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Time limit of a connection while its handler works. No handler works for an hour.
const LONG: Duration = Duration::from_secs(3600);
/// The answer if there is no room for a connection.
const NO_ROOM: &[u8] = b"HTTP/1.1 429 Too Many Requests\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 95\r\n\r\n{\"code\":429,\"error\":\"quota\",\"message\":\"too many connections at a time; try again in a moment\"}\n";

/// The first byte of TLS: a record of the type `handshake` (RFC 8446, section 5.1).
const HANDSHAKE: u8 = 22;
/// The answer to a request without TLS at a listener with TLS.
const NO_TLS: &[u8] = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: 94\r\n\r\n{\"code\":400,\"error\":\"malformed\",\"message\":\"this address takes TLS only: use https:// for it\"}\n";

/// The address of the sender, as an extension of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer(pub IpAddr);

/// Raises the limit on open files as far as this process may, and returns how many connections that
/// leaves room for.
#[must_use]
pub fn connections_possible() -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    let current = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(_) => limit.current,
    };
    let left = current.unwrap_or(u64::MAX).saturating_sub(OWN_FILES);
    usize::try_from(left).unwrap_or(usize::MAX).max(1)
}

/// Called for every connection that is refused.
pub type Refused = Arc<dyn Fn(Refusal) + Send + Sync>;

/// Serves until `stop`, then finishes the requests in progress.
pub async fn serve(
    listener: TcpListener,
    tls: Option<Tls>,
    router: Router,
    room: Room,
    refused: Refused,
    stop: CancellationToken,
) {
    let guests = Guests::new(room);
    let connections = TaskTracker::new();
    if let Some(tls) = tls.clone() {
        connections.spawn(tls.watch(stop.clone()));
    }
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => break,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                pause_after(&error).await;
                continue;
            }
        };
        match guests.admit(peer.ip(), Instant::now()) {
            Some(place) => {
                let serving = begin(
                    stream,
                    peer,
                    place,
                    tls.clone(),
                    router.clone(),
                    stop.clone(),
                );
                let refused = refused.clone();
                connections.spawn(async move {
                    if let Some(refusal) = serving.await {
                        refused(refusal);
                    }
                });
            }
            None => {
                debug!(%peer, "a connection was refused: all others are being served");
                refused(Refusal::NoRoom);
                if tls.is_none() {
                    // If the answer does not fit into the socket's buffer, the caller only sees the connection end.
                    let _ = stream.try_write(NO_ROOM);
                }
            }
        }
    }
    drop(listener);
    connections.close();
    connections.wait().await;
}

/// Serves a connection from its first byte on. The handshake of TLS and the first head share one limit, and a
/// connection in this phase makes room first. Returns why it was refused, if it was.
async fn begin(
    stream: TcpStream,
    peer: SocketAddr,
    place: Place,
    tls: Option<Tls>,
    router: Router,
    stop: CancellationToken,
) -> Option<Refusal> {
    let socket = |inner: TcpStream| watched::Socket {
        inner,
        seen: place.seen.clone(),
    };
    let Some(tls) = tls else {
        let socket = socket(stream);
        return connection(socket, peer, place, router, stop).await;
    };
    let handshake = async {
        let mut first = [0];
        // The byte stays in the socket, for the handshake.
        if stream.peek(&mut first).await? == 1 && first != [HANDSHAKE] {
            let mut stream = stream;
            // A socket that is closed with unread bytes ends in a reset.
            let _ = stream.try_read(&mut [0; HEAD_MAX_BYTES]);
            stream.write_all(NO_TLS).await?;
            return Err(io::Error::other("a request without TLS"));
        }
        tls.accept(socket(stream)).await
    };
    let limit = place.seen.deadline();
    let limit = limit.unwrap_or_else(|| Instant::now() + seen::HEAD_LIMIT);
    let stream = tokio::select! {
        stream = handshake => match stream {
            Ok(stream) => stream,
            Err(error) => {
                debug!(%peer, %error, "the TLS handshake with a client failed");
                // A client that only tests the port does not count as refused.
                let has_left = error.kind() == io::ErrorKind::UnexpectedEof;
                return (!has_left).then_some(Refusal::NoTls);
            }
        },
        () = place.leave.cancelled() => return Some(Refusal::MadeRoom),
        () = stop.cancelled() => return None,
        () = tokio::time::sleep_until(limit) => {
            debug!(%peer, "a client did not finish the TLS handshake in time");
            return Some(Refusal::TooSlow);
        }
    };
    connection(stream, peer, place, router, stop).await
}

/// Pauses after a failed accept, unless the client caused the failure: without a free socket the next accept fails
/// too.
async fn pause_after(error: &io::Error) {
    let is_clients = matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
    );
    if !is_clients {
        warn!(%error, "a connection was not accepted");
        tokio::time::sleep(ACCEPT_PAUSE).await;
    }
}

/// Serves a connection until it ends, exceeds a limit, or has to make room. Returns why it was refused, if it was.
async fn connection<S: AsyncRead + AsyncWrite + Unpin + 'static>(
    stream: S,
    peer: SocketAddr,
    place: Place,
    router: Router,
    stop: CancellationToken,
) -> Option<Refusal> {
    let seen = place.seen.clone();
    let service = service_fn(|request: Request<Incoming>| {
        answer(router.clone(), request, peer.ip(), seen.clone())
    });
    let stream = watched::Stream {
        inner: stream,
        seen: seen.clone(),
    };
    let serving = http1::Builder::new()
        .max_header_size(HEAD_MAX_BYTES)
        .max_buf_size(BUFFER_MAX_BYTES)
        // Mayfly has its own timers: hyper's timer for the head closes idle connections too.
        .header_read_timeout(None)
        .serve_connection(TokioIo::new(stream), service);
    let mut serving = pin!(serving);
    let mut leave = pin!(place.leave.cancelled());
    let mut stop = pin!(stop.cancelled());
    let (mut leaving, mut stopping) = (false, false);
    let mut limit = pin!(tokio::time::sleep(LONG));
    poll_fn(|cx| {
        if !leaving && leave.as_mut().poll(cx).is_ready() {
            if let Some(worth) = seen.now().worth(Instant::now()) {
                return Poll::Ready(Refusal::of_leaving(worth));
            }
            // A request that arrived at the same time is still answered.
            leaving = true;
            serving.as_mut().graceful_shutdown();
        }
        if !stopping && stop.as_mut().poll(cx).is_ready() {
            stopping = true;
            serving.as_mut().graceful_shutdown();
        }
        if let Poll::Ready(ended) = serving.as_mut().poll(cx) {
            let refusal = ended.as_ref().err().and_then(Refusal::of);
            if let Err(error) = ended {
                debug!(%peer, %error, "a connection ended early");
            }
            return Poll::Ready(refusal);
        }
        let now = Instant::now();
        let due = match seen.deadline() {
            Some(due) => due,
            None if limit.deadline() > now + LONG / 2 => limit.deadline(),
            None => now + LONG,
        };
        if limit.deadline() != due {
            limit.as_mut().reset(due);
        }
        let late = limit.as_mut().poll(cx);
        late.map(|()| Refusal::of_late(&seen))
    })
    .await
}

async fn answer(
    router: Router,
    request: Request<Incoming>,
    peer: IpAddr,
    seen: Arc<Seen>,
) -> Result<Response<watched::Answer>, Infallible> {
    let has_body = !hyper::body::Body::is_end_stream(request.body());
    seen.asked(has_body, Instant::now());
    let mut request = request.map(|body| Body::new(watched::Request::new(body, seen.clone())));
    request.extensions_mut().insert(Peer(peer));
    let answer = TowerToHyperService::new(router).call(request).await?;
    seen.answered(Instant::now());
    Ok(answer.map(|inner| watched::Answer { inner, seen }))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_without_a_handler_is_an_answer() {
        for (text, code, error) in [(NO_ROOM, 429, "quota"), (NO_TLS, 400, "malformed")] {
            let text = std::str::from_utf8(text).unwrap();
            let (head, body) = text.split_once("\r\n\r\n").unwrap();
            assert!(head.contains(&format!("\r\ncontent-length: {}", body.len())));
            let body: serde_json::Value = serde_json::from_str(body).unwrap();
            assert_eq!(
                (&body["code"], &body["error"]),
                (&code.into(), &error.into())
            );
        }
    }

    #[test]
    fn there_is_room_for_connections() {
        assert!(connections_possible() > 100);
    }
}
