//! Tokens in the store: only their SHA-256 is kept.

use jiff::Timestamp;
use mayfly_common::names::PathGlob;
use mayfly_common::secret::Secret;

use super::sql::{Connection, OptionalExtension, Row, SqlError, params};
use super::{Store, StoreError, moment, unreadable};

const ROOT: &str = "root";

/// A token, without what makes it one.
#[derive(Debug, Clone)]
pub(crate) struct Token {
    /// Its id.
    pub(crate) id: String,
    /// The paths it may read.
    pub(crate) read: Vec<PathGlob>,
    /// When it was made.
    pub(crate) created: Timestamp,
    /// When it ends.
    pub(crate) expiration: Timestamp,
    /// Most leases it may have at a time.
    pub(crate) max_leases: Option<u64>,
}

/// Whose token it is.
#[derive(Debug, Clone)]
pub(crate) enum Bearer {
    /// The root token's.
    Root,
    /// A read token's; it may have expired.
    Reader(Token),
}

fn hash(token: &Secret) -> Vec<u8> {
    aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, token.expose().as_bytes())
        .as_ref()
        .to_vec()
}

pub(super) fn insert_root(
    connection: &Connection,
    token: &Secret,
    now: Timestamp,
) -> Result<(), StoreError> {
    connection.execute(
        "INSERT INTO tokens (id, hash, created) VALUES (?1, ?2, ?3)",
        params![ROOT, hash(token), now.as_millisecond()],
    )?;
    Ok(())
}

type Raw = (String, Option<String>, i64, Option<i64>, Option<u64>);

fn raw(row: &Row) -> Result<Raw, SqlError> {
    Ok((
        row.get(0)?,
        row.get(1)?,
        row.get(2)?,
        row.get(3)?,
        row.get(4)?,
    ))
}

fn token((id, read, created, expiration, max_leases): Raw) -> Result<Token, StoreError> {
    let read = read.ok_or_else(|| unreadable("tokens.read"))?;
    Ok(Token {
        id,
        read: serde_json::from_str(&read).map_err(|_| unreadable("tokens.read"))?,
        created: moment(created)?,
        expiration: moment(expiration.ok_or_else(|| unreadable("tokens.expiration"))?)?,
        max_leases,
    })
}

impl Store {
    /// Whose token this is; nobody's, if none.
    ///
    /// # Errors
    /// The store is away.
    pub(crate) async fn bearer(&self, presented: Secret) -> Result<Option<Bearer>, StoreError> {
        // Found by its hash: nothing to be learned from how long it takes.
        let hash = hash(&presented);
        self.run(move |connection| {
            let found = connection
                .prepare_cached(
                    "SELECT id, read, created, expiration, max_leases FROM tokens WHERE hash = ?1",
                )?
                .query_row([hash], raw)
                .optional()?;
            match found {
                None => Ok(None),
                Some((id, None, ..)) if id == ROOT => Ok(Some(Bearer::Root)),
                Some(found) => Ok(Some(Bearer::Reader(token(found)?))),
            }
        })
        .await
    }

    /// Adds a read token.
    ///
    /// # Errors
    /// The store is away.
    pub(crate) async fn create_token(&self, new: Token, secret: &Secret) -> Result<(), StoreError> {
        let hash = hash(secret);
        self.run(move |connection| {
            let read = serde_json::to_string(&new.read).map_err(|_| unreadable("read"))?;
            connection.execute(
                "INSERT INTO tokens (id, hash, read, created, expiration, max_leases)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                params![
                    new.id,
                    hash,
                    read,
                    new.created.as_millisecond(),
                    new.expiration.as_millisecond(),
                    new.max_leases,
                ],
            )?;
            Ok(())
        })
        .await
    }

    /// A read token.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) async fn token(&self, id: String) -> Result<Token, StoreError> {
        self.run(move |connection| {
            let found = connection
                .query_row(
                    "SELECT id, read, created, expiration, max_leases FROM tokens WHERE id = ?1 AND read IS NOT NULL",
                    [&id],
                    raw,
                )
                .optional()?;
            token(found.ok_or_else(|| StoreError::NotFound(format!("token `{id}`")))?)
        })
        .await
    }

    /// Read tokens after `cursor`, by id, at most `limit`.
    ///
    /// # Errors
    /// The store is away.
    pub(crate) async fn tokens(
        &self,
        cursor: String,
        limit: usize,
    ) -> Result<Vec<Token>, StoreError> {
        self.run(move |connection| {
            connection
                .prepare_cached(
                    "SELECT id, read, created, expiration, max_leases FROM tokens
                     WHERE id > ?1 AND read IS NOT NULL ORDER BY id LIMIT ?2",
                )?
                .query(params![cursor, i64::try_from(limit).unwrap_or(i64::MAX)])?
                .iter()
                .map(|row| token(raw(row)?))
                .collect()
        })
        .await
    }

    /// Ends a read token. Its leases live on.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) async fn delete_token(&self, id: String) -> Result<(), StoreError> {
        self.run(move |connection| {
            match connection.execute(
                "DELETE FROM tokens WHERE id = ?1 AND read IS NOT NULL",
                [&id],
            )? {
                0 => Err(StoreError::NotFound(format!("token `{id}`"))),
                _ => Ok(()),
            }
        })
        .await
    }
}
