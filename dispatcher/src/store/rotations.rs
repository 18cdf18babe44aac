//! Changes of admins' passwords in progress. The new password is kept sealed next to the old one until it is known
//! which is in force. Then it becomes the base secret's password or is deleted, in one transaction with the end of
//! the record.

use jiff::Timestamp;
use mayfly_protocol::names::{PoolName, SecretPath};
use mayfly_protocol::secret::Secret;
use mayfly_protocol::target::Target;

use super::authentic::{self, Entry, ROTATIONS, SECRETS};
use super::bases::{self, linked_pools, pool};
use super::pools::Pool;
use super::sealer::{CellId, Sealer};
use super::secret_row::{self, Record};
use super::sql::{Connection, NONE, params};
use super::unproven::{self, set_password};
use super::{Store, StoreError, exists, timestamp, unreadable};
use mayfly_protocol::lease::BaseRef;

/// A change in progress.
#[derive(Debug)]
pub(crate) struct Rotation {
    /// Id of the base secret.
    pub(crate) secret: String,
    pub(crate) path: SecretPath,
    /// The admin connection with the earlier password.
    pub(crate) target: Target,
    pub(crate) password: Secret,
    /// Pools whose engines may be asked.
    pub(crate) pools: Vec<Pool>,
    /// After this time no request of the change can have an effect.
    pub(crate) settles_at: Timestamp,
    /// The same limit by the database's clock, which does not depend on other clocks.
    pub(crate) over_there: Option<Timestamp>,
}

/// A change that is about to begin.
#[derive(Debug)]
pub(crate) struct Opening {
    pub(crate) path: SecretPath,
    /// The base secret's version, which must still be the present version.
    pub(crate) version: u64,
    pub(crate) password: Secret,
    /// The pool whose engine is asked.
    pub(crate) pool: PoolName,
    pub(crate) who: String,
    pub(crate) started: Timestamp,
    /// After this time no request of the change can have an effect.
    pub(crate) settles_at: Timestamp,
    /// The same limit by the database's clock, which does not depend on other clocks.
    pub(crate) over_there: Timestamp,
}

pub(super) fn cell<'a>(secret: &'a str, version: u64) -> CellId<'a> {
    CellId {
        table: "rotations",
        row: secret,
        version,
        column: "password",
    }
}

/// Checks whether an update may be made while a change is in progress. Only an update of the password itself may,
/// and only when no request of the change can have an effect any more. Such an update ends the change.
pub(super) fn ensure_updatable(
    connection: &Connection,
    sealer: &Sealer,
    record: &Record,
    password_changes: bool,
    now: Timestamp,
) -> Result<(), StoreError> {
    let open = open_of(connection, &record.id)?;
    let settles_at = open
        .as_ref()
        .map(|row| row.get::<i64>("settles_at"))
        .transpose()?;
    match (open, settles_at) {
        (None, _) | (_, None) if password_changes => unproven::drop_of(connection, &record.id),
        (None, _) | (_, None) => Ok(()),
        (Some(open), Some(settles_at)) if password_changes && now.as_millisecond() > settles_at => {
            let new = new_password(sealer, &open)?;
            end(connection, &record.id)?;
            unproven::keep(
                connection,
                sealer,
                &record.id,
                record.version + 1,
                &new,
                now,
            )
        }
        (Some(_), Some(_)) => Err(StoreError::InUse(format!(
            "the password of `{}` is being rotated, and it is not known yet which one is in force; until it is, only an update of the password is accepted, and only from 1 min after the rotation began",
            record.path
        ))),
    }
}

/// Refuses to delete a base secret whose password is being changed.
pub(super) fn check_none(connection: &Connection, record: &Record) -> Result<(), StoreError> {
    let open = "SELECT 1 FROM rotations WHERE secret_id = ?1";
    if exists(connection, open, &record.id)? {
        return Err(StoreError::InUse(format!(
            "the password of `{}` is being rotated",
            record.path
        )));
    }
    Ok(())
}

/// Refuses to delete a pool whose engine is changing a password.
pub(super) fn check_pool(connection: &Connection, name: &PoolName) -> Result<(), StoreError> {
    let open = "SELECT 1 FROM rotations WHERE pool = ?1";
    if exists(connection, open, name.as_str())? {
        return Err(StoreError::InUse(format!(
            "an engine of pool `{name}` is rotating a password"
        )));
    }
    Ok(())
}

/// Refuses the change if another base secret has the same admin: its stored password would become wrong.
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
        bases::load_target(connection, sealer, &base)?.ok_or_else(|| unreadable("base_versions"))
    };
    let (own, own_server) = admin(&record.id, record.version)?;
    let others = "WHERE kind = 'base' AND id <> ?1";
    for row in authentic::rows(connection, &SECRETS, others, [&record.id])? {
        let (other, server) = admin(&row.get::<String>("id")?, row.get("version")?)?;
        // Two base secrets may write the same server in different forms.
        let is_there = (&other.host, other.port) == (&own.host, own.port)
            || server.is_some() && server == own_server;
        if is_there && other.username == own.username {
            return Err(StoreError::InUse(format!(
                "`{}` has the same admin, and its password would stop working; give each base secret an admin of its own",
                secret_row::path_of(&row)?
            )));
        }
    }
    Ok(())
}

/// The new password of a change.
fn new_password(sealer: &Sealer, open: &Entry) -> Result<Secret, StoreError> {
    let (secret, version): (String, u64) = (open.get("secret_id")?, open.get("version")?);
    let sealed: Vec<u8> = open.get("password_sealed")?;
    let clear = sealer.open(cell(&secret, version), &sealed)?;
    let text = std::str::from_utf8(&clear).map_err(|_| unreadable("rotations.password"))?;
    Ok(Secret::new(text))
}

fn end(connection: &Connection, secret: &str) -> Result<bool, StoreError> {
    let ended = connection
        .prepare("DELETE FROM rotations WHERE secret_id = ?1")?
        .execute([secret])?;
    Ok(ended > 0)
}

/// The change of this secret's password that is in progress.
fn open_of(connection: &Connection, secret: &str) -> Result<Option<Entry>, StoreError> {
    authentic::row(connection, &ROTATIONS, "WHERE secret_id = ?1", [secret])
}

/// Like [`open_of`], but only if the change settles at this time: another change may have begun since.
fn still_open(
    connection: &Connection,
    secret: &str,
    settles_at: Timestamp,
) -> Result<Option<Entry>, StoreError> {
    let which = "WHERE secret_id = ?1 AND settles_at = ?2";
    let values = params![secret, settles_at.as_millisecond()];
    authentic::row(connection, &ROTATIONS, which, values)
}

impl Store {
    /// Records that a password is about to be changed.
    ///
    /// # Errors
    /// `NotFound`; `InUse` if a change is in progress, if the secret changed meanwhile, or if another base
    /// secret has the same admin.
    pub(crate) async fn open_rotation(&self, opening: Opening) -> Result<(), StoreError> {
        let sealer = self.sealer.clone();
        self.run(move |connection| {
            let record = secret_row::load(connection, &opening.path)?;
            check_none(connection, &record)?;
            if record.version != opening.version {
                return Err(StoreError::InUse(format!(
                    "`{}` was changed just now",
                    opening.path
                )));
            }
            no_other_has_it(connection, &sealer, &record)?;
            let sealed = sealer.seal(
                cell(&record.id, record.version),
                opening.password.expose().as_bytes(),
            )?;
            let entry = ROTATIONS.entry(params![
                record.id,
                record.version,
                sealed,
                opening.pool.as_str(),
                opening.started.as_millisecond(),
                opening.who,
                opening.settles_at.as_millisecond(),
                opening.over_there.as_millisecond(),
            ]);
            authentic::insert(connection, &entry)
        })
        .await
    }

    /// All changes in progress.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn rotations(&self) -> Result<Vec<Rotation>, StoreError> {
        let sealer = self.sealer.clone();
        self.run(move |connection| {
            let which = "WHERE secret_id IN (SELECT id FROM secrets) ORDER BY secret_id";
            let mut found = Vec::new();
            for row in authentic::sound_rows(connection, &ROTATIONS, which, NONE)? {
                let (secret, version): (String, u64) = (row.get("secret_id")?, row.get("version")?);
                let asked: String = row.get("pool")?;
                let path = secret_row::path_of(&secret_row::row(connection, &secret)?)?;
                let password = new_password(&sealer, &row)?;
                let before = BaseRef {
                    id: secret.clone(),
                    version,
                };
                let (target, _) = bases::load_target(connection, &sealer, &before)?
                    .ok_or_else(|| unreadable("base_versions"))?;
                let mut pools = linked_pools(connection, &secret)?;
                match pool(connection, &asked) {
                    Ok(asked) if asked.distrusted.is_some() => {}
                    Ok(asked) => pools.insert(0, asked),
                    Err(StoreError::NotFound(_)) => {}
                    Err(error) => return Err(error),
                }
                found.push(Rotation {
                    secret,
                    path,
                    target,
                    password,
                    pools,
                    settles_at: timestamp(row.get("settles_at")?)?,
                    over_there: row
                        .get::<Option<i64>>("over_there")?
                        .map(timestamp)
                        .transpose()?,
                });
            }
            Ok(found)
        })
        .await
    }

    /// Makes the new password the base secret's, as an update would. Returns `None` if the change that settles at
    /// `settles_at` has already ended.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn commit_rotation(
        &self,
        path: SecretPath,
        settles_at: Timestamp,
        now: Timestamp,
    ) -> Result<Option<Record>, StoreError> {
        let sealer = self.sealer.clone();
        self.run(move |connection| {
            let record = secret_row::load(connection, &path)?;
            let Some(open) = still_open(connection, &record.id, settles_at)? else {
                return Ok(None);
            };
            let who: String = open.get("started_by")?;
            let password = new_password(&sealer, &open)?;
            end(connection, &record.id)?;
            set_password(connection, &sealer, record, &password, who, now).map(Some)
        })
        .await
    }

    /// Ends the change that settles at `settles_at`, because it did not happen. Returns whether this change was in
    /// progress. Its password is kept until a lease is made with the one in force.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn drop_rotation(
        &self,
        secret: String,
        settles_at: Timestamp,
        now: Timestamp,
    ) -> Result<bool, StoreError> {
        let sealer = self.sealer.clone();
        self.run(move |connection| {
            let Some(open) = still_open(connection, &secret, settles_at)? else {
                return Ok(false);
            };
            let new = new_password(&sealer, &open)?;
            let version: u64 = secret_row::row(connection, &secret)?.get("version")?;
            unproven::keep(connection, &sealer, &secret, version, &new, now)?;
            end(connection, &secret)
        })
        .await
    }
}
