//! Listing the roles of leases on a server.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Kind, ReplyResult, Request};
use crate::names::{InstallationId, LeaseId, RoleName};
use crate::target::Target;

/// List the roles of leases of any installation on a server, by their comments.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sweep {
    /// The installation that asks. Objects that accounts left to its grant roles are moved to the quarantine
    /// role too.
    #[serde(default)]
    pub installation: Option<InstallationId>,
    /// The server and its admin.
    pub target: Target,
    /// Only roles whose `VALID UNTIL` passed at least this long ago, in seconds; `None`: all roles.
    pub expired_for_seconds: Option<u64>,
    /// Only roles whose names sort after this name.
    pub after: Option<String>,
    /// Largest number of roles in the answer.
    pub limit: u32,
}

/// What a sweep found, sorted by name.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ledger {
    /// Identity of the server.
    pub server: String,
    /// The server's clock at the time of the list.
    pub now: Timestamp,
    /// The roles found, sorted by name.
    pub roles: Vec<LedgerRole>,
    /// Whether there are more.
    pub more: bool,
}

/// A role whose comment names a lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerRole {
    /// Name of the role.
    pub role: RoleName,
    /// The installation that its comment names.
    pub installation: InstallationId,
    /// The lease that its comment names.
    pub lease: LeaseId,
    /// The `VALID UNTIL` of the role.
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
