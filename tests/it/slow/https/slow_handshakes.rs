//! Clients that do not finish a handshake or a request, and clients that do not read.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mayfly_tests::pki::Pki;
use mayfly_tests::seconds;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

use super::{Files, Program, both, pki, trusting};

/// The beginning of a handshake: 5 bytes of the record, 4 of the hello, and not what they promise.
const HALF_A_HELLO: &[u8] = &[22, 3, 1, 2, 0, 1, 0, 1, 252];
/// The time limit of handshake and head together, and more for a busy machine.
const CLOSED_WITHIN: Duration = Duration::from_secs(30);

/// A connection from 127.0.`site`.1.
async fn connect(to: SocketAddr, site: u8) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket
        .bind((Ipv4Addr::new(127, 0, site, 1), 0).into())
        .unwrap();
    socket.connect(to).await.unwrap()
}

/// A connection whose handshake is done.
async fn encrypted(pki: &Pki, to: SocketAddr) -> tokio_rustls::client::TlsStream<TcpStream> {
    let mut roots = rustls::RootCertStore::empty();
    let pem = pki.text("root.crt");
    roots
        .add(CertificateDer::from_pem_slice(pem.as_bytes()).unwrap())
        .unwrap();
    let config = rustls::ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").unwrap();
    let stream = connect(to, 1).await;
    let connector = TlsConnector::from(Arc::new(config));
    connector.connect(name, stream).await.unwrap()
}

/// Waits until the other side has closed.
async fn closed(mut stream: impl AsyncReadExt + Unpin) {
    let mut said = Vec::new();
    let end = stream.read_to_end(&mut said);
    // A reset is an end too.
    let _ = tokio::time::timeout(CLOSED_WITHIN, end)
        .await
        .expect("it is not closed");
}

/// Clients that never finish a handshake, or a head after it, or that do not read: they are closed in time, and
/// nobody else waits for them. Without limits on the handshake twenty of these stop the API for good.
#[tokio::test(flavor = "multi_thread")]
async fn half_a_handshake_shuts_nobody_out() {
    let pki = pki();
    let mut settings = both(&Files::of(&pki));
    settings.push(("MAYFLY__HTTP__MAX_CONNECTIONS".to_owned(), "20".into()));
    let dispatcher = Program::start("mayfly-dispatcher", &settings);
    let client = trusting(&[&pki]).pool_max_idle_per_host(0).build().unwrap();
    dispatcher.healthy(&client).await;

    // While there is room for all, the time limit closes these connections.
    let mut few = JoinSet::new();
    let begun = Instant::now();
    for sent in [b"".as_slice(), HALF_A_HELLO] {
        let mut stream = connect(dispatcher.http, 1).await;
        stream.write_all(sent).await.unwrap();
        few.spawn(closed(stream));
    }
    let mut stream = encrypted(&pki, dispatcher.http).await;
    stream
        .write_all(b"GET /v1/status HTTP/1.1\r\n")
        .await
        .unwrap();
    few.spawn(closed(stream));
    let deaf = encrypted(&pki, dispatcher.http).await;
    few.spawn(async move {
        let mut deaf = deaf;
        let ask = b"GET /v1/status HTTP/1.1\r\nhost: x\r\n\r\n".repeat(100);
        // The answers fill the system's buffers, and then the requests do.
        let asking = async { while deaf.write_all(&ask).await.is_ok() {} };
        tokio::time::timeout(seconds(90), asking)
            .await
            .expect("who does not read is not closed");
    });
    few.join_all().await;
    assert!(begun.elapsed() > seconds(5), "they had room and time");

    // Without room, later clients take their places.
    let mut many = JoinSet::new();
    for n in 0..100 {
        let to = if n % 3 == 0 {
            dispatcher.admin
        } else {
            dispatcher.http
        };
        let mut stream = connect(to, 1 + n % 8).await;
        // The connection may have been closed to make room already.
        let sent: &[u8] = if n % 2 == 0 { b"" } else { HALF_A_HELLO };
        let _ = stream.write_all(sent).await;
        many.spawn(closed(stream));
    }
    for _ in 0..10 {
        let begun = Instant::now();
        assert_eq!(dispatcher.ask(&client).await.unwrap(), 200);
        dispatcher.page(&client, "/healthz").await.unwrap();
        let took = begun.elapsed();
        assert!(took < seconds(20), "{took:?}");
    }
    many.join_all().await;

    // A stop does not wait for such connections.
    let held = connect(dispatcher.http, 1).await;
    let begun = Instant::now();
    let mut dispatcher = dispatcher;
    dispatcher.process.take().unwrap().stop();
    assert!(begun.elapsed() < CLOSED_WITHIN);
    drop(held);
}
