//! Clients that are slow, or that never continue: they are closed in time, and nobody else waits for them, neither at
//! the API nor at the admin listener.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::seconds;
use mayfly_tests::system::System;
use reqwest::Method;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;

/// Half of a request.
const HALF: &[u8] = b"GET /v1/status HTTP/1.1\r\nhost: x\r\n";
/// The time limit of a head, and more for a busy machine.
const CLOSED_WITHIN: Duration = Duration::from_secs(20);

/// The address of the API.
fn api(system: &System) -> SocketAddr {
    let address = system.api.address.trim_start_matches("http://");
    address.parse().unwrap()
}

fn admin(system: &System) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, system.admin_port()).into()
}

/// A connection from 127.0.`site`.1.
async fn connect(to: SocketAddr, site: u8) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket
        .bind((Ipv4Addr::new(127, 0, site, 1), 0).into())
        .unwrap();
    socket.connect(to).await.unwrap()
}

/// Connections from several addresses that have sent this and stay open.
async fn hold(to: SocketAddr, count: usize, sent: &'static [u8]) -> Vec<TcpStream> {
    let mut held = Vec::with_capacity(count);
    for n in 0..count {
        let mut stream = connect(to, u8::try_from(1 + n % 8).unwrap()).await;
        // The connection may have been closed to make room already.
        let _ = stream.write_all(sent).await;
        held.push(stream);
    }
    held
}

/// Waits until the other side has closed. Returns what it sent before.
async fn closed(stream: &mut TcpStream, within: Duration) -> Vec<u8> {
    let mut said = Vec::new();
    let end = stream.read_to_end(&mut said);
    // A reset is an end too.
    let _ = tokio::time::timeout(within, end)
        .await
        .expect("it is not closed");
    said
}

/// The longest time of some calls to the API, and to `/readyz`.
async fn slowest(system: &System) -> Duration {
    let mut slowest = Duration::ZERO;
    for _ in 0..20 {
        let begun = Instant::now();
        system.api.ok("/v1/tokens").await;
        assert!(system.is_ready().await);
        slowest = slowest.max(begun.elapsed());
    }
    slowest
}

/// Requests of which half is sent, more of them than the limit on connections: without a limit, 300 of these stopped
/// API and `/readyz`, and each stayed open for ever.
#[tokio::test(flavor = "multi_thread")]
async fn half_sent_requests_shut_nobody_out() {
    let system = System::start().await;
    let before = system.dispatcher().resident_mib();
    let begun = Instant::now();
    let (at_api, at_admin) = tokio::join!(
        hold(api(&system), 1500, HALF),
        hold(admin(&system), 200, HALF)
    );
    let slowest = slowest(&system).await;
    assert!(slowest < seconds(9), "{slowest:?}");
    // A client that connects now is served, although all places are taken.
    let mut late = connect(api(&system), 9).await;
    late.write_all(HALF).await.unwrap();
    late.write_all(b"connection: close\r\n\r\n").await.unwrap();
    let said = closed(&mut late, CLOSED_WITHIN).await;
    assert!(
        said.starts_with(b"HTTP/1.1 401"),
        "{}",
        String::from_utf8_lossy(&said)
    );
    let after = system.dispatcher().resident_mib();
    assert!(after < 128.0, "{before} to {after} MiB");

    let mut ends = JoinSet::new();
    for mut stream in at_api.into_iter().chain(at_admin) {
        ends.spawn(async move { closed(&mut stream, CLOSED_WITHIN).await });
    }
    ends.join_all().await;
    let took = begun.elapsed();
    assert!(
        took > seconds(2),
        "those that had room were closed at once: {took:?}"
    );
    // Each of the 1500 connections is counted: those that made room, and those whose time limit was reached.
    let scrape = system.admin_text("/metrics").await;
    let counted = |reason: &str| -> u32 {
        let series = format!("mayfly_dispatcher_http_refused_total{{reason=\"{reason}\"}} ");
        let counted = scrape.lines().find_map(|line| line.strip_prefix(&series));
        counted.unwrap().parse().unwrap()
    };
    let (made_room, too_slow) = (counted("made_room"), counted("too_slow"));
    assert!(too_slow > 0, "{made_room} made room");
    assert!(
        made_room + too_slow > 1400,
        "{made_room} made room, {too_slow} were too slow"
    );
}

/// A head or a body that comes byte by byte is closed in time too.
#[tokio::test(flavor = "multi_thread")]
async fn a_drip_ends_in_time() {
    let system = System::start().await;
    let drip = |head: String, byte: &'static [u8]| {
        let to = api(&system);
        async move {
            let mut stream = connect(to, 1).await;
            stream.write_all(head.as_bytes()).await.unwrap();
            let begun = Instant::now();
            while stream.write_all(byte).await.is_ok() {
                let mut buffer = [0; 4096];
                let read = stream.read(&mut buffer);
                match tokio::time::timeout(Duration::from_millis(300), read).await {
                    Ok(Ok(0) | Err(_)) => break,
                    Ok(Ok(n)) => return (begun.elapsed(), buffer[..n].to_vec()),
                    Err(_) => {}
                }
                assert!(begun.elapsed() < CLOSED_WITHIN, "it is still dripping");
            }
            (begun.elapsed(), Vec::new())
        }
    };
    let token = &system.api.token;
    let put = format!(
        "PUT /v1/secrets/a HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\ncontent-length: 1000\r\n\r\n"
    );
    let head = "GET /v1/status HTTP/1.1\r\nx: ".to_owned();
    let unknown = put.replace(token.as_str(), "wrong");
    let (head, body, unknown) =
        tokio::join!(drip(head, b"x"), drip(put, b" "), drip(unknown, b" "));
    assert!(
        head.0 > seconds(8),
        "a slow head was cut off after {:?}",
        head.0
    );
    assert!(
        body.0 > seconds(8),
        "a slow body was cut off after {:?}",
        body.0
    );
    let said = String::from_utf8_lossy(&body.1);
    assert!(said.contains("did not arrive within 10 s"), "{said}");
    // The body of a request without a token is not waited for.
    let said = String::from_utf8_lossy(&unknown.1);
    assert!(
        unknown.0 < seconds(7) && said.starts_with("HTTP/1.1 401"),
        "{said}"
    );
}

/// A client that sends requests without a pause, and never reads.
#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_read_is_closed() {
    let system = System::start().await;
    let asking = async {
        let mut stream = connect(api(&system), 1).await;
        let ask = b"GET /v1/status HTTP/1.1\r\nhost: x\r\n\r\n".repeat(500);
        let begun = Instant::now();
        // The answers fill the system's buffers, and then the requests do.
        while stream.write_all(&ask).await.is_ok() {
            assert!(begun.elapsed() < seconds(60), "it is never closed");
        }
    };
    tokio::time::timeout(seconds(90), asking)
        .await
        .expect("it is never closed");
    assert!(slowest(&system).await < seconds(9));
}

#[tokio::test]
async fn heads_are_limited() {
    let system = System::start().await;
    let ask = async |size: usize| {
        let filler = ("x-filler", &*"x".repeat(size));
        let address = format!("{}/v1/status", system.api.address);
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let asked = client.get(address).header(filler.0, filler.1);
        asked.send().await.unwrap().status().as_u16()
    };
    assert_eq!((ask(8_000).await, ask(40_000).await), (401, 431));
}

/// An address at its limit makes room among its own connections, not among others'.
#[tokio::test(flavor = "multi_thread")]
async fn an_address_has_only_its_part() {
    let limits = [
        ("MAYFLY__HTTP__MAX_CONNECTIONS", "12"),
        ("MAYFLY__HTTP__MAX_CONNECTIONS_PER_ADDRESS", "4"),
    ];
    let system = System::start_with(Rabbit::shared(), &limits).await;
    let to = api(&system);
    // Four connections are idle and kept alive.
    let mut idle = Vec::new();
    for _ in 0..4 {
        let mut stream = connect(to, 1).await;
        stream
            .write_all(b"HEAD /v1/status HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .unwrap();
        let mut buffer = [0; 1024];
        assert!(stream.read(&mut buffer).await.unwrap() > 0);
        idle.push(stream);
    }
    // Another connection of the address takes the place of an idle one. Usually this is the oldest. On a busy machine
    // the system may note the end of its answer later than that of the others.
    let mut fifth = connect(to, 1).await;
    fifth.write_all(HALF).await.unwrap();
    let closing = idle
        .iter_mut()
        .map(|stream| Box::pin(closed(stream, CLOSED_WITHIN)));
    let (_, which, waiting) = futures_util::future::select_all(closing).await;
    drop(waiting);
    idle.remove(which);
    // The others stay, and other addresses get in.
    for stream in &mut idle {
        stream
            .write_all(b"GET /v1/status HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .unwrap();
        let mut buffer = [0; 1024];
        let n = stream.read(&mut buffer).await.unwrap();
        assert!(buffer[..n].starts_with(b"HTTP/1.1 401"));
    }
    let (status, _) = system
        .api
        .try_call(Method::POST, "/v1/pools", Some(json!({"name": "x"})))
        .await
        .unwrap();
    assert_eq!(status, 201);
}

/// A dispatcher that stops does not wait for slow clients.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_does_not_wait_for_the_slow() {
    let mut system = System::start().await;
    let held = hold(api(&system), 20, HALF).await;
    let begun = Instant::now();
    system.stop_dispatcher();
    let took = begun.elapsed();
    assert!(took < CLOSED_WITHIN, "{took:?}");
    drop(held);
}
