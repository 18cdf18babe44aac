//! An engine's answer to a request, and its heartbeat.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::ReplyResult;
use crate::authorities::Digest;
use crate::names::{EngineName, PoolName};

/// An engine's answer to a request.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Reply {
    /// The engine that answers.
    pub engine: EngineName,
    /// What the engine did.
    pub result: ReplyResult,
}

/// The sign of life of an engine, sent every 2 s.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Name of the engine.
    pub engine: EngineName,
    /// Pool of the engine.
    pub pool: PoolName,
    /// Version of the engine.
    pub version: String,
    /// When the engine started, by its own clock.
    pub started: Timestamp,
    /// Tasks it is working on.
    pub in_flight: u32,
    /// The engine takes no more tasks and will end.
    #[serde(default)]
    pub leaving: bool,
    /// The bundles of authorities that it has read from its pool's queue and that stay there. `None`: it cannot read
    /// the queue, or its version has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authorities: Option<Vec<Digest>>,
    /// Whether it opens envelopes of [`crate::seal::Form::Shared`].
    #[serde(default)]
    pub opens_shared: bool,
    /// Whether it ends all leases of a revocation that names several, see [`super::Revoke::others`].
    #[serde(default)]
    pub ends_batches: bool,
}
