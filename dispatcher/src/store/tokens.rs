//! Tokens in the store: only their SHA-256 is kept.

use std::collections::HashMap;

use jiff::Timestamp;
use mayfly_protocol::names::PathGlob;
use mayfly_protocol::secret::Secret;

use super::authentic::{self, Entry, TOKENS};
use super::sql::{Cell, Connection, params};
use super::{Lane, Store, StoreError, timestamp, unreadable};

const ROOT: &str = "root";

/// A token without its secret text.
#[derive(Debug, Clone)]
pub(crate) struct Token {
    pub(crate) id: String,
    /// The paths it may read.
    pub(crate) read: Vec<PathGlob>,
    /// When it was made.
    pub(crate) created: Timestamp,
    pub(crate) expiration: Timestamp,
    /// Maximum number of its leases at a time.
    pub(crate) max_leases: Option<u64>,
}

/// The owner of a token.
#[derive(Debug, Clone)]
pub(crate) enum Bearer {
    Root,
    /// A read token. It may have expired.
    Reader(Token),
}

/// The SHA-256 of a token, which the store keeps.
pub(crate) fn hash(token: &Secret) -> Vec<u8> {
    aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, token.expose().as_bytes())
        .as_ref()
        .to_vec()
}

fn root(token: &Secret, now: Timestamp) -> Entry {
    let none = None::<i64>;
    TOKENS.entry(params![
        ROOT,
        hash(token),
        None::<String>,
        now.as_millisecond(),
        none,
        none
    ])
}

/// Makes this the root token. After the COMMIT the earlier one is not valid.
pub(super) fn put_root(
    connection: &Connection,
    token: &Secret,
    now: Timestamp,
) -> Result<(), StoreError> {
    let all = ["hash", "read", "created", "expiration", "max_leases"];
    authentic::put(connection, &root(token, now), &all)
}

fn token(row: &Entry) -> Result<Token, StoreError> {
    let read: String = row.get("read")?;
    Ok(Token {
        id: row.get("id")?,
        read: serde_json::from_str(&read).map_err(|_| unreadable("tokens.read"))?,
        created: timestamp(row.get("created")?)?,
        expiration: timestamp(row.get("expiration")?)?,
        max_leases: row.get("max_leases")?,
    })
}

/// Tokens that one query looks up. A shorter list repeats its last hash, so that one statement is enough for all
/// lengths.
const AT_ONCE: usize = 32;

/// The condition for the rows of tokens with these hashes, and its values.
fn of_hashes(hashes: &[Vec<u8>]) -> (String, Vec<Cell>) {
    let places = if hashes.len() == 1 { 1 } else { AT_ONCE };
    let cells = hashes.iter().map(|hash| Cell::from(hash.clone()));
    let last = hashes.last().cloned().unwrap_or_default();
    let padding = std::iter::repeat_n(Cell::from(last), places - hashes.len());
    let which = format!("WHERE hash IN ({})", vec!["?"; places].join(", "));
    (which, cells.chain(padding).collect())
}

/// The owners of those hashes that belong to a token. A row that is not authentic does not count.
fn owners(
    connection: &Connection,
    hashes: &[Vec<u8>],
) -> Result<HashMap<Vec<u8>, Bearer>, StoreError> {
    let mut found = HashMap::new();
    for some in hashes.chunks(AT_ONCE) {
        let (which, cells) = of_hashes(some);
        for row in authentic::sound_rows(connection, &TOKENS, &which, cells)? {
            let is_root =
                row.get::<String>("id")? == ROOT && row.get::<Option<String>>("read")?.is_none();
            let bearer = match is_root {
                true => Bearer::Root,
                false => Bearer::Reader(token(&row)?),
            };
            found.insert(row.get("hash")?, bearer);
        }
    }
    Ok(found)
}

impl Store {
    /// The owners of tokens, by their hashes: the time that this takes reveals nothing about a token. An unknown
    /// hash has no owner.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn bearers(
        &self,
        hashes: Vec<Vec<u8>>,
    ) -> Result<Vec<Option<Bearer>>, StoreError> {
        let asked = |hashes: &[Vec<u8>]| {
            let (which, cells) = of_hashes(hashes);
            authentic::query(&TOKENS, &which, cells)
        };
        let ahead = || hashes.chunks(AT_ONCE).map(asked).collect();
        let hashes = hashes.clone();
        self.read_rows(ahead, move |connection| {
            let owners = owners(connection, &hashes)?;
            Ok(hashes
                .iter()
                .map(|hash| owners.get(hash).cloned())
                .collect())
        })
        .await
    }

    /// Adds a read token.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn create_token(&self, new: Token, secret: &Secret) -> Result<(), StoreError> {
        let hash = hash(secret);
        self.run(move |connection| {
            let read = serde_json::to_string(&new.read).map_err(|_| unreadable("read"))?;
            let entry = TOKENS.entry(params![
                new.id,
                hash,
                read,
                new.created.as_millisecond(),
                new.expiration.as_millisecond(),
                new.max_leases,
            ]);
            authentic::insert(connection, &entry)
        })
        .await
    }

    /// Loads a read token by its id.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) async fn token(&self, id: String) -> Result<Token, StoreError> {
        self.read(Lane::Rows, move |connection| {
            let which = "WHERE id = ?1 AND read IS NOT NULL";
            let found = authentic::row(connection, &TOKENS, which, [&id])?;
            token(&found.ok_or_else(|| StoreError::NotFound(format!("token `{id}`")))?)
        })
        .await
    }

    /// At most `limit` read tokens after `cursor`, by id.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn tokens(
        &self,
        cursor: String,
        limit: usize,
    ) -> Result<Vec<Token>, StoreError> {
        self.read(Lane::Pages, move |connection| {
            let which = "WHERE id > ?1 AND read IS NOT NULL ORDER BY id LIMIT ?2";
            let limit = i64::try_from(limit).unwrap_or(i64::MAX);
            let found = authentic::sound_rows(connection, &TOKENS, which, params![cursor, limit])?;
            found.iter().map(token).collect()
        })
        .await
    }

    /// Deletes a read token. Its leases live on.
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
