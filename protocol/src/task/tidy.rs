//! Removing the roles of Mayfly's own that nothing needs.

use serde::{Deserialize, Serialize};

use super::{Kind, ReplyResult, Request};
use crate::names::InstallationId;
use crate::target::Target;

/// Remove this installation's grant roles without members and its quarantine roles that own
/// nothing. Run twice, the second finds what the first left.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Tidy {
    /// The installation that owns the roles.
    pub installation: InstallationId,
    /// The server and its admin.
    pub target: Target,
}

/// What became of the roles of an installation on a server.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Tidied {
    /// Roles that are gone, by name.
    pub removed: Vec<String>,
    /// Roles that stay, with the reasons.
    pub kept: Vec<Kept>,
}

/// A role that stays.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Kept {
    /// Name of the role.
    pub role: String,
    /// Why, for a person.
    pub reason: String,
    /// It is a member's, so it may go once that one is gone.
    pub in_use: bool,
}

impl Request for Tidy {
    const KIND: Kind = Kind::Tidy;
    type Answer = Tidied;

    fn to_reply(answer: Self::Answer) -> ReplyResult {
        ReplyResult::Tidied(answer)
    }

    fn from_reply(reply: ReplyResult) -> Option<Self::Answer> {
        match reply {
            ReplyResult::Tidied(answer) => Some(answer),
            _ => None,
        }
    }
}
