//! Listing the roles of leases that stand on a server.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Kind, ReplyResult, Request};
use crate::names::{InstallationId, LeaseId, RoleName};
use crate::target::Target;

/// List the roles of leases that stand on a server, whoever's, by their comments.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sweep {
    /// Who asks: what accounts left to its grant roles is taken away, too.
    #[serde(default)]
    pub installation: Option<InstallationId>,
    /// The server and its admin.
    pub target: Target,
    /// Only those whose `VALID UNTIL` passed so long ago, in seconds; none = all.
    pub expired_for_seconds: Option<u64>,
    /// Only those with names after this.
    pub after: Option<String>,
    /// At most so many.
    pub limit: u32,
}

/// What a sweep found, sorted by name.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ledger {
    /// Identity of the server.
    pub server: String,
    /// Its clock.
    pub now: Timestamp,
    /// The roles.
    pub roles: Vec<LedgerRole>,
    /// Whether there are more.
    pub more: bool,
}

/// A role whose comment says that it is of a lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerRole {
    /// Its name.
    pub role: RoleName,
    /// Whose lease, as its comment says.
    pub installation: InstallationId,
    /// The lease.
    pub lease: LeaseId,
    /// `VALID UNTIL`.
    pub expiration: Option<Timestamp>,
    /// Whether it owns anything, in any database of the server.
    pub owns: bool,
}

impl Request for Sweep {
    const KIND: Kind = Kind::Sweep;
    type Answer = Ledger;

    fn to_reply(answer: Self::Answer) -> ReplyResult {
        ReplyResult::Ledger(answer)
    }

    fn from_reply(reply: ReplyResult) -> Option<Self::Answer> {
        match reply {
            ReplyResult::Ledger(answer) => Some(answer),
            _ => None,
        }
    }
}
