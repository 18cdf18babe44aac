//! Versions of base secrets: the admin connection of each, the server that was last seen with it, and the pools that
//! may have it.

use mayfly_protocol::names::{PoolName, SecretPath};
use mayfly_protocol::target::Target;

use super::authentic::{self, BASE_POOLS, BASE_VERSIONS, Entry, POOLS, SECRETS};
use super::pools::{self, Pool};
use super::sealer::Sealer;
use super::secret_row::{self, Record, path_of, target_spot};
use super::sql::{Connection, NONE, Query, params};
use super::{Lane, Store, StoreError, unreadable};
use crate::secrets::Kind;
use mayfly_protocol::lease::BaseRef;

/// The present version of a base secret, and the pool that uses it.
#[derive(Debug)]
pub(crate) struct BaseFacts {
    pub(crate) base: BaseRef,
    pub(crate) target: Target,
    /// The server that was last seen with it.
    pub(crate) server: Option<String>,
    pub(crate) pool: Pool,
}

/// A base secret, and the pools that may use it.
#[derive(Debug)]
pub(crate) struct Base {
    /// The secret without its data.
    pub(crate) record: Record,
    pub(crate) target: Target,
    /// Pools of the dynamic secrets linked to it, by name, without distrusted ones.
    pub(crate) linked: Vec<Pool>,
    /// The last such pool, if it has these credentials.
    pub(crate) last: Option<Pool>,
}

/// Maximum number of versions that are tried between a lease's own version and the present one.
const MOST_BETWEEN: u32 = 8;
const BY_VERSION: &str = "WHERE secret_id = ?1 AND version = ?2";

/// The admin connection of a version of a base secret, and the server that was last seen with it.
pub(super) fn load_target(
    connection: &Connection,
    sealer: &Sealer,
    base: &BaseRef,
) -> Result<Option<(Target, Option<String>)>, StoreError> {
    let found = version(connection, base, "")?;
    found.map(|found| target(sealer, base, &found)).transpose()
}

/// Like [`load_target`], from the row of this version.
fn target(
    sealer: &Sealer,
    base: &BaseRef,
    version: &Entry,
) -> Result<(Target, Option<String>), StoreError> {
    let sealed: Vec<u8> = version.get("target_sealed")?;
    let clear = sealer.open(target_spot(base), &sealed)?;
    let target = serde_json::from_slice(&clear).map_err(|_| unreadable("base_versions.target"))?;
    Ok((target, version.get("server")?))
}

fn version(
    connection: &Connection,
    base: &BaseRef,
    for_update: &str,
) -> Result<Option<Entry>, StoreError> {
    let which = format!("{BY_VERSION}{for_update}");
    let values = params![base.id, base.version];
    authentic::row(connection, &BASE_VERSIONS, &which, values)
}

/// The first query of [`saw_server`].
pub(super) fn seen_asked(base: &BaseRef) -> Query {
    authentic::query(&BASE_VERSIONS, BY_VERSION, params![base.id, base.version])
}

/// Records the server that was seen with a version of a base secret.
pub(super) fn saw_server(
    connection: &Connection,
    base: &BaseRef,
    server: &str,
) -> Result<(), StoreError> {
    let is_known = |found: &Entry| -> Result<bool, StoreError> {
        Ok(found.get::<Option<String>>("server")?.as_deref() == Some(server))
    };
    // This runs for each issued lease, and the identity is rarely new.
    let Some(mut found) = version(connection, base, "")? else {
        return Ok(());
    };
    if is_known(&found)? {
        return Ok(());
    }
    if !connection.for_update().is_empty() {
        let Some(locked) = version(connection, base, connection.for_update())? else {
            return Ok(());
        };
        found = locked;
    }
    found.set("server", server);
    authentic::update(connection, &found, &["server"])
}

/// The newest version of a base secret. It may be of a deleted secret that leases still need.
pub(super) fn newest_version(connection: &Connection, id: &str) -> Result<Option<u64>, StoreError> {
    let newest = "WHERE secret_id = ?1 ORDER BY version DESC LIMIT 1";
    let found = authentic::row(connection, &BASE_VERSIONS, newest, [id])?;
    Ok(found.map(|row| row.get("version")).transpose()?)
}

/// The admin connections of the versions between this version and `newest`, the latest first.
pub(super) fn targets_between(
    connection: &Connection,
    sealer: &Sealer,
    base: &BaseRef,
    newest: u64,
) -> Result<Vec<Target>, StoreError> {
    let which = format!(
        "WHERE secret_id = ?1 AND version > ?2 AND version < ?3 ORDER BY version DESC LIMIT {MOST_BETWEEN}"
    );
    let values = params![base.id, base.version, newest];
    let mut found = Vec::new();
    for row in authentic::sound_rows(connection, &BASE_VERSIONS, &which, values)? {
        let between = BaseRef {
            id: base.id.clone(),
            version: row.get("version")?,
        };
        let sealed: Vec<u8> = row.get("target_sealed")?;
        let clear = sealer.open(target_spot(&between), &sealed)?;
        let target = serde_json::from_slice(&clear);
        found.push(target.map_err(|_| unreadable("base_versions.target"))?);
    }
    Ok(found)
}

/// The pools that dynamic secrets of this base secret name now, without distrusted ones.
pub(super) fn linked_pools(connection: &Connection, secret: &str) -> Result<Vec<Pool>, StoreError> {
    let rows = authentic::rows(
        connection,
        &SECRETS,
        "WHERE linked = ?1 ORDER BY pool",
        [secret],
    )?;
    let mut names = rows
        .iter()
        .map(|row| row.get("pool"))
        .collect::<Result<Vec<String>, _>>()?;
    names.dedup();
    let pools = names.iter().map(|name| pool(connection, name));
    let mut pools: Vec<Pool> = pools.collect::<Result<_, _>>()?;
    pools.retain(|pool| pool.distrusted.is_none());
    Ok(pools)
}

/// Whether a pool may have this version of a base secret, which is the newest: a dynamic secret names the pool now,
/// or the last one that named it used this version.
pub(super) fn may_have(
    connection: &Connection,
    base: &BaseRef,
    pool: &PoolName,
) -> Result<bool, StoreError> {
    let linked = linked_pools(connection, &base.id)?;
    Ok(linked.iter().any(|linked| linked.name == *pool)
        || last_pool(connection, base)?.is_some_and(|last| last.name == *pool))
}

/// The pool whose dynamic secret was deleted last, if it was given this version.
fn last_pool(connection: &Connection, base: &BaseRef) -> Result<Option<Pool>, StoreError> {
    let which = "WHERE secret_id = ?1";
    let Some(row) = authentic::row(connection, &BASE_POOLS, which, [&base.id])? else {
        return Ok(None);
    };
    let last = (row.get::<Option<u64>>("version")? == Some(base.version))
        .then(|| row.get::<String>("pool"))
        .transpose()?;
    match last.map(|name| pool(connection, &name)) {
        Some(Err(StoreError::NotFound(_))) | None => Ok(None),
        Some(found) => Ok(Some(found?).filter(|pool| pool.distrusted.is_none())),
    }
}

pub(super) fn pool(connection: &Connection, name: &str) -> Result<Pool, StoreError> {
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
    let (target, _) =
        load_target(connection, sealer, &present)?.ok_or_else(|| unreadable("base_versions"))?;
    Ok(Base {
        linked: linked_pools(connection, &record.id)?,
        last: last_pool(connection, &present)?,
        target,
        record,
    })
}

/// Records which pool made accounts with a base secret, when the dynamic secret is deleted, and the version of the
/// credentials that the pool has.
pub(super) fn remember_pool(connection: &Connection, dynamic: &Record) -> Result<(), StoreError> {
    let row = secret_row::row(connection, &dynamic.id)?;
    let (linked, pool): (String, String) = (row.get("linked")?, row.get("pool")?);
    let version: u64 = secret_row::row(connection, &linked)?.get("version")?;
    let entry = BASE_POOLS.entry(params![linked, pool, version]);
    authentic::put(connection, &entry, &["pool", "version"])
}

/// The result, or `None` if a row is unusable or absent: other base secrets do not depend on it.
fn if_usable<T>(found: Result<Option<T>, StoreError>) -> Result<Option<T>, StoreError> {
    match found {
        Err(StoreError::Unusable(_) | StoreError::NotFound(_)) => Ok(None),
        found => found,
    }
}

fn base_ref(base: &Entry) -> Result<BaseRef, StoreError> {
    Ok(BaseRef {
        id: base.get("id")?,
        version: base.get("version")?,
    })
}

/// The queries of [`base_facts`]: the base secret, its version, and the pool. No query needs the answer of another,
/// so all are sent at once.
pub(super) fn facts_asked(dynamic: &SecretPath) -> [Query; 3] {
    let path = [dynamic.as_str()];
    let base = "WHERE id = (SELECT linked FROM secrets WHERE path = ?1)";
    let version = "WHERE (secret_id, version) = (SELECT id, version FROM secrets
        WHERE id = (SELECT linked FROM secrets WHERE path = ?1))";
    let pool = "WHERE name = (SELECT pool FROM secrets WHERE path = ?1)";
    [
        authentic::query(&SECRETS, base, path),
        authentic::query(&BASE_VERSIONS, version, path),
        authentic::query(&POOLS, pool, path),
    ]
}

/// Loads what an account of a dynamic secret is made with. Each row must be the one that the authentic row before it
/// names, because the conditions of the queries are not authenticated.
pub(super) fn base_facts(
    connection: &Connection,
    sealer: &Sealer,
    dynamic: &Entry,
) -> Result<BaseFacts, StoreError> {
    let [base, version, pool] = facts_asked(&path_of(dynamic)?);
    let first = |table, query| -> Result<Option<Entry>, StoreError> {
        Ok(authentic::found(connection, table, query)?
            .into_iter()
            .next())
    };
    let linked: String = dynamic.get("linked")?;
    let base = first(&SECRETS, base)?.ok_or_else(|| unreadable("secrets.id"))?;
    let base = base_ref(&base)?;
    if base.id != linked {
        return Err(unreadable("secrets.linked"));
    }
    let version = first(&BASE_VERSIONS, version)?.ok_or_else(|| unreadable("base_versions"))?;
    if version.key() != params![base.id, base.version] {
        return Err(unreadable("base_versions.version"));
    }
    let (target, server) = target(sealer, &base, &version)?;
    let name: String = dynamic.get("pool")?;
    let pool = first(&POOLS, pool)?
        .ok_or_else(|| StoreError::NotFound(format!("pool `{name}`")))
        .and_then(|row| pools::pool(&row))?;
    if pool.name.as_str() != name {
        return Err(unreadable("secrets.pool"));
    }
    Ok(BaseFacts {
        base,
        target,
        server,
        pool,
    })
}

fn linked_facts(
    connection: &Connection,
    sealer: &Sealer,
    dynamic: &Entry,
    base: &Entry,
) -> Result<BaseFacts, StoreError> {
    let pool: String = dynamic.get("pool")?;
    facts_of(connection, sealer, base_ref(base)?, &pool)
}

fn facts_of(
    connection: &Connection,
    sealer: &Sealer,
    base: BaseRef,
    pool: &str,
) -> Result<BaseFacts, StoreError> {
    let (target, server) =
        load_target(connection, sealer, &base)?.ok_or_else(|| unreadable("base_versions"))?;
    let pool = pools::load(
        connection,
        &pool.parse().map_err(|_| unreadable("secrets.pool"))?,
    )?;
    Ok(BaseFacts {
        base,
        target,
        server,
        pool,
    })
}

impl Store {
    /// A base secret and its pools.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for another kind of secret.
    pub(crate) async fn base(&self, path: SecretPath) -> Result<Base, StoreError> {
        self.read(Lane::Rows, move |connection| {
            let sealer = connection.sealer()?;
            let record = secret_row::load(connection, &path)?;
            match record.kind {
                Kind::Base => base(connection, sealer, record),
                Kind::Static | Kind::Dynamic => Err(StoreError::Invalid(
                    [(
                        "path".to_owned(),
                        vec![format!(
                            "`{path}` is a {} secret; only base secrets are possible here",
                            record.kind.as_str()
                        )],
                    )]
                    .into(),
                )),
            }
        })
        .await
    }

    /// Every base secret with each pool of its dynamic secrets. If it has no dynamic secret any more, with the last
    /// pool that used it, if that pool has the present credentials. Distrusted pools are left out.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn bases_in_use(&self) -> Result<Vec<(SecretPath, BaseFacts)>, StoreError> {
        self.read(Lane::Pages, move |connection| {
            let sealer = connection.sealer()?;
            let which = "WHERE id IN (SELECT min(id) FROM secrets WHERE linked IS NOT NULL GROUP BY linked, pool)
                 ORDER BY path";
            let mut found = Vec::new();
            for dynamic in authentic::sound_rows(connection, &SECRETS, which, NONE)? {
                let looked = || {
                    let base = secret_row::row(connection, &dynamic.get::<String>("linked")?)?;
                    let facts = linked_facts(connection, sealer, &dynamic, &base)?;
                    Ok(Some((path_of(&base)?, facts)))
                };
                found.extend(if_usable(looked())?);
            }
            let which = "WHERE NOT EXISTS (SELECT 1 FROM secrets d WHERE d.linked = secret_id)
                 AND EXISTS (SELECT 1 FROM secrets s WHERE s.id = secret_id)
                 AND EXISTS (SELECT 1 FROM pools p WHERE p.name = pool) ORDER BY secret_id";
            for last in authentic::sound_rows(connection, &BASE_POOLS, which, NONE)? {
                let looked = || {
                    let row = secret_row::row(connection, &last.get::<String>("secret_id")?)?;
                    let base = base_ref(&row)?;
                    if last.get::<Option<u64>>("version")? != Some(base.version) {
                        return Ok(None);
                    }
                    let pool: String = last.get("pool")?;
                    let facts = facts_of(connection, sealer, base, &pool)?;
                    Ok(Some((path_of(&row)?, facts)))
                };
                found.extend(if_usable(looked())?);
            }
            found.retain(|(_, facts)| facts.pool.distrusted.is_none());
            Ok(found)
        })
        .await
    }
}
