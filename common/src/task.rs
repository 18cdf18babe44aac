//! The wire: what a task, a reply, an outcome and a heartbeat say, as versioned JSON inside a
//! sealed envelope, and the clear head that goes with it.

use jiff::Timestamp;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::account::Account;
use crate::authorities::Digest;
use crate::grant::{Grant, OwnedObjects};
use crate::names::{EngineName, InstallationId, LeaseId, PoolName, RoleName};
use crate::request::RequestId;
use crate::seal::{KeyPair, Open, PublicKey, SealError};
use crate::secret::Secret;
use crate::target::Target;

/// Version of the bodies. A receiver refuses one it does not know.
pub const WIRE_VERSION: u32 = 1;

/// Longest time from the delivery of a create task to the commit of its role. Together with the
/// task's expiry in the queue it bounds when a role can still appear, on no clock but the
/// broker's and the database's.
pub const CREATE_BUDGET: std::time::Duration = std::time::Duration::from_secs(10);

/// What a message is: tasks and verdicts go from dispatcher to engine, the last three come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Make a role.
    Create,
    /// Move a role's end.
    Renew,
    /// Change the admin's own password.
    Rotate,
    /// Say what the admin can and cannot do.
    Check,
    /// Remove the grant and quarantine roles nothing needs.
    Tidy,
    /// List the roles of leases that stand on a server.
    Sweep,
    /// Grant what was made since on the grant role of living accounts.
    Refresh,
    /// End a role.
    Revoke,
    /// Say that you are there.
    Ping,
    /// A revocation that failed needs no more tries.
    Verdict,
    /// Answer to a request.
    Reply,
    /// What became of a revoke.
    Outcome,
    /// An engine lives.
    Heartbeat,
    /// A dispatcher looks whether delayed messages come.
    Probe,
    /// A bundle of authorities, for messages that name it.
    Authorities,
    /// Something of a newer version.
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

    /// All that this version knows.
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

/// The clear part of a message. All but `attempt`, `settling` and `traceparent` is authenticated
/// with the body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// What the message is.
    pub kind: Kind,
    /// The pool it is for, or from.
    pub pool: PoolName,
    /// The lease it is about.
    pub lease: Option<LeaseId>,
    /// When it was sealed, by the sender's clock.
    pub issued: Timestamp,
    /// When its sender stops waiting, by the sender's clock.
    pub deadline: Option<Timestamp>,
    /// How often this revocation was tried before.
    pub attempt: u32,
    /// This revocation was done once while its create could still be under way; now it is done
    /// again, when it no longer can.
    pub settling: bool,
    /// W3C Trace Context, level 1.
    pub traceparent: String,
}

impl Head {
    /// The bytes authenticated with the body.
    fn associated(&self) -> Vec<u8> {
        let lease = self.lease.map(|id| id.to_string()).unwrap_or_default();
        let deadline = self
            .deadline
            .map(|at| at.as_millisecond().to_string())
            .unwrap_or_default();
        format!(
            "{WIRE_VERSION}|{}|{}|{lease}|{}|{deadline}",
            self.kind.as_str(),
            self.pool,
            self.issued.as_millisecond()
        )
        .into_bytes()
    }

    /// Seals a body under this head.
    ///
    /// # Errors
    /// See [`KeyPair::seal`].
    pub fn seal<T: Serialize>(
        &self,
        from: &KeyPair,
        to: &PublicKey,
        body: &T,
    ) -> Result<Vec<u8>, SealError> {
        self.seal_request(from, to, body, None)
    }

    /// Seals a request under its name, or the answer to it. The name is inside the seal: peers
    /// of before it was there pass over it.
    ///
    /// # Errors
    /// See [`KeyPair::seal`].
    pub fn seal_request<T: Serialize>(
        &self,
        from: &KeyPair,
        to: &PublicKey,
        body: &T,
        request: Option<RequestId>,
    ) -> Result<Vec<u8>, SealError> {
        let versioned = Versioned {
            v: WIRE_VERSION,
            request,
            body,
        };
        let text = zeroize::Zeroizing::new(
            serde_json::to_vec(&versioned)
                .unwrap_or_else(|e| unreachable!("a body is plain data: {e}")),
        );
        from.seal(to, &self.associated(), &text)
    }

    /// Opens a body that came under this head.
    ///
    /// # Errors
    /// [`OpenError`]: not authentic, or of a version or form this one does not know.
    pub fn open<T: DeserializeOwned>(
        &self,
        to: &impl Open,
        from: &PublicKey,
        envelope: &[u8],
    ) -> Result<T, OpenError> {
        self.open_request(to, from, envelope).map(|(body, _)| body)
    }

    /// Opens a request or an answer, and gives the name of the request where there is one.
    ///
    /// # Errors
    /// See [`Head::open`].
    pub fn open_request<T: DeserializeOwned>(
        &self,
        to: &impl Open,
        from: &PublicKey,
        envelope: &[u8],
    ) -> Result<(T, Option<RequestId>), OpenError> {
        let text = to.open(from, &self.associated(), envelope)?;
        let versioned: Versioned<T> =
            serde_json::from_slice(&text).map_err(|_| OpenError::UnknownBody)?;
        if versioned.v != WIRE_VERSION {
            return Err(OpenError::UnknownBody);
        }
        Ok((versioned.body, versioned.request))
    }
}

#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    v: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    request: Option<RequestId>,
    body: T,
}

/// Why a message is not understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// See [`SealError`].
    #[error("{0}")]
    Sealed(#[from] SealError),
    /// Authentic, but not of this version.
    #[error("the message is of a version this engine does not know")]
    UnknownBody,
}

impl OpenError {
    /// The `reason` label of refused tasks.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Sealed(SealError::UnknownForm) | Self::UnknownBody => "unknown_version",
            Self::Sealed(SealError::OtherKey) => "other_key",
            Self::Sealed(SealError::NotAuthentic | SealError::BadKey) => "not_authentic",
        }
    }
}

/// Make a role for a lease. Run twice, the second finds the role by its comment and succeeds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Create {
    /// The lease.
    pub lease: LeaseId,
    /// Whose lease; part of the role's comment.
    pub installation: InstallationId,
    /// The server and its admin.
    pub target: Target,
    /// The database the account is for.
    pub database: String,
    /// The role to make.
    pub role: RoleName,
    /// SCRAM-SHA-256 verifier (RFC 5803), where the account is nothing beyond its grants.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verifier: Option<String>,
    /// Its verifier, and what it is beyond its grants. An engine of before this field looks for
    /// the verifier in its old place, finds none, and refuses the task: it must not make the
    /// account without the rest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub special: Option<Special>,
    /// Life of the account, in seconds, from the database's clock at the time it is made.
    pub ttl_seconds: u64,
    /// What it may do.
    pub grants: Vec<Grant>,
    /// `CONNECTION LIMIT`; none = unlimited.
    #[serde(default)]
    pub connection_limit: Option<u32>,
    /// Longest wait, after the role is made, until the server's replicas have it, in seconds.
    #[serde(default)]
    pub wait_for_replicas: Option<u32>,
    /// No statement that makes the role begins later than this, by the database's clock. An engine's
    /// clocks stand still while its machine is suspended. None where the dispatcher does not know the
    /// database's clock yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_after: Option<Timestamp>,
}

/// An account that is more than its grants.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Special {
    /// See [`Create::verifier`].
    pub verifier: String,
    /// The password, for a server that is to make the verifier itself. The only case in which it
    /// leaves the dispatcher other than to the caller.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "crate::secret::expose_option"
    )]
    pub password: Option<Secret>,
    /// The rest.
    #[serde(flatten)]
    pub account: Account,
}

impl Create {
    /// The account's password, where the server is to get it in clear.
    pub fn clear_password(&self) -> Option<&Secret> {
        self.special.as_ref()?.password.as_ref()
    }

    /// The account's verifier, and what it is beyond its grants.
    ///
    /// # Errors
    /// The task has no verifier.
    pub fn account(&self) -> Result<(&str, Option<&Account>), Failure> {
        match (&self.special, &self.verifier) {
            (Some(special), _) => Ok((&special.verifier, Some(&special.account))),
            (None, Some(verifier)) => Ok((verifier, None)),
            (None, None) => Err(Failure::new(
                FailureCode::NotUnderstood,
                "the task has no verifier",
            )),
        }
    }
}

/// Why a revocation is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RevokeMode {
    /// The parked message: due only when the role's `VALID UNTIL` has passed.
    Expire,
    /// Asked for, or after a failed create: whatever the date.
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

/// End the role of a lease. Run twice, the second finds it absent and says so.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Revoke {
    /// The lease.
    pub lease: LeaseId,
    /// Whose lease.
    pub installation: InstallationId,
    /// The server and its admin, as they were when the lease was made.
    pub target: Target,
    /// The role to end.
    pub role: RoleName,
    /// Due when.
    pub mode: RevokeMode,
    /// What becomes of what the account owns.
    pub owned_objects: OwnedObjects,
    /// The server the role was made on, where that is known: only there does absence count.
    #[serde(default)]
    pub server: Option<String>,
    /// Where the target is. A dispatcher of before this field does not say: then another server is
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
    /// A person asked for it to be tried now: also at a server that is taken for away.
    #[serde(default)]
    pub asked: bool,
}

/// A stable reason for a failure; the API's `error` of the same name (DESIGN §5).
/// A word this version does not know is read as [`FailureCode::StatementFailed`]: a newer engine
/// may have more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", from = "String")]
pub enum FailureCode {
    /// A named object, database or role does not exist.
    NoSuchObject,
    /// A bare name is two things.
    AmbiguousObject,
    /// The privilege cannot be granted on that object.
    GrantRefused,
    /// The admin lacks a right to do its work.
    AdminLacksRights,
    /// Another transaction holds a named object (SQLSTATE 55P03).
    ObjectLocked,
    /// PostgreSQL refused a statement for another reason.
    StatementFailed,
    /// No connection.
    DatabaseUnreachable,
    /// The admin's login was refused.
    DatabaseRefusedLogin,
    /// The role's name belongs to somebody else.
    ForeignRole,
    /// The role must be somewhere else: this is another server than it was made on.
    OtherServer,
    /// The engine cannot open or understand the task.
    NotUnderstood,
    /// The task came too late.
    PastDeadline,
    /// The account's time is over, or it was revoked: it cannot be renewed.
    Expired,
    /// The renewal would go beyond the lease's maximum.
    BeyondMaximum,
}

impl From<String> for FailureCode {
    fn from(word: String) -> Self {
        Self::ALL
            .into_iter()
            .find(|code| code.as_str() == word)
            .unwrap_or(Self::StatementFailed)
    }
}

impl FailureCode {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::NoSuchObject,
        Self::AmbiguousObject,
        Self::GrantRefused,
        Self::AdminLacksRights,
        Self::ObjectLocked,
        Self::StatementFailed,
        Self::DatabaseUnreachable,
        Self::DatabaseRefusedLogin,
        Self::ForeignRole,
        Self::OtherServer,
        Self::NotUnderstood,
        Self::PastDeadline,
        Self::Expired,
        Self::BeyondMaximum,
    ];

    /// The word on the wire, in logs and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoSuchObject => "no_such_object",
            Self::AmbiguousObject => "ambiguous_object",
            Self::GrantRefused => "grant_refused",
            Self::AdminLacksRights => "admin_lacks_rights",
            Self::ObjectLocked => "object_locked",
            Self::StatementFailed => "statement_failed",
            Self::DatabaseUnreachable => "database_unreachable",
            Self::DatabaseRefusedLogin => "database_refused_login",
            Self::ForeignRole => "foreign_role",
            Self::OtherServer => "other_server",
            Self::NotUnderstood => "not_understood",
            Self::PastDeadline => "past_deadline",
            Self::Expired => "expired",
            Self::BeyondMaximum => "beyond_maximum",
        }
    }
}

/// A failure: a stable code and words for a person. Neither ever holds a secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// The stable code.
    pub code: FailureCode,
    /// What happened and what helps.
    pub message: String,
    /// Objects in the way of a revocation, named as PostgreSQL does.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub objects: Vec<String>,
    /// The same may well succeed in a moment, on another connection. For who met the failure
    /// only: it does not travel.
    #[serde(skip)]
    pub passing: bool,
    /// The server has no free connection slot (SQLSTATE 53300), or the engine has too few connections
    /// for what it has to do there. The same may be asked of another engine, or again in a moment.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub full: bool,
    /// Of a create that failed before anything was made, and that no engine will be given again: there
    /// is no account to end. Engines of earlier versions do not say so.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub nothing_made: bool,
}

impl Failure {
    /// A failure.
    pub fn new(code: FailureCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            objects: Vec::new(),
            passing: false,
            full: false,
            nothing_made: false,
        }
    }
}

/// Move a role's `VALID UNTIL` forward, to `increment_seconds` from the database's present. A
/// request that is run twice moves nothing the second time; none moves anything back.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Renew {
    /// The lease.
    pub lease: LeaseId,
    /// Whose lease.
    pub installation: InstallationId,
    /// The server and its admin.
    pub target: Target,
    /// The server the role was made on: only there does its absence count.
    pub server: Option<String>,
    /// Where the target is. A dispatcher of before this field does not say: then the role is looked
    /// for on no other server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place: Option<Place>,
    /// The role.
    pub role: RoleName,
    /// Life from now on, in seconds.
    pub increment_seconds: u64,
    /// No later than this, by the database's clock; what would be is refused, never cut.
    pub not_after: Timestamp,
    /// The end it was asked for from. An end that is later was moved meanwhile, maybe by this very
    /// request: then nothing is moved, and the answer is [`ReplyResult::Moved`]. A dispatcher of
    /// before this field sends none.
    #[serde(default)]
    pub from: Option<Timestamp>,
    /// What its secret grants now: looked at after the end was moved. An older engine passes over it.
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

/// Bring the grant role of a secret up to date, where accounts are members of it. Run twice, the
/// second finds nothing to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Refresh {
    /// Whose role.
    pub installation: InstallationId,
    /// The server and its admin.
    pub target: Target,
    /// What the role is for.
    pub of: GrantsOf,
}

/// List the roles of leases that stand on a server, whoever's, by their comments.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sweep {
    /// Who asks: what accounts left to its grant roles is taken away, too.
    #[serde(default)]
    pub installation: Option<InstallationId>,
    /// The server and its admin.
    pub target: Target,
    /// Only those whose `VALID UNTIL` passed so long ago, in seconds; none = all.
    pub expired_for_seconds: Option<u64>,
    /// Only those with names after this.
    pub after: Option<String>,
    /// At most so many.
    pub limit: u32,
}

/// What a sweep found, sorted by name.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ledger {
    /// Identity of the server.
    pub server: String,
    /// Its clock.
    pub now: Timestamp,
    /// The roles.
    pub roles: Vec<LedgerRole>,
    /// Whether there are more.
    pub more: bool,
}

/// A role whose comment says that it is of a lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerRole {
    /// Its name.
    pub role: RoleName,
    /// Whose lease, as its comment says.
    pub installation: InstallationId,
    /// The lease.
    pub lease: LeaseId,
    /// `VALID UNTIL`.
    pub expiration: Option<Timestamp>,
    /// Whether it owns anything, in any database of the server.
    pub owns: bool,
}

/// What becomes of a revocation that failed. Sent to the engine that reported it, while it still
/// holds the message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// [`Outcome::ticket`] of what it answers.
    pub ticket: u64,
    /// It needs no more tries: the lease is settled.
    pub retire: bool,
    /// What is parked in its place, one for one: for other credentials, another address or
    /// another key.
    #[serde(default)]
    pub instead: Option<Instead>,
}

/// A sealed [`Revoke`] of the same lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instead {
    /// [`Head::issued`] it was sealed with; the rest of the head is that of the message it
    /// replaces.
    pub issued: Timestamp,
    /// The sealed body, in base64.
    pub body: String,
}

/// Give the admin another password. Run twice, the second finds that the new one works already.
/// The change is committed at most [`CREATE_BUDGET`] after delivery, or never.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Rotate {
    /// The server and its admin, with the password of before.
    pub target: Target,
    /// The new password.
    #[serde(serialize_with = "crate::secret::expose")]
    pub password: Secret,
    /// Change it; else only say which of the two is in force.
    pub change: bool,
    /// The statement that changes it begins no later than this, by the database's clock. A dispatcher
    /// of before this field says nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_after: Option<Timestamp>,
}

/// Which password of the admin is in force.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rotated {
    /// The new one: a login with it worked.
    Changed {
        /// Identity of the server.
        server: String,
    },
    /// The one of before still logs in, and this is why it was not changed.
    Unchanged(Failure),
    /// A wrong password is let in too, so no login tells; this request changed nothing.
    Trusted(Failure),
    /// It could not be found out.
    Unknown(Failure),
}

/// Look at what an admin can do, or at the door of the server. Changes nothing that lasts.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Check {
    /// Whose roles.
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
    /// The server and its admin; and where accounts are to be made, whether they can be.
    Admin {
        /// The accounts; none = the admin alone.
        accounts: Option<Accounts>,
    },
    /// Whether this role is refused with a wrong password.
    WrongPassword {
        /// The role.
        role: RoleName,
        /// The database it may connect to.
        database: String,
    },
    /// Whether an account could be made at this moment: all that comes before it is done, and it is not
    /// made. Engines of earlier versions do not understand this.
    Ready {
        /// The database it would be for.
        database: String,
        /// What it might do.
        grants: Vec<Grant>,
    },
}

/// What accounts are to be.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Accounts {
    /// The database they are for.
    pub database: String,
    /// What they may do.
    pub grants: Vec<Grant>,
    /// What becomes of what they own.
    #[serde(default)]
    pub owned_objects: OwnedObjects,
    /// How many connections they may take; none: an older dispatcher does not say.
    #[serde(default)]
    pub connections: Option<Connections>,
    /// What they are beyond their grants.
    #[serde(default, skip_serializing_if = "Account::is_plain")]
    pub account: Account,
}

/// How many connections the accounts of a secret may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connections {
    /// Of one account; none = unlimited.
    pub each: Option<u32>,
    /// How many accounts there may be at a time; none = unlimited.
    pub accounts: Option<u64>,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What, in one word or two.
    pub check: String,
    /// Whether it is as it should be.
    pub ok: bool,
    /// What was found, for a person.
    pub message: String,
    /// Statements that set it right, for somebody who may.
    #[serde(default)]
    pub fix: Vec<String>,
}

/// Remove this installation's grant roles without members and its quarantine roles that own
/// nothing. Run twice, the second finds what the first left.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Tidy {
    /// Whose roles.
    pub installation: InstallationId,
    /// The server and its admin.
    pub target: Target,
}

/// What became of the roles of an installation on a server.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Tidied {
    /// Roles that are gone, by name.
    pub removed: Vec<String>,
    /// Roles that stay.
    pub kept: Vec<Kept>,
}

/// A role that stays.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Kept {
    /// Its name.
    pub role: String,
    /// Why, for a person.
    pub reason: String,
    /// It is a member's, so it may go once that one is gone.
    pub in_use: bool,
}

/// A role was made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Created {
    /// Its `VALID UNTIL`, by the database's clock.
    pub expiration: Timestamp,
    /// Identity of the server it was made on.
    pub server: String,
    /// What the account lacks for now and gets later, for a person. An older engine sends none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// An engine's answer to a request.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Reply {
    /// Who answers.
    pub engine: EngineName,
    /// What it did.
    pub result: ReplyResult,
}

/// What the engine did.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReplyResult {
    /// The role exists.
    Created(Created),
    /// It does not, or not for certain; the lease must be revoked.
    Failed(Failure),
    /// Answer to a ping.
    Pong(Heartbeat),
    /// The role now ends then, by the database's clock.
    Renewed(Timestamp),
    /// The role ends then, later than [`Renew::from`]: nothing was moved.
    Moved(Timestamp),
    /// What stands on the server.
    Ledger(Ledger),
    /// Which password is in force.
    Rotated(Rotated),
    /// What was found.
    Checked(Vec<Finding>),
    /// Which roles went and which stay.
    Tidied(Tidied),
    /// A grant role is up to date.
    Refreshed {
        /// Accounts are members of it; else nothing was done.
        in_use: bool,
    },
}

/// What became of one try at a revocation.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Outcome {
    /// The lease.
    pub lease: LeaseId,
    /// Who tried.
    pub engine: EngineName,
    /// How often it was tried, this time included.
    pub attempts: u32,
    /// The role it was about. An engine of before this field names none.
    #[serde(default)]
    pub role: Option<RoleName>,
    /// The address at which a role was found that is dropped, or about to be: `host port` of the
    /// task's target. It is the lease's wherever it stands, so what was found at the address where
    /// the lease was made counts, whatever server answers there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub found_at: Option<String>,
    /// What came of it.
    pub result: OutcomeResult,
    /// Where the engine still has the message and waits for a [`Verdict`] on it: its name.
    #[serde(default)]
    pub ticket: Option<u64>,
    /// When it is tried again by itself, in milliseconds from now; none = never.
    #[serde(default)]
    pub again_ms: Option<u64>,
}

/// What came of a revocation.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutcomeResult {
    /// The role was there and is gone.
    Dropped {
        /// When, by the database's clock.
        at: Timestamp,
        /// Identity of the server.
        server: String,
        /// Its create could commit no more: gone is gone for good.
        #[serde(default)]
        conclusive: bool,
    },
    /// The role was not there.
    Absent {
        /// When it was looked for, by the database's clock.
        at: Timestamp,
        /// Identity of the server.
        server: String,
        /// Its create could commit no more: gone is gone for good.
        #[serde(default)]
        conclusive: bool,
    },
    /// The role lives, and may for longer.
    NotDue {
        /// Its `VALID UNTIL`.
        until: Timestamp,
        /// What it has left, by the database's clock, in milliseconds.
        #[serde(default)]
        left_ms: Option<u64>,
    },
    /// It is not known to be gone. It is tried again, for ever.
    Failing(Failure),
    /// The role stands on this server, which has taken the place of the one it was made on: after a
    /// major upgrade, or a restore from a dump. It is about to be ended there. Said before, so that
    /// its absence there counts afterwards.
    Moved {
        /// Identity of the server.
        server: String,
    },
}

/// An engine lives.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Its name.
    pub engine: EngineName,
    /// Its pool.
    pub pool: PoolName,
    /// Its version.
    pub version: String,
    /// When it started, by its clock.
    pub started: Timestamp,
    /// Tasks it is working on.
    pub in_flight: u32,
    /// It has stopped taking tasks and is about to go.
    #[serde(default)]
    pub leaving: bool,
    /// The bundles of authorities that it has read from its pool's queue, and that will stay there for
    /// long. None where it cannot read the queue; engines of before the queue do not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authorities: Option<Vec<Digest>>,
}

/// A request that says which server it is for.
pub trait HasTarget {
    /// The server and its admin.
    fn target_mut(&mut self) -> &mut Target;
}

macro_rules! has_target {
    ($($task:ty),*) => {
        $(impl HasTarget for $task {
            fn target_mut(&mut self) -> &mut Target {
                &mut self.target
            }
        })*
    };
}

has_target!(Create, Revoke, Renew, Rotate, Check, Tidy, Sweep, Refresh);

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn head() -> Head {
        Head {
            kind: Kind::Outcome,
            pool: "pool1".parse().unwrap(),
            lease: Some(LeaseId::random()),
            issued: Timestamp::now(),
            deadline: None,
            attempt: 0,
            settling: false,
            traceparent: String::new(),
        }
    }

    #[test]
    fn a_body_is_bound_to_its_head() {
        let (engine, dispatcher) = (KeyPair::generate(), KeyPair::generate());
        let head = head();
        let sealed = head.seal(&engine, dispatcher.public(), &"hello").unwrap();
        let open = |head: &Head| head.open::<String>(&dispatcher, engine.public(), &sealed);
        assert_eq!(open(&head).unwrap(), "hello");
        assert!(
            open(&Head {
                kind: Kind::Reply,
                ..head.clone()
            })
            .is_err()
        );
        assert!(
            open(&Head {
                lease: Some(LeaseId::random()),
                ..head.clone()
            })
            .is_err()
        );
        assert!(
            open(&Head {
                pool: "pool2".parse().unwrap(),
                ..head.clone()
            })
            .is_err()
        );
        assert!(
            open(&Head {
                deadline: Some(head.issued),
                ..head.clone()
            })
            .is_err()
        );
        assert!(
            open(&Head {
                attempt: 7,
                settling: true,
                ..head.clone()
            })
            .is_ok(),
            "these two may change on the way"
        );
    }

    #[test]
    fn an_answer_names_its_request_inside_the_seal() {
        let (engine, dispatcher) = (KeyPair::generate(), KeyPair::generate());
        let (head, id) = (head(), RequestId::random());
        let seal = |id| head.seal_request(&engine, dispatcher.public(), &"hello", id);
        let open = |sealed: Vec<u8>| {
            head.open_request::<String>(&dispatcher, engine.public(), &sealed)
                .unwrap()
        };
        assert_eq!(
            open(seal(Some(id)).unwrap()),
            ("hello".to_owned(), Some(id))
        );
        assert_eq!(open(seal(None).unwrap()).1, None, "of an older peer");
    }

    /// An engine of before has a place for the verifier and none for the rest: it must not make the
    /// account without the rest.
    #[test]
    fn an_older_engine_refuses_a_special_account() {
        #[derive(Deserialize)]
        struct Older {
            #[serde(rename = "verifier")]
            _verifier: String,
        }
        let create = |verifier: Option<String>, special| Create {
            lease: LeaseId::random(),
            installation: InstallationId::random(),
            target: Target {
                host: "h".to_owned(),
                port: 1,
                database: "d".to_owned(),
                username: "u".to_owned(),
                password: Secret::new("p"),
                sslmode: crate::target::SslMode::Require,
                auth: crate::pg_login::Auth::default(),
                channel_binding: None,
                sslrootcert: None,
                sslcert: None,
                sslkey: None,
            },
            database: "d".to_owned(),
            role: "r".parse().unwrap(),
            verifier,
            special,
            ttl_seconds: 1,
            grants: vec![],
            connection_limit: None,
            wait_for_replicas: None,
            not_after: None,
        };
        let account = Account {
            attributes: vec![crate::account::Attribute::BypassRls],
            ..Account::default()
        };
        let special = Special {
            verifier: "v".to_owned(),
            password: None,
            account: account.clone(),
        };
        let text = |create: &Create| serde_json::to_string(create).unwrap();
        let (plain, special) = (
            create(Some("v".to_owned()), None),
            create(None, Some(special)),
        );
        assert!(serde_json::from_str::<Older>(&text(&plain)).is_ok());
        assert!(serde_json::from_str::<Older>(&text(&special)).is_err());
        let read: Create = serde_json::from_str(&text(&special)).unwrap();
        assert_eq!(read.account().unwrap(), ("v", Some(&account)));
        let read: Create = serde_json::from_str(&text(&plain)).unwrap();
        assert_eq!(read.account().unwrap(), ("v", None));
        assert!(create(None, None).account().is_err());
    }

    #[test]
    fn another_version_is_not_understood() {
        let (engine, dispatcher) = (KeyPair::generate(), KeyPair::generate());
        let head = head();
        let body = serde_json::to_vec(&serde_json::json!({"v": 2, "body": "x"})).unwrap();
        let sealed = engine
            .seal(dispatcher.public(), &head.associated(), &body)
            .unwrap();
        let opened = head.open::<String>(&dispatcher, engine.public(), &sealed);
        assert_eq!(opened.unwrap_err().reason(), "unknown_version");
    }
}
