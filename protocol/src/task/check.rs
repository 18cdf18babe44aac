//! A request that checks what an admin can do.

use serde::{Deserialize, Serialize};

use super::{Finding, Kind, ReplyResult, Request};
use crate::account::Account;
use crate::grant::{Grant, OwnedObjects};
use crate::names::{InstallationId, RoleName};
use crate::target::Target;

/// Check what an admin can do, or whether the server refuses a wrong password. Changes nothing that lasts.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Check {
    /// The installation that owns the roles.
    pub installation: InstallationId,
    /// The server and its admin.
    pub target: Target,
    /// What to look at.
    pub what: CheckWhat,
}

/// What a check looks at.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckWhat {
    /// The server and its admin, and for a dynamic secret whether accounts can be made.
    Admin {
        /// The accounts; `None`: only the admin.
        accounts: Option<Accounts>,
    },
    /// Whether this role is refused with a wrong password.
    WrongPassword {
        /// The account whose login is tried.
        role: RoleName,
        /// The database it may connect to.
        database: String,
    },
    /// Whether an account could be made now: the engine does every step before the account, but does not make
    /// it. Engines of earlier versions do not know this.
    Ready {
        /// The database it would be for.
        database: String,
        /// What it might do.
        grants: Vec<Grant>,
    },
}

/// The accounts that a secret makes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Accounts {
    /// The database they are for.
    pub database: String,
    /// What they may do.
    pub grants: Vec<Grant>,
    /// What happens to objects that they own.
    #[serde(default)]
    pub owned_objects: OwnedObjects,
    /// How many connections they may take. `None`: an earlier dispatcher does not send it.
    #[serde(default)]
    pub connections: Option<Connections>,
    /// What they have besides their grants.
    #[serde(default, skip_serializing_if = "Account::is_plain")]
    pub account: Account,
}

/// How many connections the accounts of a secret may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connections {
    /// Connections of one account. `None`: no limit.
    pub each: Option<u32>,
    /// How many accounts there may be at a time. `None`: no limit.
    pub accounts: Option<u64>,
}

impl Request for Check {
    const KIND: Kind = Kind::Check;
    type Answer = Vec<Finding>;

    fn to_reply(answer: Self::Answer) -> ReplyResult {
        ReplyResult::Checked(answer)
    }

    fn from_reply(reply: ReplyResult) -> Option<Self::Answer> {
        match reply {
            ReplyResult::Checked(answer) => Some(answer),
            _ => None,
        }
    }
}
