//! Changes of admins' passwords that are under way: the new password stands sealed beside the old
//! until it is known which is in force, and then becomes the base secret's, or goes, in one
//! transaction with the end of the record.

use jiff::Timestamp;
use mayfly_common::names::{PoolName, SecretPath};
use mayfly_common::secret::Secret;
use mayfly_common::target::Target;
use serde_json::Value;

use super::pools::{self, Pool};
use super::sealer::{Sealer, Spot};
use super::sql::{Connection, NONE, OptionalExtension, params};
use super::{Store, StoreError, exists, moment, secrets, unreadable};
use crate::lease::BaseRef;
use crate::secrets::{Content, Kind, Spec, parse};
use crate::store::{Record, Revised};

/// A base secret, and the pools that may use it.
#[derive(Debug)]
pub(crate) struct Base {
    /// All but its data.
    pub(crate) record: Record,
    /// The admin connection.
    pub(crate) target: Target,
    /// Pools of the dynamic secrets linked to it, by name.
    pub(crate) linked: Vec<Pool>,
    /// The last such pool, where none is linked any more.
    pub(crate) last: Option<Pool>,
}

/// A change under way.
#[derive(Debug)]
pub(crate) struct Rotation {
    /// Id of the base secret.
    pub(crate) secret: String,
    /// Its path.
    pub(crate) path: SecretPath,
    /// The admin connection with the password of before.
    pub(crate) target: Target,
    /// The new password.
    pub(crate) password: Secret,
    /// Pools that may be asked.
    pub(crate) pools: Vec<Pool>,
    /// After this moment nothing of it can still happen.
    pub(crate) settles_at: Timestamp,
}

/// A change that is about to begin.
#[derive(Debug)]
pub(crate) struct Opening {
    /// The base secret.
    pub(crate) path: SecretPath,
    /// Its version, which must still be the present one.
    pub(crate) version: u64,
    /// The new password.
    pub(crate) password: Secret,
    /// The pool that is asked.
    pub(crate) pool: PoolName,
    /// Who asks.
    pub(crate) who: String,
    /// When.
    pub(crate) started: Timestamp,
    /// After this moment nothing of it can still happen.
    pub(crate) settles_at: Timestamp,
}

fn spot<'a>(secret: &'a str, version: u64) -> Spot<'a> {
    Spot {
        table: "rotations",
        row: secret,
        version,
        column: "password",
    }
}

fn linked_pools(connection: &Connection, secret: &str) -> Result<Vec<Pool>, StoreError> {
    let rows = connection
        .prepare_cached("SELECT DISTINCT pool FROM secrets WHERE linked = ?1 ORDER BY pool")?
        .query([secret])?;
    rows.iter()
        .map(|row| pool(connection, &row.get::<String>(0)?))
        .collect()
}

fn pool(connection: &Connection, name: &str) -> Result<Pool, StoreError> {
    pools::load(
        connection,
        &name.parse().map_err(|_| unreadable("secrets.pool"))?,
    )
}

fn base(connection: &Connection, sealer: &Sealer, record: Record) -> Result<Base, StoreError> {
    let present = BaseRef {
        id: record.id.clone(),
        version: record.version,
    };
    let (target, _) = secrets::load_target(connection, sealer, &present)?
        .ok_or_else(|| unreadable("base_versions"))?;
    let last: Option<String> = connection
        .prepare_cached("SELECT pool FROM base_pools WHERE secret_id = ?1")?
        .query_row([&record.id], |row| row.get(0))
        .optional()?;
    let last = match last.map(|name| pool(connection, &name)) {
        Some(Err(StoreError::NotFound(_))) | None => None,
        Some(found) => Some(found?),
    };
    Ok(Base {
        linked: linked_pools(connection, &record.id)?,
        last,
        target,
        record,
    })
}

/// Whether an update may be made beside a change under way: only one of the password itself, and
/// only once nothing of the change can happen any more. Such an update ends it.
pub(super) fn make_way(
    connection: &Connection,
    record: &Record,
    password_changes: bool,
    now: Timestamp,
) -> Result<(), StoreError> {
    let settles_at: Option<i64> = connection
        .prepare_cached("SELECT settles_at FROM rotations WHERE secret_id = ?1")?
        .query_row([&record.id], |row| row.get(0))
        .optional()?;
    match settles_at {
        None => Ok(()),
        Some(settles_at) if password_changes && now.as_millisecond() > settles_at => {
            end(connection, &record.id).map(drop)
        }
        Some(_) => Err(StoreError::InUse(format!(
            "the password of `{}` is being rotated, and it is not known yet which is in force; until then only another password is taken, and that no sooner than a minute after the rotation began",
            record.path
        ))),
    }
}

/// A base secret goes, unless its password is being changed.
pub(super) fn forget(connection: &Connection, record: &Record) -> Result<(), StoreError> {
    check_none(connection, record)?;
    connection.execute("DELETE FROM base_pools WHERE secret_id = ?1", [&record.id])?;
    Ok(())
}

fn check_none(connection: &Connection, record: &Record) -> Result<(), StoreError> {
    let open = "SELECT 1 FROM rotations WHERE secret_id = ?1";
    if exists(connection, open, &record.id)? {
        return Err(StoreError::InUse(format!(
            "the password of `{}` is being rotated",
            record.path
        )));
    }
    Ok(())
}

/// A pool that is to be deleted.
pub(super) fn check_pool(connection: &Connection, name: &PoolName) -> Result<(), StoreError> {
    let open = "SELECT 1 FROM rotations WHERE pool = ?1";
    if exists(connection, open, name.as_str())? {
        return Err(StoreError::InUse(format!(
            "an engine of pool `{name}` is rotating a password"
        )));
    }
    Ok(())
}

/// Remembers which pool made accounts with a base secret whose dynamic secret goes.
pub(super) fn remember_pool(connection: &Connection, dynamic: &Record) -> Result<(), StoreError> {
    connection.execute(
        "INSERT INTO base_pools (secret_id, pool) SELECT linked, pool FROM secrets WHERE id = ?1
         ON CONFLICT (secret_id) DO UPDATE SET pool = excluded.pool",
        [&dynamic.id],
    )?;
    Ok(())
}

/// Another base secret with the same admin would be left with a password that works no more.
fn no_other_has_it(
    connection: &Connection,
    sealer: &Sealer,
    record: &Record,
) -> Result<(), StoreError> {
    let admin = |id: &str, version| {
        let base = BaseRef {
            id: id.to_owned(),
            version,
        };
        secrets::load_target(connection, sealer, &base)?.ok_or_else(|| unreadable("base_versions"))
    };
    let (own, own_server) = admin(&record.id, record.version)?;
    let statement = connection
        .prepare_cached("SELECT id, version, path FROM secrets WHERE kind = 'base' AND id <> ?1")?;
    for row in &statement.query([&record.id])? {
        let (other, server) = admin(&row.get::<String>(0)?, row.get(1)?)?;
        // One server may be written in several ways.
        let is_there = (&other.host, other.port) == (&own.host, own.port)
            || server.is_some() && server == own_server;
        if is_there && other.username == own.username {
            return Err(StoreError::InUse(format!(
                "`{}` has the same admin, and would be left with a password that works no more; give each an admin of its own",
                row.get::<String>(2)?
            )));
        }
    }
    Ok(())
}

fn end(connection: &Connection, secret: &str) -> Result<bool, StoreError> {
    let ended = connection
        .prepare_cached("DELETE FROM rotations WHERE secret_id = ?1")?
        .execute([secret])?;
    Ok(ended > 0)
}

/// Whether the record that stands is the one that settles then, and not one begun since.
fn is_still(
    connection: &Connection,
    secret: &str,
    settles_at: Timestamp,
) -> Result<bool, StoreError> {
    let stands = connection
        .prepare_cached("SELECT 1 FROM rotations WHERE secret_id = ?1 AND settles_at = ?2")?
        .query(params![secret, settles_at.as_millisecond()])?;
    Ok(!stands.is_empty())
}

impl Store {
    /// A base secret and its pools.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for another kind of secret.
    pub(crate) async fn base(&self, path: SecretPath) -> Result<Base, StoreError> {
        let sealer = self.sealer.clone();
        self.run(move |connection| {
            let record = secrets::load(connection, &path)?;
            match record.kind {
                Kind::Base => base(connection, &sealer, record),
                Kind::Static | Kind::Dynamic => Err(StoreError::Invalid(
                    [(
                        "path".to_owned(),
                        vec![format!(
                            "`{path}` is a {} secret; this is for base secrets",
                            record.kind.as_str()
                        )],
                    )]
                    .into(),
                )),
            }
        })
        .await
    }

    /// Records that a password is about to be changed.
    ///
    /// # Errors
    /// `NotFound`; `InUse` where one is, where the secret changed meanwhile, or where another base
    /// secret has the same admin.
    pub(crate) async fn open_rotation(&self, opening: Opening) -> Result<(), StoreError> {
        let sealer = self.sealer.clone();
        self.run(move |connection| {
            let record = secrets::load(connection, &opening.path)?;
            check_none(connection, &record)?;
            if record.version != opening.version {
                return Err(StoreError::InUse(format!(
                    "`{}` was changed just now",
                    opening.path
                )));
            }
            no_other_has_it(connection, &sealer, &record)?;
            let sealed = sealer.seal(
                spot(&record.id, record.version),
                opening.password.expose().as_bytes(),
            )?;
            connection
                .prepare_cached(
                    "INSERT INTO rotations (secret_id, version, password_sealed, pool, started, started_by, settles_at)
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
                )?
                .execute(params![
                    record.id,
                    record.version,
                    sealed,
                    opening.pool.as_str(),
                    opening.started.as_millisecond(),
                    opening.who,
                    opening.settles_at.as_millisecond(),
                ])?;
            Ok(())
        })
        .await
    }

    /// All that are under way.
    ///
    /// # Errors
    /// The store is away.
    pub(crate) async fn rotations(&self) -> Result<Vec<Rotation>, StoreError> {
        let sealer = self.sealer.clone();
        self.run(move |connection| {
            let statement = connection.prepare_cached(
                "SELECT r.secret_id, r.version, r.password_sealed, r.pool, r.settles_at, s.path
                 FROM rotations r JOIN secrets s ON s.id = r.secret_id ORDER BY r.secret_id",
            )?;
            let mut found = Vec::new();
            for row in &statement.query(NONE)? {
                let (secret, version): (String, u64) = (row.get(0)?, row.get(1)?);
                let sealed: Vec<u8> = row.get(2)?;
                let (asked, path): (String, String) = (row.get(3)?, row.get(5)?);
                let clear = sealer.open(spot(&secret, version), &sealed)?;
                let password = Secret::new(
                    std::str::from_utf8(&clear).map_err(|_| unreadable("rotations.password"))?,
                );
                let before = BaseRef {
                    id: secret.clone(),
                    version,
                };
                let (target, _) = secrets::load_target(connection, &sealer, &before)?
                    .ok_or_else(|| unreadable("base_versions"))?;
                let mut pools = linked_pools(connection, &secret)?;
                match pool(connection, &asked) {
                    Ok(asked) => pools.insert(0, asked),
                    Err(StoreError::NotFound(_)) => {}
                    Err(error) => return Err(error),
                }
                found.push(Rotation {
                    secret,
                    path: path.parse().map_err(|_| unreadable("secrets.path"))?,
                    target,
                    password,
                    pools,
                    settles_at: moment(row.get(4)?)?,
                });
            }
            Ok(found)
        })
        .await
    }

    /// Makes the new password the base secret's, as an update of it would. None where the change
    /// that settles at `settles_at` has ended already.
    ///
    /// # Errors
    /// The store is away.
    pub(crate) async fn commit_rotation(
        &self,
        path: SecretPath,
        settles_at: Timestamp,
        now: Timestamp,
    ) -> Result<Option<Record>, StoreError> {
        let sealer = self.sealer.clone();
        self.run(move |connection| {
            let record = secrets::load(connection, &path)?;
            if !is_still(connection, &record.id, settles_at)? {
                return Ok(None);
            }
            let open: Option<(u64, Vec<u8>, String)> = connection
                .prepare_cached(
                    "SELECT version, password_sealed, started_by FROM rotations WHERE secret_id = ?1",
                )?
                .query_row([&record.id], |row| {
                    Ok((row.get(0)?, row.get(1)?, row.get(2)?))
                })
                .optional()?;
            let Some((version, sealed, who)) = open else {
                return Ok(None);
            };
            let clear = sealer.open(spot(&record.id, version), &sealed)?;
            let password =
                std::str::from_utf8(&clear).map_err(|_| unreadable("rotations.password"))?;
            let mut content = Content {
                attributes: record.attributes.clone(),
                description: record.description.clone(),
                data: secrets::open_data(connection, &sealer, &record)?,
            };
            content
                .data
                .insert("password".to_owned(), Value::String(password.to_owned()));
            end(connection, &record.id)?;
            // It was checked when it was written.
            let spec = match parse(&content, u64::MAX) {
                Ok(spec @ Spec::Base(_)) => spec,
                Ok(Spec::Static | Spec::Dynamic(_)) | Err(_) => {
                    return Err(unreadable("secrets.data"));
                }
            };
            let revised = Revised { content, spec };
            secrets::replace(connection, &sealer, record, &revised, who, now).map(Some)
        })
        .await
    }

    /// Ends the change that settles at `settles_at` and did not happen. Whether there was one.
    ///
    /// # Errors
    /// The store is away.
    pub(crate) async fn drop_rotation(
        &self,
        secret: String,
        settles_at: Timestamp,
    ) -> Result<bool, StoreError> {
        self.run(move |connection| {
            Ok(is_still(connection, &secret, settles_at)? && end(connection, &secret)?)
        })
        .await
    }
}
