//! A small HTTP listener for probes, and for requests from the same machine. It answers one request on each
//! connection. It has no TLS, because its answers contain no secret.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue, ORIGIN};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::failure::Failure;

/// Maximum number of concurrent connections. Further connections wait.
const CONNECTIONS: usize = 32;
/// The time limit of a connection.
const CONNECTION_SECONDS: u64 = 10;
/// Largest head of a request, in bytes.
const HEAD_BYTES: usize = 16 << 10;
/// Pause after the system had no socket for a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A request to the listener. Its body is not read.
pub(crate) struct Request {
    /// The method in capitals: `GET`, `POST`.
    pub(crate) method: String,
    pub(crate) path: String,
    /// Whether a program of this machine, or of this pod, has sent it over a loopback address. A page in a browser
    /// does not count: browsers send its origin (Fetch standard, 3.2).
    pub(crate) is_local: bool,
}

/// An answer: a status and plain text.
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) body: String,
}

impl Reply {
    pub(crate) fn new(status: u16, body: impl Into<String>) -> Self {
        Self {
            status,
            body: body.into(),
        }
    }
}

/// A listener that is open. It answers from [`Listener::serve`] on.
pub(crate) struct Listener(TcpListener);

impl Listener {
    /// Opens the listener.
    ///
    /// # Errors
    /// The address does not belong to this machine, or is in use.
    pub(crate) async fn open(address: SocketAddr) -> Result<Self, Failure> {
        let listener = TcpListener::bind(address).await;
        listener.map(Self).map_err(|error| {
            Failure::Usage(format!("--listen: cannot listen on {address}: {error}"))
        })
    }

    /// Answers requests. When this is dropped, all connections end.
    pub(crate) async fn serve(
        self,
        answer: impl Fn(&Request) -> Reply + Send + Sync + 'static,
    ) -> Infallible {
        let answer = Arc::new(answer);
        let room = Arc::new(Semaphore::new(CONNECTIONS));
        let mut connections = JoinSet::new();
        loop {
            let place = room.clone().acquire_owned().await;
            let Ok((stream, peer)) = self.0.accept().await else {
                sleep(ACCEPT_PAUSE).await;
                continue;
            };
            let answer = answer.clone();
            connections.spawn(async move {
                let limit = Duration::from_secs(CONNECTION_SECONDS);
                // If the answer fails, the peer only sees the connection end.
                let _ = timeout(limit, connection(stream, peer, &*answer)).await;
                drop(place);
            });
            while connections.try_join_next().is_some() {}
        }
    }
}

async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    answer: &(impl Fn(&Request) -> Reply + Send + Sync),
) -> hyper::Result<()> {
    let service = service_fn(async |request: hyper::Request<Incoming>| {
        let reply = answer(&Request {
            method: request.method().as_str().to_owned(),
            path: request.uri().path().to_owned(),
            is_local: peer.ip().to_canonical().is_loopback()
                && !request.headers().contains_key(ORIGIN),
        });
        let mut response = Response::new(reply.body);
        *response.status_mut() =
            StatusCode::from_u16(reply.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        // This is also the content type of Prometheus' text format 0.0.4.
        let text = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
        response.headers_mut().insert(CONTENT_TYPE, text);
        Ok::<_, Infallible>(response)
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .keep_alive(false)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service)
        .await
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn ask(address: SocketAddr, head: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    #[tokio::test]
    async fn a_page_in_a_browser_is_not_local() {
        let listener = Listener::open("127.0.0.1:0".parse().unwrap())
            .await
            .unwrap();
        let address = listener.0.local_addr().unwrap();
        let serving = tokio::spawn(listener.serve(|request| {
            Reply::new(
                200,
                format!("{} {} {}", request.method, request.path, request.is_local),
            )
        }));
        let plain = ask(address, "POST /quit?x HTTP/1.1\r\nhost: x\r\n\r\n").await;
        assert!(plain.ends_with("POST /quit true"), "{plain}");
        let page = "POST /quit HTTP/1.1\r\nhost: x\r\norigin: https://evil.example\r\n\r\n";
        let page = ask(address, page).await;
        assert!(page.ends_with("POST /quit false"), "{page}");
        let large = format!(
            "GET / HTTP/1.1\r\nx: {}\r\n\r\n",
            "x".repeat(2 * HEAD_BYTES)
        );
        let mut stream = TcpStream::connect(address).await.unwrap();
        let _ = stream.write_all(large.as_bytes()).await;
        let mut refused = Vec::new();
        let _ = stream.read_to_end(&mut refused).await;
        assert!(!String::from_utf8_lossy(&refused).contains(" 200 "));
        serving.abort();
    }
}
