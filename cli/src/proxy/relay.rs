//! A session: bytes go both ways as they are, until one side ends, the session moves to a new account, or it is cut.
//! A chunk is passed on before the next is read, so nothing is buffered beyond one chunk for each direction.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf, ReadHalf, WriteHalf};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout};

use super::errors::{State, fatal};
use super::frames::{Garbled, message};
use super::leaving::{Leaving, Next};
use super::stream::Stream;
use super::talk::Talk;

/// Bytes that are read at once from a client and from a server.
const FROM_CLIENT: usize = 8 * 1024;
const FROM_SERVER: usize = 16 * 1024;
/// Time for the end of a message that is under way when the session is cut, and for a last message.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// Time for what a server has sent before it ended the connection.
const REST: Duration = Duration::from_secs(5);

const MOVE_HINT: &str = "Connect again: new connections have a new account.";
const CUT_HINT: &str = "A transaction ends at the latest with the lease. Raise the maxTtl of the secret for longer ones.";

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// By its client or its server.
    BySides,
    /// It was idle, and the client was asked to connect again.
    Moved,
    /// It was in use at the end of its lease.
    Cut,
}

/// What both directions of a session share.
struct Link {
    talk: Mutex<Talk>,
    /// A request has ended.
    ready: Notify,
}

impl Link {
    fn talk(&self) -> MutexGuard<'_, Talk> {
        self.talk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn broken(_: Garbled) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "malformed message")
}

/// Relays a session whose greeting was sent. `rest` is what the server has sent behind it.
pub(super) async fn relay(
    client: Stream,
    server: Stream,
    rest: Vec<u8>,
    leaving: &mut Leaving,
) -> Ended {
    let link = Link {
        talk: Mutex::new(Talk::new()),
        ready: Notify::new(),
    };
    let (mut client_in, mut client_out) = tokio::io::split(client);
    let (mut server_in, mut server_out) = tokio::io::split(server);
    let mut from_client = vec![0; FROM_CLIENT];
    let mut from_server = vec![0; FROM_SERVER];
    if !rest.is_empty() && pass(&link, &rest, &mut client_out).await.is_err() {
        return Ended::BySides;
    }
    drop(rest);
    // Read from the client and not passed on yet.
    let mut held = 0;
    let next = loop {
        let next = tokio::select! {
            biased;
            _ = to_client(&link, &mut server_in, &mut client_out, &mut from_server) => break None,
            result = to_server(&link, &mut client_in, &mut server_out, &mut from_client, held) => {
                if result.is_err() {
                    // What the server has sent before it ended the connection still goes to the client.
                    let rest = to_client(&link, &mut server_in, &mut client_out, &mut from_server);
                    let _ = timeout(REST, rest).await;
                }
                break None;
            }
            // It must see its time also when the transfers have used up what the task may do in one turn.
            next = tokio::task::unconstrained(decide(&link, leaving)) => next,
        };
        if next == Next::Move {
            // A request may have come meanwhile.
            match read_now(&mut client_in, &mut from_client).await {
                Some(Ok(0) | Err(_)) => break None,
                Some(Ok(n)) => {
                    held = n;
                    continue;
                }
                None => {}
            }
        }
        break Some(next);
    };
    let ended = match next {
        Some(Next::Move) => {
            let text =
                "terminating connection: its account ends soon, and new connections have a new one";
            let error = fatal(State::AdminShutdown, text, Some(MOVE_HINT));
            let _ = timeout(LAST_WORDS, client_out.write_all(&error)).await;
            Ended::Moved
        }
        Some(Next::Cut) => {
            let open = link.talk().what_is_open();
            cut(
                &link,
                &mut server_in,
                &mut client_out,
                &mut from_server,
                open,
                leaving,
            )
            .await;
            Ended::Cut
        }
        Some(Next::Wait(_)) | None => Ended::BySides,
    };
    let _ = timeout(LAST_WORDS, client_out.shutdown()).await;
    if ended != Ended::Cut {
        // Terminate; a server that works on a request would not read it.
        let _ = timeout(LAST_WORDS, server_out.write_all(&message(b'X', b""))).await;
    }
    let _ = timeout(LAST_WORDS, server_out.shutdown()).await;
    if ended != Ended::BySides {
        // A socket that is closed with unread bytes ends in a reset, and the client may lose the message.
        let discard =
            async { while !matches!(client_in.read(&mut from_client).await, Ok(0) | Err(_)) {} };
        let _ = timeout(LAST_WORDS, discard).await;
    }
    ended
}

/// Passes on what the client sends, beginning with `held` bytes that are in the buffer.
async fn to_server(
    link: &Link,
    from: &mut ReadHalf<Stream>,
    to: &mut WriteHalf<Stream>,
    buffer: &mut [u8],
    mut held: usize,
) -> io::Result<()> {
    loop {
        let n = match held {
            0 => from.read(buffer).await?,
            n => n,
        };
        held = 0;
        if n == 0 {
            return Ok(());
        }
        let followed = link.talk().client(&buffer[..n]);
        followed.map_err(broken)?;
        to.write_all(&buffer[..n]).await?;
        to.flush().await?;
        link.talk().client_sent();
    }
}

/// Passes on what the server sends.
async fn to_client(
    link: &Link,
    from: &mut ReadHalf<Stream>,
    to: &mut WriteHalf<Stream>,
    buffer: &mut [u8],
) -> io::Result<()> {
    loop {
        let n = from.read(buffer).await?;
        if n == 0 {
            return Ok(());
        }
        pass(link, &buffer[..n], to).await?;
    }
}

/// Passes a chunk of the server on.
async fn pass(link: &Link, chunk: &[u8], to: &mut WriteHalf<Stream>) -> io::Result<()> {
    let followed = link.talk().server(chunk);
    followed.map_err(broken)?;
    to.write_all(chunk).await?;
    to.flush().await?;
    let is_idle = {
        let mut talk = link.talk();
        talk.server_sent();
        talk.idle_since().is_some()
    };
    if is_idle {
        link.ready.notify_one();
    }
    Ok(())
}

/// Waits until the session has to move or to be cut.
async fn decide(link: &Link, leaving: &mut Leaving) -> Next {
    loop {
        let idle_since = link.talk().idle_since();
        match leaving.next(Instant::now(), idle_since) {
            Next::Wait(until) => tokio::select! {
                () = sleep_until(until) => {}
                () = link.ready.notified(), if leaving.is_leaving() => {}
                () = leaving.changed() => {}
            },
            decided => return decided,
        }
    }
}

/// What can be read without waiting.
async fn read_now(from: &mut ReadHalf<Stream>, buffer: &mut [u8]) -> Option<io::Result<usize>> {
    poll_fn(|cx| {
        let mut buffer = ReadBuf::new(buffer);
        Poll::Ready(match Pin::new(&mut *from).poll_read(cx, &mut buffer) {
            Poll::Ready(Ok(())) => Some(Ok(buffer.filled().len())),
            Poll::Ready(Err(error)) => Some(Err(error)),
            Poll::Pending => None,
        })
    })
    .await
}

/// Tells the client why its session ends, after the message that is under way, if that ends in time.
async fn cut(
    link: &Link,
    from: &mut ReadHalf<Stream>,
    to: &mut WriteHalf<Stream>,
    buffer: &mut [u8],
    open: &str,
    leaving: &Leaving,
) {
    let why = leaving.why();
    let text = format!("terminating connection: {why}, and {open}");
    let error = fatal(State::AdminShutdown, &text, Some(CUT_HINT));
    let speak = async {
        // A chunk of which only a part was written cannot be completed: its rest is lost.
        if link.talk().can_speak_to_client() {
            return to.write_all(&error).await;
        }
        if link.talk().is_writing_to_client() {
            return Ok(());
        }
        loop {
            let n = from.read(buffer).await?;
            let whole = link.talk().server(&buffer[..n]).map_err(broken)?;
            if n == 0 {
                return Ok(());
            }
            if whole > 0 {
                to.write_all(&buffer[..whole]).await?;
                return to.write_all(&error).await;
            }
            to.write_all(&buffer[..n]).await?;
        }
    };
    let _: Result<io::Result<()>, _> = timeout(LAST_WORDS, speak).await;
    let _ = timeout(LAST_WORDS, to.flush()).await;
}
