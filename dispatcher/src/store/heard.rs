//! A pool's report about a lease. It counts only for a lease of that pool and for the lease's role. The job that
//! applies the event checks this.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use mayfly_protocol::names::{LeaseId, PoolName, RoleName};
use tracing::info;

use super::lease_row::{self, Stored, load_stored};
use super::leases::{Applied, apply};
use super::sealer::Sealer;
use super::sql::Connection;
use super::{Store, StoreError, bases};
use mayfly_protocol::lease::{Event, State};

/// What a message reports.
#[derive(Debug, Clone)]
pub(crate) struct Report {
    /// The pool whose key it was sealed with.
    pub(crate) pool: PoolName,
    /// The role that it is about. Engines of early versions name none.
    pub(crate) role: Option<RoleName>,
    /// Where its role was found. `None`: nowhere.
    pub(crate) found: Option<Found>,
    pub(crate) event: Event,
    /// Whether it is an answer whose caller has left.
    pub(crate) late: bool,
}

/// Where a role with the lease's own comment was found.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) address: String,
    /// Identity of the server that answers there.
    pub(crate) server: String,
}

/// Records that a lease's role was found. If it was found at the address where it was made, the server there has
/// replaced the original one, for example in a major upgrade. A server at another address may be a copy.
fn found(
    connection: &Connection,
    sealer: &Sealer,
    stored: &mut Stored,
    found: &Found,
) -> Result<(), StoreError> {
    let lease = &mut stored.lease;
    let known = lease.status.server.as_ref();
    if known.is_none_or(|known| *known == found.server) {
        return Ok(());
    }
    let own = bases::load_target(connection, sealer, &lease.base)?;
    if own.is_none_or(|(own, _)| own.address() != found.address) {
        return Ok(());
    }
    info!(lease = %lease.id, server = found.server, "another server answers at the address where the account was made");
    lease.status.server = Some(found.server.clone());
    stored.write(connection)?;
    bases::saw_server(connection, &stored.lease.base, &found.server)
}

/// The result of a report.
#[derive(Debug)]
pub(crate) enum Heard {
    Applied(Box<Applied>),
    /// The caller is still waiting and decides about the lease. A late answer never makes a credential.
    NotYet,
    /// The store has no such lease.
    Unknown,
    /// The lease belongs to another pool.
    OtherPool,
    /// The lease has another role.
    OtherRole,
}

/// Applies an event to a lease if the lease belongs to the pool.
fn hear(
    connection: &Connection,
    stored: &mut Stored,
    report: Report,
    now: Timestamp,
) -> Result<Heard, StoreError> {
    let sealer = connection.sealer()?;
    let lease = &stored.lease;
    if lease.pool != report.pool {
        return Ok(Heard::OtherPool);
    }
    if report.role.is_some_and(|role| role != lease.role) {
        return Ok(Heard::OtherRole);
    }
    if report.late && lease.status.state == State::Pending {
        return Ok(Heard::NotYet);
    }
    if let Some(place) = &report.found {
        found(connection, sealer, stored, place)?;
    }
    apply(connection, sealer, stored, report.event, now)
        .map(|applied| Heard::Applied(Box::new(applied)))
}

impl Store {
    /// Applies events in one job, each if its lease belongs to the report's pool. The results are in the order of
    /// the reports. A report about one lease changes no other.
    ///
    /// # Errors
    /// The store is unreachable, or the row of one lease is unusable. Then nothing was applied.
    pub(crate) async fn hear(
        &self,
        reports: Vec<(LeaseId, Report)>,
        now: Timestamp,
    ) -> Result<Vec<Heard>, StoreError> {
        // All jobs lock rows in this order, so two jobs about the same leases do not block each other.
        let ids: BTreeSet<LeaseId> = reports.iter().map(|(id, _)| *id).collect();
        let asked = ids.clone();
        let ahead = move || asked.into_iter().map(lease_row::asked).collect();
        self.run_beside_later(ahead, move |connection| {
            let mut leases = BTreeMap::new();
            for id in ids {
                match load_stored(connection, id) {
                    Ok(stored) => drop(leases.insert(id, stored)),
                    Err(StoreError::NotFound(_)) => {}
                    Err(error) => return Err(error),
                }
            }
            let heard = reports
                .into_iter()
                .map(|(id, report)| match leases.get_mut(&id) {
                    Some(stored) => hear(connection, stored, report, now),
                    None => Ok(Heard::Unknown),
                });
            heard.collect()
        })
        .await
    }
}
