//! A path to a server that can be cut, or drop everything.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// The state of the path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Traffic passes.
    Pass,
    /// Connections are ended and refused.
    Cut,
    /// Connections stay open, and nothing arrives.
    Hole,
}

/// A TCP proxy on loopback.
pub struct Proxy {
    /// The port for clients.
    pub port: u16,
    mode: watch::Sender<Mode>,
    target: watch::Sender<u16>,
    rounds: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Proxy {
    /// A path to a port of this machine.
    pub async fn to(target: u16) -> Self {
        Self::at(([127, 0, 0, 1], 0).into(), target).await
    }

    /// The same, from this address.
    pub async fn at(address: SocketAddr, target: u16) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (mode, is) = watch::channel(Mode::Pass);
        let (target, to) = watch::channel(target);
        let rounds = Arc::new(AtomicUsize::new(0));
        let count = rounds.clone();
        let task = tokio::spawn(async move {
            loop {
                let Ok((near, _)) = listener.accept().await else {
                    continue;
                };
                if *is.borrow() != Mode::Cut {
                    let target = *to.borrow();
                    tokio::spawn(carry(near, target, is.clone(), count.clone()));
                }
            }
        });
        Self {
            port,
            mode,
            target,
            rounds,
            task,
        }
    }

    /// Round trips of all connections: how often a client has spoken after the server. Works through TLS.
    pub fn rounds(&self) -> usize {
        self.rounds.load(Ordering::SeqCst)
    }

    /// Sets the state of the path from now on.
    pub fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }
}

impl Proxy {
    /// From now on the path leads to this port of this machine.
    pub fn turn_to(&self, target: u16) {
        self.target.send_replace(target);
        self.mode.send_replace(Mode::Cut);
        self.mode.send_replace(Mode::Pass);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn carry(
    near: TcpStream,
    target: u16,
    mut mode: watch::Receiver<Mode>,
    rounds: Arc<AtomicUsize>,
) {
    let Ok(far) = TcpStream::connect(("127.0.0.1", target)).await else {
        return;
    };
    let (near_in, near_out) = near.into_split();
    let (far_in, far_out) = far.into_split();
    let (there, back) = (mode.clone(), mode.clone());
    let answered = AtomicBool::new(true);
    let asks = || {
        if answered.swap(false, Ordering::SeqCst) {
            rounds.fetch_add(1, Ordering::SeqCst);
        }
    };
    let answers = || answered.store(true, Ordering::SeqCst);
    tokio::select! {
        () = pump(near_in, far_out, there, asks) => {}
        () = pump(far_in, near_out, back, answers) => {}
        _ = mode.wait_for(|mode| *mode == Mode::Cut) => {}
    }
}

async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut mode: watch::Receiver<Mode>,
    seen: impl Fn(),
) {
    let mut bytes = vec![0; 16 * 1024];
    loop {
        let Ok(n) = from.read(&mut bytes).await else {
            return;
        };
        if n == 0 || mode.wait_for(|mode| *mode != Mode::Hole).await.is_err() {
            return;
        }
        seen();
        if to.write_all(&bytes[..n]).await.is_err() {
            return;
        }
    }
}
