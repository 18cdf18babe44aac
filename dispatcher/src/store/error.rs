//! The store's errors, and their codes in the API.

use mayfly_protocol::names::PoolName;

use crate::error::{ApiError, Code, Problems};

/// Why a store job failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum StoreError {
    /// The disk, the file or the thread failed. The caller is not the cause.
    #[error("the lease store cannot be used: {0}")]
    Unavailable(String),
    /// A row was not written by a dispatcher with this master key, or this version cannot read it. Other rows can be
    /// used.
    #[error("the lease store cannot be used: {0}")]
    Unusable(String),
    /// The thing does not exist. The value has its kind and name.
    #[error("there is no {0}")]
    NotFound(String),
    /// The thing exists already. The value is the message.
    #[error("{0}")]
    Exists(String),
    /// Something still needs it.
    #[error("{0}")]
    InUse(String),
    /// Something needs it until a known timestamp.
    #[error("{message}")]
    InUseUntil {
        message: String,
        /// That timestamp, by the store's clock.
        until: jiff::Timestamp,
    },
    /// A limit on leases is reached.
    #[error("{message}")]
    Quota {
        message: String,
        /// The latest timestamp at which the count falls below the limit, if it is known.
        until: Option<jiff::Timestamp>,
    },
    /// The pool is distrusted.
    #[error(
        "pool `{0}` is distrusted, so nothing is asked of it; `mayfly secret update` moves a secret to another pool"
    )]
    Distrusted(PoolName),
    /// The value names something that does not exist.
    #[error("not valid")]
    Invalid(Problems),
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            // The log has the detail, which is of no use to a caller.
            StoreError::Unavailable(_) | StoreError::Unusable(_) => {
                Self::new(Code::StoreUnavailable, "the lease store cannot be used now")
            }
            StoreError::NotFound(what) => Self::not_found(what),
            StoreError::Exists(message) => Self::new(Code::Exists, message),
            StoreError::InUse(message) => Self::new(Code::InUse, message),
            StoreError::InUseUntil { message, until } => Self {
                retry_at: Some(until),
                ..Self::new(Code::InUse, message)
            },
            StoreError::Distrusted(_) => Self::new(Code::NoEngine, error.to_string()),
            StoreError::Quota { message, until } => Self {
                retry_at: until,
                ..Self::new(Code::Quota, message)
            },
            StoreError::Invalid(errors) => Self::invalid(errors),
        }
    }
}
