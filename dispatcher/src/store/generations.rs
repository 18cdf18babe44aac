//! The generations of the dispatcher's secret keys, sealed in `meta`, and the keys from which the passwords of
//! leases are derived. Each change is one transaction, so a killed process leaves either the earlier keys or the new
//! ones.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use mayfly_protocol::names::LeaseId;
use mayfly_protocol::seal::KeyPair;
use mayfly_protocol::secret::Secret;
use zeroize::Zeroizing;

use super::authentic::{self, LEASES, POOLS};
use super::open::{meta, meta_asked, meta_cell, put};
use super::ring::{Generation, Ring};
use super::sealer::Sealer;
use super::sql::{Connection, NONE, Query, params};
use super::{Lane, Store, StoreError, unreadable};
use crate::password::Seed;

/// The row of the first derivation key. The rows of later keys have their generation after a dot.
const DERIVATION: &str = "derivation_key";
/// The row with the generation of the oldest derivation key that a lease may need.
const OLDEST: &str = "derivation_oldest";
/// The row of the dispatcher's key and its generation.
const DISPATCHER: &str = "dispatcher_key";
const GENERATION: &str = "dispatcher_generation";
/// The row of the dispatcher's next key.
const NEXT: &str = "dispatcher_key.next";

/// Whether a row of `meta` is sealed.
pub(super) fn is_sealed(row: &str) -> bool {
    let rest = [DERIVATION, DISPATCHER]
        .iter()
        .find_map(|key| row.strip_prefix(key));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// Every row of `meta` that is sealed.
pub(super) fn sealed_rows(connection: &Connection) -> Result<Vec<String>, StoreError> {
    // In ASCII `/` follows `.`, so this range has all names with the prefix.
    let rows = connection.prepare(
        "SELECT key FROM meta WHERE key >= 'derivation_key' AND key < 'derivation_key/'
             OR key >= 'dispatcher_key' AND key < 'dispatcher_key/' ORDER BY key",
    )?;
    let rows = rows.query(NONE)?;
    rows.iter().map(|row| Ok(row.get(0)?)).collect()
}

fn opened(
    connection: &Connection,
    sealer: &Sealer,
    row: &str,
) -> Result<Option<Secret>, StoreError> {
    let Some(sealed) = meta(connection, row)? else {
        return Ok(None);
    };
    let clear = sealer.open(meta_cell(row), &sealed)?;
    let text = std::str::from_utf8(&clear).map_err(|_| unreadable("meta"))?;
    Ok(Some(Secret::new(text)))
}

fn seal(
    connection: &Connection,
    sealer: &Sealer,
    row: &str,
    key: &Secret,
) -> Result<(), StoreError> {
    let sealed = sealer.seal(meta_cell(row), key.expose().as_bytes())?;
    put(connection, row, &sealed)
}

/// A generation that has its own row. Without that row it is the first generation.
fn number(connection: &Connection, row: &str) -> Result<Generation, StoreError> {
    let Some(bytes) = meta(connection, row)? else {
        return Ok(1);
    };
    let text = std::str::from_utf8(&bytes).ok();
    text.and_then(|text| text.parse().ok())
        .ok_or_else(|| unreadable("meta"))
}

fn row_of(generation: Generation) -> String {
    match generation {
        1 => DERIVATION.to_owned(),
        later => format!("{DERIVATION}.{later}"),
    }
}

fn newest_derivation(connection: &Connection) -> Result<Generation, StoreError> {
    let rows = sealed_rows(connection)?;
    let later = rows.iter().filter_map(|row| {
        let generation = row.strip_prefix(DERIVATION)?.strip_prefix('.')?;
        generation.parse().ok()
    });
    Ok(later.max().unwrap_or(1))
}

fn random_key() -> Secret {
    Secret::new(BASE64_STANDARD.encode(*Zeroizing::new(rand::random::<[u8; 32]>())))
}

fn derivation_key(
    connection: &Connection,
    sealer: &Sealer,
    generation: Generation,
) -> Result<Zeroizing<[u8; 32]>, StoreError> {
    let row = row_of(generation);
    let text = opened(connection, sealer, &row)?
        .ok_or_else(|| StoreError::NotFound(format!("meta row {row}")))?;
    let bytes = BASE64_STANDARD.decode(text.expose()).map(Zeroizing::new);
    let bytes = bytes.map_err(|_| unreadable(DERIVATION))?;
    let key = <[u8; 32]>::try_from(bytes.as_slice()).map_err(|_| unreadable(DERIVATION))?;
    Ok(Zeroizing::new(key))
}

fn dispatcher_key(
    connection: &Connection,
    sealer: &Sealer,
    row: &str,
) -> Result<Option<KeyPair>, StoreError> {
    let key = opened(connection, sealer, row)?.map(|text| KeyPair::from_base64(&text));
    key.transpose().map_err(|_| unreadable(DISPATCHER))
}

/// The keys of a new store.
pub(super) fn first(connection: &Connection, sealer: &Sealer) -> Result<(), StoreError> {
    seal(connection, sealer, DERIVATION, &random_key())?;
    seal(
        connection,
        sealer,
        DISPATCHER,
        &KeyPair::generate().to_base64(),
    )
}

/// The keys that are in use.
pub(super) fn load(connection: &Connection, sealer: &Sealer) -> Result<Ring, StoreError> {
    let generation = number(connection, GENERATION)?;
    let present = dispatcher_key(connection, sealer, DISPATCHER)?
        .ok_or_else(|| StoreError::NotFound(format!("meta row {DISPATCHER}")))?;
    let next = dispatcher_key(connection, sealer, NEXT)?;
    let newest = newest_derivation(connection)?;
    Ok(Ring {
        derivation: (newest, derivation_key(connection, sealer, newest)?),
        dispatcher: [
            Some((generation, present)),
            next.map(|next| (generation + 1, next)),
        ]
        .into_iter()
        .flatten()
        .collect(),
    })
}

/// Adds a derivation key, from which the passwords of new leases come.
pub(super) fn add_derivation(
    connection: &Connection,
    sealer: &Sealer,
) -> Result<Generation, StoreError> {
    let generation = newest_derivation(connection)? + 1;
    seal(connection, sealer, &row_of(generation), &random_key())?;
    Ok(generation)
}

/// Forgets the derivation keys that no lease needs any more. The first key is overwritten, not deleted, because a
/// dispatcher of the previous version does not start without it.
fn forget_derivation(connection: &Connection, sealer: &Sealer) -> Result<(), StoreError> {
    let (first, newest) = (number(connection, OLDEST)?, newest_derivation(connection)?);
    let mut oldest = first;
    while oldest < newest && !is_needed(connection, oldest)? {
        match oldest {
            1 => seal(connection, sealer, DERIVATION, &random_key())?,
            later => {
                connection.execute("DELETE FROM meta WHERE key = ?1", [row_of(later)])?;
            }
        }
        oldest += 1;
    }
    if oldest != first {
        put(connection, OLDEST, oldest.to_string().as_bytes())?;
        tracing::info!(
            oldest,
            newest,
            "derivation keys that no lease needs are forgotten"
        );
    }
    Ok(())
}

/// Whether a lease may still need its password from this generation.
fn is_needed(connection: &Connection, generation: Generation) -> Result<bool, StoreError> {
    let live = "state IN ('pending', 'active') LIMIT 1";
    let by_nonce = format!("SELECT 1 FROM leases WHERE derivation = ?1 AND {live}");
    let by_id = format!("SELECT 1 FROM leases WHERE derivation IS NULL AND {live}");
    let is_found = |sql: &str, values: Vec<super::sql::Cell>| -> Result<bool, StoreError> {
        Ok(!connection.prepare(sql)?.query(values)?.is_empty())
    };
    Ok(is_found(&by_nonce, params![generation])? || generation == 1 && is_found(&by_id, vec![])?)
}

/// Refuses a lease whose password would come from a forgotten key. This happens if the process was suspended after
/// it read the keys.
pub(super) fn check(connection: &Connection, generation: Generation) -> Result<(), StoreError> {
    if generation < number(connection, OLDEST)? {
        return Err(StoreError::Unavailable(
            "the derivation key was renewed just now".to_owned(),
        ));
    }
    Ok(())
}

/// The query of [`check`].
pub(super) fn asked() -> Query {
    meta_asked(OLDEST)
}

/// Adds the dispatcher's next key. Pools get it with their next keys.
pub(super) fn add_dispatcher(
    connection: &Connection,
    sealer: &Sealer,
) -> Result<Generation, StoreError> {
    let generation = number(connection, GENERATION)? + 1;
    if meta(connection, NEXT)?.is_some() {
        return Err(StoreError::InUse(format!(
            "generation {generation} of the dispatcher's key exists already; give it to every pool with `mayfly pool rotate-key`, then `mayfly-dispatcher --rekey dispatcher --finish`"
        )));
    }
    seal(connection, sealer, NEXT, &KeyPair::generate().to_base64())?;
    Ok(generation)
}

/// Replaces the dispatcher's present key by its next key. The present key is forgotten.
pub(super) fn finish_dispatcher(
    connection: &Connection,
    sealer: &Sealer,
) -> Result<Generation, StoreError> {
    let generation = number(connection, GENERATION)? + 1;
    let Some(next) = opened(connection, sealer, NEXT)? else {
        return Err(StoreError::InUse(
            "the dispatcher's key is not being renewed; begin with --rekey dispatcher".to_owned(),
        ));
    };
    let which = "WHERE dispatcher_generation < ?1 AND distrusted IS NULL ORDER BY name";
    let behind = authentic::rows(connection, &POOLS, which, params![generation])?;
    if !behind.is_empty() {
        let names: Result<Vec<String>, _> = behind.iter().map(|row| row.get("name")).collect();
        return Err(StoreError::InUse(format!(
            "engines of these pools do not have the new key yet: {}; give it to them with `mayfly pool rotate-key NAME` and `--finish`",
            names?.join(", ")
        )));
    }
    seal(connection, sealer, DISPATCHER, &next)?;
    put(connection, GENERATION, generation.to_string().as_bytes())?;
    connection.execute("DELETE FROM meta WHERE key = ?1", [NEXT])?;
    Ok(generation)
}

/// Refuses a generation of the dispatcher's key that does not exist any more. This happens if the process was
/// suspended after it read the keys.
pub(super) fn check_dispatcher(
    connection: &Connection,
    generation: Generation,
) -> Result<(), StoreError> {
    if generation < number(connection, GENERATION)? {
        return Err(StoreError::Unavailable(
            "the dispatcher's key was renewed just now".to_owned(),
        ));
    }
    Ok(())
}

impl Store {
    /// Reads the keys, which may have been renewed. With `tidy` it forgets those that nothing needs.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn keys(&self, tidy: bool) -> Result<Ring, StoreError> {
        let (oldest, newest) = self
            .read(Lane::Rows, |connection| {
                Ok((number(connection, OLDEST)?, newest_derivation(connection)?))
            })
            .await?;
        if tidy && oldest < newest {
            let forget =
                |connection: &Connection| forget_derivation(connection, connection.sealer()?);
            self.run(forget).await?;
        }
        self.read(Lane::Rows, |connection| {
            load(connection, connection.sealer()?)
        })
        .await
    }

    /// What the password of a live lease is derived from.
    ///
    /// # Errors
    /// `NotFound`, also if the lease has ended.
    pub(crate) async fn seed(&self, id: LeaseId) -> Result<Seed, StoreError> {
        self.read(Lane::Rows, move |connection| {
            let sealer = connection.sealer()?;
            let which = "WHERE id = ?1 AND state IN ('pending', 'active')";
            let found = authentic::row(connection, &LEASES, which, [id.to_string()])?
                .ok_or_else(|| StoreError::NotFound(format!("live lease {id}")))?;
            let nonce: Option<Vec<u8>> = found.get("nonce")?;
            let generation: Option<Generation> = found.get("derivation")?;
            match nonce.zip(generation) {
                Some((nonce, generation)) => {
                    let key = derivation_key(connection, sealer, generation)?;
                    Ok(Seed::of_nonce(key, &nonce))
                }
                None if generation.is_none() => {
                    Ok(Seed::of_id(derivation_key(connection, sealer, 1)?, &id))
                }
                None => Err(unreadable("leases.nonce")),
            }
        })
        .await
    }
}
