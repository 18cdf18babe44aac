//! What the dispatcher and the engine share beyond the protocol: the start, settings, logs and traces, the broker,
//! the HTTP server, and the beginning of a PostgreSQL session. It holds no decision about a lease.

pub mod admin;
pub mod arrival;
pub mod broker;
pub mod fault;
pub mod panics;
#[cfg(feature = "postgres")]
pub mod pg_connect;
pub mod private_file;
pub mod process;
pub mod process_metrics;
pub mod serve;
pub mod settings;
pub mod sql_session;
pub mod telemetry;
pub mod tls;
pub mod trace;

/// Version of the binaries, from the workspace manifest.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
