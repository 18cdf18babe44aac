//! Moving a role's end.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Kind, Place, ReplyResult, Request};
use crate::grant::Grant;
use crate::names::{InstallationId, LeaseId, RoleName};
use crate::target::Target;

/// Move a role's `VALID UNTIL` forward, to `increment_seconds` after the database's present time. A second
/// run moves nothing. No run moves it back.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Renew {
    /// The lease to renew.
    pub lease: LeaseId,
    /// The installation that owns the lease.
    pub installation: InstallationId,
    /// The server and its admin.
    pub target: Target,
    /// The server on which the role was made. Its absence counts only there.
    pub server: Option<String>,
    /// Where the target is. A dispatcher without this field does not send it: then the role is not looked for on
    /// another server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place: Option<Place>,
    /// The role of the lease.
    pub role: RoleName,
    /// Life from now on, in seconds.
    pub increment_seconds: u64,
    /// The latest end, by the database's clock. A later end is refused, never shortened.
    pub not_after: Timestamp,
    /// The role's end when the renewal was requested. If the role now ends later, its end was moved meanwhile, maybe
    /// by an earlier run of this request. Then nothing is moved, and the answer is [`Renewed::Moved`]. A dispatcher
    /// without this field sends none.
    #[serde(default)]
    pub from: Option<Timestamp>,
    /// The present grants of its secret, which are refreshed after the end was moved. An older engine ignores
    /// it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub of: Option<GrantsOf>,
}

/// What accounts of a secret may do, and where.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GrantsOf {
    /// The database they are for.
    pub database: String,
    /// What they may do.
    pub grants: Vec<Grant>,
}

/// The result of a renewal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Renewed {
    /// The new end of the role, by the database's clock. It is not before the requested end.
    Until(Timestamp),
    /// The end of the role, which is already later than [`Renew::from`]. It was not changed.
    Moved(Timestamp),
}

impl Request for Renew {
    const KIND: Kind = Kind::Renew;
    type Answer = Renewed;

    fn lease(&self) -> Option<LeaseId> {
        Some(self.lease)
    }

    fn to_reply(answer: Self::Answer) -> ReplyResult {
        match answer {
            Renewed::Until(until) => ReplyResult::Renewed(until),
            Renewed::Moved(until) => ReplyResult::Moved(until),
        }
    }

    fn from_reply(reply: ReplyResult) -> Option<Self::Answer> {
        match reply {
            ReplyResult::Renewed(until) => Some(Renewed::Until(until)),
            ReplyResult::Moved(until) => Some(Renewed::Moved(until)),
            _ => None,
        }
    }
}
