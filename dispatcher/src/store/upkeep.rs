//! Periodic work on leases: claims due leases, counts leases, and forgets old leases.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use mayfly_protocol::names::PoolName;

use super::candidates::{AccessCache, LeaseAccess};
use super::lease_row::select_due;
use super::leases::apply;
use super::sql::{Cell, Connection, NONE, params};
use super::takeover::take_over;
use super::{Cause, Lane, Store, StoreError, open, pools};
use crate::store::shown;
use mayfly_protocol::lease::{self, State};

/// How long failed leases are kept. They never had an account, and their create can commit no more.
const KEPT_FAILED: SignedDuration = SignedDuration::from_mins(10);
/// How long read tokens are kept after their end, so that a list shows why a token is refused.
const TOKENS_KEPT: SignedDuration = SignedDuration::from_hours(7 * 24);
/// Settled leases of each kind that one job forgets. It takes 20 ms in SQLite, during which no read can write.
const FORGET: u32 = 200;
/// A lease is overdue when its account should have ended this long ago.
const OVERDUE: SignedDuration = SignedDuration::from_secs(10);

const POOLS_WITH_DUE: &str = "SELECT name FROM pools WHERE EXISTS
    (SELECT 1 FROM leases INDEXED BY leases_reconcile WHERE leases.pool = pools.name AND next_reconcile <= ?1)
    ORDER BY name";

/// The numbers of every pool in one query. With many pools and a distant store, a query for each number would take
/// seconds. Columns: the name; leases shown as ended but not settled; those of them with an expiration; stuck
/// leases; leases overdue since `?1`; and the leases in each state.
fn pool_numbers() -> String {
    let of_states = State::ALL.map(|state| {
        format!(
            "(SELECT CAST(coalesce(sum(n), 0) AS BIGINT) FROM lease_counts WHERE pool = pools.name AND state = '{}')",
            state.as_str()
        )
    });
    let gone =
        "FROM leases WHERE state = 'revoking' AND revoked_at IS NOT NULL AND pool = pools.name";
    format!(
        "SELECT name, (SELECT count(*) {gone}), (SELECT count(expiration) {gone}),
           (SELECT count(*) FROM leases WHERE stuck = 1 AND revoked_at IS NULL AND pool = pools.name),
           (SELECT count(*) FROM leases
            WHERE next_reconcile IS NOT NULL AND revoked_at IS NULL AND ends_here < ?1 AND pool = pools.name),
           {}
         FROM pools ORDER BY name",
        of_states.join(", ")
    )
}

/// Numbers of one pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PoolCount {
    pub(crate) pool: PoolName,
    /// Leases shown in each state, as in [`State::ALL`].
    pub(crate) leases: [u64; 5],
    /// Leases shown as ended whose create can still commit.
    pub(crate) settling: u64,
    /// Leases whose revocation keeps failing.
    pub(crate) stuck: u64,
    /// Leases more than 10 s past their end whose account is not known to be gone.
    pub(crate) overdue: u64,
}

/// Sums up the counts: each session of a store in PostgreSQL writes rows of its own.
fn fold_counts(connection: &Connection) -> Result<(), StoreError> {
    if !connection.is_shared() {
        return Ok(());
    }
    let parts = connection.prepare(
        "SELECT pool, state, CAST(sum(n) AS BIGINT) FROM lease_counts WHERE part <> 0 GROUP BY pool, state",
    )?;
    let parts = parts.query(NONE)?;
    connection.execute("DELETE FROM lease_counts WHERE part <> 0", NONE)?;
    for part in parts {
        let (pool, state, n): (String, String, i64) = (part.get(0)?, part.get(1)?, part.get(2)?);
        connection.execute(
            "INSERT INTO lease_counts (pool, state, part, n) VALUES (?1, ?2, 0, ?3)
             ON CONFLICT (pool, state, part) DO UPDATE SET n = lease_counts.n + excluded.n",
            params![pool, state, n],
        )?;
    }
    Ok(())
}

/// Counts the settled leases that are about to be forgotten.
fn count_forgotten(
    connection: &Connection,
    which: &str,
    values: Vec<Cell>,
) -> Result<(), StoreError> {
    if !connection.is_counting() {
        return Ok(());
    }
    // The texts in a row that somebody else wrote may not be valid names.
    let sql = format!(
        "UPDATE lease_counts AS c SET n = c.n - f.n
         FROM (SELECT pool, state, count(*) AS n FROM leases WHERE id IN ({which}) GROUP BY pool, state) AS f
         WHERE c.pool = f.pool AND c.state = f.state"
    );
    connection.execute(&sql, values)?;
    Ok(())
}

impl Store {
    /// Pools with leases that are due for [`Store::claim_due`].
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn pools_with_due(&self, now: Timestamp) -> Result<Vec<PoolName>, StoreError> {
        self.read(Lane::Rows, move |connection| {
            let names = connection
                .prepare(POOLS_WITH_DUE)?
                .query([now.as_millisecond()])?;
            pools::names(&names)
        })
        .await
    }

    /// Claims at most `limit` leases of a pool for which the reconciler must send a message now. It sets the next
    /// look at each of them; `chance` (0 to 1) spreads these. Pending leases past their deadline are given up first.
    /// For a pool that is not in `living` nothing else is done. Leases that their pool cannot end are given to
    /// another pool, preferably one in `living`.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn claim_due(
        &self,
        pool: PoolName,
        living: Vec<PoolName>,
        limit: u32,
        now: Timestamp,
        chance: f64,
    ) -> Result<Vec<LeaseAccess>, StoreError> {
        self.run_later(move |connection| {
            let sealer = connection.sealer()?;
            let pool = match pools::load(connection, &pool) {
                Ok(pool) => pool,
                // Only this pool is left out.
                Err(StoreError::NotFound(_) | StoreError::Unusable(_)) => return Ok(Vec::new()),
                Err(error) => return Err(error),
            };
            let may_send = living.contains(&pool.name) || pool.distrusted.is_some();
            let rest = if may_send {
                "INDEXED BY leases_reconcile WHERE pool = ?1 AND next_reconcile <= ?2 ORDER BY next_reconcile LIMIT ?3"
            } else {
                // The pool has no engines: only pending leases are claimed. Other due leases wait for an engine.
                "INDEXED BY leases_state WHERE pool = ?1 AND next_reconcile <= ?2 AND state = 'pending' LIMIT ?3"
            };
            let due = select_due(connection, rest, params![pool.name.as_str(), now.as_millisecond(), limit], now)?;
            let restored = open::copied_at(connection, now)?;
            let (mut claimed, mut cache) = (Vec::new(), AccessCache::default());
            for mut stored in due {
                if stored.lease.status.state == State::Pending {
                    let is_older = restored.is_some_and(|copied| stored.lease.created <= copied);
                    let event = stored.lease.unanswered(is_older, now);
                    apply(connection, sealer, &mut stored, event, now)?;
                    stored.lease.status.next_reconcile = Some(now);
                }
                if may_send {
                    let status = &mut stored.lease.status;
                    let turn = status.reconcile_attempts;
                    let wait = lease::reconcile_after(status.reconcile_attempts, chance);
                    status.next_reconcile = Some(now + wait);
                    status.reconcile_attempts = status.reconcile_attempts.saturating_add(1);
                    let taken_over = match take_over(connection, &mut stored, &pool, &living, now) {
                        Err(StoreError::Unusable(_)) => false,
                        taken_over => taken_over?,
                    };
                    let found = cache.access(connection, sealer, &stored.lease, turn)?;
                    claimed.extend(found.map(|found| LeaseAccess { taken_over, ..found }));
                }
                stored.write(connection)?;
            }
            Ok(claimed)
        })
        .await
    }

    /// Makes all leases due that an earlier process of this dispatcher had postponed. Records which server is the
    /// store's primary, so that [`Self::claim_due`] can notice a failover.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn wake_put_off(&self, now: Timestamp) -> Result<usize, StoreError> {
        self.run(move |connection| {
            open::copied_at(connection, now)?;
            Ok(connection.execute(
                "UPDATE leases SET next_reconcile = ?1, reconcile_attempts = 0
                 WHERE next_reconcile IS NOT NULL AND reconcile_attempts > 0",
                [now.as_millisecond()],
            )?)
        })
        .await
    }

    /// Makes the pending leases due that this dispatcher recorded before its present start at `begun`. Nobody waits
    /// for them any more, and a caller that reads again gets a new lease. With several dispatchers another one may
    /// be making the account, so only the deadline counts.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn requeue_abandoned(
        &self,
        begun: Timestamp,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        self.run(move |connection| {
            if !connection.is_shared() {
                connection.execute(
                    "UPDATE leases SET next_reconcile = ?2 WHERE state = 'pending' AND created < ?1",
                    params![begun.as_millisecond(), now.as_millisecond()],
                )?;
            }
            Ok(())
        })
        .await
    }

    /// Number of active leases that have not reached their end.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn living(&self, now: Timestamp) -> Result<u64, StoreError> {
        self.read(Lane::Pages, move |connection| {
            let sql = "SELECT count(*) FROM leases WHERE state = 'active' AND ends_here > ?1";
            Ok(connection
                .prepare(sql)?
                .query_row([now.as_millisecond()], |row| row.get(0))?)
        })
        .await
    }

    /// Writes a row as a test: a store on a full disk can still be read.
    ///
    /// # Errors
    /// Nothing can be written.
    pub(crate) async fn touch(&self, now: Timestamp) -> Result<(), StoreError> {
        let written = self
            // The write uses no slot: a store whose turn cannot be taken cannot be written.
            .run(move |connection| {
                let moment = now.as_millisecond().to_string();
                open::put_free(connection, "touched", moment.as_bytes())
            })
            .await;
        match &written {
            Ok(()) => self.health.written(),
            // A full disk was already reported, and an unreachable store is known.
            Err(_) if self.ready().is_ok() => self.health.failed(Cause::Other),
            Err(_) => {}
        }
        written
    }

    /// The numbers of every pool, all states named.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn pool_counts(&self, now: Timestamp) -> Result<Vec<PoolCount>, StoreError> {
        self.read(Lane::Pages, move |connection| {
            let overdue_before = (now - OVERDUE).as_millisecond();
            let rows = connection
                .prepare(&pool_numbers())?
                .query([overdue_before])?;
            let mut counts = Vec::with_capacity(rows.len());
            for row in &rows {
                // A text that is not a name was not written by a dispatcher.
                let Ok(pool) = row.get::<String>(0)?.parse() else {
                    continue;
                };
                let mut leases = [0; 5];
                for (at, n) in leases.iter_mut().enumerate() {
                    *n = row.get(5 + at)?;
                }
                let settling = row.get(1)?;
                counts.push(PoolCount {
                    pool,
                    leases: shown::counts(leases, settling, row.get(2)?),
                    settling,
                    stuck: row.get(3)?,
                    overdue: row.get(4)?,
                });
            }
            Ok(counts)
        })
        .await
    }

    /// Forgets some of the settled leases: failed ones after 10 min, others after `history`. When there are no more
    /// of them, it also forgets the versions of base secrets that no lease needs, and read tokens 7 days after their
    /// end. Returns whether there may be more.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn forget(
        &self,
        now: Timestamp,
        history: Duration,
    ) -> Result<bool, StoreError> {
        self.run_later(move |connection| {
            let old = "SELECT id FROM leases WHERE next_reconcile IS NULL AND created < ?1 ORDER BY created, id LIMIT ?2";
            // A detached lease is kept for the same time as the others.
            let failed = "SELECT id FROM leases INDEXED BY leases_failed WHERE next_reconcile IS NULL AND state = 'failed' AND created < ?1
                          AND (revoked_at IS NOT NULL OR last_error IS NULL) ORDER BY created LIMIT ?2";
            let mut is_all = true;
            for (which, before) in [(failed, now - KEPT_FAILED), (old, now - history)] {
                let values = params![before.as_millisecond(), FORGET];
                let reads = format!("DELETE FROM reads WHERE lease IN ({which})");
                connection.execute(&reads, values.clone())?;
                count_forgotten(connection, which, values.clone())?;
                let leases = format!("DELETE FROM leases WHERE id IN ({which})");
                is_all &= connection.execute(&leases, values)? < FORGET as usize;
            }
            if !is_all {
                return Ok(true);
            }
            fold_counts(connection)?;
            // The leases of a deleted token keep its id.
            connection.execute(
                "DELETE FROM tokens WHERE read IS NOT NULL AND expiration < ?1",
                [(now - TOKENS_KEPT).as_millisecond()],
            )?;
            connection.execute(
                "DELETE FROM base_versions AS v
                 WHERE NOT EXISTS (SELECT 1 FROM secrets s WHERE s.id = v.secret_id AND s.version = v.version)
                   AND NOT EXISTS (SELECT 1 FROM leases l WHERE l.base_secret_id = v.secret_id
                                   AND l.next_reconcile IS NOT NULL
                                   AND l.base_version <= v.version)",
                NONE,
            )?;
            connection.execute(
                "DELETE FROM unproven WHERE NOT EXISTS (SELECT 1 FROM secrets s WHERE s.id = unproven.secret_id)",
                NONE,
            )?;
            connection.execute(
                "DELETE FROM base_pools
                 WHERE NOT EXISTS (SELECT 1 FROM secrets s WHERE s.id = base_pools.secret_id)
                   AND NOT EXISTS (SELECT 1 FROM leases l WHERE l.base_secret_id = base_pools.secret_id
                                   AND l.next_reconcile IS NOT NULL)",
                NONE,
            )?;
            Ok(false)
        })
        .await
    }
}
