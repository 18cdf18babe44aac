//! Logging in to the server with the account of a lease. What the server may ask for is checked as for an engine
//! (`mayfly_protocol::pg_gate`).

use std::io;
use std::sync::Arc;
use std::time::Duration;

use mayfly_protocol::pg_gate::Gate;
use mayfly_protocol::pg_login::{ChannelBinding as Binding, Refusal, Rule};
use mayfly_protocol::secret::Secret;
use mayfly_protocol::target::{Endpoint, SslMode};
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{
    ChannelBinding, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramSha256,
};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::cancels::AtServer;
use super::end_point::tls_server_end_point;
use super::errors::state_of;
use super::frames::message;
use super::site::Use;
use super::startup::Startup;
use super::stream::{Stream, tune};

/// Maximum time to connect to a single host.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum time to connect to one of several hosts.
const HOST_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum time of a login at one host, after the connection.
const LOGIN_TIMEOUT: Duration = Duration::from_secs(15);
/// Passwords that are hashed at a time for one account.
pub(super) const HASHING: usize = 4;
/// Maximum size of all messages of a login, in bytes.
const LOGIN_MAX: usize = 256 * 1024;
/// Largest process id and key: those of protocol 3.2. They are kept for each session.
const KEY_MAX: usize = 4 + 256;
/// `SSLRequest` (PostgreSQL documentation, "Message Formats").
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];
const CANCEL_CODE: u32 = 80_877_102;

/// An account, and the server it is for.
pub(super) struct Account {
    pub(super) endpoints: Vec<Endpoint>,
    pub(super) database: String,
    pub(super) user: String,
    pub(super) password: Secret,
    pub(super) rule: Rule,
    pub(super) tls: Option<Arc<ClientConfig>>,
    /// Passwords that are hashed at a time.
    pub(super) hashing: Semaphore,
}

/// A session of the server, after its first `ReadyForQuery`.
pub(super) struct LoggedIn {
    pub(super) stream: Stream,
    pub(super) endpoint: Endpoint,
    /// Messages that the client must get before the end of its own login.
    pub(super) negotiation: Vec<u8>,
    /// The server's messages from `AuthenticationOk` up to `ReadyForQuery`.
    pub(super) greeting: Vec<u8>,
    /// What the server has sent after the greeting.
    pub(super) rest: Vec<u8>,
    /// Process id and key, for a `CancelRequest`.
    pub(super) key: Vec<u8>,
}

impl LoggedIn {
    /// The place to which a cancel request for it is sent.
    pub(super) fn at_server(&self, usage: &Use) -> AtServer {
        AtServer {
            upstream: usage.0.clone(),
            endpoint: self.endpoint.clone(),
            key: self.key.clone(),
        }
    }
}

#[cfg(test)]
impl LoggedIn {
    /// A session of the server over this socket.
    pub(super) fn for_tests(socket: UnixStream) -> Self {
        let host = "127.0.0.1".to_owned();
        Self {
            stream: Stream::Unix(socket),
            endpoint: Endpoint { host, port: 1 },
            negotiation: Vec::new(),
            greeting: Vec::new(),
            rest: Vec::new(),
            key: Vec::new(),
        }
    }
}

/// Why there is no session.
#[derive(Debug)]
pub(super) enum NoLogin {
    /// No host was reached, or it did not answer in time. The text names the hosts and why.
    Unreachable(String),
    /// The login was aborted: the server asked for something that is not allowed.
    Aborted(String),
    /// The server's error: the body of its `ErrorResponse`.
    Refused(Vec<u8>),
}

impl NoLogin {
    /// Whether the server does not know the account or its password.
    pub(super) fn is_of_the_account(&self) -> bool {
        match self {
            // invalid_password, invalid_authorization_specification.
            Self::Refused(body) => matches!(state_of(body), Some("28P01" | "28000")),
            Self::Unreachable(_) | Self::Aborted(_) => false,
        }
    }
}

impl Account {
    /// Opens a session at the first host that accepts it and, of several, is not a standby.
    pub(super) async fn log_in(&self, startup: &Startup) -> Result<LoggedIn, NoLogin> {
        let several = self.endpoints.len() > 1;
        let mut refused = None;
        let mut reasons = Vec::new();
        for endpoint in &self.endpoints {
            let stream = match self.connect(endpoint).await {
                Ok(stream) => stream,
                Err(error) => {
                    reasons.push(format!("{endpoint}: {}", reason(&error)));
                    continue;
                }
            };
            let login = self.begin(stream, endpoint, startup);
            match timeout(LOGIN_TIMEOUT, Box::pin(login)).await {
                Ok(Ok(session)) if several && session.is_standby => {
                    reasons.push(format!("{endpoint}: it is a standby"));
                }
                Ok(Ok(session)) => return Ok(session.logged_in),
                Ok(Err(LoginError::Server(body))) => refused = refused.or(Some(body)),
                Ok(Err(LoginError::Io(error))) => {
                    if let Some(refusal) = Refusal::in_error(&error) {
                        return Err(NoLogin::Aborted(format!("{endpoint}: {refusal}")));
                    }
                    reasons.push(format!("{endpoint}: {}", reason(&error)));
                }
                Err(_) => reasons.push(format!(
                    "{endpoint}: the login did not end within {} s",
                    LOGIN_TIMEOUT.as_secs()
                )),
            }
        }
        match refused {
            Some(body) => Err(NoLogin::Refused(body)),
            None => Err(NoLogin::Unreachable(reasons.join("; "))),
        }
    }

    /// Asks the server to cancel the request of the session with this process id and key.
    pub(super) async fn cancel(&self, endpoint: &Endpoint, key: &[u8]) -> io::Result<()> {
        let mut stream = self.connect(endpoint).await?;
        let length = u32::try_from(key.len() + 8).map_err(io::Error::other)?;
        let mut packet = length.to_be_bytes().to_vec();
        packet.extend_from_slice(&CANCEL_CODE.to_be_bytes());
        packet.extend_from_slice(key);
        stream.write_all(&packet).await?;
        stream.flush().await?;
        // The server closes the connection when it has sent the signal.
        let mut end = [0];
        timeout(CONNECT_TIMEOUT, stream.read(&mut end)).await??;
        Ok(())
    }

    async fn connect(&self, endpoint: &Endpoint) -> io::Result<Stream> {
        let limit = match self.endpoints.len() {
            1 => CONNECT_TIMEOUT,
            _ => HOST_TIMEOUT,
        };
        match timeout(limit, Box::pin(self.open(endpoint))).await {
            Ok(opened) => opened,
            Err(_) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("no connection within {} s", limit.as_secs()),
            )),
        }
    }

    async fn open(&self, endpoint: &Endpoint) -> io::Result<Stream> {
        if endpoint.host.starts_with('/') {
            let path = format!("{}/.s.PGSQL.{}", endpoint.host, endpoint.port);
            return UnixStream::connect(path).await.map(Stream::Unix);
        }
        let mut socket = TcpStream::connect((endpoint.host.as_str(), endpoint.port)).await?;
        tune(&socket)?;
        let Some(tls) = &self.tls else {
            return Ok(Stream::Tcp(socket));
        };
        socket.write_all(&SSL_REQUEST).await?;
        // Reads exactly this byte: all that follows must come inside TLS (CVE-2021-23222).
        match socket.read_u8().await? {
            b'S' => {
                let name = ServerName::try_from(endpoint.host.clone()).map_err(io::Error::other)?;
                let connected = TlsConnector::from(tls.clone())
                    .connect(name, socket)
                    .await?;
                Ok(Stream::Tls(Box::new(connected)))
            }
            b'N' if self.rule.sslmode == SslMode::Prefer => Ok(Stream::Tcp(socket)),
            b'N' => Err(io::Error::other("the server offers no TLS")),
            _ => Err(io::Error::other(
                "the server did not answer the request for TLS",
            )),
        }
    }

    async fn begin(
        &self,
        stream: Stream,
        endpoint: &Endpoint,
        startup: &Startup,
    ) -> Result<Session, LoginError> {
        let has_tls = matches!(stream, Stream::Tls(_));
        let mut rule = self.rule;
        if matches!(stream, Stream::Unix(_)) {
            // A Unix socket has no TLS, and the protection asked for does not concern it (libpq, `sslmode`).
            rule.sslmode = SslMode::Disable;
        }
        let mut login = Login {
            account: self,
            rule,
            gate: Gate::new(rule, has_tls),
            stream,
            bytes: Vec::new(),
            at: 0,
            scram: None,
        };
        login
            .stream
            .write_all(&startup.packet(&self.user, &self.database))
            .await?;
        login.stream.flush().await?;
        login.run(endpoint).await
    }
}

/// The innermost reason, for a person.
fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "the server closed the connection".to_owned(),
        _ => error.to_string(),
    }
}

struct Session {
    logged_in: LoggedIn,
    is_standby: bool,
}

enum LoginError {
    Io(io::Error),
    /// The body of an `ErrorResponse`.
    Server(Vec<u8>),
}

impl From<io::Error> for LoginError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn garbled() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "the server does not speak PostgreSQL's protocol",
    )
}

/// A login in progress.
struct Login<'a> {
    account: &'a Account,
    rule: Rule,
    gate: Gate,
    stream: Stream,
    /// What the server has sent and the gate has cleared; `at` is where the next message begins.
    bytes: Vec<u8>,
    at: usize,
    scram: Option<ScramSha256>,
}

impl Login<'_> {
    async fn run(mut self, endpoint: &Endpoint) -> Result<Session, LoginError> {
        let mut negotiation = Vec::new();
        let mut begun = None;
        let mut key = Vec::new();
        let mut is_standby = false;
        loop {
            let at = self.at;
            let (kind, body) = self.next().await?;
            match kind {
                b'R' if begun.is_none() => {
                    if self.answer(&body).await? {
                        begun = Some(at);
                    }
                }
                b'E' => return Err(LoginError::Server(body)),
                // NegotiateProtocolVersion.
                b'v' if begun.is_none() => negotiation.extend_from_slice(&self.bytes[at..self.at]),
                b'K' if body.len() <= KEY_MAX => key = body,
                // ParameterStatus. From PostgreSQL 14 on it shows whether the server is a standby.
                b'S' if body == b"in_hot_standby\0on\0" => is_standby = true,
                b'Z' if let Some(begun) = begun => {
                    let rest = self.bytes.split_off(self.at);
                    let greeting = self.bytes.split_off(begun);
                    return Ok(Session {
                        logged_in: LoggedIn {
                            stream: self.stream,
                            endpoint: endpoint.clone(),
                            negotiation,
                            greeting,
                            rest,
                            key,
                        },
                        is_standby,
                    });
                }
                b'N' | b'S' => {}
                _ => return Err(garbled().into()),
            }
        }
    }

    /// The type and the body of the next message.
    async fn next(&mut self) -> io::Result<(u8, Vec<u8>)> {
        loop {
            if let [kind, a, b, c, d, ..] = self.bytes[self.at..] {
                let length = u32::from_be_bytes([a, b, c, d]);
                let length = usize::try_from(length).map_err(io::Error::other)?;
                if !(4..LOGIN_MAX).contains(&length) {
                    return Err(garbled());
                }
                if let Some(body) = self.bytes[self.at..].get(5..=length) {
                    let body = body.to_vec();
                    self.at += length + 1;
                    return Ok((kind, body));
                }
            }
            if self.bytes.len() > LOGIN_MAX {
                return Err(garbled());
            }
            let mut chunk = [0; 2048];
            match self.stream.read(&mut chunk).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n if self.gate.is_in().is_some() => self.bytes.extend_from_slice(&chunk[..n]),
                n => {
                    self.gate.take(&chunk[..n]).map_err(io::Error::other)?;
                    self.bytes.extend(self.gate.cleared());
                }
            }
        }
    }

    /// Answers a request for authentication that the gate has allowed. Returns whether this was the last request.
    async fn answer(&mut self, body: &[u8]) -> io::Result<bool> {
        let (number, rest) = body.split_first_chunk().ok_or_else(garbled)?;
        let account = self.account;
        let password = account.password.expose().as_bytes();
        let reply = match u32::from_be_bytes(*number) {
            0 => return Ok(true),
            3 => [password, b"\0"].concat(),
            5 => {
                let salt = rest.try_into().map_err(|_| garbled())?;
                let hash = md5_hash(account.user.as_bytes(), password, salt);
                [hash.as_bytes(), b"\0"].concat()
            }
            10 => self.sasl(rest)?,
            11 => {
                let mut scram = self.scram.take().ok_or_else(garbled)?;
                let challenge = rest.to_vec();
                let place = account.hashing.acquire().await;
                let _place = place.map_err(io::Error::other)?;
                // The server chooses the number of rounds, up to a million: about a second.
                let hashed = spawn_blocking(move || scram.update(&challenge).map(|()| scram));
                let scram = self.scram.insert(hashed.await.map_err(io::Error::other)??);
                scram.message().to_vec()
            }
            12 => {
                self.scram.as_mut().ok_or_else(garbled)?.finish(rest)?;
                return Ok(false);
            }
            _ => return Err(garbled()),
        };
        let reply = message(b'p', &reply);
        self.gate.sends(&reply).map_err(io::Error::other)?;
        self.stream.write_all(&reply).await?;
        self.stream.flush().await?;
        Ok(false)
    }

    /// The body of `SASLInitialResponse`: bound to the TLS connection if both sides can.
    fn sasl(&mut self, mechanisms: &[u8]) -> io::Result<Vec<u8>> {
        let has_plus = mechanisms
            .split(|byte| *byte == 0)
            .any(|name| name == SCRAM_SHA_256_PLUS.as_bytes());
        let end_point = match (&self.stream, self.rule.binding()) {
            (Stream::Tls(stream), Binding::Require | Binding::Prefer) => stream
                .get_ref()
                .1
                .peer_certificates()
                .and_then(|chain| tls_server_end_point(chain.first()?)),
            _ => None,
        };
        let (name, binding) = match end_point {
            Some(hash) if has_plus => (
                SCRAM_SHA_256_PLUS,
                ChannelBinding::tls_server_end_point(hash),
            ),
            // This client can bind the login to the connection, but the server did not offer that.
            Some(_) => (SCRAM_SHA_256, ChannelBinding::unrequested()),
            None => (SCRAM_SHA_256, ChannelBinding::unsupported()),
        };
        let scram = ScramSha256::new(self.account.password.expose().as_bytes(), binding);
        let mut body = name.as_bytes().to_vec();
        body.push(0);
        let first = scram.message();
        let length = u32::try_from(first.len()).map_err(io::Error::other)?;
        body.extend_from_slice(&length.to_be_bytes());
        body.extend_from_slice(first);
        self.scram = Some(scram);
        Ok(body)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::startup::{First, parse};
    use super::super::target::account;
    use super::*;
    use crate::keeper::Lease;
    use crate::protection::Protection;
    use serde_json::json;
    use tokio::net::UnixListener;
    use tokio::time::Instant;

    /// The result of a login at a server that gives a key of this length. The server accepts every account.
    async fn with_key(length: usize) -> Result<usize, NoLogin> {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join(".s.PGSQL.1")).unwrap();
        let answer = json!({"data": {"leaseId": "l", "ttl": 60, "host": directory.path(), "port": 1,
            "database": "d", "username": "u", "password": "p"}});
        let lease = Lease::of("db:app", answer, None, Instant::now()).unwrap();
        let account = account(&lease, &Protection::default()).unwrap();
        let serve = async {
            let (mut socket, _) = listener.accept().await.unwrap();
            let startup = socket.read_u32().await.unwrap();
            let mut rest = vec![0; usize::try_from(startup).unwrap() - 4];
            socket.read_exact(&mut rest).await.unwrap();
            let greeting = [
                message(b'R', &[0; 4]),
                message(b'K', &vec![1; length]),
                message(b'Z', b"I"),
            ];
            socket.write_all(&greeting.concat()).await.unwrap();
            socket
        };
        let Ok(First::Session(startup)) = parse(b"\0\x03\0\0user\0u\0\0") else {
            panic!("it is a startup packet");
        };
        let (_socket, session) = tokio::join!(serve, account.log_in(&startup));
        session.map(|session| session.key.len())
    }

    /// A key is kept several times for each session, and clients of the proxy would get it.
    #[tokio::test]
    async fn a_key_that_no_server_gives_is_refused() {
        assert_eq!(with_key(KEY_MAX).await.unwrap(), KEY_MAX);
        let refused = with_key(KEY_MAX + 1).await.unwrap_err();
        assert!(
            matches!(&refused, NoLogin::Unreachable(why) if why.contains("protocol")),
            "{refused:?}"
        );
    }
}
