//! Pools in the store: their names and public keys.

use jiff::Timestamp;
use mayfly_common::names::PoolName;
use mayfly_common::seal::PublicKey;

use super::sql::{Connection, OptionalExtension, Row, SqlError, params};
use super::{Store, StoreError, exists, moment, rotations, unreadable};

/// A pool.
#[derive(Debug, Clone)]
pub(crate) struct Pool {
    /// Its name.
    pub(crate) name: PoolName,
    /// The public half of its engines' key.
    pub(crate) public_key: PublicKey,
    /// The key of a rotation that is under way: some engines have it already.
    pub(crate) next_key: Option<PublicKey>,
    /// The key of before the last rotation.
    pub(crate) previous_key: Option<PublicKey>,
    /// When it was made.
    pub(crate) created: Timestamp,
}

impl Pool {
    /// All keys its engines may speak with.
    pub(crate) fn keys(&self) -> Vec<PublicKey> {
        [
            Some(&self.public_key),
            self.next_key.as_ref(),
            self.previous_key.as_ref(),
        ]
        .into_iter()
        .flatten()
        .cloned()
        .collect()
    }
}

const COLUMNS: &str = "name, public_key, created, next_key, previous_key";

type Raw = (String, String, i64, Option<String>, Option<String>);

fn raw(row: &Row) -> Result<Raw, SqlError> {
    Ok((
        row.get(0)?,
        row.get(1)?,
        row.get(2)?,
        row.get(3)?,
        row.get(4)?,
    ))
}

fn pool((name, key, created, next, previous): Raw) -> Result<Pool, StoreError> {
    let other = |key: Option<String>| {
        key.map(|key| PublicKey::from_base64(&key).map_err(|_| unreadable("pools.next_key")))
            .transpose()
    };
    Ok(Pool {
        next_key: other(next)?,
        previous_key: other(previous)?,
        name: name.parse().map_err(|_| unreadable("pools.name"))?,
        public_key: PublicKey::from_base64(&key).map_err(|_| unreadable("pools.public_key"))?,
        created: moment(created)?,
    })
}

pub(super) fn load(connection: &Connection, name: &PoolName) -> Result<Pool, StoreError> {
    let found = connection
        .prepare_cached(&format!("SELECT {COLUMNS} FROM pools WHERE name = ?1"))?
        .query_row([name.as_str()], raw)
        .optional()?;
    pool(found.ok_or_else(|| StoreError::NotFound(format!("pool `{name}`")))?)
}

impl Store {
    /// Adds a pool.
    ///
    /// # Errors
    /// `Exists`.
    pub(crate) async fn create_pool(&self, new: Pool) -> Result<(), StoreError> {
        self.run(move |connection| {
            if exists(
                connection,
                "SELECT 1 FROM pools WHERE name = ?1",
                new.name.as_str(),
            )? {
                return Err(StoreError::Exists(format!(
                    "there is a pool `{}` already",
                    new.name
                )));
            }
            connection
                .prepare_cached(
                    "INSERT INTO pools (name, public_key, created) VALUES (?1, ?2, ?3)",
                )?
                .execute(params![
                    new.name.as_str(),
                    new.public_key.to_base64(),
                    new.created.as_millisecond()
                ])?;
            Ok(())
        })
        .await
    }

    /// A pool.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) async fn pool(&self, name: PoolName) -> Result<Pool, StoreError> {
        self.run(move |connection| load(connection, &name)).await
    }

    /// All pools after `cursor`, by name, at most `limit`.
    ///
    /// # Errors
    /// The store is away.
    pub(crate) async fn pools(
        &self,
        cursor: String,
        limit: usize,
    ) -> Result<Vec<Pool>, StoreError> {
        self.run(move |connection| {
            connection
                .prepare_cached(&format!(
                    "SELECT {COLUMNS} FROM pools WHERE name > ?1 ORDER BY name LIMIT ?2"
                ))?
                .query(params![cursor, i64::try_from(limit).unwrap_or(i64::MAX)])?
                .iter()
                .map(|row| pool(raw(row)?))
                .collect()
        })
        .await
    }

    /// All pools.
    ///
    /// # Errors
    /// The store is away.
    pub(crate) async fn all_pools(&self) -> Result<Vec<Pool>, StoreError> {
        self.pools(String::new(), usize::MAX).await
    }

    /// Begins the rotation of a pool's key: from now on engines may speak with `next` too.
    ///
    /// # Errors
    /// `NotFound`; `InUse` while one is under way.
    pub(crate) async fn begin_key_rotation(
        &self,
        name: PoolName,
        next: PublicKey,
    ) -> Result<(), StoreError> {
        self.run(move |connection| {
            if load(connection, &name)?.next_key.is_some() {
                return Err(StoreError::InUse(format!(
                    "a rotation of pool `{name}`'s key is under way; finish it first, or give it up"
                )));
            }
            connection.execute(
                "UPDATE pools SET next_key = ?2 WHERE name = ?1",
                params![name.as_str(), next.to_base64()],
            )?;
            Ok(())
        })
        .await
    }

    /// Ends the rotation of a pool's key: tasks are sealed to the new one from now on, or it is
    /// forgotten.
    ///
    /// # Errors
    /// `NotFound`; `InUse` where none is under way.
    pub(crate) async fn end_key_rotation(
        &self,
        name: PoolName,
        take_it: bool,
    ) -> Result<Pool, StoreError> {
        self.run(move |connection| {
            if load(connection, &name)?.next_key.is_none() {
                return Err(StoreError::InUse(format!(
                    "no rotation of pool `{name}`'s key is under way"
                )));
            }
            let change = if take_it {
                "UPDATE pools SET previous_key = public_key, public_key = next_key, next_key = NULL WHERE name = ?1"
            } else {
                "UPDATE pools SET next_key = NULL WHERE name = ?1"
            };
            connection.execute(change, [name.as_str()])?;
            load(connection, &name)
        })
        .await
    }

    /// Removes a pool.
    ///
    /// # Errors
    /// `NotFound`; `InUse` while a lease of it lives or a dynamic secret names it.
    pub(crate) async fn delete_pool(&self, name: PoolName) -> Result<(), StoreError> {
        self.run(move |connection| {
            load(connection, &name)?;
            let live = "SELECT 1 FROM lease_counts WHERE pool = ?1 AND n > 0 AND state IN ('pending', 'active', 'revoking')";
            if exists(connection, live, name.as_str())? {
                return Err(StoreError::InUse(format!(
                    "leases of pool `{name}` are not revoked yet; only its engines can end them"
                )));
            }
            if exists(connection, "SELECT 1 FROM secrets WHERE pool = ?1", name.as_str())? {
                return Err(StoreError::InUse(format!("a dynamic secret names pool `{name}`")));
            }
            rotations::check_pool(connection, &name)?;
            // Those that are gone and were to be looked for once more: nobody is left to look, nor
            // to make them anew.
            connection.execute(
                "UPDATE leases SET next_reconcile = NULL WHERE pool = ?1 AND next_reconcile IS NOT NULL",
                [name.as_str()],
            )?;
            connection.execute("DELETE FROM pools WHERE name = ?1", [name.as_str()])?;
            Ok(())
        })
        .await
    }
}
