//! Connecting to PostgreSQL with a login that is checked ([`mayfly_protocol::pg_gate`]): the driver gets a
//! stream on which TLS, if any, is negotiated already, and whose first messages have passed the check. Dispatcher and
//! engine share it.

use std::future::Future;
use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::UnixStream;
use tokio::time::timeout;
use tokio_postgres::config::{self, Host, SslNegotiation};
use tokio_postgres::tls::{self, MakeTlsConnect, TlsConnect, TlsStream};
use tokio_postgres::{Client, Config};
use tokio_postgres_rustls::MakeRustlsConnect;

use mayfly_protocol::pg_gate::Gate;
use mayfly_protocol::pg_login::{ChannelBinding, Method, Refusal, Rule};
use mayfly_protocol::target::{SslMode, Target};

/// `SSLRequest` (PostgreSQL documentation, "Message Formats").
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

/// How to log in to a server.
#[derive(Clone)]
pub struct Login {
    rule: Rule,
    tls: Option<MakeRustlsConnect>,
}

/// The task that moves a connection's bytes, until its client is dropped or the server ends it.
pub type Driver = Pin<Box<dyn Future<Output = Result<(), tokio_postgres::Error>> + Send>>;

impl Login {
    /// The login of a target, by this rule.
    ///
    /// # Errors
    /// A malformed certificate or key, or no authorities to verify with; the message names the
    /// field.
    pub fn new(target: &Target, rule: Rule) -> Result<Self, String> {
        let tls = match rule.sslmode {
            SslMode::Disable => None,
            SslMode::Prefer | SslMode::Require | SslMode::VerifyFull => {
                Some(MakeRustlsConnect::new(crate::tls::client_config(target)?))
            }
        };
        Ok(Self { rule, tls })
    }
}

/// Opens a connection to the first host of the configuration that accepts the login, or to its only Unix socket. TLS
/// and channel binding are those of `login`, not those of the configuration. A Unix socket has no TLS, and `sslmode`
/// does not apply to it (PostgreSQL documentation, "Database Connection Control Functions", `sslmode`). The result
/// names the method by which the server accepted the login.
///
/// # Errors
/// The driver's. [`mayfly_protocol::pg_login::Refusal::in_error`] finds the refusal, if the check aborted the login.
pub async fn connect(
    config: &Config,
    login: &Login,
) -> Result<(Client, Driver, Method), tokio_postgres::Error> {
    let method = Arc::new(OnceLock::new());
    let mut login = login.clone();
    if matches!(config.get_hosts(), [Host::Unix(_)]) {
        login.rule.sslmode = SslMode::Disable;
    }
    let binding = login.rule.binding();
    let is_trial = login.rule.is_trial;
    let connector = Connector {
        login,
        method: method.clone(),
    };
    let mut config = config.clone();
    config
        // The connector negotiates TLS. Without `direct` the driver would ask for TLS itself, and continue without
        // it if the server has none.
        .ssl_mode(config::SslMode::Require)
        .ssl_negotiation(SslNegotiation::Direct)
        .channel_binding(match binding {
            ChannelBinding::Require if !is_trial => config::ChannelBinding::Require,
            ChannelBinding::Require | ChannelBinding::Prefer => config::ChannelBinding::Prefer,
            ChannelBinding::Disable => config::ChannelBinding::Disable,
        });
    let (client, driver): (Client, Driver) = match config.get_hosts() {
        // The driver has no TLS on Unix sockets, and would not ask the connector there.
        [Host::Unix(directory)] => {
            let port = config.get_ports().first().copied().unwrap_or(5432);
            let socket = UnixSocket {
                path: directory.join(format!(".s.PGSQL.{port}")),
                limit: config.get_connect_timeout().copied(),
                connector,
            };
            let (client, connection) = config.connect_raw(tokio::io::empty(), socket).await?;
            (client, Box::pin(connection))
        }
        _ => {
            let (client, connection) = config.connect(connector).await?;
            (client, Box::pin(connection))
        }
    };
    let method = method.get().copied().unwrap_or(Method::None);
    Ok((client, driver, method))
}

/// Negotiates TLS on a socket, and checks the login on it.
#[derive(Clone)]
struct Connector {
    login: Login,
    method: Arc<OnceLock<Method>>,
}

/// A [`Connector`] for a server of this name.
struct To {
    connector: Connector,
    domain: String,
}

/// A [`Connector`] for a Unix socket.
struct UnixSocket {
    path: PathBuf,
    limit: Option<Duration>,
    connector: Connector,
}

type Opening<S> = Pin<Box<dyn Future<Output = io::Result<S>> + Send>>;

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> MakeTlsConnect<S> for Connector {
    type Stream = Checked<S>;
    type TlsConnect = To;
    type Error = io::Error;

    fn make_tls_connect(&mut self, domain: &str) -> io::Result<To> {
        Ok(To {
            connector: self.clone(),
            domain: domain.to_owned(),
        })
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> TlsConnect<S> for To {
    type Stream = Checked<S>;
    type Error = io::Error;
    type Future = Opening<Checked<S>>;

    fn connect(self, socket: S) -> Self::Future {
        Box::pin(async move {
            let Self { connector, domain } = self;
            let stream = protect(socket, &connector.login, &domain).await?;
            Ok(connector.check(stream))
        })
    }
}

impl TlsConnect<tokio::io::Empty> for UnixSocket {
    type Stream = Checked<UnixStream>;
    type Error = io::Error;
    type Future = Opening<Self::Stream>;

    fn connect(self, _: tokio::io::Empty) -> Self::Future {
        Box::pin(async move {
            let limit = self.limit.unwrap_or(Duration::MAX);
            let socket = timeout(limit, UnixStream::connect(&self.path)).await;
            let socket = socket.map_err(|_| ErrorKind::TimedOut)??;
            Ok(self.connector.check(Protected::Plain(socket)))
        })
    }
}

impl Connector {
    fn check<S>(self, stream: Protected<S>) -> Checked<S>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let has_tls = matches!(stream, Protected::Tls(_));
        Checked {
            stream,
            gate: Gate::new(self.login.rule, has_tls),
            method: self.method,
            cleared: Vec::new(),
            given: 0,
        }
    }
}

/// Requests TLS from the server, and does the handshake.
async fn protect<S>(mut socket: S, login: &Login, domain: &str) -> io::Result<Protected<S>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let Some(mut tls) = login.tls.clone() else {
        return Ok(Protected::Plain(socket));
    };
    socket.write_all(&SSL_REQUEST).await?;
    // Reads exactly this byte: all that follows must come inside TLS (CVE-2021-23222).
    match socket.read_u8().await? {
        b'S' => {
            let Ok(connect) = MakeTlsConnect::<S>::make_tls_connect(&mut tls, domain);
            let stream = connect.connect(socket).await?;
            Ok(Protected::Tls(Box::new(stream)))
        }
        b'N' if login.rule.sslmode == SslMode::Prefer => Ok(Protected::Plain(socket)),
        b'N' => Err(no_tls("the server offers no TLS")),
        b'E' => Err(no_tls(
            "the server answered the request for TLS with an error",
        )),
        _ => Err(no_tls("the server does not speak PostgreSQL's protocol")),
    }
}

fn no_tls(reason: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, reason)
}

type RustlsStream<S> = <MakeRustlsConnect as MakeTlsConnect<S>>::Stream;

/// A socket, with TLS or without.
enum Protected<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> {
    Plain(S),
    Tls(Box<RustlsStream<S>>),
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> Protected<S> {
    fn read(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

/// A stream whose login is checked. After the login it passes all bytes on.
struct Checked<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> {
    stream: Protected<S>,
    gate: Gate,
    method: Arc<OnceLock<Method>>,
    /// Checked bytes. The driver has read the first `given` of them.
    cleared: Vec<u8>,
    given: usize,
}

fn refused(refusal: Refusal) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, refusal)
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> AsyncRead for Checked<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            let rest = &this.cleared[this.given..];
            if !rest.is_empty() {
                let length = rest.len().min(buffer.remaining());
                buffer.put_slice(&rest[..length]);
                this.given += length;
                return Poll::Ready(Ok(()));
            }
            if this.gate.is_in().is_some() {
                return this.stream.read(cx, buffer);
            }
            let mut bytes = [0; 4096];
            let mut bytes = ReadBuf::new(&mut bytes);
            ready!(this.stream.read(cx, &mut bytes))?;
            if bytes.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            this.gate.take(bytes.filled()).map_err(refused)?;
            if let Some(method) = this.gate.is_in() {
                let _ = this.method.set(method);
            }
            (this.cleared, this.given) = (this.gate.cleared(), 0);
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> AsyncWrite for Checked<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.gate.sends(bytes).map_err(refused)?;
        match &mut this.stream {
            Protected::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Protected::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Protected::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Protected::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Protected::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Protected::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> TlsStream for Checked<S> {
    fn channel_binding(&self) -> tls::ChannelBinding {
        match &self.stream {
            Protected::Plain(_) => tls::ChannelBinding::none(),
            Protected::Tls(stream) => stream.channel_binding(),
        }
    }
}
