//! What the dispatcher, the engine and the command line all speak: names, grants, tasks (the
//! wire), the broker's topology, sealing, configuration, logs and traces. It holds no decision
//! about a lease, and no SQL but what every session begins with.

pub mod admin;
pub mod arrival;
pub mod broker;
pub mod fault;
pub mod panics;
#[cfg(feature = "postgres")]
pub mod pg_connect;
pub mod private_file;
pub mod process;
pub mod serve;
pub mod settings;
pub mod sql_session;
pub mod telemetry;
pub mod tls;
pub mod trace;

/// Version of the binaries, from the workspace manifest.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
