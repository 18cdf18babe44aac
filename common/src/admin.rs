//! The admin listener of both binaries: `/healthz`, `/readyz`, `/metrics`. And the end of a
//! process: the signals that ask for it.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::process;
use crate::serve::{self, Room, Tls};

/// Why a process is not ready, for a person.
pub type Readiness = Result<(), String>;

/// Its own, so that it answers whatever is going on at the API.
const ROOM: Room = Room {
    connections: 64,
    connections_per_address: 64,
};

/// Serves the admin listener until `stop`.
pub async fn serve(
    listener: TcpListener,
    tls: Option<Tls>,
    ready: impl Fn() -> Readiness + Send + Sync + 'static,
    metrics: impl Fn() -> String + Send + Sync + 'static,
    stop: CancellationToken,
) {
    let (ready, metrics) = (Arc::new(ready), Arc::new(metrics));
    let app = Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route(
            "/readyz",
            get(async move || match ready() {
                Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
                Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
            }),
        )
        .route(
            "/metrics",
            get(async move || {
                // Prometheus text exposition format 0.0.4.
                (
                    [(
                        header::CONTENT_TYPE,
                        "text/plain; version=0.0.4; charset=utf-8",
                    )],
                    metrics() + &process::metrics(),
                )
                    .into_response()
            }),
        );
    serve::serve(listener, tls, app, ROOM, Arc::new(|_| {}), stop).await;
}

/// Opens a listener, with the key's name in the error. `[::]` serves IPv4 too; where the kernel has no
/// IPv6 (`ipv6.disable=1`), 0.0.0.0 takes its place.
///
/// # Errors
/// The address cannot be listened on.
pub async fn listen(key: &str, address: SocketAddr) -> Result<TcpListener, String> {
    let bound = match TcpListener::bind(address).await {
        Err(error) if lacks_ipv6(&error) && is_any_ipv6(address) => {
            let instead = SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port()));
            info!(key, %address, %instead, "this machine has no IPv6: IPv4 alone is listened on");
            TcpListener::bind(instead).await
        }
        bound => bound,
    };
    bound.map_err(|error| format!("{key}: cannot listen on {address}: {error}"))
}

/// Whether the kernel has no such addresses at all. That one of them is not there, or is in use, is another
/// error. socket(2): EAFNOSUPPORT; bind(2): EADDRNOTAVAIL.
fn lacks_ipv6(error: &std::io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::AFNOSUPPORT.raw_os_error())
        || error.kind() == ErrorKind::AddrNotAvailable
}

fn is_any_ipv6(address: SocketAddr) -> bool {
    address.is_ipv6() && address.ip().is_unspecified()
}

/// Waits for SIGTERM or SIGINT.
///
/// # Errors
/// No handler can be installed.
pub async fn asked_to_stop() -> std::io::Result<()> {
    let mut term = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = term.recv() => info!("SIGTERM: stopping"),
        _ = interrupt.recv() => info!("SIGINT: stopping"),
    }
    Ok(())
}
