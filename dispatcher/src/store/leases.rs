//! Leases in the store. What an event makes of one is decided by [`crate::lease::next`]; here
//! it is loaded, changed and written in one job.

use jiff::Timestamp;
use mayfly_common::names::{LeaseId, PoolName, RoleName, SecretPath};
use mayfly_common::seal::PublicKey;
use mayfly_common::target::Target;
use rusqlite::types::Value;
use rusqlite::{Connection, Row, params, params_from_iter};

use super::sealer::Sealer;
use super::{Store, StoreError, after_children, exists, moment, pools, secrets, unreadable};
use crate::lease::{self, BaseRef, Course, Event, Lease, Send, State};

/// What is needed to have an account ended.
#[derive(Debug, Clone)]
pub(crate) struct Revocation {
    /// The lease.
    pub(crate) lease: Lease,
    /// The admin connection it was made with; with the present credentials, where they are for
    /// the same host and port.
    pub(crate) target: Target,
    /// Whether those are others than it was made with.
    pub(crate) renewed_credentials: bool,
    /// The server its account is on, or was about to be.
    pub(crate) server: Option<String>,
    /// Whom to seal it to.
    pub(crate) pool_key: PublicKey,
}

/// What an event made of a lease.
#[derive(Debug)]
pub(crate) struct Applied {
    /// The lease as it is now.
    pub(crate) lease: Lease,
    /// Its state before.
    pub(crate) before: State,
    /// What to send.
    pub(crate) send: Send,
    /// With what; there when something is to be sent and still can be.
    pub(crate) revocation: Option<Revocation>,
}

/// Which leases to list.
#[derive(Debug, Clone, Default)]
pub(crate) struct Filter {
    /// Of this path and those below.
    pub(crate) path: Option<SecretPath>,
    /// Of this path alone.
    pub(crate) exact_path: Option<SecretPath>,
    /// Of this pool.
    pub(crate) pool: Option<PoolName>,
    /// In this state.
    pub(crate) state: Option<State>,
    /// Only those that are stuck.
    pub(crate) stuck: bool,
    /// Of this account.
    pub(crate) role: Option<RoleName>,
    /// Of this token.
    pub(crate) created_by: Option<String>,
}

impl Filter {
    /// Conditions and their values.
    fn sql(&self) -> (String, Vec<Value>) {
        let (mut sql, mut values) = (String::from("WHERE 1 = 1"), Vec::new());
        let mut add = |condition: &str, value: String| {
            sql.push_str(" AND ");
            sql.push_str(condition);
            values.push(Value::Text(value));
        };
        if let Some(pool) = &self.pool {
            add("pool = ?", pool.to_string());
        }
        if let Some(state) = self.state {
            add("state = ?", state.as_str().to_owned());
        }
        if let Some(role) = &self.role {
            add("role = ?", role.to_string());
        }
        if let Some(who) = &self.created_by {
            add("created_by = ?", who.clone());
        }
        if let Some(path) = &self.exact_path {
            add("path = ?", path.to_string());
        }
        if let Some(path) = &self.path {
            // The path itself or `path:…`; nothing sorts between the two but `path` with a
            // character below `:`, which the second condition takes out.
            add("path >= ?", path.to_string());
            add("path < ?", after_children(path.as_str()));
            add("(path = ?", path.to_string());
            sql.push_str(" OR path >= ?)");
            values.push(Value::Text(format!("{path}:")));
        }
        if self.stuck {
            sql.push_str(" AND stuck = 1");
        }
        (sql, values)
    }
}

const COLUMNS: &str = "id, path, pool, role, state, base_secret_id, base_version, database, owned_objects, \
    traceparent, created, created_by, ttl_seconds, create_deadline, expiration, server, engine, revoked_at, \
    revoked_by, attempts, last_error, stuck, next_reconcile, reconcile_attempts";

fn from_row(row: &Row<'_>) -> Result<Lease, StoreError> {
    fn name<T: std::str::FromStr>(row: &Row<'_>, n: usize, column: &str) -> Result<T, StoreError> {
        row.get::<_, String>(n)?
            .parse()
            .map_err(|_| unreadable(column))
    }
    let maybe = |n: usize| row.get::<_, Option<i64>>(n)?.map(moment).transpose();
    let engine = |n: usize| {
        let name = row.get::<_, Option<String>>(n)?;
        name.map(|name| name.parse().map_err(|_| unreadable("leases.engine")))
            .transpose()
    };
    let owned: String = row.get(8)?;
    Ok(Lease {
        id: name(row, 0, "leases.id")?,
        path: name(row, 1, "leases.path")?,
        pool: name(row, 2, "leases.pool")?,
        role: name(row, 3, "leases.role")?,
        base: BaseRef {
            id: row.get(5)?,
            version: row.get(6)?,
        },
        database: row.get(7)?,
        owned_objects: serde_json::from_str(&owned)
            .map_err(|_| unreadable("leases.owned_objects"))?,
        traceparent: row.get(9)?,
        created: moment(row.get(10)?)?,
        created_by: row.get(11)?,
        ttl_seconds: row.get(12)?,
        create_deadline: moment(row.get(13)?)?,
        course: Course {
            state: State::parse(&row.get::<_, String>(4)?)
                .ok_or_else(|| unreadable("leases.state"))?,
            expiration: maybe(14)?,
            server: row.get(15)?,
            engine: engine(16)?,
            revoked_at: maybe(17)?,
            revoked_by: engine(18)?,
            attempts: row.get(19)?,
            last_error: row.get(20)?,
            stuck: row.get(21)?,
            next_reconcile: maybe(22)?,
            reconcile_attempts: row.get(23)?,
        },
    })
}

pub(super) fn select(
    connection: &Connection,
    rest: &str,
    values: impl rusqlite::Params,
) -> Result<Vec<Lease>, StoreError> {
    let mut statement =
        connection.prepare_cached(&format!("SELECT {COLUMNS} FROM leases {rest}"))?;
    let mut rows = statement.query(values)?;
    let mut leases = Vec::new();
    while let Some(row) = rows.next()? {
        leases.push(from_row(row)?);
    }
    Ok(leases)
}

fn load(connection: &Connection, id: LeaseId) -> Result<Lease, StoreError> {
    select(connection, "WHERE id = ?1", [id.to_string()])?
        .pop()
        .ok_or_else(|| StoreError::NotFound(format!("lease {id}")))
}

fn ms(at: Option<Timestamp>) -> Option<i64> {
    at.map(Timestamp::as_millisecond)
}

fn insert(connection: &Connection, lease: &Lease) -> Result<(), StoreError> {
    let owned =
        serde_json::to_string(&lease.owned_objects).map_err(|_| unreadable("owned_objects"))?;
    connection
        .prepare_cached(&format!(
            "INSERT INTO leases ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14,
             NULL, NULL, NULL, NULL, NULL, 0, NULL, 0, ?15, 0)"
        ))?
        .execute(params![
            lease.id.to_string(),
            lease.path.as_str(),
            lease.pool.as_str(),
            lease.role.as_str(),
            lease.course.state.as_str(),
            lease.base.id,
            lease.base.version,
            lease.database,
            owned,
            lease.traceparent,
            lease.created.as_millisecond(),
            lease.created_by,
            lease.ttl_seconds,
            lease.create_deadline.as_millisecond(),
            ms(lease.course.next_reconcile),
        ])?;
    Ok(())
}

pub(super) fn write_course(connection: &Connection, lease: &Lease) -> Result<(), StoreError> {
    let course = &lease.course;
    connection
        .prepare_cached(
            "UPDATE leases SET state = ?2, expiration = ?3, server = ?4, engine = ?5, revoked_at = ?6,
             revoked_by = ?7, attempts = ?8, last_error = ?9, stuck = ?10, next_reconcile = ?11,
             reconcile_attempts = ?12 WHERE id = ?1",
        )?
        .execute(params![
            lease.id.to_string(),
            course.state.as_str(),
            ms(course.expiration),
            course.server,
            course.engine.as_ref().map(|engine| engine.as_str()),
            ms(course.revoked_at),
            course.revoked_by.as_ref().map(|engine| engine.as_str()),
            course.attempts,
            course.last_error,
            course.stuck,
            ms(course.next_reconcile),
            course.reconcile_attempts,
        ])?;
    Ok(())
}

/// What a revocation of the lease needs; none once that is no longer kept.
pub(super) fn revocation(
    connection: &Connection,
    sealer: &Sealer,
    lease: &Lease,
) -> Result<Option<Revocation>, StoreError> {
    let Some((mut target, server)) = secrets::load_target(connection, sealer, &lease.base)? else {
        return Ok(None);
    };
    let mut renewed_credentials = false;
    if let Some(version) = secrets::present_version(connection, &lease.base.id)?
        && version != lease.base.version
        && let Some((present, _)) = secrets::load_target(
            connection,
            sealer,
            &BaseRef {
                id: lease.base.id.clone(),
                version,
            },
        )?
        && (&present.host, present.port) == (&target.host, target.port)
    {
        target = present;
        renewed_credentials = true;
    }
    let pool_key = match pools::load(connection, &lease.pool) {
        Ok(pool) => pool.public_key,
        Err(StoreError::NotFound(_)) => return Ok(None),
        Err(error) => return Err(error),
    };
    let server = lease.course.server.clone().or(server);
    Ok(Some(Revocation {
        lease: lease.clone(),
        target,
        renewed_credentials,
        server,
        pool_key,
    }))
}

pub(super) fn apply(
    connection: &Connection,
    sealer: &Sealer,
    mut lease: Lease,
    event: Event,
    now: Timestamp,
) -> Result<Applied, StoreError> {
    let seen = match &event {
        Event::Created(created, _) => Some(created.server.clone()),
        _ => None,
    };
    let before = lease.course.state;
    let change = lease::next(&lease, event, now);
    if change.course != lease.course {
        lease.course = change.course;
        write_course(connection, &lease)?;
    }
    if let Some(server) = seen {
        connection
            .prepare_cached(
                "UPDATE base_versions SET server = ?3 WHERE secret_id = ?1 AND version = ?2 AND server IS NOT ?3",
            )?
            .execute(params![lease.base.id, lease.base.version, server])?;
    }
    let revocation = match change.send {
        Send::Nothing => None,
        Send::RevokeNow | Send::WithPresentCredentials => revocation(connection, sealer, &lease)?,
    };
    Ok(Applied {
        lease,
        before,
        send: change.send,
        revocation,
    })
}

impl Store {
    /// Records a lease before its account is made.
    ///
    /// # Errors
    /// `NotFound` where the secret went away meanwhile.
    pub(crate) async fn insert_lease(&self, lease: Lease) -> Result<(), StoreError> {
        self.run(move |connection| {
            if !exists(
                connection,
                "SELECT 1 FROM secrets WHERE path = ?1",
                lease.path.as_str(),
            )? {
                return Err(StoreError::NotFound(format!("secret `{}`", lease.path)));
            }
            pools::load(connection, &lease.pool)?;
            insert(connection, &lease)
        })
        .await
    }

    /// Lets an event happen to a lease.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) async fn apply(
        &self,
        id: LeaseId,
        event: Event,
        now: Timestamp,
    ) -> Result<Applied, StoreError> {
        let sealer = self.sealer.clone();
        self.run(move |connection| apply(connection, &sealer, load(connection, id)?, event, now))
            .await
    }

    /// A lease.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) async fn lease(&self, id: LeaseId) -> Result<Lease, StoreError> {
        self.run(move |connection| load(connection, id)).await
    }

    /// Leases, the newest first, those after `cursor` (an id, or empty), at most `limit`.
    ///
    /// # Errors
    /// The store is away.
    pub(crate) async fn leases(
        &self,
        filter: Filter,
        cursor: String,
        limit: usize,
    ) -> Result<Vec<Lease>, StoreError> {
        self.run(move |connection| {
            let (mut sql, mut values) = filter.sql();
            if !cursor.is_empty() {
                sql.push_str(" AND id < ?");
                values.push(Value::Text(cursor));
            }
            sql.push_str(" ORDER BY id DESC LIMIT ?");
            values.push(Value::Integer(i64::try_from(limit).unwrap_or(i64::MAX)));
            select(connection, &sql, params_from_iter(values))
        })
        .await
    }

    /// Marks up to `limit` live leases as to be revoked, for the reconciler to do at once.
    /// Returns how many.
    ///
    /// # Errors
    /// The store is away.
    pub(crate) async fn revoke_matching(
        &self,
        filter: Filter,
        limit: u32,
        now: Timestamp,
    ) -> Result<usize, StoreError> {
        let sealer = self.sealer.clone();
        self.run(move |connection| {
            let (sql, values) = filter.sql();
            let rest = format!(
                // Few of all the leases below a path live, or few of all that live are below it.
                "INDEXED BY leases_live_path {sql} AND state IN ('pending', 'active') LIMIT {limit}"
            );
            let leases = select(connection, &rest, params_from_iter(values))?;
            let count = leases.len();
            for lease in leases {
                let mut applied = apply(connection, &sealer, lease, Event::RevokeAsked, now)?;
                applied.lease.course.next_reconcile = Some(now);
                write_course(connection, &applied.lease)?;
            }
            Ok(count)
        })
        .await
    }
}
