//! The lease protocol: names, secrets, grants, the wire, and every decision about a lease. It
//! decides; the programs act. Nothing here reads a clock, a file, a store or a broker.

pub mod account;
pub mod authorities;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::print_stdout)]
mod cost_tests;
#[cfg(any(test, feature = "fixtures"))]
pub mod fixtures;
pub mod grant;
pub mod lease;
pub mod names;
pub mod pg_gate;
pub mod pg_login;
pub mod request;
pub mod revocation;
pub mod seal;
pub mod secret;
pub mod target;
pub mod task;
pub mod timing;
pub mod topology;
