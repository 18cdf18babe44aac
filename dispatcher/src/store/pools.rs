//! Pools in the store: their names and public keys.

use jiff::Timestamp;
use mayfly_protocol::names::PoolName;
use mayfly_protocol::seal::PublicKey;

use super::authentic::{self, Entry, POOLS};
use super::ring::Generation;
use super::sql::{Connection, Query, Row, params};
use super::{Lane, Store, StoreError, exists, generations, timestamp, unreadable};

#[derive(Debug, Clone)]
pub(crate) struct Pool {
    pub(crate) name: PoolName,
    /// The public half of its engines' key.
    pub(crate) public_key: PublicKey,
    /// The new key of a rotation in progress. Some engines have it already.
    pub(crate) next_key: Option<PublicKey>,
    /// The key before the last rotation. It is not used any more in either direction, but messages sealed to it may
    /// still be parked.
    pub(crate) previous_key: Option<PublicKey>,
    /// The newest of the dispatcher's keys that all its engines know.
    pub(crate) dispatcher_generation: Generation,
    /// When it was made.
    pub(crate) created: Timestamp,
    /// The time from which nothing is sent to it, and its messages are refused.
    pub(crate) distrusted: Option<Timestamp>,
}

/// The receiver of a sealed message, and the generation of the dispatcher's key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Recipient {
    /// The key that opens it.
    pub(crate) key: PublicKey,
    /// The generation of the dispatcher's key that its engines know.
    pub(crate) from: Generation,
}

impl Pool {
    pub(crate) fn new(
        name: PoolName,
        public_key: PublicKey,
        dispatcher_generation: Generation,
        created: Timestamp,
    ) -> Self {
        Self {
            name,
            public_key,
            next_key: None,
            previous_key: None,
            dispatcher_generation,
            created,
            distrusted: None,
        }
    }

    /// All keys that its engines may seal with. Empty: the pool is distrusted.
    pub(crate) fn keys(&self) -> Vec<PublicKey> {
        match self.distrusted {
            Some(_) => vec![],
            None => [Some(&self.public_key), self.next_key.as_ref()]
                .into_iter()
                .flatten()
                .cloned()
                .collect(),
        }
    }

    /// The key to which every message to the pool is sealed.
    ///
    /// # Errors
    /// `Distrusted`.
    pub(crate) fn recipient(&self) -> Result<Recipient, StoreError> {
        match self.distrusted {
            Some(_) => Err(StoreError::Distrusted(self.name.clone())),
            None => Ok(Recipient {
                key: self.public_key.clone(),
                from: self.dispatcher_generation,
            }),
        }
    }

    /// Whether messages may be parked that its engines cannot open any more.
    pub(crate) fn has_new_keys(&self) -> bool {
        self.previous_key.is_some() || self.dispatcher_generation > 1
    }
}

const BY_NAME: &str = "WHERE name = ?1";
/// The columns that hold keys, or say which are used.
const KEYS: [&str; 6] = [
    "public_key",
    "next_key",
    "previous_key",
    "distrusted",
    "dispatcher_generation",
    "next_dispatcher_generation",
];

pub(super) fn pool(row: &Entry) -> Result<Pool, StoreError> {
    let key = |text: String| PublicKey::from_base64(&text).map_err(|_| unreadable("pools.keys"));
    Ok(Pool {
        name: row
            .get::<String>("name")?
            .parse()
            .map_err(|_| unreadable("pools.name"))?,
        public_key: key(row.get("public_key")?)?,
        next_key: row.get::<Option<_>>("next_key")?.map(key).transpose()?,
        previous_key: row.get::<Option<_>>("previous_key")?.map(key).transpose()?,
        created: timestamp(row.get("created")?)?,
        dispatcher_generation: row.get("dispatcher_generation")?,
        distrusted: row
            .get::<Option<_>>("distrusted")?
            .map(timestamp)
            .transpose()?,
    })
}

fn check_trusted(row: &Entry) -> Result<(), StoreError> {
    let pool = pool(row)?;
    match pool.distrusted {
        None => Ok(()),
        Some(_) => Err(StoreError::InUse(format!(
            "pool `{}` is distrusted for good: create another pool, or delete this one and create it again",
            pool.name
        ))),
    }
}

/// Marks a pool as distrusted. A pool that is distrusted already keeps its earlier time.
pub(super) fn distrust(
    connection: &Connection,
    name: &PoolName,
    now: Timestamp,
) -> Result<Pool, StoreError> {
    let mut row = row(connection, name)?;
    if row.get::<Option<i64>>("distrusted")?.is_none() {
        row.set("distrusted", now.as_millisecond());
        row.set("next_key", None::<String>);
        row.set("next_dispatcher_generation", None::<i64>);
        authentic::update(connection, &row, &KEYS)?;
    }
    pool(&row)
}

fn row(connection: &Connection, name: &PoolName) -> Result<Entry, StoreError> {
    authentic::row(connection, &POOLS, BY_NAME, [name.as_str()])?
        .ok_or_else(|| StoreError::NotFound(format!("pool `{name}`")))
}

/// The names of pools in the first column. A text that is not a name was not written by a dispatcher, and is left
/// out.
pub(super) fn names(rows: &[Row]) -> Result<Vec<PoolName>, StoreError> {
    let mut names = Vec::with_capacity(rows.len());
    for row in rows {
        names.extend(row.get::<String>(0)?.parse());
    }
    Ok(names)
}

pub(super) fn load(connection: &Connection, name: &PoolName) -> Result<Pool, StoreError> {
    pool(&row(connection, name)?)
}

/// The query of [`load`].
pub(super) fn asked(name: &PoolName) -> Query {
    authentic::query(&POOLS, BY_NAME, [name.as_str()])
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
                    "pool `{}` exists already",
                    new.name
                )));
            }
            generations::check_dispatcher(connection, new.dispatcher_generation)?;
            let none = None::<String>;
            let entry = POOLS.entry(params![
                new.name.as_str(),
                new.public_key.to_base64(),
                new.created.as_millisecond(),
                none,
                none,
                None::<i64>,
                new.dispatcher_generation,
                None::<i64>,
            ]);
            authentic::insert(connection, &entry)
        })
        .await
    }

    /// Loads a pool by its name.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) async fn pool(&self, name: PoolName) -> Result<Pool, StoreError> {
        self.read(Lane::Rows, move |connection| load(connection, &name))
            .await
    }

    /// At most `limit` pools after `cursor`, by name.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn pools(
        &self,
        cursor: String,
        limit: usize,
    ) -> Result<Vec<Pool>, StoreError> {
        self.read(Lane::Rows, move |connection| {
            let which = "WHERE name > ?1 ORDER BY name LIMIT ?2";
            let limit = i64::try_from(limit).unwrap_or(i64::MAX);
            let found = authentic::sound_rows(connection, &POOLS, which, params![cursor, limit])?;
            found.iter().map(pool).collect()
        })
        .await
    }

    /// All pools.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn all_pools(&self) -> Result<Vec<Pool>, StoreError> {
        self.pools(String::new(), usize::MAX).await
    }

    /// Begins the rotation of a pool's key: from now on engines may use `next` too. They get the dispatcher's key of
    /// this generation with it.
    ///
    /// # Errors
    /// `NotFound`; `InUse` if a rotation is in progress, or if the pool is distrusted.
    pub(crate) async fn begin_key_rotation(
        &self,
        name: PoolName,
        next: PublicKey,
        dispatcher_generation: Generation,
    ) -> Result<(), StoreError> {
        self.run(move |connection| {
            let mut row = row(connection, &name)?;
            check_trusted(&row)?;
            if row.get::<Option<String>>("next_key")?.is_some() {
                return Err(StoreError::InUse(format!(
                    "a rotation of the key of pool `{name}` is in progress; finish it first, or give it up"
                )));
            }
            generations::check_dispatcher(connection, dispatcher_generation)?;
            row.set("next_key", next.to_base64());
            row.set("next_dispatcher_generation", dispatcher_generation);
            authentic::update(connection, &row, &KEYS)
        })
        .await
    }

    /// Ends the rotation of a pool's key. Either only the new key counts from now on, in both directions, or the new
    /// key is forgotten.
    ///
    /// # Errors
    /// `NotFound`; `InUse` if no rotation is in progress, or if the pool is distrusted.
    pub(crate) async fn end_key_rotation(
        &self,
        name: PoolName,
        take_it: bool,
    ) -> Result<Pool, StoreError> {
        self.run(move |connection| {
            let mut row = row(connection, &name)?;
            check_trusted(&row)?;
            let Some(next) = row.get::<Option<String>>("next_key")? else {
                return Err(StoreError::InUse(format!(
                    "no rotation of the key of pool `{name}` is in progress"
                )));
            };
            if take_it {
                row.set("previous_key", row.get::<String>("public_key")?);
                row.set("public_key", next);
                let generation = row.get::<Option<Generation>>("next_dispatcher_generation")?;
                if let Some(generation) = generation {
                    row.set("dispatcher_generation", generation);
                }
            }
            row.set("next_dispatcher_generation", None::<i64>);
            row.set("next_key", None::<String>);
            authentic::update(connection, &row, &KEYS)?;
            pool(&row)
        })
        .await
    }
}
