//! A session: bytes go both ways as they are, until one side ends, the session moves to a new account, or it is cut.
//! With `--hold` the server's side of it is replaced. A chunk is passed on before the next is read, so nothing is
//! buffered beyond one chunk for each direction.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf, ReadHalf, WriteHalf};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until, timeout};

use super::cancels::{AtServer, Cancellable};
use super::hold::Hold;
use super::leaving::{Leaving, Next};
use super::metrics::Counted;
use super::notes::Notes;
use super::site::Use;
use super::stream::Stream;
use super::talk::Talk;
use super::upstream::LoggedIn;
use super::vanished::{Ends, Vanished};
use super::wires::{Ended, Wires, broken};

/// Time for what a server has sent before it ended the connection.
const REST: Duration = Duration::from_secs(5);

/// The server's side of a client's session.
pub(super) struct Seat<'s> {
    pub(super) usage: Use,
    pub(super) leaving: Leaving,
    pub(super) at_server: AtServer,
    pub(super) cancellable: Cancellable<'s>,
    /// With `--hold`.
    pub(super) hold: Option<Hold>,
    pub(super) vanished: watch::Receiver<Vanished>,
    /// The connections of the client and of the server.
    pub(super) ends: [Option<Ends>; 2],
    pub(super) counted: &'s Counted,
}

/// The state that both directions of a session share.
struct Link {
    talk: Mutex<Talk>,
    /// A request has ended.
    ready: Notify,
    /// Messages for the client that are sent before the next bytes of the server. An idle client is not woken for
    /// them.
    notes: Mutex<Notes>,
}

impl Link {
    fn talk(&self) -> MutexGuard<'_, Talk> {
        self.talk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a session ends.
enum End {
    /// The client or the server ended the session.
    BySides,
    /// The session is idle and has to leave its account.
    Move,
    /// The session is in use, and its account ends.
    Cut,
    /// The server did not report the state of its session, so another session could not take its place.
    SwapFailed(io::Error),
}

/// Relays a session whose greeting was sent.
pub(super) async fn relay(client: Stream, session: LoggedIn, seat: &mut Seat<'_>) -> Ended {
    let link = Link {
        talk: Mutex::new(Talk::new(seat.hold.is_some())),
        ready: Notify::new(),
        notes: Mutex::new(Notes::default()),
    };
    let mut wires = Wires::new(client, session.stream);
    let rest = session.rest;
    if !rest.is_empty() && pass(&link, &rest, &mut wires.client_out).await.is_err() {
        return Ended::BySides;
    }
    drop(rest);
    let end = until_end(&link, seat, &mut wires).await;
    let ended = match end {
        End::BySides => Ended::BySides,
        End::Move => {
            let obstacle = seat.hold.as_ref().and_then(Hold::obstacle);
            wires.ask_to_move(&seat.leaving, obstacle).await
        }
        End::SwapFailed(error) => wires.swap_failed(&error).await,
        End::Cut => {
            wires.cut(&link.talk, &seat.leaving).await;
            Ended::Cut
        }
    };
    wires.close(ended).await;
    ended
}

/// Passes bytes on in both directions, and gives the session other servers, until it ends.
async fn until_end(link: &Link, seat: &mut Seat<'_>, wires: &mut Wires) -> End {
    let Wires {
        client_in,
        client_out,
        server_in,
        server_out,
        from_client,
        from_server,
    } = wires;
    // Read from the client and not passed on yet.
    let mut held = 0;
    loop {
        let next = tokio::select! {
            biased;
            _ = to_client(link, server_in, client_out, from_server) => return End::BySides,
            result = to_server(link, client_in, server_out, from_client, held) => {
                if result.is_err() {
                    // What the server has sent before it ended the connection still goes to the client.
                    let rest = to_client(link, server_in, client_out, from_server);
                    let _ = timeout(REST, rest).await;
                }
                return End::BySides;
            }
            // This future must run in time even if the transfers have used up the task's budget for one turn.
            next = tokio::task::unconstrained(decide(link, seat)) => next,
        };
        // What was read from the client before has been passed on.
        held = 0;
        match next {
            Next::Swap => {
                if let Err(error) = swap(link, seat, server_in, server_out).await {
                    return End::SwapFailed(error);
                }
            }
            // A request may have come meanwhile.
            Next::Move => match read_now(client_in, from_client).await {
                Some(Ok(0) | Err(_)) => return End::BySides,
                Some(Ok(n)) => held = n,
                None => return End::Move,
            },
            Next::Cut => return End::Cut,
            Next::Lose | Next::Wait(_) => return End::BySides,
        }
    }
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
    let notes = link.notes().take();
    if !notes.is_empty() {
        to.write_all(&notes).await?;
    }
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

/// Waits until the session has to move or to be cut, or another session of the server can take its place.
async fn decide(link: &Link, seat: &mut Seat<'_>) -> Next {
    loop {
        let (idle_since, has_set) = {
            let talk = link.talk();
            (talk.idle_since(), talk.has_set())
        };
        let now = Instant::now();
        let until = match (seat.leaving.next(now, idle_since), idle_since) {
            (Next::Wait(until), _) => until,
            (Next::Move, Some(since))
                if let Some(hold) = &mut seat.hold
                    && !seat.leaving.is_last(now) =>
            {
                match hold.next(now, since, has_set) {
                    None => return Next::Swap,
                    Some(until) => until.min(seat.leaving.cut_at()),
                }
            }
            (decided, _) => return decided,
        };
        let (leaving, hold) = (&mut seat.leaving, &mut seat.hold);
        let (vanished, ends) = (&mut seat.vanished, &seat.ends);
        let is_leaving = leaving.is_leaving();
        tokio::select! {
            () = sleep_until(until) => {}
            () = link.ready.notified(), if is_leaving => {}
            () = leaving.changed() => {}
            () = logged_in(hold) => {}
            () = lost(vanished, ends) => return Next::Lose,
        }
    }
}

/// Waits until one of these connections has no peer any more.
async fn lost(vanished: &mut watch::Receiver<Vanished>, ends: &[Option<Ends>; 2]) {
    // An earlier connection may have had the same ports, so only what is found from now on counts.
    while vanished.changed().await.is_ok() {
        let found = vanished.borrow_and_update();
        if ends.iter().flatten().any(|ends| found.contains(ends)) {
            return;
        }
    }
    std::future::pending().await
}

/// Waits for the login of a session that takes the place of the present session.
async fn logged_in(hold: &mut Option<Hold>) {
    match hold {
        Some(hold) => hold.logged_in().await,
        None => std::future::pending().await,
    }
}

/// Replaces an idle session of the server by another one, if that is possible.
///
/// # Errors
/// The connection to the server is broken.
async fn swap(
    link: &Link,
    seat: &mut Seat<'_>,
    server_in: &mut ReadHalf<Stream>,
    server_out: &mut WriteHalf<Stream>,
) -> io::Result<()> {
    let (idle_since, unnamed) = {
        let talk = link.talk();
        (talk.idle_since(), talk.unnamed())
    };
    let (Some(hold), Some(idle_since)) = (&mut seat.hold, idle_since) else {
        return Ok(());
    };
    let mut notes = std::mem::take(&mut *link.notes());
    let swapped = hold
        .swap(server_in, server_out, idle_since, &unnamed, &mut notes)
        .await;
    *link.notes() = notes;
    if let Some(swapped) = swapped? {
        (*server_in, *server_out) = (swapped.from, swapped.to);
        seat.cancellable.point_to(swapped.at_server.clone());
        seat.at_server = swapped.at_server;
        seat.ends[1] = swapped.ends;
        seat.leaving = Leaving::new(swapped.usage.0.clone());
        // From here on the earlier account may end.
        seat.usage = swapped.usage;
        seat.counted.swapped.inc();
    }
    Ok(())
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
