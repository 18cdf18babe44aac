//! Pools in the store: their names and public keys.

use jiff::Timestamp;
use mayfly_common::names::PoolName;
use mayfly_common::seal::PublicKey;
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::{Store, StoreError, exists, moment, unreadable};

/// A pool.
#[derive(Debug, Clone)]
pub(crate) struct Pool {
    /// Its name.
    pub(crate) name: PoolName,
    /// The public half of its engines' key.
    pub(crate) public_key: PublicKey,
    /// When it was made.
    pub(crate) created: Timestamp,
}

type Raw = (String, String, i64);

fn raw(row: &Row<'_>) -> Result<Raw, rusqlite::Error> {
    Ok((row.get(0)?, row.get(1)?, row.get(2)?))
}

fn pool((name, key, created): Raw) -> Result<Pool, StoreError> {
    Ok(Pool {
        name: name.parse().map_err(|_| unreadable("pools.name"))?,
        public_key: PublicKey::from_base64(&key).map_err(|_| unreadable("pools.public_key"))?,
        created: moment(created)?,
    })
}

pub(super) fn load(connection: &Connection, name: &PoolName) -> Result<Pool, StoreError> {
    let found = connection
        .prepare_cached("SELECT name, public_key, created FROM pools WHERE name = ?1")?
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
                .prepare_cached("INSERT INTO pools VALUES (?1, ?2, ?3)")?
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
                .prepare_cached("SELECT name, public_key, created FROM pools WHERE name > ?1 ORDER BY name LIMIT ?2")?
                .query_map(params![cursor, i64::try_from(limit).unwrap_or(i64::MAX)], raw)?
                .map(|found| pool(found?))
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
            connection.execute("DELETE FROM pools WHERE name = ?1", [name.as_str()])?;
            Ok(())
        })
        .await
    }
}
