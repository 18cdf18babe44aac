//! The other password of an admin. After a change it is the earlier password. After a change that did not happen it
//! is the planned password. It is kept until a lease is made with the one in force. If a login is refused before
//! that, both are tried again: a failover or a restored database may have lost the change, and an engine of an
//! earlier version may have made it late.

use jiff::Timestamp;
use mayfly_protocol::names::SecretPath;
use mayfly_protocol::secret::Secret;
use serde_json::Value;

use super::authentic::{self, Entry, UNPROVEN};
use super::sealer::{CellId, Sealer};
use super::secret_row::{self, Record, Revised, open_data, replace};
use super::sql::{Connection, NONE, params};
use super::{Store, StoreError, timestamp, unreadable};
use crate::secrets::{Content, Spec, parse};
use mayfly_protocol::lease::BaseRef;

/// A login with the stored password was refused, and another password is kept.
#[derive(Debug)]
pub(crate) struct Doubt {
    pub(crate) path: SecretPath,
    pub(crate) password: Secret,
    /// When the other password began to be kept.
    pub(crate) since: Timestamp,
}

pub(super) fn cell<'a>(secret: &'a str, version: u64) -> CellId<'a> {
    CellId {
        table: "unproven",
        row: secret,
        version,
        column: "password",
    }
}

/// Keeps a password for a version of a base secret. It replaces one that was kept before.
pub(super) fn keep(
    connection: &Connection,
    sealer: &Sealer,
    secret: &str,
    version: u64,
    password: &Secret,
    now: Timestamp,
) -> Result<(), StoreError> {
    let sealed = sealer.seal(cell(secret, version), password.expose().as_bytes())?;
    let entry = UNPROVEN.entry(params![
        secret,
        version,
        sealed,
        now.as_millisecond(),
        None::<i64>,
    ]);
    let changed = ["version", "password_sealed", "since", "doubted"];
    authentic::put(connection, &entry, &changed)
}

/// Forgets the password that is kept for a base secret.
pub(super) fn drop_of(connection: &Connection, secret: &str) -> Result<(), StoreError> {
    connection
        .prepare("DELETE FROM unproven WHERE secret_id = ?1")?
        .execute([secret])?;
    Ok(())
}

/// Forgets the other password, because a lease that was recorded at this time was made with this version: its
/// password is in force.
pub(super) fn proven(
    connection: &Connection,
    base: &BaseRef,
    recorded: Timestamp,
) -> Result<(), StoreError> {
    connection
        .prepare("DELETE FROM unproven WHERE secret_id = ?1 AND version <= ?2 AND since <= ?3")?
        .write(params![base.id, base.version, recorded.as_millisecond()])?;
    Ok(())
}

fn row(connection: &Connection, secret: &str) -> Result<Option<Entry>, StoreError> {
    let which = format!("WHERE secret_id = ?1{}", connection.for_update());
    authentic::row(connection, &UNPROVEN, &which, [secret])
}

fn password(sealer: &Sealer, row: &Entry) -> Result<Secret, StoreError> {
    let (secret, version): (String, u64) = (row.get("secret_id")?, row.get("version")?);
    let sealed: Vec<u8> = row.get("password_sealed")?;
    let clear = sealer.open(cell(&secret, version), &sealed)?;
    let text = std::str::from_utf8(&clear).map_err(|_| unreadable("unproven.password"))?;
    Ok(Secret::new(text))
}

/// Records that a login with this version was refused.
pub(super) fn doubt(
    connection: &Connection,
    base: &BaseRef,
    now: Timestamp,
) -> Result<(), StoreError> {
    let Some(mut row) = row(connection, &base.id)? else {
        return Ok(());
    };
    let is_known = row.get::<Option<i64>>("doubted")?.is_some();
    if is_known || base.version < row.get::<u64>("version")? {
        return Ok(());
    }
    row.set("doubted", now.as_millisecond());
    authentic::update(connection, &row, &["doubted"])
}

/// Makes another password the base secret's, as an update would. The earlier one is kept until a lease is made with
/// the new one.
pub(super) fn set_password(
    connection: &Connection,
    sealer: &Sealer,
    record: Record,
    password: &Secret,
    who: String,
    now: Timestamp,
) -> Result<Record, StoreError> {
    let mut content = Content {
        attributes: record.attributes.clone(),
        description: record.description.clone(),
        data: open_data(connection, sealer, &record)?,
    };
    let text = Value::String(password.expose().to_owned());
    let before = content.data.insert("password".to_owned(), text);
    let before = before.as_ref().and_then(Value::as_str).map(Secret::new);
    // The secret was checked when it was written.
    let spec = match parse(&content, u64::MAX) {
        Ok(spec @ Spec::Base(_)) => spec,
        Ok(Spec::Static | Spec::Dynamic(_)) | Err(_) => return Err(unreadable("secrets.data")),
    };
    let revised = Revised { content, spec };
    let record = replace(connection, sealer, record, &revised, who, now)?;
    if let Some(before) = before {
        keep(connection, sealer, &record.id, record.version, &before, now)?;
    }
    Ok(record)
}

impl Store {
    /// Records that a login with this version of a base secret was refused. If another password is kept,
    /// [`Store::doubts`] returns the secret from now on.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn doubt_password(
        &self,
        base: BaseRef,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        self.run(move |connection| doubt(connection, &base, now))
            .await
    }

    /// Base secrets whose password is in doubt.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn doubts(&self) -> Result<Vec<Doubt>, StoreError> {
        let sealer = self.sealer.clone();
        self.run(move |connection| {
            let which = "WHERE secret_id IN (SELECT id FROM secrets) ORDER BY secret_id";
            let mut found = Vec::new();
            for row in authentic::sound_rows(connection, &UNPROVEN, which, NONE)? {
                if row.get::<Option<i64>>("doubted")?.is_none() {
                    continue;
                }
                let secret: String = row.get("secret_id")?;
                found.push(Doubt {
                    path: secret_row::path_of(&secret_row::row(connection, &secret)?)?,
                    password: password(&sealer, &row)?,
                    since: timestamp(row.get("since")?)?,
                });
            }
            Ok(found)
        })
        .await
    }

    /// Records the result of a login about a password in doubt. If the `other` one is in force for this version, it
    /// becomes the base secret's password, and the secret is returned.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn settle_doubt(
        &self,
        path: SecretPath,
        version: u64,
        other: bool,
        now: Timestamp,
    ) -> Result<Option<Record>, StoreError> {
        let sealer = self.sealer.clone();
        self.run(move |connection| {
            let record = secret_row::load(connection, &path)?;
            let Some(mut row) = row(connection, &record.id)? else {
                return Ok(None);
            };
            if !other {
                row.set("doubted", None::<i64>);
                authentic::update(connection, &row, &["doubted"])?;
                return Ok(None);
            }
            // A rotation that has begun since then finds out by itself which password is in force.
            let is_rotated = "SELECT 1 FROM rotations WHERE secret_id = ?1";
            if record.version != version || super::exists(connection, is_rotated, &record.id)? {
                return Ok(None);
            }
            let (password, who) = (password(&sealer, &row)?, record.last_modified_by.clone());
            set_password(connection, &sealer, record, &password, who, now).map(Some)
        })
        .await
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
impl Store {
    /// Keeps another password for each of two base secrets, both in doubt.
    pub(super) async fn keep_two_passwords(&self) {
        let sealer = self.sealer.clone();
        let kept = self.run(move |connection| {
            for (second, id) in [(1, "db:root"), (2, "db2:root")] {
                let at = Timestamp::from_second(second).unwrap();
                let other = Secret::new(format!("the other of {id}"));
                keep(connection, &sealer, id, 1, &other, at)?;
                let base = BaseRef {
                    id: id.to_owned(),
                    version: 1,
                };
                doubt(connection, &base, at)?;
            }
            Ok(())
        });
        kept.await.unwrap();
    }
}
