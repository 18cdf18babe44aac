//! Why a call of the broker failed.

use super::Taken;
use super::declare::is_refused;

/// Why a call of the broker failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BrokerError {
    /// There is no connection at present.
    #[error("the broker is not connected")]
    Down,
    /// The connection or channel failed, or no confirm came in time. The broker may have the message or not.
    #[error("the broker did not confirm: {0}")]
    Unconfirmed(String),
    /// The broker has returned the message: no queue has this name.
    #[error("the broker has no queue for this message")]
    Unroutable,
    /// A queue or exchange does not exist yet. Only dispatchers declare shared ones.
    #[error("the broker has no `{0}` yet; a dispatcher declares it")]
    Absent(String),
    /// The broker's user lacks a permission.
    #[error("the broker's user lacks a permission: {0}")]
    NotAllowed(String),
    /// The virtual host belongs to another installation.
    #[error("{0}")]
    Taken(Taken),
    /// The number of connected dispatchers of the other installation.
    #[error(
        "{0} dispatchers of the other installation are connected to this virtual host; stop them first (one that was killed counts for 15 s)"
    )]
    InUse(u32),
}

impl BrokerError {
    /// One word for spans.
    pub(super) fn word(&self) -> &'static str {
        match self {
            Self::Down => "broker_down",
            Self::Unconfirmed(_) => "unconfirmed",
            Self::Unroutable => "unroutable",
            Self::Absent(_) => "absent",
            Self::NotAllowed(_) => "not_allowed",
            Self::Taken(_) => "taken",
            Self::InUse(_) => "in_use",
        }
    }
}

impl From<lapin::Error> for BrokerError {
    fn from(error: lapin::Error) -> Self {
        match is_refused(&error) {
            true => Self::NotAllowed(error.to_string()),
            false => Self::Unconfirmed(error.to_string()),
        }
    }
}
