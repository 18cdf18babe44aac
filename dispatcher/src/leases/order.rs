//! The parameters of a read of a dynamic secret, and its result.

use jiff::Timestamp;
use mayfly_common::trace::TraceContext;
use mayfly_protocol::names::{LeaseId, RoleName};
use mayfly_protocol::secret::Secret;

use crate::secrets::Dynamic;
use crate::store::{BaseFacts, Record};

/// A lease that a caller has asked for, with all that its create needs.
pub(crate) struct Order {
    pub(crate) record: Record,
    pub(crate) dynamic: Dynamic,
    pub(crate) base: BaseFacts,
    /// TTL of the account, in seconds.
    pub(crate) ttl_seconds: u64,
    /// Longest life with renewals, in seconds.
    pub(crate) max_ttl_seconds: u64,
    /// `root` or a token's id.
    pub(crate) who: String,
    /// Maximum number of the caller's leases at a time.
    pub(crate) most_of_caller: Option<u64>,
    /// The caller's `Idempotency-Key`: a second read with the same key gets the same lease.
    pub(crate) key: Option<String>,
    /// The lease is for a check and ends after it: no other read may share it.
    pub(crate) for_trial: bool,
    /// Position in the caller's trace.
    pub(crate) trace: TraceContext,
}

/// A credential, and the server that accepts it.
pub(crate) struct Issued {
    /// The secret it was read from.
    pub(crate) record: Record,
    /// Host of the server.
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) database: String,
    pub(crate) role: RoleName,
    /// The user name in the answer.
    pub(crate) username: String,
    pub(crate) password: Secret,
    /// The lease's life, in seconds.
    pub(crate) ttl_seconds: u64,
    /// The lease's end, by the database's clock.
    pub(crate) expiration: Timestamp,
    pub(crate) lease: LeaseId,
    /// Whether the lease was made for an earlier read.
    pub(crate) again: bool,
    /// What the account lacks at present. It names no object.
    pub(crate) warnings: Vec<String>,
}
