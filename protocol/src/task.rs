//! The wire: the content of a task, a reply, an outcome and a heartbeat, as versioned JSON inside a sealed envelope,
//! and the clear head beside it.
//!
//! A request that an engine answers is a type that implements [`Request`], in a file of its own.

mod check;
mod create;
mod failure;
mod finding;
mod kind;
mod refresh;
mod renew;
mod reply;
mod revoke;
mod rotate;
mod sweep;
mod tidy;
mod wire;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::names::LeaseId;
use crate::target::Target;

pub use check::{Accounts, Check, CheckWhat, Connections};
pub use create::{Create, Created, Special};
pub use failure::{Failure, FailureCode};
pub use finding::{Finding, Topic};
pub use kind::{Kind, ReplyResult};
pub use refresh::{Refresh, Refreshed};
pub use renew::{GrantsOf, Renew, Renewed};
pub use reply::{Heartbeat, Reply};
pub use revoke::{
    Also, Instead, LEASES_MAX, Outcome, OutcomeResult, Place, Revoke, RevokeMode, Verdict,
};
pub use rotate::{Rotate, Rotated};
pub use sweep::{Ledger, LedgerRole, Sweep};
pub use tidy::{Kept, Tidied, Tidy};
pub use wire::{Head, OpenError, WIRE_VERSION};

/// A task for one server.
pub trait HasTarget {
    /// The server and its admin.
    fn target(&self) -> &Target;

    /// The target, to be changed: its authorities are replaced by their name, and back.
    fn target_mut(&mut self) -> &mut Target;
}

/// A request to any engine of a pool. It travels to the pool's create queue under a [`Head`] of its
/// kind; the answer travels back as a [`Reply`].
pub trait Request: HasTarget + Clone + Serialize + DeserializeOwned + Send + Sync {
    /// The word in the head.
    const KIND: Kind;
    /// What an engine answers when it has met the request.
    type Answer: Send;

    /// The lease that head and body must both name. `None`: the request is about no lease.
    fn lease(&self) -> Option<LeaseId> {
        None
    }

    /// The answer in its form on the wire.
    fn to_reply(answer: Self::Answer) -> ReplyResult;

    /// The answer out of a reply. `None`: it answers another kind of request, or is a failure.
    fn from_reply(reply: ReplyResult) -> Option<Self::Answer>;
}
