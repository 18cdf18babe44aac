//! Reads and writes the row of a lease.

use std::time::Duration;

use jiff::Timestamp;
use mayfly_protocol::names::{LeaseId, PoolName};

use super::authentic::{self, Entry, LEASES};
use super::ring::Generation;
use super::sql::{Cell, Connection, Params, Query};
use super::{Role, StoreError, timestamp, unreadable};
use crate::password::Nonce;
use mayfly_protocol::lease::{BaseRef, Lease, State, Status};

/// The columns of a lease's status.
const STATUS_COLUMNS: [&str; 17] = [
    "state",
    "expiration",
    "server",
    "engine",
    "revoked_at",
    "revoked_by",
    "attempts",
    "last_error",
    "stuck",
    "renewable_until",
    "objects",
    "next_try",
    "skew_ms",
    "next_reconcile",
    "reconcile_attempts",
    "ends_here",
    "nonce",
];
/// Pause between two looks at a row that is not authentic. Somebody may repair it.
const REFUSED_AGAIN: Duration = Duration::from_mins(5);

pub(super) fn from_entry(row: &Entry) -> Result<Lease, StoreError> {
    fn name<T: std::str::FromStr>(row: &Entry, column: &'static str) -> Result<T, StoreError> {
        row.get::<String>(column)?
            .parse()
            .map_err(|_| unreadable(column))
    }
    let maybe = |column| row.get::<Option<i64>>(column)?.map(timestamp).transpose();
    let engine = |column| {
        let name = row.get::<Option<String>>(column)?;
        name.map(|name| name.parse().map_err(|_| unreadable(column)))
            .transpose()
    };
    let owned: String = row.get("owned_objects")?;
    let objects: Option<String> = row.get("objects")?;
    Ok(Lease {
        id: name(row, "id")?,
        path: name(row, "path")?,
        pool: name(row, "pool")?,
        role: name(row, "role")?,
        base: BaseRef {
            id: row.get("base_secret_id")?,
            version: row.get("base_version")?,
        },
        database: row.get("database")?,
        owned_objects: serde_json::from_str(&owned)
            .map_err(|_| unreadable("leases.owned_objects"))?,
        traceparent: row.get("traceparent")?,
        created: timestamp(row.get("created")?)?,
        created_by: row.get("created_by")?,
        secret_version: row.get("secret_version")?,
        ttl_seconds: row.get("ttl_seconds")?,
        max_ttl_seconds: row.get("max_ttl_seconds")?,
        create_deadline: timestamp(row.get("create_deadline")?)?,
        status: Status {
            state: State::parse(&row.get::<String>("state")?)
                .ok_or_else(|| unreadable("leases.state"))?,
            expiration: maybe("expiration")?,
            renewable_until: maybe("renewable_until")?,
            server: row.get("server")?,
            engine: engine("engine")?,
            revoked_at: maybe("revoked_at")?,
            revoked_by: engine("revoked_by")?,
            attempts: row.get("attempts")?,
            last_error: row.get("last_error")?,
            objects: objects
                .map(|text| serde_json::from_str(&text).map_err(|_| unreadable("leases.objects")))
                .transpose()?
                .unwrap_or_default(),
            next_try: maybe("next_try")?,
            skew_ms: row.get("skew_ms")?,
            stuck: row.get("stuck")?,
            next_reconcile: maybe("next_reconcile")?,
            reconcile_attempts: row.get("reconcile_attempts")?,
        },
    })
}

/// Writes a new lease.
pub(super) fn insert(
    connection: &Connection,
    lease: &Lease,
    nonce: Option<&(Generation, Nonce)>,
) -> Result<(), StoreError> {
    authentic::insert(connection, &entry(lease, nonce)?)?;
    connection.counted(&lease.pool, lease.status.state, 1);
    Ok(())
}

/// The row of a new lease.
fn entry(lease: &Lease, nonce: Option<&(Generation, Nonce)>) -> Result<Entry, StoreError> {
    let owned =
        serde_json::to_string(&lease.owned_objects).map_err(|_| unreadable("owned_objects"))?;
    let mut row = LEASES.blank();
    for (column, value) in [
        ("id", Cell::from(lease.id.to_string())),
        ("path", lease.path.as_str().into()),
        ("pool", lease.pool.as_str().into()),
        ("role", lease.role.as_str().into()),
        ("base_secret_id", (&lease.base.id).into()),
        ("base_version", lease.base.version.into()),
        ("database", (&lease.database).into()),
        ("owned_objects", owned.into()),
        ("traceparent", (&lease.traceparent).into()),
        ("created", lease.created.as_millisecond().into()),
        ("created_by", (&lease.created_by).into()),
        ("ttl_seconds", lease.ttl_seconds.into()),
        ("max_ttl_seconds", lease.max_ttl_seconds.into()),
        (
            "create_deadline",
            lease.create_deadline.as_millisecond().into(),
        ),
        ("secret_version", lease.secret_version.into()),
        ("nonce", nonce.map(|(_, nonce)| nonce.expose()).into()),
        (
            "derivation",
            nonce.map(|(generation, _)| *generation).into(),
        ),
    ]
    .into_iter()
    .chain(status(lease)?)
    {
        row.set(column, value);
    }
    Ok(row)
}

/// The values of the status columns.
fn status(lease: &Lease) -> Result<[(&'static str, Cell); 16], StoreError> {
    let status = &lease.status;
    let objects = match status.objects.as_slice() {
        [] => None,
        list => Some(serde_json::to_string(list).map_err(|_| unreadable("objects"))?),
    };
    Ok([
        ("state", status.state.as_str().into()),
        ("expiration", ms(status.expiration).into()),
        ("server", status.server.as_deref().into()),
        (
            "engine",
            status.engine.as_ref().map(|engine| engine.as_str()).into(),
        ),
        ("revoked_at", ms(status.revoked_at).into()),
        (
            "revoked_by",
            status
                .revoked_by
                .as_ref()
                .map(|engine| engine.as_str())
                .into(),
        ),
        ("attempts", status.attempts.into()),
        ("last_error", status.last_error.as_deref().into()),
        ("stuck", status.stuck.into()),
        ("renewable_until", ms(status.renewable_until).into()),
        ("objects", objects.into()),
        ("next_try", ms(status.next_try).into()),
        ("skew_ms", status.skew_ms.into()),
        ("next_reconcile", ms(status.next_reconcile).into()),
        ("reconcile_attempts", status.reconcile_attempts.into()),
        (
            "ends_here",
            ms(status.expiration.map(|end| status.to_store_clock(end))).into(),
        ),
    ])
}

/// A lease, and the row that it was read from. Both belong to the transaction of one job.
pub(super) struct Stored {
    pub(super) lease: Lease,
    row: Entry,
}

impl Stored {
    fn of(row: Entry) -> Result<Self, StoreError> {
        Ok(Self {
            lease: from_entry(&row)?,
            row,
        })
    }

    /// Writes the status of the lease.
    pub(super) fn write(&mut self, connection: &Connection) -> Result<(), StoreError> {
        let before: String = self.row.get("state")?;
        let before = State::parse(&before).ok_or_else(|| unreadable("leases.state"))?;
        for (column, value) in status(&self.lease)? {
            self.row.set(column, value);
        }
        // After this state nobody gets the password again.
        if !matches!(self.lease.status.state, State::Pending | State::Active) {
            self.row.set("nonce", None::<Vec<u8>>);
        }
        authentic::update(connection, &self.row, &STATUS_COLUMNS)?;
        let (pool, state) = (&self.lease.pool, self.lease.status.state);
        if before != state {
            connection.counted(pool, before, -1);
            connection.counted(pool, state, 1);
        }
        Ok(())
    }

    /// Like [`Stored::write`], and sets the version of the lease's base secret.
    pub(super) fn write_with_base(
        &mut self,
        connection: &Connection,
        base: &BaseRef,
    ) -> Result<(), StoreError> {
        self.row.set("base_version", base.version);
        authentic::update(connection, &self.row, &["base_version"])?;
        self.lease.base = base.clone();
        self.write(connection)
    }

    /// Gives the lease to another pool. The status is not written.
    pub(super) fn move_to(
        &mut self,
        connection: &Connection,
        pool: &PoolName,
    ) -> Result<(), StoreError> {
        self.row.set("pool", pool.as_str());
        authentic::update(connection, &self.row, &["pool"])?;
        let state: String = self.row.get("state")?;
        let state = State::parse(&state).ok_or_else(|| unreadable("leases.state"))?;
        connection.counted(&self.lease.pool, state, -1);
        connection.counted(pool, state, 1);
        self.lease.pool = pool.clone();
        Ok(())
    }
}

/// The leases of a query, without rows that are not authentic.
pub(super) fn select(
    connection: &Connection,
    rest: &str,
    values: impl Params,
) -> Result<Vec<Lease>, StoreError> {
    let rows = authentic::sound_rows(connection, &LEASES, rest, values)?;
    rows.iter().map(from_entry).collect()
}

/// A page of leases that a job can change.
pub(super) struct Page {
    /// The leases whose rows are authentic.
    pub(super) found: Vec<Stored>,
    /// The number of all rows, authentic or not.
    pub(super) rows: usize,
    /// Path and id of the last row.
    pub(super) last: Option<(String, String)>,
}

/// A page of leases that the job can change. A row that is not authentic counts for the limit, and is skipped.
pub(super) fn select_page(
    connection: &Connection,
    rest: &str,
    values: impl Params,
) -> Result<Page, StoreError> {
    let looked = authentic::looked_at(connection, &LEASES, rest, values)?;
    let last = match looked.last() {
        Some(Ok(row)) => Some((row.get("path")?, row.get("id")?)),
        Some(Err(refused)) => Some((refused.get("path")?, refused.get("id")?)),
        None => None,
    };
    let rows = looked.len();
    let sound = looked.into_iter().filter_map(Result::ok);
    let found = sound.map(Stored::of).collect::<Result<Vec<_>, _>>()?;
    Ok(Page { found, rows, last })
}

/// Like [`select_page`]. A row that is not authentic is due again after [`REFUSED_AGAIN`].
pub(super) fn select_due(
    connection: &Connection,
    rest: &str,
    values: impl Params,
    now: Timestamp,
) -> Result<Vec<Stored>, StoreError> {
    let mut found = Vec::new();
    for row in authentic::looked_at(connection, &LEASES, rest, values)? {
        match row {
            Ok(row) => found.push(Stored::of(row)?),
            Err(refused) => {
                let mut values = refused.key().to_vec();
                values.push((now + REFUSED_AGAIN).as_millisecond().into());
                connection.execute(
                    "UPDATE leases SET next_reconcile = ?2 WHERE id = ?1",
                    values,
                )?;
            }
        }
    }
    Ok(found)
}

pub(super) fn load(connection: &Connection, id: LeaseId) -> Result<Lease, StoreError> {
    load_stored(connection, id).map(|stored| stored.lease)
}

/// Loads a lease that the job can change.
pub(super) fn load_stored(connection: &Connection, id: LeaseId) -> Result<Stored, StoreError> {
    let found = authentic::row(
        connection,
        &LEASES,
        &by_id(connection.role()),
        [id.to_string()],
    )?;
    Stored::of(found.ok_or_else(|| StoreError::NotFound(format!("lease {id}")))?)
}

/// The query of [`load_stored`] in a slot.
pub(super) fn asked(id: LeaseId) -> Query {
    authentic::query(&LEASES, &by_id(Role::Slot), [id.to_string()])
}

fn by_id(role: Role) -> String {
    format!("WHERE id = ?1{}", role.for_update())
}

fn ms(at: Option<Timestamp>) -> Option<i64> {
    at.map(Timestamp::as_millisecond)
}
