//! Both connections of a session, and how they end: with a message that tells the client why, if the proxy ends them.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::time::timeout;

use super::errors::{State, fatal};
use super::frames::{Garbled, message};
use super::leaving::Leaving;
use super::stream::Stream;
use super::talk::Talk;

/// Bytes that are read at once from a client and from a server.
const FROM_CLIENT: usize = 8 * 1024;
const FROM_SERVER: usize = 16 * 1024;
/// Time for the end of a message that is in progress when the session is cut, and for a last message.
const CLOSE_LIMIT: Duration = Duration::from_millis(500);

const MOVE_HINT: &str = "Connect again: new connections get a new account.";
const HOLD_HINT: &str = "A session with such a state does not get a new account. End the state before the end of its lease, or connect again.";
const CUT_HINT: &str = "A transaction ends at the latest with the lease. Raise the maxTtl of the secret for longer ones.";

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// The client or the server ended the session.
    BySides,
    /// The session was idle, and the client was asked to connect again.
    Moved,
    /// The session was in use at the end of its lease.
    Cut,
}

/// The connections of a session to its client and to its server, and a chunk of each.
pub(super) struct Wires {
    pub(super) client_in: ReadHalf<Stream>,
    pub(super) client_out: WriteHalf<Stream>,
    pub(super) server_in: ReadHalf<Stream>,
    pub(super) server_out: WriteHalf<Stream>,
    pub(super) from_client: Vec<u8>,
    pub(super) from_server: Vec<u8>,
}

pub(super) fn broken(_: Garbled) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "malformed message")
}

fn lock(talk: &Mutex<Talk>) -> MutexGuard<'_, Talk> {
    talk.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Wires {
    pub(super) fn new(client: Stream, server: Stream) -> Self {
        let (client_in, client_out) = tokio::io::split(client);
        let (server_in, server_out) = tokio::io::split(server);
        Self {
            client_in,
            client_out,
            server_in,
            server_out,
            from_client: vec![0; FROM_CLIENT],
            from_server: vec![0; FROM_SERVER],
        }
    }

    /// Asks an idle client to connect again. With `--hold`, names the state that kept the session from a new account.
    pub(super) async fn ask_to_move(&mut self, leaving: &Leaving, obstacle: Option<&str>) -> Ended {
        let (text, hint, ended) = match obstacle {
            Some(obstacle) => {
                let why = leaving.why();
                let text = format!("terminating connection: {why}, and the session {obstacle}");
                (text, HOLD_HINT, Ended::Cut)
            }
            None => {
                let text = "terminating connection: its account ends soon, and new connections get a new account";
                (text.to_owned(), MOVE_HINT, Ended::Moved)
            }
        };
        self.tell(&text, hint).await;
        ended
    }

    /// Asks an idle client to connect again, because its server did not answer when its account should change.
    pub(super) async fn swap_failed(&mut self, error: &io::Error) -> Ended {
        let why = match error.kind() {
            io::ErrorKind::TimedOut => "did not answer in time".to_owned(),
            io::ErrorKind::UnexpectedEof => "closed the connection".to_owned(),
            _ => format!("did not answer: {error}"),
        };
        let text = format!(
            "terminating connection: its account must change, but the server of the earlier account {why}"
        );
        self.tell(&text, MOVE_HINT).await;
        Ended::Moved
    }

    async fn tell(&mut self, text: &str, hint: &str) {
        let error = fatal(State::AdminShutdown, text, Some(hint));
        let tell = async {
            self.client_out.write_all(&error).await?;
            self.client_out.flush().await
        };
        let _ = timeout(CLOSE_LIMIT, tell).await;
    }

    /// Reports to the client why its session ends. This comes after the message that is in progress, if that ends in
    /// time.
    pub(super) async fn cut(&mut self, talk: &Mutex<Talk>, leaving: &Leaving) {
        let (why, open) = (leaving.why(), lock(talk).what_is_open());
        let text = format!("terminating connection: {why}, and {open}");
        let error = fatal(State::AdminShutdown, &text, Some(CUT_HINT));
        let (from, to) = (&mut self.server_in, &mut self.client_out);
        let speak = async {
            // A chunk of which only a part was written cannot be completed: its rest is lost.
            if lock(talk).can_speak_to_client() {
                return to.write_all(&error).await;
            }
            if lock(talk).is_writing_to_client() {
                return Ok(());
            }
            loop {
                let n = from.read(&mut self.from_server).await?;
                let chunk = &self.from_server[..n];
                let whole = lock(talk).server(chunk).map_err(broken)?;
                if n == 0 {
                    return Ok(());
                }
                if whole > 0 {
                    to.write_all(&chunk[..whole]).await?;
                    return to.write_all(&error).await;
                }
                to.write_all(chunk).await?;
            }
        };
        let _: Result<io::Result<()>, _> = timeout(CLOSE_LIMIT, speak).await;
        let _ = timeout(CLOSE_LIMIT, self.client_out.flush()).await;
    }

    /// Closes both connections of a session that has ended in this way.
    pub(super) async fn close(&mut self, ended: Ended) {
        let _ = timeout(CLOSE_LIMIT, self.client_out.shutdown()).await;
        if ended != Ended::Cut {
            // Terminate; a server that works on a request would not read it.
            let terminate = message(b'X', b"");
            let _ = timeout(CLOSE_LIMIT, self.server_out.write_all(&terminate)).await;
        }
        let _ = timeout(CLOSE_LIMIT, self.server_out.shutdown()).await;
        if ended != Ended::BySides {
            // A socket that is closed with unread bytes ends in a reset, and the client may lose the message.
            let discard = async {
                while !matches!(
                    self.client_in.read(&mut self.from_client).await,
                    Ok(0) | Err(_)
                ) {}
            };
            let _ = timeout(CLOSE_LIMIT, discard).await;
        }
    }
}
