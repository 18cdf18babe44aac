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
    /// The revocation was requested, or follows a failed create. It is due at once, whatever `VALID UNTIL` is.
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

/// Where a task's target is, seen from the address at which the lease was made. That is the address that the lease's
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
    /// How long the lease's create can still commit after this message arrived, in milliseconds. If it is not 0, the
    /// result is not conclusive, and the revocation is done again after that time.
    #[serde(default)]
    pub window_ms: u64,
    /// A copy by the reconciler: never parked again, so copies cannot multiply.
    #[serde(default)]
    pub copy: bool,
    /// A person requested a try now, also at a server that counts as unreachable.
    #[serde(default)]
    pub asked: bool,
    /// The dispatcher reads [`Outcome::others`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub reads_batches: bool,
    /// More leases whose roles are ended with the same target, mode and options; at most
    /// [`LEASES_MAX`] - 1. Only in a copy. An engine that does not know the field ends the first
    /// alone, and the reconciler sends the others again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<Also>,
}

/// Maximum number of leases in one revocation or one outcome.
pub const LEASES_MAX: usize = 200;

/// What distinguishes a lease from the first of its message.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Also {
    /// The lease of the role.
    pub lease: LeaseId,
    /// The role to end.
    pub role: RoleName,
    /// See [`Revoke::window_ms`].
    #[serde(default)]
    pub window_ms: u64,
    /// W3C Trace Context of the lease.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub traceparent: String,
}

impl Revoke {
    /// The number of leases.
    pub fn leases(&self) -> usize {
        1 + self.others.len()
    }

    /// A revocation for each lease, and the trace of each but the first. Several in one message are
    /// copies, which are never parked: the message of one must not be parked for another.
    pub fn each(mut self) -> impl Iterator<Item = (Self, Option<String>)> {
        let others = std::mem::take(&mut self.others);
        self.copy |= !others.is_empty();
        let first = self.clone();
        let also = others.into_iter().map(move |also| {
            let one = Self {
                lease: also.lease,
                role: also.role,
                window_ms: also.window_ms,
                ..self.clone()
            };
            (one, Some(also.traceparent))
        });
        std::iter::once((first, None)).chain(also)
    }
}

/// What happens to a failed revocation. It is sent to the engine that reported the failure, while that engine
/// still holds the message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// The [`Outcome::ticket`] that it answers.
    pub ticket: u64,
    /// The revocation needs no more tries: the lease is settled.
    pub retire: bool,
    /// The revocation that replaces it, with other credentials, another address or another key.
    #[serde(default)]
    pub instead: Option<Instead>,
}

/// A sealed [`Revoke`] of the same lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instead {
    /// The [`super::Head::issued`] that it was sealed with. The rest of the head is that of the message that it
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
    /// Outcomes of other leases in the same message, at most [`LEASES_MAX`] - 1. They have no ticket
    /// and no others. Sent if the revocation says that its dispatcher reads them, see [`Revoke::reads_batches`].
    /// Another dispatcher, of an earlier version, records the first alone; the reconciler asks for the others
    /// again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<Outcome>,
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
        /// The account's remaining time by the database's clock, in milliseconds.
        #[serde(default)]
        left_ms: Option<u64>,
    },
    /// The account is not known to be gone. The revocation is tried again, without a limit.
    Failing(Failure),
    /// The role stands on this server, which has taken the place of the one it was made on: after a
    /// major upgrade, or a restore from a dump. The engine reports this before it ends the
    /// role there. So the role's absence there counts afterwards.
    Moved {
        /// Identity of the server.
        server: String,
    },
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn revoke(extra: Value) -> Value {
        let mut body = json!({
            "lease": "01890000-0000-7000-8000-000000000001",
            "installation": "00000000-0000-4000-8000-000000000001",
            "target": {"host": "h", "port": 1, "database": "d", "username": "u", "password": "p", "sslmode": "disable"},
            "role": "mayfly_a", "mode": "now", "owned_objects": "reassign", "server": "s", "window_ms": 7,
        });
        for (name, value) in extra.as_object().unwrap() {
            body[name] = value.clone();
        }
        body
    }

    #[test]
    fn one_lease_is_written_as_earlier_versions_read_it() {
        let task: Revoke = serde_json::from_value(revoke(json!({}))).unwrap();
        assert!(!task.reads_batches && task.others.is_empty());
        let written = serde_json::to_value(&task).unwrap();
        assert!(written.get("others").is_none() && written.get("reads_batches").is_none());
        let each: Vec<_> = task.each().collect();
        assert_eq!(each.len(), 1);
        assert!(!each[0].0.copy, "alone it may be parked");
    }

    #[test]
    fn several_leases_are_copies_with_values_of_their_own() {
        let other = "01890000-0000-7000-8000-000000000002";
        let also = json!({"others": [{"lease": other, "role": "mayfly_b", "window_ms": 9, "traceparent": "00-b"}]});
        let task: Revoke = serde_json::from_value(revoke(also)).unwrap();
        assert_eq!(task.leases(), 2);
        let each: Vec<_> = task.each().collect();
        assert!(
            each.iter()
                .all(|(one, _)| one.copy && one.others.is_empty())
        );
        let (first, second) = (&each[0].0, &each[1].0);
        assert_eq!((first.role.as_str(), first.window_ms), ("mayfly_a", 7));
        assert_eq!((second.role.as_str(), second.window_ms), ("mayfly_b", 9));
        assert_eq!(second.lease.to_string(), other);
        assert_eq!(second.server.as_deref(), Some("s"));
        assert_eq!(each[1].1.as_deref(), Some("00-b"));
    }

    #[test]
    fn an_outcome_of_an_earlier_engine_has_no_others() {
        let body = json!({"lease": "01890000-0000-7000-8000-000000000001", "engine": "e", "attempts": 1,
            "result": {"not_due": {"until": "2020-01-01T00:00:00Z"}}});
        let outcome: Outcome = serde_json::from_value(body).unwrap();
        assert!(outcome.others.is_empty());
        let written = serde_json::to_value(&outcome).unwrap();
        assert!(written.get("others").is_none());
    }
}
