//! Ended leases for measurements. It writes the rows of weeks in seconds, in the form that a dispatcher gives them.
//! No program calls this except `examples/add_history.rs`, for `make bench ROW=rows`.

use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use mayfly_protocol::lease::{Lease, State, Status};
use mayfly_protocol::names::{LeaseId, RoleName, UserPrefix};
use mayfly_protocol::secret::Secret;

use super::{Backend, Filter, Place, Store, StoreError, Url, lease_row, unreadable};

/// Rows in one transaction.
const IN_ONE_JOB: usize = 5_000;
/// Age of the first lease.
const SPAN: Duration = Duration::from_hours(30 * 24 - 1);
/// Number of paths and callers to which the leases belong.
const PATHS: usize = 100;
const CALLERS: usize = 20;

/// Adds `number` ended leases to a store that no dispatcher uses. They are created evenly over the last 30 days less
/// 1 h. They are like the newest lease of the store, at 100 paths below its path: `PATH:h00` to `PATH:h99`. `url` is
/// a store in PostgreSQL; `None`: the SQLite store in `data_dir`, which has the master key too.
///
/// # Errors
/// The store cannot be opened or written, or it has no lease.
pub async fn add_history(url: Option<&str>, data_dir: &Path, number: usize) -> Result<(), String> {
    let backend = match url {
        Some(url) => Backend::Postgres(Box::new(Url::parse(&Secret::new(url))?)),
        None => Backend::Sqlite(data_dir.join("mayfly.db")),
    };
    let place = Place {
        backend,
        key_file: data_dir.join("master-key"),
        next_key_file: None,
        root_token_file: data_dir.join("root-token"),
        data_dir: data_dir.to_owned(),
    };
    let (store, _, _lock) = Store::open(&place).map_err(|error| error.to_string())?;
    let added = add(&store, number).await;
    store.close().await;
    added.map_err(|error| error.to_string())
}

/// Like [`add_history`], in an open store.
pub(super) async fn add(store: &Store, number: usize) -> Result<(), StoreError> {
    let newest = store.leases(Filter::default(), String::new(), 1).await?;
    let like = newest.into_iter().next();
    let like = like.ok_or_else(|| StoreError::NotFound("any lease".to_owned()))?;
    let now = store.now();
    for first in (0..number).step_by(IN_ONE_JOB) {
        let like = like.clone();
        let job = store.run(move |connection| {
            for n in first..number.min(first + IN_ONE_JOB) {
                let lease = ended(&like, n, now - SPAN.mul_f64(1.0 - n as f64 / number as f64))?;
                lease_row::insert(connection, &lease, None)?;
            }
            Ok(())
        });
        job.await?;
    }
    Ok(())
}

/// The lease number `n`, which was created at this time and has ended.
fn ended(like: &Lease, n: usize, created: Timestamp) -> Result<Lease, StoreError> {
    let prefix: UserPrefix = "mayfly_".parse().map_err(|_| unreadable("prefix"))?;
    let id = id_of(created)?;
    let end = created + Duration::from_secs(like.ttl_seconds);
    let path = format!("{}:h{:02}", like.path, n % PATHS);
    let engine = like.status.engine.clone();
    Ok(Lease {
        id,
        path: path.parse().map_err(|_| unreadable("path"))?,
        role: RoleName::for_lease(&prefix, &id),
        created,
        created_by: format!("caller{:02}", n / PATHS % CALLERS),
        create_deadline: created + Duration::from_secs(30),
        status: Status {
            state: State::Revoked,
            expiration: Some(end),
            renewable_until: Some(end),
            revoked_at: Some(end + Duration::from_millis(600)),
            revoked_by: engine.clone(),
            engine,
            next_reconcile: None,
            ..like.status.clone()
        },
        ..like.clone()
    })
}

/// A UUID of version 7 for this time (RFC 9562, 5.7).
fn id_of(time: Timestamp) -> Result<LeaseId, StoreError> {
    let ms = u128::try_from(time.as_millisecond()).map_err(|_| unreadable("time"))?;
    let random = rand::random::<u128>() & ((1 << 80) - 1);
    let id = (ms << 80) | random & !(0xf << 76) | (7 << 76);
    let id = id & !(0b11 << 62) | (0b10 << 62);
    format!("{id:032x}").parse().map_err(|_| unreadable("id"))
}
