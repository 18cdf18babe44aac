//! The admin listener of dispatcher, engine and proxy: `/healthz`, `/readyz`, `/metrics`.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::process_metrics;
use crate::serve::{self, Listening, Room, Tls};

/// Why a process is not ready, for a person.
pub type Readiness = Result<(), String>;

/// Limits of this listener alone: it answers while the API's connections are used up.
const ROOM: Room = Room {
    connections: 64,
    connections_per_address: 64,
};

/// The admin listener. It is open, and answers from [`Admin::serve`] on.
#[derive(Debug)]
pub struct Admin {
    listener: TcpListener,
    tls: Option<Tls>,
}

impl Admin {
    /// Opens the admin listener.
    ///
    /// # Errors
    /// The address cannot be listened on. The message names the key `admin.listen`.
    pub(crate) async fn open(listening: &Listening) -> Result<Self, String> {
        Ok(Self {
            listener: serve::listen("admin.listen", listening.address).await?,
            tls: listening.tls.clone(),
        })
    }

    /// Opens an admin listener without TLS at this address.
    ///
    /// # Errors
    /// The address cannot be listened on. The message names the setting `admin_listen`.
    pub async fn at(address: SocketAddr) -> Result<Self, String> {
        Ok(Self {
            listener: serve::listen("admin_listen", address).await?,
            tls: None,
        })
    }

    /// Answers requests until `stop`. `ready` gives the reason while the process is not ready.
    pub async fn serve(
        self,
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
                        metrics() + &process_metrics::text(),
                    )
                        .into_response()
                }),
            );
        serve::serve(self.listener, self.tls, app, ROOM, Arc::new(|_| {}), stop).await;
    }
}
