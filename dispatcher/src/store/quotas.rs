//! Admission: whether a read gets a new lease, the lease of an earlier read, or none because a quota is
//! used up. It is decided in the job that inserts the lease, so that it is exact.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use mayfly_protocol::names::LeaseId;
use tokio::sync::OwnedMutexGuard;

use super::authentic::{self, LEASES, READS};
use super::lease_row::{self, from_entry};
use super::ring::Generation;
use super::sql::{Cell, Connection, Query, SqlError, params};
use super::{Role, Store, StoreError, generations, pools, timestamp};
use crate::password::Nonce;
use mayfly_protocol::lease::{Lease, State};

/// The conditions under which a lease is recorded.
#[derive(Debug, Clone, Default)]
pub(crate) struct Conditions {
    /// The caller's key for the read.
    pub(crate) key: Option<String>,
    /// A lease of the same caller and secret that lives at least this long is used instead.
    pub(crate) share_for: Option<Duration>,
    /// What its password is derived from: the generation of the key, and its nonce.
    pub(crate) nonce: Option<(Generation, Nonce)>,
    /// Maximum number of leases of the secret.
    pub(crate) most_of_secret: Option<u64>,
    /// Maximum number of leases of the secret for one caller.
    pub(crate) most_of_secret_and_caller: Option<u64>,
    /// Maximum number of leases of the caller.
    pub(crate) most_of_caller: Option<u64>,
}

/// The result of the admission.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Admission {
    New,
    /// No new lease: this existing lease is the answer.
    Known(LeaseId),
}

/// A caller's key as the store has it. A dispatcher of the previous version derives passwords from lease ids and
/// would return a wrong one, so it must not find the leases of this version.
fn read_key(key: &str) -> String {
    format!("nonce|{key}")
}

/// The query for the key of a read.
fn key_asked(lease: &Lease, key: &str) -> Query {
    authentic::query(
        &READS,
        "WHERE created_by = ?1 AND path = ?2 AND key IN (?3, ?4) ORDER BY key = ?3 DESC LIMIT 1",
        params![lease.created_by, lease.path.as_str(), read_key(key), key],
    )
}

/// Finds leases with at least this remaining life, which a read can share. Without the name of the index SQLite
/// would read all live leases of the base secret.
fn shared_asked(lease: &Lease, life: Duration, now: Timestamp) -> Query {
    authentic::query(
        &LEASES,
        "INDEXED BY leases_held_path
         WHERE path = ?1 AND created_by = ?2 AND next_reconcile IS NOT NULL AND revoked_at IS NULL
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
    )
}

/// The earlier lease that answers the read, if there is one.
fn known(
    connection: &Connection,
    lease: &Lease,
    conditions: &Conditions,
    now: Timestamp,
) -> Result<Option<LeaseId>, StoreError> {
    if let Some(key) = &conditions.key {
        let found = authentic::found(connection, &READS, key_asked(lease, key))?;
        let found = match found.first() {
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
    let found = authentic::sound(connection, &LEASES, shared_asked(lease, life, now))?;
    let found = found.first().map(from_entry).transpose()?;
    Ok(found.map(|found| found.id))
}

/// A limit on the number of live leases.
struct Quota {
    most: u64,
    /// The SQL condition for the leases that count.
    condition: String,
    values: Vec<Cell>,
    name: String,
}

impl Quota {
    /// The limits of a read.
    fn all(lease: &Lease, conditions: &Conditions) -> Vec<Self> {
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
        let limits = limits.into_iter().filter_map(|limit| {
            let (most, condition, values, name) = limit;
            Some(Self {
                most: most?,
                condition,
                values: values.into_iter().map(Cell::from).collect(),
                name,
            })
        });
        limits.collect()
    }

    /// The number of leases that count, at most the limit.
    fn count_asked(&self) -> Query {
        let count = format!(
            "SELECT count(*) FROM (SELECT 1 FROM leases WHERE {} LIMIT ?{}) AS held",
            self.condition,
            self.values.len() + 1
        );
        let mut values = self.values.clone();
        values.push(Cell::Int(i64::try_from(self.most).unwrap_or(i64::MAX)));
        Query::new(count, values)
    }

    /// Refuses a lease above the limit. It counts in the job that inserts the lease, so that the limit is exact.
    fn check(&self, connection: &Connection, now: Timestamp) -> Result<(), StoreError> {
        let (most, name) = (self.most, &self.name);
        let count = connection.ask(self.count_asked())?;
        let count: u64 = count.first().ok_or(SqlError::NoRow)?.get(0)?;
        if count < most {
            return Ok(());
        }
        // The end of a lease whose create is in progress is not known yet.
        let first = format!(
            "SELECT min(coalesce(ends_here, created + 1000 * ttl_seconds)) FROM leases WHERE {}",
            self.condition
        );
        let first: Option<i64> =
            connection.query_row(&first, self.values.clone(), |row| row.get(0))?;
        let until = first.map(timestamp).transpose()?;
        let when = match until {
            Some(at) if at > now => format!("; a place becomes free at {at:.0} at the latest"),
            Some(_) => "; a place becomes free when an overdue account is gone".to_owned(),
            None => String::new(),
        };
        Err(StoreError::Quota {
            message: format!(
                "{name}: {count} of {most} leases exist{when}, or when one is revoked"
            ),
            until,
        })
    }
}

/// The rows that a read locks so that quotas and keys are exact: one of `tokens`, and one of `secrets`. Reads that
/// count against the same quota, or have the same key, wait for each other here. The order is always the same.
fn held(lease: &Lease, conditions: &Conditions) -> (Option<String>, Option<String>) {
    let counts = conditions.key.is_some()
        || conditions.share_for.is_some()
        || conditions.most_of_secret.is_some()
        || conditions.most_of_secret_and_caller.is_some();
    (
        conditions.most_of_caller.map(|_| lease.created_by.clone()),
        counts.then(|| lease.path.to_string()),
    )
}

/// The queries of [`hold`], for the token and for the secret.
fn hold_asked(lease: &Lease, conditions: &Conditions, role: Role) -> (Option<Query>, Query) {
    let for_update = role.for_update();
    let (token, secret) = held(lease, conditions);
    let token = token.filter(|_| !for_update.is_empty()).map(|token| {
        let sql = format!("SELECT 1 FROM tokens WHERE id = ?1{for_update}");
        Query::new(sql, [token])
    });
    let until_end = if secret.is_some() { for_update } else { "" };
    let sql = format!("SELECT 1 FROM secrets WHERE path = ?1{until_end}");
    (token, Query::new(sql, [lease.path.as_str()]))
}

/// Locks these rows until the end of the job, so that reads with the same quota or key are decided one after
/// another. `false`: the secret does not exist any more.
fn hold(
    connection: &Connection,
    lease: &Lease,
    conditions: &Conditions,
) -> Result<bool, StoreError> {
    let (token, secret) = hold_asked(lease, conditions, connection.role());
    if let Some(token) = token {
        connection.ask(token)?;
    }
    Ok(!connection.ask(secret)?.is_empty())
}

/// All queries that [`Store::admit`] makes in a slot, except the query for the lease of a key.
fn asked(lease: &Lease, conditions: &Conditions, now: Timestamp) -> Vec<Query> {
    let (token, secret) = hold_asked(lease, conditions, Role::Slot);
    let key = conditions.key.as_ref().map(|key| key_asked(lease, key));
    let life = conditions.share_for;
    let shared = life.map(|life| shared_asked(lease, life, now));
    let mut asked: Vec<Query> = token.into_iter().collect();
    asked.extend([secret, pools::asked(&lease.pool)]);
    asked.extend(key.into_iter().chain(shared));
    let quotas = Quota::all(lease, conditions);
    asked.extend(quotas.iter().map(Quota::count_asked));
    asked.extend(conditions.nonce.as_ref().map(|_| generations::asked()));
    asked
}

impl Store {
    /// Waits for the other reads of this dispatcher that lock the same rows. A store in SQLite does not need this.
    ///
    /// # Errors
    /// They have not finished by the deadline of the create.
    async fn wait_for_rows(
        &self,
        lease: &Lease,
        conditions: &Conditions,
        now: Timestamp,
    ) -> Result<Vec<OwnedMutexGuard<()>>, StoreError> {
        let mut rows = Vec::new();
        let Some(slots) = &self.slots else {
            return Ok(rows);
        };
        let (token, secret) = held(lease, conditions);
        let token = token.map(|id| format!("token {id}"));
        let secret = secret.map(|path| format!("secret {path}"));
        let waiting = async {
            for row in token.into_iter().chain(secret) {
                rows.push(slots.rows.wait(row).await);
            }
        };
        let left = lease.create_deadline.duration_since(now);
        let left = left.max(SignedDuration::ZERO).unsigned_abs();
        match tokio::time::timeout(left, waiting).await {
            Ok(()) => Ok(rows),
            Err(_) => Err(StoreError::Unavailable(
                "other reads of this secret or caller used up the time limit".to_owned(),
            )),
        }
    }

    /// Records a lease before its account is made, or finds the earlier lease that is the answer.
    ///
    /// # Errors
    /// `NotFound` if the secret was deleted meanwhile; `Quota`.
    pub(crate) async fn admit(
        &self,
        lease: Lease,
        conditions: Conditions,
        now: Timestamp,
    ) -> Result<Admission, StoreError> {
        let _rows = self.wait_for_rows(&lease, &conditions, now).await?;
        let ahead = {
            let (lease, conditions) = (lease.clone(), conditions.clone());
            move || asked(&lease, &conditions, now)
        };
        self.run_beside(ahead, move |connection| {
            if !hold(connection, &lease, &conditions)? {
                return Err(StoreError::NotFound(format!("secret `{}`", lease.path)));
            }
            pools::load(connection, &lease.pool)?.recipient()?;
            let known = known(connection, &lease, &conditions, now)?;
            if known.is_none() {
                for quota in Quota::all(&lease, &conditions) {
                    quota.check(connection, now)?;
                }
                if let Some((generation, _)) = &conditions.nonce {
                    generations::check(connection, *generation)?;
                }
                lease_row::insert(connection, &lease, conditions.nonce.as_ref())?;
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
