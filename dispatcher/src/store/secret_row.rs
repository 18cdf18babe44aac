//! Reads the row of a secret, and writes its next version.

use jiff::Timestamp;
use mayfly_protocol::names::SecretPath;

use super::authentic::{self, BASE_VERSIONS, Entry, SECRETS};
use super::pools;
use super::sealer::{CellId, Sealer};
use super::sql::{Connection, Query, params};
use super::{StoreError, timestamp, unreadable};
use crate::error::{ApiError, Problems};
use crate::secrets::{self, Content, Dynamic, Kind, Object, Spec};
use mayfly_protocol::lease::BaseRef;

/// A secret without its data.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    pub(crate) id: String,
    pub(crate) path: SecretPath,
    pub(crate) kind: Kind,
    pub(crate) attributes: Object,
    pub(crate) description: Option<String>,
    /// 1 for a new secret. Each update adds 1.
    pub(crate) version: u64,
    /// When it was made.
    pub(crate) created: Timestamp,
    pub(crate) created_by: String,
    /// When it was last changed.
    pub(crate) last_modified: Timestamp,
    pub(crate) last_modified_by: String,
}

impl Record {
    /// The content of a stored dynamic secret.
    ///
    /// # Errors
    /// It does not pass the present check, or it is not a dynamic secret.
    pub(crate) fn dynamic(&self) -> Result<Dynamic, ApiError> {
        let content = Content {
            attributes: self.attributes.clone(),
            ..Content::default()
        };
        match secrets::parse(&content, u64::MAX) {
            Ok(Spec::Dynamic(dynamic)) => Ok(*dynamic),
            Ok(Spec::Static | Spec::Base(_)) => {
                Err(StoreError::Unavailable("not a dynamic secret".to_owned()).into())
            }
            Err(problems) => Err(ApiError::invalid(problems)),
        }
    }
}

/// The result of an update of a secret.
#[derive(Debug)]
pub(crate) struct Revised {
    pub(crate) content: Content,
    pub(crate) spec: Spec,
}

pub(super) fn record(row: &Entry) -> Result<Record, StoreError> {
    let (kind, attributes): (String, String) = (row.get("kind")?, row.get("attributes")?);
    Ok(Record {
        id: row.get("id")?,
        path: path_of(row)?,
        kind: Kind::parse(&kind).ok_or_else(|| unreadable("secrets.kind"))?,
        attributes: serde_json::from_str(&attributes)
            .map_err(|_| unreadable("secrets.attributes"))?,
        description: row.get("description")?,
        version: row.get("version")?,
        created: timestamp(row.get("created")?)?,
        created_by: row.get("created_by")?,
        last_modified: timestamp(row.get("last_modified")?)?,
        last_modified_by: row.get("last_modified_by")?,
    })
}

pub(super) fn path_of(row: &Entry) -> Result<SecretPath, StoreError> {
    let path: String = row.get("path")?;
    path.parse().map_err(|_| unreadable("secrets.path"))
}

pub(super) fn load(connection: &Connection, path: &SecretPath) -> Result<Record, StoreError> {
    record(&row_at(connection, path)?)
}

/// The row of the secret with this path.
pub(super) fn row_at(connection: &Connection, path: &SecretPath) -> Result<Entry, StoreError> {
    let found = authentic::found(connection, &SECRETS, asked(path))?;
    let found = found.into_iter().next();
    found.ok_or_else(|| StoreError::NotFound(format!("secret `{path}`")))
}

/// The query of [`row_at`].
pub(super) fn asked(path: &SecretPath) -> Query {
    authentic::query(&SECRETS, "WHERE path = ?1", [path.as_str()])
}

/// The row with this id, which another row names.
pub(super) fn row(connection: &Connection, id: &str) -> Result<Entry, StoreError> {
    authentic::row(connection, &SECRETS, "WHERE id = ?1", [id])?
        .ok_or_else(|| unreadable("secrets.id"))
}

pub(super) fn data_spot(id: &str, version: u64) -> CellId<'_> {
    CellId {
        table: "secrets",
        row: id,
        version,
        column: "data",
    }
}

pub(super) fn open_data(
    connection: &Connection,
    sealer: &Sealer,
    record: &Record,
) -> Result<Object, StoreError> {
    data_of(sealer, record, &row(connection, &record.id)?)
}

/// The data of a secret from its row.
pub(super) fn data_of(sealer: &Sealer, record: &Record, row: &Entry) -> Result<Object, StoreError> {
    let sealed: Vec<u8> = row.get("data")?;
    let clear = sealer.open(data_spot(&record.id, record.version), &sealed)?;
    serde_json::from_slice(&clear).map_err(|_| unreadable("secrets.data"))
}

fn seal_json<T: serde::Serialize>(
    sealer: &Sealer,
    cell: CellId<'_>,
    value: &T,
) -> Result<Vec<u8>, StoreError> {
    let clear =
        zeroize::Zeroizing::new(serde_json::to_vec(value).map_err(|_| unreadable(cell.column))?);
    sealer.seal(cell, &clear)
}

pub(super) fn target_spot(base: &BaseRef) -> CellId<'_> {
    CellId {
        table: "base_versions",
        row: &base.id,
        version: base.version,
        column: "target",
    }
}

/// Finds the base secret that a dynamic secret names, and returns its id. Checks the pool too.
fn resolve(connection: &Connection, dynamic: &Dynamic) -> Result<String, StoreError> {
    let mut problems = Problems::new();
    let mut refuse =
        |field: &str, reason: String| problems.entry(field.to_owned()).or_default().push(reason);
    let here = "attributes.linkConfig.linkedSecret";
    let linked = &dynamic.linked;
    let mut id = None;
    match load(connection, linked) {
        Ok(found) => match found.kind {
            Kind::Base => id = Some(found.id),
            Kind::Static => refuse(
                here,
                format!(
                    "`{linked}` is a static secret, not an admin connection (attributes.type is not `postgresql`)"
                ),
            ),
            Kind::Dynamic => refuse(here, format!("`{linked}` is itself a dynamic secret")),
        },
        Err(StoreError::NotFound(_)) => refuse(here, format!("there is no secret `{linked}`")),
        Err(error) => return Err(error),
    }
    match pools::load(connection, &dynamic.pool) {
        Ok(pool) if pool.distrusted.is_none() => {}
        Ok(pool) => refuse(
            "attributes.pool",
            format!("pool `{}` is distrusted; name another", pool.name),
        ),
        Err(StoreError::NotFound(what)) => {
            refuse("attributes.pool", format!("there is no {what}"));
        }
        Err(error) => return Err(error),
    }
    match id {
        Some(id) if problems.is_empty() => Ok(id),
        _ => Err(StoreError::Invalid(problems)),
    }
}

/// Writes a secret's row, which is new or replaces the old row. For a base secret it also writes the version.
pub(super) fn write(
    connection: &Connection,
    sealer: &Sealer,
    record: &Record,
    revised: &Revised,
) -> Result<(), StoreError> {
    let (linked, pool) = match &revised.spec {
        Spec::Dynamic(dynamic) => (
            Some(resolve(connection, dynamic)?),
            Some(dynamic.pool.to_string()),
        ),
        Spec::Static | Spec::Base(_) => (None, None),
    };
    let linked_base = linked.clone();
    let data = seal_json(
        sealer,
        data_spot(&record.id, record.version),
        &revised.content.data,
    )?;
    let attributes =
        serde_json::to_string(&revised.content.attributes).map_err(|_| unreadable("attributes"))?;
    let entry = SECRETS.entry(params![
        record.id,
        record.path.as_str(),
        record.kind.as_str(),
        attributes,
        revised.content.description,
        data,
        record.version,
        linked,
        pool,
        record.created.as_millisecond(),
        record.created_by,
        record.last_modified.as_millisecond(),
        record.last_modified_by,
    ]);
    let changed = [
        "attributes",
        "description",
        "data",
        "version",
        "linked",
        "pool",
        "last_modified",
        "last_modified_by",
    ];
    authentic::put(connection, &entry, &changed)?;
    if let Some(base) = &linked_base {
        wake_stuck(connection, base, record.last_modified)?;
    }
    if let Spec::Base(target) = &revised.spec {
        let base = BaseRef {
            id: record.id.clone(),
            version: record.version,
        };
        let sealed = seal_json(sealer, target_spot(&base), target)?;
        let none = None::<String>;
        let entry = BASE_VERSIONS.entry(params![base.id, base.version, sealed, none]);
        authentic::insert(connection, &entry)?;
    }
    Ok(())
}

/// Writes the next version of a secret.
pub(super) fn replace(
    connection: &Connection,
    sealer: &Sealer,
    mut record: Record,
    revised: &Revised,
    who: String,
    now: Timestamp,
) -> Result<Record, StoreError> {
    record.version += 1;
    record.last_modified = now;
    record.last_modified_by = who;
    record.attributes = revised.content.attributes.clone();
    record.description = revised.content.description.clone();
    write(connection, sealer, &record, revised)?;
    if record.kind == Kind::Base {
        // Revocations that failed with the old credentials are tried with the new ones at once.
        connection.execute(
            "UPDATE leases SET next_reconcile = ?2, reconcile_attempts = 0
             WHERE base_secret_id = ?1 AND next_reconcile IS NOT NULL AND last_error IS NOT NULL",
            params![record.id, now.as_millisecond()],
        )?;
    }
    Ok(record)
}

/// Makes the stuck leases of this base secret due. One of its dynamic secrets was written, and that secret's pool
/// may be able to end them.
fn wake_stuck(connection: &Connection, base: &str, now: Timestamp) -> Result<(), StoreError> {
    connection
        .prepare(
            "UPDATE leases SET next_reconcile = ?2, reconcile_attempts = 0
             WHERE base_secret_id = ?1 AND next_reconcile IS NOT NULL AND stuck = 1",
        )?
        .execute(params![base, now.as_millisecond()])?;
    Ok(())
}
