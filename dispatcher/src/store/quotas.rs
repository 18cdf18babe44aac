//! Admission: whether a read gets a new lease, the lease of an earlier read, or none because a quota is
//! used up. It is decided in the job that inserts the lease, so that it is exact.

use std::time::Duration;

use jiff::Timestamp;
use mayfly_protocol::names::LeaseId;

use super::authentic::{self, LEASES, READS};
use super::lease_row::{self, from_entry, select};
use super::ring::Generation;
use super::sql::{Cell, Connection, params};
use super::{Store, StoreError, exists, generations, moment, pools};
use crate::password::Nonce;
use mayfly_protocol::lease::{Lease, State};

/// On which conditions a lease is recorded.
#[derive(Debug, Clone, Default)]
pub(crate) struct Conditions {
    /// The caller's name for the read.
    pub(crate) key: Option<String>,
    /// A lease of the same caller and secret that lives at least this long is used instead.
    pub(crate) share_for: Option<Duration>,
    /// What its password is derived from: the generation of the key, and its nonce.
    pub(crate) nonce: Option<(Generation, Nonce)>,
    /// Most leases of the secret.
    pub(crate) most_of_secret: Option<u64>,
    /// Most leases of the secret and caller.
    pub(crate) most_of_secret_and_caller: Option<u64>,
    /// Most leases of the caller.
    pub(crate) most_of_caller: Option<u64>,
}

/// What became of a lease to be recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Admission {
    New,
    /// It is not: this one is the answer.
    Known(LeaseId),
}

/// A caller's key as the store has it. A dispatcher of the version before derives passwords from
/// lease ids and would give a wrong one: it does not find the leases of this version.
fn read_key(key: &str) -> String {
    format!("nonce|{key}")
}

/// The lease that answers the read instead of a new one, if there is one.
fn known(
    connection: &Connection,
    lease: &Lease,
    conditions: &Conditions,
    now: Timestamp,
) -> Result<Option<LeaseId>, StoreError> {
    if let Some(key) = &conditions.key {
        let found = authentic::row(
            connection,
            &READS,
            "WHERE created_by = ?1 AND path = ?2 AND key IN (?3, ?4) ORDER BY key = ?3 DESC LIMIT 1",
            params![lease.created_by, lease.path.as_str(), read_key(key), key],
        )?;
        let found = match found {
            Some(read) => {
                let id = [read.get::<String>("lease")?];
                let found = authentic::row(connection, &LEASES, "WHERE id = ?1", id)?;
                found.map(|row| from_entry(&row)).transpose()?
            }
            None => None,
        };
        // If nobody ever got a credential, the read begins again.
        if let Some(found) = found
            && (found.status.state == State::Pending || found.status.expiration.is_some())
        {
            return Ok(Some(found.id));
        }
    }
    let Some(life) = conditions.share_for else {
        return Ok(None);
    };
    let found = select(
        connection,
        "WHERE path = ?1 AND created_by = ?2 AND next_reconcile IS NOT NULL AND revoked_at IS NULL
         AND secret_version = ?3 AND base_secret_id = ?4 AND base_version = ?5
         AND (state = 'pending' AND create_deadline > ?6 AND 1000 * ttl_seconds >= ?8
              OR state = 'active' AND engine IS NOT NULL AND ends_here >= ?7)
         ORDER BY id DESC LIMIT 1",
        params![
            lease.path.as_str(),
            lease.created_by,
            lease.secret_version,
            lease.base.id,
            lease.base.version,
            now.as_millisecond(),
            (now + life).as_millisecond(),
            i64::try_from(life.as_millis()).unwrap_or(i64::MAX),
        ],
    )?;
    Ok(found.first().map(|found| found.id))
}

/// Refuses one lease too many. Counted where it is inserted, so that it is exact.
fn check_quotas(
    connection: &Connection,
    lease: &Lease,
    conditions: &Conditions,
    now: Timestamp,
) -> Result<(), StoreError> {
    let held = "next_reconcile IS NOT NULL AND revoked_at IS NULL";
    let (path, who) = (lease.path.as_str(), lease.created_by.as_str());
    let limits = [
        (
            conditions.most_of_secret,
            format!("path = ?1 AND {held}"),
            vec![path],
            format!("maxLeases of `{path}`"),
        ),
        (
            conditions.most_of_secret_and_caller,
            format!("path = ?1 AND created_by = ?2 AND {held}"),
            vec![path, who],
            format!("maxLeasesPerCaller of `{path}`"),
        ),
        (
            conditions.most_of_caller,
            format!("created_by = ?1 AND {held}"),
            vec![who],
            "maxLeases of this token".to_owned(),
        ),
    ];
    for (most, condition, values, name) in limits {
        let Some(most) = most else { continue };
        let values: Vec<Cell> = values.into_iter().map(Cell::from).collect();
        // Counted no further than needed.
        let count = format!(
            "SELECT count(*) FROM (SELECT 1 FROM leases WHERE {condition} LIMIT ?{}) AS held",
            values.len() + 1
        );
        let mut limited = values.clone();
        limited.push(Cell::Int(i64::try_from(most).unwrap_or(i64::MAX)));
        let count: u64 = connection
            .prepare(&count)?
            .query_row(limited, |row| row.get(0))?;
        if count >= most {
            // One whose create is under way ends at its own date, which is not known yet.
            let first = format!(
                "SELECT min(coalesce(ends_here, created + 1000 * ttl_seconds)) FROM leases WHERE {condition}"
            );
            let first: Option<i64> = connection
                .prepare(&first)?
                .query_row(values, |row| row.get(0))?;
            let until = first.map(moment).transpose()?;
            let when = match until {
                Some(at) if at > now => format!("; a place becomes free at {at:.0} at the latest"),
                Some(_) => "; a place becomes free when an overdue account is gone".to_owned(),
                None => String::new(),
            };
            return Err(StoreError::Quota {
                message: format!(
                    "{name}: {count} of {most} leases exist{when}, or when one is revoked"
                ),
                until,
            });
        }
    }
    Ok(())
}

/// Keeps others off what must be exact until the end of the job: of two reads that count against one quota, or
/// have the same key, one decides after the other. Always in this order. `false`: the secret is gone.
fn hold(
    connection: &Connection,
    lease: &Lease,
    conditions: &Conditions,
) -> Result<bool, StoreError> {
    let for_update = connection.for_update();
    if conditions.most_of_caller.is_some() && !for_update.is_empty() {
        let token = format!("SELECT 1 FROM tokens WHERE id = ?1{for_update}");
        exists(connection, &token, &lease.created_by)?;
    }
    let counts = conditions.key.is_some()
        || conditions.share_for.is_some()
        || conditions.most_of_secret.is_some()
        || conditions.most_of_secret_and_caller.is_some();
    let until_end = if counts { for_update } else { "" };
    let secret = format!("SELECT 1 FROM secrets WHERE path = ?1{until_end}");
    exists(connection, &secret, lease.path.as_str())
}

impl Store {
    /// Records a lease before its account is made; or finds the one that is the answer already.
    ///
    /// # Errors
    /// `NotFound` where the secret went away meanwhile; `Quota`.
    pub(crate) async fn admit(
        &self,
        lease: Lease,
        conditions: Conditions,
        now: Timestamp,
    ) -> Result<Admission, StoreError> {
        self.run_beside(move |connection| {
            if !hold(connection, &lease, &conditions)? {
                return Err(StoreError::NotFound(format!("secret `{}`", lease.path)));
            }
            pools::load(connection, &lease.pool)?.recipient()?;
            let known = known(connection, &lease, &conditions, now)?;
            if known.is_none() {
                check_quotas(connection, &lease, &conditions, now)?;
                if let Some((generation, _)) = &conditions.nonce {
                    generations::check(connection, *generation)?;
                }
                authentic::insert(
                    connection,
                    &lease_row::entry(&lease, conditions.nonce.as_ref())?,
                )?;
            }
            if let Some(key) = &conditions.key {
                let entry = READS.entry(params![
                    lease.created_by,
                    lease.path.as_str(),
                    read_key(key),
                    known.unwrap_or(lease.id).to_string(),
                ]);
                authentic::put(connection, &entry, &["lease"])?;
            }
            Ok(known.map_or(Admission::New, Admission::Known))
        })
        .await
    }
}
