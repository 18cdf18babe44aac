//! Ending a role: the task, its outcome, and the dispatcher's verdict.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Failure;
use crate::grant::OwnedObjects;
use crate::names::{EngineName, InstallationId, LeaseId, RoleName};
use crate::target::Target;

/// Why a revocation was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RevokeMode {
    /// The parked message: due only when the role's `VALID UNTIL` has passed.
    Expire,
    /// Requested, or after a failed create: due at any date.
    Now,
}

impl RevokeMode {
    /// The word in logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Expire => "expire",
            Self::Now => "now",
        }
    }
}

/// Where a task's target is, seen from the address at which the lease was made: the one that its
/// credential names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// The same address. A server with another identity there has replaced the earlier one.
    Own,
    /// A different address. A server with another identity there may be a copy.
    Other,
}

/// End the role of a lease. A second run finds it absent and reports that.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Revoke {
    /// The lease of the role.
    pub lease: LeaseId,
    /// The installation that owns the lease.
    pub installation: InstallationId,
    /// The server and its admin, as they were when the lease was made.
    pub target: Target,
    /// The role to end.
    pub role: RoleName,
    /// When it is due.
    pub mode: RevokeMode,
    /// What happens to objects that the account owns.
    pub owned_objects: OwnedObjects,
    /// The server on which the role was made, if it is known. Absence counts only there.
    #[serde(default)]
    pub server: Option<String>,
    /// Where the target is. A dispatcher without this field does not send it: then another server is
    /// left alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place: Option<Place>,
    /// How long after this message's arrival the lease's create could still commit, in
    /// milliseconds. Where it is not 0, what is found is not conclusive, and the revocation is done
    /// again after that time.
    #[serde(default)]
    pub window_ms: u64,
    /// A copy by the reconciler: never parked again, so copies cannot multiply.
    #[serde(default)]
    pub copy: bool,
    /// A person requested a try now, also at a server that counts as unreachable.
    #[serde(default)]
    pub asked: bool,
}

/// What happens to a failed revocation. It is sent to the engine that reported the failure, while that engine
/// still holds the message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// [`Outcome::ticket`] of what it answers.
    pub ticket: u64,
    /// It needs no more tries: the lease is settled.
    pub retire: bool,
    /// The revocation that replaces it, with other credentials, another address or another key.
    #[serde(default)]
    pub instead: Option<Instead>,
}

/// A sealed [`Revoke`] of the same lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instead {
    /// [`super::Head::issued`] it was sealed with; the rest of the head is that of the message it
    /// replaces.
    pub issued: Timestamp,
    /// The sealed body, in base64.
    pub body: String,
}

/// The result of one try of a revocation.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Outcome {
    /// The lease of the role.
    pub lease: LeaseId,
    /// The engine that tried.
    pub engine: EngineName,
    /// The number of tries, including this one.
    pub attempts: u32,
    /// The role it was about. An engine without this field names none.
    #[serde(default)]
    pub role: Option<RoleName>,
    /// The address at which the role was found before it was dropped: `host port` of the task's target. A
    /// report from the address where the lease was made counts, even if another server answers there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub found_at: Option<String>,
    /// The result of the try.
    pub result: OutcomeResult,
    /// The name for a [`Verdict`], if the engine holds the message and waits for one.
    #[serde(default)]
    pub ticket: Option<u64>,
    /// When it is tried again, in milliseconds from now. `None`: never.
    #[serde(default)]
    pub again_ms: Option<u64>,
}

/// The result of a revocation.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutcomeResult {
    /// The role existed and is gone.
    Dropped {
        /// When, by the database's clock.
        at: Timestamp,
        /// Identity of the server.
        server: String,
        /// Whether its create could no longer commit, so that the absence is final.
        #[serde(default)]
        conclusive: bool,
    },
    /// The role was absent.
    Absent {
        /// When it was looked for, by the database's clock.
        at: Timestamp,
        /// Identity of the server.
        server: String,
        /// Whether its create could no longer commit, so that the absence is final.
        #[serde(default)]
        conclusive: bool,
    },
    /// The role lives and is not due yet.
    NotDue {
        /// The `VALID UNTIL` of the role.
        until: Timestamp,
        /// Its remaining time by the database's clock, in milliseconds.
        #[serde(default)]
        left_ms: Option<u64>,
    },
    /// It is not known to be gone. It is tried again, without a limit.
    Failing(Failure),
    /// The role stands on this server, which has taken the place of the one it was made on: after a
    /// major upgrade, or a restore from a dump. It is about to be ended there. Reported first, so that
    /// its absence there counts afterwards.
    Moved {
        /// Identity of the server.
        server: String,
    },
}
