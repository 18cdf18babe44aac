//! Sessions of drivers that were recorded, changed at random places, and sent through the framing and through a whole
//! relay. The changes are the same in each run. `recorded` has what psql (COPY both ways, a cursor, LISTEN), pgbench
//! (prepared statements), asyncpg (unnamed statements, portals) and psycopg (a pipeline) and PostgreSQL 15 have sent
//! each other after the login.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::timeout;

use super::cancels::Cancels;
use super::frames::{Frames, Garbled, KEPT};
use super::leaving::Leaving;
use super::metrics::Metrics;
use super::relay::{Seat, relay};
use super::site::Use;
use super::stream::Stream;
use super::talk::Talk;
use super::upstream::LoggedIn;
use super::wires::Ended;

/// What a client and a server have sent.
const RECORDED: [(&[u8], &[u8]); 4] = [
    (
        include_bytes!("recorded/psql.client"),
        include_bytes!("recorded/psql.server"),
    ),
    (
        include_bytes!("recorded/pgbench.client"),
        include_bytes!("recorded/pgbench.server"),
    ),
    (
        include_bytes!("recorded/asyncpg.client"),
        include_bytes!("recorded/asyncpg.server"),
    ),
    (
        include_bytes!("recorded/psycopg.client"),
        include_bytes!("recorded/psycopg.server"),
    ),
];
const FRAMING_CASES: u64 = 20_000;
const RELAY_CASES: u64 = 400;
const LIMIT: Duration = Duration::from_secs(60);

/// Changes a stream at up to four places: a byte, a length, a part that is left out, sent twice or cut off.
fn change(stream: &[u8], random: &mut SmallRng) -> Vec<u8> {
    let mut changed = stream.to_vec();
    for _ in 0..random.random_range(0..=4) {
        if changed.is_empty() {
            break;
        }
        let at = random.random_range(0..changed.len());
        let end = (at + random.random_range(1..40)).min(changed.len());
        match random.random_range(0..6) {
            0 => changed[at] = random.random(),
            1 => changed[at] ^= 1 << random.random_range(0..8),
            2 => {
                let length: u32 = match random.random_range(0..3) {
                    0 => random.random_range(0..9),
                    1 => random.random_range(0..5000),
                    _ => random.random(),
                };
                let bytes = length.to_be_bytes();
                let width = bytes.len().min(changed.len() - at);
                changed[at..][..width].copy_from_slice(&bytes[..width]);
            }
            3 => drop(changed.drain(at..end)),
            4 => {
                let again = changed[at..end].to_vec();
                changed.splice(at..at, again);
            }
            _ => changed.truncate(at),
        }
    }
    changed
}

/// Cuts a stream into chunks.
fn chunks(stream: &[u8], random: &mut SmallRng) -> Vec<Vec<u8>> {
    let most = random.random_range(1..400);
    let mut rest = stream;
    let mut chunks = Vec::new();
    while !rest.is_empty() {
        let (chunk, after) = rest.split_at(random.random_range(1..=most).min(rest.len()));
        chunks.push(chunk.to_vec());
        rest = after;
    }
    chunks
}

/// Types of messages, and the beginnings of their bodies.
type Messages = Vec<(u8, Vec<u8>)>;

/// The messages of a whole stream, and whether none is malformed.
fn messages(mut stream: &[u8]) -> (Messages, Result<(), Garbled>) {
    let mut found = Vec::new();
    while let [kind, a, b, c, d, rest @ ..] = stream {
        let length = u32::from_be_bytes([*a, *b, *c, *d]);
        if !(4..=0x4000_0000).contains(&length) {
            return (found, Err(Garbled));
        }
        let Some((body, after)) = rest.split_at_checked(length as usize - 4) else {
            break;
        };
        found.push((*kind, body[..body.len().min(KEPT)].to_vec()));
        stream = after;
    }
    (found, Ok(()))
}

#[test]
fn changed_sessions_are_framed_as_a_plain_reader_does() {
    let mut random = SmallRng::seed_from_u64(14);
    for case in 0..FRAMING_CASES {
        let (client, server) = RECORDED[random.random_range(0..RECORDED.len())];
        let stream = change([client, server][random.random_range(0..2)], &mut random);
        let (expected, result) = messages(&stream);
        let (mut frames, mut seen) = (Frames::default(), Vec::new());
        let followed = chunks(&stream, &mut random).iter().try_for_each(|chunk| {
            let follow = frames.follow(
                chunk,
                |_| KEPT,
                |kind, body| seen.push((kind, body.to_vec())),
            );
            follow.map(drop)
        });
        assert_eq!((seen, followed), (expected, result), "case {case}");
    }
}

/// Whatever both sides send, a session with an open request, or in a transaction, does not count as idle.
#[test]
fn no_changed_session_is_idle_in_a_request() {
    let mut random = SmallRng::seed_from_u64(15);
    let mut idle = 0;
    for case in 0..FRAMING_CASES {
        let (client, server) = RECORDED[random.random_range(0..RECORDED.len())];
        let client = chunks(&change(client, &mut random), &mut random);
        let server = chunks(&change(server, &mut random), &mut random);
        let mut talk = Talk::new(true);
        let (mut asked, mut answered) = (Vec::new(), Vec::new());
        let (mut client, mut server) = (client.into_iter(), server.into_iter());
        loop {
            let is_client: bool = random.random();
            let next = match is_client {
                true => client.next(),
                false => server.next(),
            };
            let Some(chunk) = next else { break };
            let followed = match is_client {
                true => {
                    asked.extend_from_slice(&chunk);
                    talk.client(&chunk)
                }
                false => {
                    answered.extend_from_slice(&chunk);
                    talk.server(&chunk).map(drop)
                }
            };
            talk.client_sent();
            talk.server_sent();
            if followed.is_err() {
                break;
            }
            if talk.idle_since().is_some() {
                idle += 1;
                let (asked, _) = messages(&asked);
                let (answered, _) = messages(&answered);
                let last = answered.iter().rfind(|(kind, _)| *kind == b'Z');
                assert!(
                    last.is_none_or(|(_, status)| status.first() == Some(&b'I')),
                    "case {case}: idle in a transaction"
                );
                let last = asked.iter().rfind(|(kind, _)| b"QFSPBDEHC".contains(kind));
                assert!(
                    last.is_none_or(|(kind, _)| b"QFS".contains(kind)),
                    "case {case}: idle before a Sync"
                );
            }
        }
    }
    assert!(idle > 1000, "{idle}");
}

/// A relay between two pairs of sockets: what came out for the client and for the server, and how it ended.
async fn relayed(client: Vec<Vec<u8>>, server: Vec<Vec<u8>>) -> (Vec<u8>, Vec<u8>, Ended) {
    let (near, at_client) = UnixStream::pair().unwrap();
    let (far, at_server) = UnixStream::pair().unwrap();
    let (cancels, metrics) = (Cancels::default(), Metrics::new().unwrap());
    let counted = metrics.of("l");
    let usage = Use::for_tests();
    let session = LoggedIn::for_tests(far);
    let at = session.at_server(&usage);
    let mut seat = Seat {
        cancellable: cancels.enter(Vec::new(), at.clone()),
        at_server: at,
        leaving: Leaving::new(usage.0.clone()),
        usage,
        hold: None,
        vanished: watch::Sender::default().subscribe(),
        ends: [None, None],
        counted: &counted,
    };
    let speak = |mut socket: UnixStream, chunks: Vec<Vec<u8>>| async move {
        let (mut from, mut to) = socket.split();
        let write = async {
            for chunk in chunks {
                if to.write_all(&chunk).await.is_err() {
                    break;
                }
            }
            // The other half of the socket stays open.
            let _ = to.shutdown().await;
        };
        let mut read = Vec::new();
        let ((), _) = tokio::join!(write, from.read_to_end(&mut read));
        read
    };
    let all = async {
        tokio::join!(
            relay(Stream::Unix(near), session, &mut seat),
            speak(at_client, client),
            speak(at_server, server)
        )
    };
    let (ended, to_client, to_server) = timeout(LIMIT, all).await.expect("the relay does not end");
    (to_client, to_server, ended)
}

/// Each side gets a beginning of what the other has sent, and nothing else but the end of the session.
#[tokio::test]
async fn changed_sessions_pass_unchanged_and_end() {
    const TERMINATE: &[u8] = b"X\0\0\0\x04";
    let mut random = SmallRng::seed_from_u64(16);
    for case in 0..RELAY_CASES {
        let (client, server) = RECORDED[random.random_range(0..RECORDED.len())];
        let (client, server) = (change(client, &mut random), change(server, &mut random));
        let sent = (chunks(&client, &mut random), chunks(&server, &mut random));
        let (to_client, to_server, ended) = relayed(sent.0, sent.1).await;
        assert_eq!(ended, Ended::BySides, "case {case}");
        assert!(server.starts_with(&to_client), "case {case}");
        let passed = to_server.strip_suffix(TERMINATE).unwrap_or(&to_server);
        assert!(
            client.starts_with(passed) || client.starts_with(&to_server),
            "case {case}"
        );
    }
}

/// A client that reads nothing: the server's bytes wait at the server.
#[tokio::test]
async fn what_a_client_does_not_read_is_not_taken_from_the_server() {
    const ROW: usize = 8 * 1024;
    let (near, _at_client) = UnixStream::pair().unwrap();
    let (far, mut at_server) = UnixStream::pair().unwrap();
    let (cancels, metrics) = (Cancels::default(), Metrics::new().unwrap());
    let counted = metrics.of("l");
    let usage = Use::for_tests();
    let session = LoggedIn::for_tests(far);
    let at = session.at_server(&usage);
    let mut seat = Seat {
        cancellable: cancels.enter(Vec::new(), at.clone()),
        at_server: at,
        leaving: Leaving::new(usage.0.clone()),
        usage,
        hold: None,
        vanished: watch::Sender::default().subscribe(),
        ends: [None, None],
        counted: &counted,
    };
    let row = super::frames::message(b'D', &[0; ROW]);
    let mut taken = 0;
    let write = async {
        // A socket's own buffers hold a few hundred KB.
        while let Ok(Ok(())) = timeout(Duration::from_millis(500), at_server.write_all(&row)).await
        {
            taken += ROW;
            assert!(taken < 8 * 1024 * 1024, "{taken} bytes are somewhere");
        }
    };
    tokio::select! {
        ended = relay(Stream::Unix(near), session, &mut seat) => panic!("{ended:?}"),
        () = write => {}
    }
    assert!(taken > 0);
}
