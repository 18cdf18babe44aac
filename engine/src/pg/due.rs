//! Values that the steps of an end pass on: candidates, roles that are due, and results.

use jiff::Timestamp;
use mayfly_protocol::task::{Failure, Revoke};

use mayfly_protocol::revocation::Ended;

/// When a role was dropped, and how many seconds late.
pub(super) type Dropped = (Timestamp, f64);

/// A revocation, and its place in the batch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate<'t> {
    pub(super) index: usize,
    pub(super) task: &'t Revoke,
    /// Absence of the role is final.
    pub(super) conclusive: bool,
}

/// A role whose end has come.
#[derive(Debug, Clone)]
pub(super) struct Due<'t> {
    pub(super) task: &'t Revoke,
    pub(super) oid: u32,
    pub(super) index: usize,
}

/// The result of each revocation of a batch, in their order. `None`: its role must be ended alone.
pub(super) struct Results {
    pub(super) list: Vec<Option<Result<Ended, Failure>>>,
}

impl Results {
    pub(super) fn set(&mut self, index: usize, result: Result<Ended, Failure>) {
        self.list[index] = Some(result);
    }

    /// Whether the server has a role whose end has not come.
    pub(super) fn has_one_not_due(&self) -> bool {
        let is_not_due =
            |result: &Result<Ended, Failure>| matches!(result, Ok(Ended::NotDue { .. }));
        self.list.iter().flatten().any(is_not_due)
    }

    pub(super) fn dropped(&mut self, roles: &[Due<'_>], dropped: Vec<Dropped>, identity: &str) {
        for (role, (at, late_seconds)) in roles.iter().zip(dropped) {
            let server = identity.to_owned();
            let ended = Ended::Dropped {
                at,
                server,
                late_seconds,
            };
            self.set(role.index, Ok(ended));
        }
    }
}
