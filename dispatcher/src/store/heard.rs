//! What a message of a pool says of a lease. It counts only for a lease of that pool and for the
//! role on record; that is looked at in the same job in which the event happens.

use jiff::Timestamp;
use mayfly_common::names::{LeaseId, PoolName, RoleName};

use super::leases::{Applied, apply, load};
use super::{Store, StoreError};
use crate::lease::{Event, State};

/// What a message says.
#[derive(Debug, Clone)]
pub(crate) struct Said {
    /// The pool whose key it was sealed with.
    pub(crate) pool: PoolName,
    /// The role it is about; engines of before it was said name none.
    pub(crate) role: Option<RoleName>,
    /// What happened.
    pub(crate) event: Event,
    /// It is an answer whose caller has left.
    pub(crate) late: bool,
}

/// What came of it.
#[derive(Debug)]
pub(crate) enum Heard {
    /// It happened.
    Applied(Box<Applied>),
    /// The caller is about to say what became of the lease; a late answer never makes a
    /// credential.
    NotYet,
    /// The store has no such lease.
    Unknown,
    /// It is a lease of another pool.
    OtherPool,
    /// The lease has another role.
    OtherRole,
}

impl Store {
    /// Lets an event happen to a lease if it is the pool's to speak of.
    ///
    /// # Errors
    /// The store is away.
    pub(crate) async fn hear(
        &self,
        id: LeaseId,
        said: Said,
        now: Timestamp,
    ) -> Result<Heard, StoreError> {
        let sealer = self.sealer.clone();
        self.run(move |connection| {
            let lease = match load(connection, id) {
                Ok(lease) => lease,
                Err(StoreError::NotFound(_)) => return Ok(Heard::Unknown),
                Err(error) => return Err(error),
            };
            if lease.pool != said.pool {
                return Ok(Heard::OtherPool);
            }
            if said.role.is_some_and(|role| role != lease.role) {
                return Ok(Heard::OtherRole);
            }
            if said.late && lease.course.state == State::Pending {
                return Ok(Heard::NotYet);
            }
            apply(connection, &sealer, lease, said.event, now)
                .map(|applied| Heard::Applied(Box::new(applied)))
        })
        .await
    }
}
