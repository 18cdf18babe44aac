//! The load generator: clients that send one fixed HTTP request again and again, each on a connection of its own.
//! It parses status and length of an answer and nothing else, because it shares the cores with the system.

use std::borrow::Cow;
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// What clients send.
#[derive(Clone)]
pub struct Target {
    /// Client N uses the port N, modulo their number.
    pub ports: Vec<u16>,
    /// Whole requests. Client N sends the request N, modulo their number.
    pub requests: Vec<Vec<u8>>,
    /// Whether a client uses its connection again.
    pub keep_alive: bool,
    /// Whether each answer must be a success, or else a refusal (401 or 429).
    pub succeeds: bool,
    /// When accounts are due: `TTL` in a request stands for the seconds until then, rounded up.
    pub due: Option<Instant>,
}

/// See [`Target::due`].
pub const TTL: &str = "-TTL-";

impl Target {
    /// A GET of a path with one of these headers; each client has the next header.
    pub fn get(port: u16, path: &str, headers: &[String]) -> Self {
        let request = |header: &String| {
            format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{header}\r\n\r\n")
                .into_bytes()
        };
        Self {
            ports: vec![port],
            requests: headers.iter().map(request).collect(),
            keep_alive: true,
            succeeds: true,
            due: None,
        }
    }

    /// The same with a connection for each request.
    pub fn without_keep_alive(mut self) -> Self {
        self.keep_alive = false;
        for request in &mut self.requests {
            request.truncate(request.len() - 2);
            request.extend_from_slice(b"Connection: close\r\n\r\n");
        }
        self
    }

    /// The same at several ports.
    pub fn at(mut self, ports: &[u16]) -> Self {
        self.ports = ports.to_vec();
        self
    }

    /// The same with accounts that are due in the second that begins then.
    pub fn due(mut self, at: Instant) -> Self {
        self.due = Some(at);
        self
    }

    /// The next request of a client.
    fn request(&self, client: usize) -> Cow<'_, [u8]> {
        let request = &self.requests[client % self.requests.len()];
        let Some(due) = self.due else {
            return request.into();
        };
        let left = due.saturating_duration_since(Instant::now());
        let seconds = (left.as_secs_f64().ceil() as u64).max(1).to_string();
        let text = String::from_utf8_lossy(request).replace(TTL, &seconds);
        text.into_bytes().into()
    }

    /// The same for a request that must be refused.
    pub fn refused(mut self) -> Self {
        self.succeeds = false;
        self
    }
}

/// When clients stop.
#[derive(Clone, Copy)]
pub enum Until {
    /// After this number of requests of all clients.
    Count(usize),
    /// No request begins after this time.
    Time(Duration),
}

/// What a load has measured.
#[derive(Debug, Default)]
pub struct Load {
    /// One for each request, sorted.
    pub latencies: Vec<Duration>,
    /// From the first request to the last answer.
    pub elapsed: Duration,
}

impl Load {
    /// Requests per second.
    pub fn rate(&self) -> f64 {
        self.latencies.len() as f64 / self.elapsed.as_secs_f64()
    }

    /// A percentile of the latencies, in ms.
    pub fn percentile(&self, percent: usize) -> f64 {
        percentile(&self.latencies, percent)
    }
}

/// A percentile of sorted durations, in ms.
pub fn percentile(sorted: &[Duration], percent: usize) -> f64 {
    assert!(!sorted.is_empty(), "nothing was measured");
    sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)].as_secs_f64() * 1000.0
}

/// Runs this number of clients against a target.
///
/// # Panics
/// If an answer is not the expected success or refusal.
pub async fn run(target: &Target, in_flight: usize, until: Until) -> Load {
    let started = Instant::now();
    let mut clients = tokio::task::JoinSet::new();
    for number in 0..in_flight {
        let (target, mut taken) = (target.clone(), Vec::new());
        let most = match until {
            Until::Count(count) => count / in_flight + usize::from(number < count % in_flight),
            Until::Time(_) => usize::MAX,
        };
        clients.spawn(async move {
            let mut kept = None;
            while taken.len() < most {
                if matches!(until, Until::Time(limit) if started.elapsed() >= limit) {
                    break;
                }
                let begun = Instant::now();
                let mut connection = match kept.take() {
                    Some(connection) => connection,
                    None => connect(target.ports[number % target.ports.len()]).await,
                };
                let (status, body) = exchange(&mut connection, &target.request(number)).await;
                taken.push(begun.elapsed());
                let is_right = if target.succeeds {
                    status == 200
                } else {
                    matches!(status, 401 | 429)
                };
                assert!(is_right, "{status}: {}", String::from_utf8_lossy(&body));
                kept = target.keep_alive.then_some(connection);
            }
            taken
        });
    }
    let mut load = Load::default();
    while let Some(taken) = clients.join_next().await {
        load.latencies.extend(taken.unwrap());
    }
    load.elapsed = started.elapsed();
    load.latencies.sort();
    load
}

async fn connect(port: u16) -> BufReader<TcpStream> {
    let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    stream.set_nodelay(true).unwrap();
    BufReader::new(stream)
}

/// Sends a request and reads its answer: status and body.
async fn exchange(connection: &mut BufReader<TcpStream>, request: &[u8]) -> (u16, Vec<u8>) {
    connection.get_mut().write_all(request).await.unwrap();
    let (mut status, mut length, mut line) = (0, None, String::new());
    loop {
        line.clear();
        let read = connection.read_line(&mut line).await.unwrap();
        assert!(read > 0, "the server has closed the connection");
        let text = line.trim_end();
        if text.is_empty() {
            break;
        }
        if let Some(rest) = text.strip_prefix("HTTP/1.1 ") {
            status = rest[..3].parse().unwrap();
        }
        if let Some((name, value)) = text.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse::<usize>().ok();
        }
    }
    // An answer of 204 has no length.
    let mut body = vec![0; length.unwrap_or(0)];
    connection.read_exact(&mut body).await.unwrap();
    (status, body)
}
