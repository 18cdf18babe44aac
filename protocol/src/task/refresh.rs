//! Bringing the grant role of live accounts up to date.

use serde::{Deserialize, Serialize};

use super::{GrantsOf, Kind, ReplyResult, Request};
use crate::names::InstallationId;
use crate::target::Target;

/// Bring the grant role of a secret up to date if accounts are members of it. A second run finds nothing to
/// do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Refresh {
    /// The installation that owns the role.
    pub installation: InstallationId,
    /// The server and its admin.
    pub target: Target,
    /// What the role is for.
    pub of: GrantsOf,
}

/// A grant role is up to date.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refreshed {
    /// Whether accounts are members of it. If not, nothing was done.
    pub in_use: bool,
}

impl Request for Refresh {
    const KIND: Kind = Kind::Refresh;
    type Answer = Refreshed;

    fn to_reply(answer: Self::Answer) -> ReplyResult {
        ReplyResult::Refreshed {
            in_use: answer.in_use,
        }
    }

    fn from_reply(reply: ReplyResult) -> Option<Self::Answer> {
        match reply {
            ReplyResult::Refreshed { in_use } => Some(Refreshed { in_use }),
            _ => None,
        }
    }
}
