//! Why something failed: a stable code and a message for users.

use serde::{Deserialize, Serialize};

/// A stable reason for a failure; the API's `error` of the same name (DESIGN §5).
/// A word this version does not know is read as [`FailureCode::StatementFailed`]: a newer engine
/// may have more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", from = "String")]
pub enum FailureCode {
    /// A named object, database or role does not exist.
    NoSuchObject,
    /// A name without a schema fits several objects.
    AmbiguousObject,
    /// The privilege cannot be granted on that object.
    GrantRefused,
    /// The admin lacks a right to do its work.
    AdminLacksRights,
    /// Another transaction holds a named object (SQLSTATE 55P03).
    ObjectLocked,
    /// PostgreSQL refused a statement for another reason.
    StatementFailed,
    /// The engine has no connection to the database.
    DatabaseUnreachable,
    /// The admin's login was refused.
    DatabaseRefusedLogin,
    /// The role is not of this installation and lease.
    ForeignRole,
    /// Another server answers than the one on which the role was made.
    OtherServer,
    /// The engine cannot open or understand the task.
    NotUnderstood,
    /// The task came too late.
    PastDeadline,
    /// The account has expired or was revoked, so it cannot be renewed.
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
    /// All codes, for metrics and tests.
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

/// A failure: a stable code and a message for users. Neither ever contains a secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// The stable reason, for programs.
    pub code: FailureCode,
    /// What happened and what helps.
    pub message: String,
    /// Objects that prevent a revocation, named as PostgreSQL names them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub objects: Vec<String>,
    /// Whether the same work may succeed a moment later on another connection. Only the process that met the failure
    /// sees this: it is not sent.
    #[serde(skip)]
    pub transient: bool,
    /// The server has no free connection slot (SQLSTATE 53300), or the engine has too few connections for its
    /// tasks there. Another engine, or the same one later, may succeed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub full: bool,
    /// The create failed before anything was made, and no engine will get it again. So there is no account to end.
    /// Engines of earlier versions never set this.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub nothing_made: bool,
}

impl Failure {
    /// A failure without objects in the way.
    pub fn new(code: FailureCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            objects: Vec::new(),
            transient: false,
            full: false,
            nothing_made: false,
        }
    }
}
