//! Removing Mayfly's roles that nothing needs.

use serde::{Deserialize, Serialize};

use super::{Kind, ReplyResult, Request};
use crate::names::InstallationId;
use crate::target::Target;

/// Remove this installation's grant roles without members and its quarantine roles that own nothing. A second
/// run finds the roles that the first has left.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Tidy {
    /// The installation that owns the roles.
    pub installation: InstallationId,
    /// The server and its admin.
    pub target: Target,
}

/// The result of tidying the roles of an installation on a server.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Tidied {
    /// Names of the removed roles.
    pub removed: Vec<String>,
    /// Roles that stay, with the reasons.
    pub kept: Vec<Kept>,
}

/// A role that was not removed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Kept {
    /// Name of the role.
    pub role: String,
    /// The reason, as a message for users.
    pub reason: String,
    /// Whether it has members. It can be removed when they are gone.
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
