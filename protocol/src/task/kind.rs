//! What a message is.

use serde::{Deserialize, Serialize};

/// The kind of a message. Tasks and verdicts go from dispatcher to engine. Replies, outcomes and heartbeats
/// go back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Make a role for a lease.
    Create,
    /// Move a role's end.
    Renew,
    /// Change the admin's own password.
    Rotate,
    /// Report what the admin can and cannot do.
    Check,
    /// Remove the grant and quarantine roles that nothing needs.
    Tidy,
    /// List the roles of leases on a server.
    Sweep,
    /// Grant new objects to the grant role of live accounts.
    Refresh,
    /// End the role of a lease.
    Revoke,
    /// Ask one engine for a sign of life.
    Ping,
    /// A revocation that failed needs no more tries.
    Verdict,
    /// Answer to a request.
    Reply,
    /// The result of a revocation.
    Outcome,
    /// The sign of life of an engine.
    Heartbeat,
    /// A dispatcher tests whether delayed messages arrive.
    Probe,
    /// A bundle of certificate authorities, for messages that name it.
    Authorities,
    /// A kind of a newer version.
    Unknown,
}

impl Kind {
    /// The word on the wire, in logs and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Renew => "renew",
            Self::Rotate => "rotate",
            Self::Check => "check",
            Self::Tidy => "tidy",
            Self::Sweep => "sweep",
            Self::Refresh => "refresh",
            Self::Revoke => "revoke",
            Self::Ping => "ping",
            Self::Verdict => "verdict",
            Self::Reply => "reply",
            Self::Outcome => "outcome",
            Self::Heartbeat => "heartbeat",
            Self::Probe => "probe",
            Self::Authorities => "authorities",
            Self::Unknown => "unknown",
        }
    }

    /// The kind with this word.
    pub fn parse(word: &str) -> Self {
        Self::ALL
            .into_iter()
            .find(|kind| kind.as_str() == word)
            .unwrap_or(Self::Unknown)
    }

    /// All kinds that this version knows.
    pub const ALL: [Self; 15] = [
        Self::Create,
        Self::Renew,
        Self::Rotate,
        Self::Check,
        Self::Tidy,
        Self::Sweep,
        Self::Refresh,
        Self::Revoke,
        Self::Ping,
        Self::Verdict,
        Self::Reply,
        Self::Outcome,
        Self::Heartbeat,
        Self::Probe,
        Self::Authorities,
    ];
}
