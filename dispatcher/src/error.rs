//! The error of the API: a stable code, a message, and the names of wrong fields. The codes of DESIGN §5 are
//! listed here; `http/errors.rs` has their HTTP statuses.

use std::collections::BTreeMap;

use jiff::Timestamp;
use mayfly_common::broker::BrokerError;
use mayfly_protocol::task::{Failure, FailureCode};

/// What is wrong with which field: `attributes.ttl` → reasons.
pub(crate) type Problems = BTreeMap<String, Vec<String>>;

/// The stable code of an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub(crate) enum Code {
    Malformed,
    Invalid,
    Unauthenticated,
    Forbidden,
    NotFound,
    MethodNotAllowed,
    Exists,
    InUse,
    Quota,
    NoSuchObject,
    AmbiguousObject,
    GrantRefused,
    AdminLacksRights,
    ObjectLocked,
    StatementFailed,
    DatabaseUnreachable,
    DatabaseRefusedLogin,
    NoEngine,
    BrokerUnavailable,
    StoreUnavailable,
    Deadline,
}

impl Code {
    pub(crate) const ALL: [Self; 21] = [
        Self::Malformed,
        Self::Invalid,
        Self::Unauthenticated,
        Self::Forbidden,
        Self::NotFound,
        Self::MethodNotAllowed,
        Self::Exists,
        Self::InUse,
        Self::Quota,
        Self::NoSuchObject,
        Self::AmbiguousObject,
        Self::GrantRefused,
        Self::AdminLacksRights,
        Self::ObjectLocked,
        Self::StatementFailed,
        Self::DatabaseUnreachable,
        Self::DatabaseRefusedLogin,
        Self::NoEngine,
        Self::BrokerUnavailable,
        Self::StoreUnavailable,
        Self::Deadline,
    ];

    /// The codes that a read of a dynamic secret can have when its pool is known.
    pub(crate) fn of_a_read() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|code| {
            !matches!(
                code,
                Self::Malformed | Self::Unauthenticated | Self::Forbidden | Self::MethodNotAllowed
            )
        })
    }

    /// Whether the request is refused because of its content or its caller. Otherwise it failed, and the same
    /// request may succeed later.
    pub(crate) fn is_refusal(self) -> bool {
        !matches!(
            self,
            Self::ObjectLocked
                | Self::DatabaseUnreachable
                | Self::DatabaseRefusedLogin
                | Self::NoEngine
                | Self::BrokerUnavailable
                | Self::StoreUnavailable
                | Self::Deadline
        )
    }

    /// The word in `error`.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Invalid => "invalid",
            Self::Unauthenticated => "unauthenticated",
            Self::Forbidden => "forbidden",
            Self::NotFound => "not_found",
            Self::MethodNotAllowed => "method_not_allowed",
            Self::Exists => "exists",
            Self::InUse => "in_use",
            Self::Quota => "quota",
            Self::NoSuchObject => "no_such_object",
            Self::AmbiguousObject => "ambiguous_object",
            Self::GrantRefused => "grant_refused",
            Self::AdminLacksRights => "admin_lacks_rights",
            Self::ObjectLocked => "object_locked",
            Self::StatementFailed => "statement_failed",
            Self::DatabaseUnreachable => "database_unreachable",
            Self::DatabaseRefusedLogin => "database_refused_login",
            Self::NoEngine => "no_engine",
            Self::BrokerUnavailable => "broker_unavailable",
            Self::StoreUnavailable => "store_unavailable",
            Self::Deadline => "deadline",
        }
    }
}

/// The limit by which a request was refused, if the code does not name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Limit {
    /// The limit on the size of a body.
    Body,
    /// The limit on wrong tokens within 10 s.
    WrongTokens,
    /// The limit on a caller's reads that wait for one server.
    WaitingReads,
}

impl Limit {
    pub(crate) const ALL: [Self; 3] = [Self::Body, Self::WrongTokens, Self::WaitingReads];

    /// One word, for the metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Body => "body_too_large",
            Self::WrongTokens => "too_many_wrong_tokens",
            Self::WaitingReads => "too_many_waiting_reads",
        }
    }
}

/// The error that a caller gets.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct ApiError {
    pub(crate) code: Code,
    /// A message for users. It contains no secret.
    pub(crate) message: String,
    /// The fields that are wrong.
    pub(crate) errors: Problems,
    /// When a retry may succeed.
    pub(crate) retry_at: Option<Timestamp>,
    /// The limit that was reached. The metrics show it; the answer does not.
    pub(crate) limit: Option<Limit>,
}

impl ApiError {
    /// An error without fields.
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            errors: Problems::new(),
            retry_at: None,
            limit: None,
        }
    }

    /// The error `invalid`, with the wrong fields.
    pub(crate) fn invalid(errors: Problems) -> Self {
        let fields: Vec<_> = errors.keys().map(String::as_str).collect();
        Self {
            code: Code::Invalid,
            message: format!("not valid: {}", fields.join(", ")),
            errors,
            retry_at: None,
            limit: None,
        }
    }

    /// The error `not_found`: `what` does not exist.
    pub(crate) fn not_found(what: impl std::fmt::Display) -> Self {
        Self::new(Code::NotFound, format!("there is no {what}"))
    }

    /// `no_engine`: no engine of this pool is running.
    pub(crate) fn no_engine(pool: &mayfly_protocol::names::PoolName) -> Self {
        Self::new(
            Code::NoEngine,
            format!("no engine of pool `{pool}` is running"),
        )
    }

    /// The error `broker_unavailable`, with the broker's error.
    pub(crate) fn broker(error: &BrokerError) -> Self {
        Self::new(Code::BrokerUnavailable, error.to_string())
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        let code = match failure.code {
            FailureCode::NoSuchObject => Code::NoSuchObject,
            FailureCode::AmbiguousObject => Code::AmbiguousObject,
            FailureCode::GrantRefused => Code::GrantRefused,
            FailureCode::AdminLacksRights => Code::AdminLacksRights,
            FailureCode::ObjectLocked => Code::ObjectLocked,
            FailureCode::StatementFailed | FailureCode::ForeignRole | FailureCode::OtherServer => {
                Code::StatementFailed
            }
            FailureCode::Expired => Code::InUse,
            FailureCode::BeyondMaximum => {
                return Self::invalid(Problems::from([(
                    "increment".to_owned(),
                    vec![failure.message],
                )]));
            }
            FailureCode::DatabaseUnreachable => Code::DatabaseUnreachable,
            FailureCode::DatabaseRefusedLogin => Code::DatabaseRefusedLogin,
            FailureCode::NotUnderstood => {
                return Self::new(
                    Code::NoEngine,
                    format!(
                        "the engine does not understand this dispatcher (another version, or another pool key): {}",
                        failure.message
                    ),
                );
            }
            FailureCode::PastDeadline => {
                return Self::new(
                    Code::NoEngine,
                    format!(
                        "the task reached an engine after its deadline; if this repeats, compare the clocks of dispatcher and engines: {}",
                        failure.message
                    ),
                );
            }
        };
        Self::new(code, failure.message)
    }
}
