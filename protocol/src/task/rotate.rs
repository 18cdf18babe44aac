//! Changing the admin's own password.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Failure, Kind, ReplyResult, Request};
use crate::secret::Secret;
use crate::target::Target;

/// Give the admin another password. A second run finds that the new password works already.
/// The change is committed at most [`create_budget`](crate::timing::Timing::create_budget) after delivery, or never.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Rotate {
    /// The server and its admin, with the earlier password.
    pub target: Target,
    /// The new password of the admin.
    #[serde(serialize_with = "crate::secret::expose")]
    pub password: Secret,
    /// Whether to change the password. If not, only report which of the two is in force.
    pub change: bool,
    /// The change of the password begins no later than this, by the database's clock. A dispatcher of an earlier
    /// version sends no such limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_after: Option<Timestamp>,
}

/// Which password of the admin is in force.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rotated {
    /// The new password: a login with it worked.
    Changed {
        /// Identity of the server.
        server: String,
    },
    /// The earlier password still works, and this is why it was not changed.
    Unchanged(Failure),
    /// The server also accepts a wrong password, so a login proves nothing. This request changed nothing.
    Trusted(Failure),
    /// The engine could not find out.
    Unknown(Failure),
}

impl Request for Rotate {
    const KIND: Kind = Kind::Rotate;
    type Answer = Rotated;

    fn to_reply(answer: Self::Answer) -> ReplyResult {
        ReplyResult::Rotated(answer)
    }

    fn from_reply(reply: ReplyResult) -> Option<Self::Answer> {
        match reply {
            ReplyResult::Rotated(answer) => Some(answer),
            _ => None,
        }
    }
}
