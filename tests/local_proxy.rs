//! `mayfly proxy`, run against a system, and clients of it.

use std::path::PathBuf;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_postgres::{Client, NoTls};

use crate::api::Api;
use crate::cli::Cli;
use crate::process::{Process, free_port};
use crate::system::System;
use crate::{eventually, run_dir, seconds, word};

/// A running proxy with one listener on loopback.
pub struct LocalProxy {
    pub process: Process,
    /// The port for clients.
    pub port: u16,
    admin: u16,
    log: PathBuf,
}

impl LocalProxy {
    /// Starts it for a secret, and waits until it is ready.
    pub async fn start(system: &System, path: &str, arguments: &[&str]) -> Self {
        let proxy = Self::unready(system, path, arguments).await;
        proxy.ready().await;
        proxy
    }

    /// Starts it, and waits for its listener only.
    pub async fn unready(system: &System, path: &str, arguments: &[&str]) -> Self {
        let admin = free_port();
        let log = run_dir().join(format!("proxy-{}.log", word()));
        let listen = format!("127.0.0.1:{admin}");
        let mut all = vec!["proxy", path, "--admin-listen", &listen];
        if !arguments.contains(&"--listen") {
            all.extend(["--listen", "127.0.0.1:0"]);
        }
        all.extend(arguments);
        let process = Process::start(&Cli { system }.command(&all), &log);
        let port = eventually("the proxy listens", seconds(20), async || {
            let log = std::fs::read_to_string(&log).unwrap_or_default();
            let line = log.lines().find(|line| line.contains(": listening for "))?;
            let (address, _) = line.split_once(": listening")?;
            Some(address.rsplit_once(':')?.1.parse().unwrap_or(0))
        })
        .await;
        Self {
            process,
            port,
            admin,
            log,
        }
    }

    /// Waits until new sessions get an account.
    pub async fn ready(&self) {
        eventually("the proxy is ready", seconds(30), async || {
            (self.page("/readyz").await?.trim() == "ok").then_some(())
        })
        .await;
    }

    /// A page of its admin listener.
    pub async fn page(&self, path: &str) -> Option<String> {
        Api::new(format!("http://127.0.0.1:{}", self.admin), String::new())
            .try_text(path)
            .await
    }

    /// The sum of a metric's values.
    pub async fn metric(&self, name: &str) -> f64 {
        let text = self.page("/metrics").await.unwrap();
        let lines = text.lines().filter(|line| line.starts_with(name));
        lines
            .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
            .sum()
    }

    /// What it has printed.
    pub fn logged(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The configuration of an application that knows nothing of Mayfly.
    pub fn config(&self) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        config
            .host("127.0.0.1")
            .port(self.port)
            .user("anyone")
            .password("whatever")
            .dbname("anyone")
            .connect_timeout(seconds(40));
        config
    }

    /// Logs in as such an application.
    pub async fn client(&self) -> Client {
        self.try_client().await.unwrap()
    }

    /// The same; it may be refused.
    pub async fn try_client(&self) -> Result<Client, tokio_postgres::Error> {
        connect(&self.config()).await
    }

    /// Sends bytes as the first of a connection, and returns all that comes back until the proxy closes it.
    pub async fn says_to(&self, bytes: &[u8], within: Duration) -> Vec<u8> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        let mut answer = Vec::new();
        let read = stream.read_to_end(&mut answer);
        let ended = tokio::time::timeout(within, read).await;
        // A reset is an end too.
        let _ = ended.expect("the proxy keeps the connection");
        answer
    }
}

/// Logs in; the connection is driven by a task.
pub async fn connect(config: &tokio_postgres::Config) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(async move {
        let _ = connection.await;
    });
    Ok(client)
}

/// A startup packet.
pub fn startup(version: u32, pairs: &[(&str, &str)]) -> Vec<u8> {
    let mut body = version.to_be_bytes().to_vec();
    for (name, value) in pairs {
        body.extend_from_slice(format!("{name}\0{value}\0").as_bytes());
    }
    body.push(0);
    let length = u32::try_from(body.len() + 4).unwrap();
    [&length.to_be_bytes(), body.as_slice()].concat()
}

/// A client that speaks the protocol by hand.
pub struct RawClient {
    stream: TcpStream,
    /// Process id and key, for a cancel request.
    pub key: Vec<u8>,
}

impl RawClient {
    /// Logs in with this version of the protocol, such as `0x3_0002`.
    pub async fn new(proxy: &LocalProxy, version: u32) -> Self {
        Self::at(proxy.port, version).await
    }

    /// The same, at this port.
    pub async fn at(port: u16, version: u32) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let mut client = Self {
            stream,
            key: Vec::new(),
        };
        let packet = startup(version, &[("user", "raw")]);
        client.stream.write_all(&packet).await.unwrap();
        loop {
            match client.message().await {
                (b'K', key) => client.key = key,
                (b'Z', _) => return client,
                (b'E', error) => panic!("{}", String::from_utf8_lossy(&error)),
                _ => {}
            }
        }
    }

    /// The next message of the server: its type and its body.
    pub async fn message(&mut self) -> (u8, Vec<u8>) {
        let kind = self.stream.read_u8().await.unwrap();
        let length = usize::try_from(self.stream.read_u32().await.unwrap()).unwrap();
        let mut body = vec![0; length - 4];
        self.stream.read_exact(&mut body).await.unwrap();
        (kind, body)
    }

    /// Sends a query, and reads nothing.
    pub async fn query(&mut self, sql: &str) {
        self.send(b'Q', &[sql.as_bytes(), b"\0"].concat()).await;
    }

    /// Sends a message.
    pub async fn send(&mut self, kind: u8, body: &[u8]) {
        let length = u32::try_from(body.len() + 4).unwrap();
        let packet = [&[kind], &length.to_be_bytes()[..], body].concat();
        self.stream.write_all(&packet).await.unwrap();
    }

    /// Prepares a statement without a name and without parameters.
    pub async fn prepare_unnamed(&mut self, sql: &str) {
        let body = [b"\0", sql.as_bytes(), b"\0\0\0"].concat();
        self.send(b'P', &body).await;
        self.send(b'S', b"").await;
        self.until(b'Z').await;
    }

    /// Runs it, and gives the first row.
    pub async fn execute_unnamed(&mut self) -> String {
        self.send(b'B', &[0; 8]).await;
        self.send(b'E', &[0; 5]).await;
        self.send(b'S', b"").await;
        let row = self.until(b'D').await;
        self.until(b'Z').await;
        row
    }

    /// Reads up to a message of this type, and returns its body.
    pub async fn until(&mut self, wanted: u8) -> String {
        loop {
            let (kind, body) = self.message().await;
            let text = String::from_utf8_lossy(&body).into_owned();
            if kind == wanted {
                return text;
            }
            assert_ne!(kind, b'E', "{text}");
        }
    }
}
