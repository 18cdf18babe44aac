//! Leases: issue, renew, revoke, record outcomes, and repair what was lost.

pub(crate) mod compare;
pub(crate) mod inbox;
pub(crate) mod issue;
pub(crate) mod judge;
pub(crate) mod order;
pub(crate) mod outcomes;
pub(crate) mod park_again;
pub(crate) mod reconcile;
pub(crate) mod renew;
pub(crate) mod revoke;
pub(crate) mod revoke_below;
mod slot_pause;
pub(crate) mod sweep;
pub(crate) mod together;
mod trials;

use mayfly_common::trace;

/// The trace of a lease, for log lines.
pub(crate) fn trace_of(lease: &mayfly_protocol::lease::Lease) -> String {
    trace::trace_of(&lease.traceparent)
}
