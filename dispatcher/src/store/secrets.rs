//! Secrets in the store, and the versions of base secrets that leases need.

use std::sync::Arc;

use jiff::Timestamp;
use mayfly_protocol::names::SecretPath;
use mayfly_protocol::target::Target;

use super::authentic::{self, BASE_POOLS, BASE_VERSIONS, Entry, SECRETS};
use super::pools::{self, Pool};
use super::sealer::{CellId, Sealer};
use super::sql::{Connection, NONE, params};
use super::{Store, StoreError, exists, moment, rotations, takeover, unproven, unreadable};
use crate::error::Problems;
use crate::secrets::{Content, Dynamic, Kind, Object, Spec};
use mayfly_protocol::lease::BaseRef;

/// A secret without its data.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    /// Its id.
    pub(crate) id: String,
    /// Its path.
    pub(crate) path: SecretPath,
    /// What it is.
    pub(crate) kind: Kind,
    /// As written.
    pub(crate) attributes: Object,
    /// For people.
    pub(crate) description: Option<String>,
    /// 1, and one more with each update.
    pub(crate) version: u64,
    /// When it was made.
    pub(crate) created: Timestamp,
    /// Who made it.
    pub(crate) created_by: String,
    /// When it was last changed.
    pub(crate) last_modified: Timestamp,
    /// Who changed it.
    pub(crate) last_modified_by: String,
}

/// What an update makes of a secret.
#[derive(Debug)]
pub(crate) struct Revised {
    /// As written.
    pub(crate) content: Content,
    /// What it says.
    pub(crate) spec: Spec,
}

/// A secret as it is read.
#[derive(Debug)]
pub(crate) struct Reading {
    /// All but its data.
    pub(crate) record: Record,
    /// Its data.
    pub(crate) data: Object,
    /// For a dynamic secret: what an account is made with.
    pub(crate) base: Option<BaseFacts>,
}

/// The present version of a base secret, and the pool that uses it.
#[derive(Debug)]
pub(crate) struct BaseFacts {
    /// Which version.
    pub(crate) base: BaseRef,
    /// The admin connection.
    pub(crate) target: Target,
    /// The server last seen behind it.
    pub(crate) server: Option<String>,
    /// The pool.
    pub(crate) pool: Pool,
}

/// Versions of a base secret between a lease's and the present one whose credentials are tried, at
/// most.
const MOST_BETWEEN: u32 = 8;
/// Secrets looked at in one query of a list.
const PAGE: usize = 500;

fn record(row: &Entry) -> Result<Record, StoreError> {
    let (kind, attributes): (String, String) = (row.get("kind")?, row.get("attributes")?);
    Ok(Record {
        id: row.get("id")?,
        path: path_of(row)?,
        kind: Kind::parse(&kind).ok_or_else(|| unreadable("secrets.kind"))?,
        attributes: serde_json::from_str(&attributes)
            .map_err(|_| unreadable("secrets.attributes"))?,
        description: row.get("description")?,
        version: row.get("version")?,
        created: moment(row.get("created")?)?,
        created_by: row.get("created_by")?,
        last_modified: moment(row.get("last_modified")?)?,
        last_modified_by: row.get("last_modified_by")?,
    })
}

pub(super) fn path_of(row: &Entry) -> Result<SecretPath, StoreError> {
    let path: String = row.get("path")?;
    path.parse().map_err(|_| unreadable("secrets.path"))
}

pub(super) fn load(connection: &Connection, path: &SecretPath) -> Result<Record, StoreError> {
    let found = authentic::row(connection, &SECRETS, "WHERE path = ?1", [path.as_str()])?;
    record(&found.ok_or_else(|| StoreError::NotFound(format!("secret `{path}`")))?)
}

/// The row with this id, which another row names.
pub(super) fn row(connection: &Connection, id: &str) -> Result<Entry, StoreError> {
    authentic::row(connection, &SECRETS, "WHERE id = ?1", [id])?
        .ok_or_else(|| unreadable("secrets.id"))
}

pub(super) fn data_spot(id: &str, version: u64) -> CellId<'_> {
    CellId {
        table: "secrets",
        row: id,
        version,
        column: "data",
    }
}

pub(super) fn open_data(
    connection: &Connection,
    sealer: &Sealer,
    record: &Record,
) -> Result<Object, StoreError> {
    let sealed: Vec<u8> = row(connection, &record.id)?.get("data")?;
    let clear = sealer.open(data_spot(&record.id, record.version), &sealed)?;
    serde_json::from_slice(&clear).map_err(|_| unreadable("secrets.data"))
}

fn seal_json<T: serde::Serialize>(
    sealer: &Sealer,
    cell: CellId<'_>,
    value: &T,
) -> Result<Vec<u8>, StoreError> {
    let clear =
        zeroize::Zeroizing::new(serde_json::to_vec(value).map_err(|_| unreadable(cell.column))?);
    sealer.seal(cell, &clear)
}

pub(super) fn target_spot(base: &BaseRef) -> CellId<'_> {
    CellId {
        table: "base_versions",
        row: &base.id,
        version: base.version,
        column: "target",
    }
}

/// The admin connection of a version of a base secret and the server last seen behind it.
pub(super) fn load_target(
    connection: &Connection,
    sealer: &Sealer,
    base: &BaseRef,
) -> Result<Option<(Target, Option<String>)>, StoreError> {
    let Some(found) = version(connection, base)? else {
        return Ok(None);
    };
    let sealed: Vec<u8> = found.get("target_sealed")?;
    let clear = sealer.open(target_spot(base), &sealed)?;
    let target = serde_json::from_slice(&clear).map_err(|_| unreadable("base_versions.target"))?;
    Ok(Some((target, found.get("server")?)))
}

fn version(connection: &Connection, base: &BaseRef) -> Result<Option<Entry>, StoreError> {
    authentic::row(
        connection,
        &BASE_VERSIONS,
        "WHERE secret_id = ?1 AND version = ?2",
        params![base.id, base.version],
    )
}

/// Remembers the server that was seen behind a version of a base secret.
pub(super) fn saw_server(
    connection: &Connection,
    base: &BaseRef,
    server: &str,
) -> Result<(), StoreError> {
    let Some(mut found) = version(connection, base)? else {
        return Ok(());
    };
    if found.get::<Option<String>>("server")?.as_deref() == Some(server) {
        return Ok(());
    }
    found.set("server", server);
    authentic::update(connection, &found, &["server"])
}

/// The newest version of a base secret, also of one that was deleted while leases need it.
pub(super) fn newest_version(connection: &Connection, id: &str) -> Result<Option<u64>, StoreError> {
    let newest = "WHERE secret_id = ?1 ORDER BY version DESC LIMIT 1";
    let found = authentic::row(connection, &BASE_VERSIONS, newest, [id])?;
    Ok(found.map(|row| row.get("version")).transpose()?)
}

/// The admin connections of the versions after this one and before `newest`, the latest first.
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

/// What a dynamic secret names: the base secret's id. The pool is checked too.
fn resolve(connection: &Connection, dynamic: &Dynamic) -> Result<String, StoreError> {
    let mut problems = Problems::new();
    let mut say =
        |field: &str, reason: String| problems.entry(field.to_owned()).or_default().push(reason);
    let here = "attributes.linkConfig.linkedSecret";
    let linked = &dynamic.linked;
    let mut id = None;
    match load(connection, linked) {
        Ok(found) => match found.kind {
            Kind::Base => id = Some(found.id),
            Kind::Static => say(
                here,
                format!(
                    "`{linked}` is a static secret, no admin connection (attributes.type is not `postgresql`)"
                ),
            ),
            Kind::Dynamic => say(here, format!("`{linked}` is itself a dynamic secret")),
        },
        Err(StoreError::NotFound(_)) => say(here, format!("there is no secret `{linked}`")),
        Err(error) => return Err(error),
    }
    match pools::load(connection, &dynamic.pool) {
        Ok(pool) if pool.distrusted.is_none() => {}
        Ok(pool) => say(
            "attributes.pool",
            format!("pool `{}` is distrusted; name another", pool.name),
        ),
        Err(StoreError::NotFound(what)) => {
            say("attributes.pool", format!("there is no {what}"));
        }
        Err(error) => return Err(error),
    }
    match id {
        Some(id) if problems.is_empty() => Ok(id),
        _ => Err(StoreError::Invalid(problems)),
    }
}

/// Writes a secret's row (new or in the place of the old) and, for a base secret, its version.
fn write(
    connection: &Connection,
    sealer: &Sealer,
    record: &Record,
    revised: &Revised,
) -> Result<(), StoreError> {
    let (linked, pool) = match &revised.spec {
        Spec::Dynamic(dynamic) => (
            Some(resolve(connection, dynamic)?),
            Some(dynamic.pool.to_string()),
        ),
        Spec::Static | Spec::Base(_) => (None, None),
    };
    let linked_base = linked.clone();
    let data = seal_json(
        sealer,
        data_spot(&record.id, record.version),
        &revised.content.data,
    )?;
    let attributes =
        serde_json::to_string(&revised.content.attributes).map_err(|_| unreadable("attributes"))?;
    let entry = SECRETS.entry(params![
        record.id,
        record.path.as_str(),
        record.kind.as_str(),
        attributes,
        revised.content.description,
        data,
        record.version,
        linked,
        pool,
        record.created.as_millisecond(),
        record.created_by,
        record.last_modified.as_millisecond(),
        record.last_modified_by,
    ]);
    let changed = [
        "attributes",
        "description",
        "data",
        "version",
        "linked",
        "pool",
        "last_modified",
        "last_modified_by",
    ];
    authentic::put(connection, &entry, &changed)?;
    if let Some(base) = &linked_base {
        takeover::wake(connection, base, record.last_modified)?;
    }
    if let Spec::Base(target) = &revised.spec {
        let base = BaseRef {
            id: record.id.clone(),
            version: record.version,
        };
        let sealed = seal_json(sealer, target_spot(&base), target)?;
        let none = None::<String>;
        let entry = BASE_VERSIONS.entry(params![base.id, base.version, sealed, none]);
        authentic::insert(connection, &entry)?;
    }
    Ok(())
}

/// Writes the next version of a secret.
pub(super) fn replace(
    connection: &Connection,
    sealer: &Sealer,
    mut record: Record,
    revised: &Revised,
    who: String,
    now: Timestamp,
) -> Result<Record, StoreError> {
    record.version += 1;
    record.last_modified = now;
    record.last_modified_by = who;
    record.attributes = revised.content.attributes.clone();
    record.description = revised.content.description.clone();
    write(connection, sealer, &record, revised)?;
    if record.kind == Kind::Base {
        // What failed with the old credentials is tried with the new ones at once.
        connection.execute(
            "UPDATE leases SET next_reconcile = ?2, reconcile_attempts = 0
             WHERE base_secret_id = ?1 AND next_reconcile IS NOT NULL AND last_error IS NOT NULL",
            params![record.id, now.as_millisecond()],
        )?;
    }
    Ok(record)
}

impl Store {
    /// Adds a secret.
    ///
    /// # Errors
    /// `Exists`; `Invalid` where it names what is not there.
    pub(crate) async fn create_secret(
        &self,
        record: Record,
        revised: Revised,
    ) -> Result<Record, StoreError> {
        let sealer = self.sealer.clone();
        self.run(move |connection| {
            if exists(
                connection,
                "SELECT 1 FROM secrets WHERE path = ?1",
                record.path.as_str(),
            )? {
                return Err(StoreError::Exists(format!(
                    "there is a secret `{}` already",
                    record.path
                )));
            }
            write(connection, &sealer, &record, &revised)?;
            Ok(record)
        })
        .await
    }

    /// Changes a secret by `revise`, which gets its content as it is.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` from `revise`, for another kind, or where it names what is not there.
    pub(crate) async fn update_secret(
        &self,
        path: SecretPath,
        revise: impl FnOnce(Content) -> Result<Revised, Problems> + Send + 'static,
        who: String,
        now: Timestamp,
    ) -> Result<Record, StoreError> {
        let sealer = self.sealer.clone();
        self.run(move |connection| {
            let record = load(connection, &path)?;
            let old = Content {
                attributes: record.attributes.clone(),
                description: record.description.clone(),
                data: open_data(connection, &sealer, &record)?,
            };
            let password = old.data.get("password").cloned();
            let revised = revise(old).map_err(StoreError::Invalid)?;
            if revised.spec.kind() != record.kind {
                let reason = format!(
                    "a {} secret cannot become a {} one; delete it and create another",
                    record.kind.as_str(),
                    revised.spec.kind().as_str()
                );
                return Err(StoreError::Invalid(Problems::from([(
                    "attributes".to_owned(),
                    vec![reason],
                )])));
            }
            if record.kind == Kind::Base {
                let changes = revised.content.data.get("password") != password.as_ref();
                rotations::ensure_updatable(connection, &sealer, &record, changes, now)?;
            }
            replace(connection, &sealer, record, &revised, who, now)
        })
        .await
    }

    /// A secret without its data.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) async fn describe_secret(&self, path: SecretPath) -> Result<Record, StoreError> {
        self.run(move |connection| load(connection, &path)).await
    }

    /// A secret with its data, and for a dynamic one with what an account is made with.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) async fn read_secret(&self, path: SecretPath) -> Result<Reading, StoreError> {
        let sealer = self.sealer.clone();
        self.run(move |connection| {
            let record = load(connection, &path)?;
            let data = open_data(connection, &sealer, &record)?;
            let base = match record.kind {
                Kind::Static | Kind::Base => None,
                Kind::Dynamic => Some(base_facts(connection, &sealer, &record)?),
            };
            Ok(Reading { record, data, base })
        })
        .await
    }

    /// Secrets after `cursor`, by path, those that `wanted` takes, at most `limit`. One job looks at
    /// no more than a page of them, and the choice is not made on the store's thread, so a search
    /// over many holds nobody else up.
    ///
    /// # Errors
    /// The store is away.
    pub(crate) async fn secrets(
        &self,
        cursor: String,
        limit: usize,
        wanted: impl Fn(&Record) -> bool + Send + Sync + 'static,
    ) -> Result<Vec<Record>, StoreError> {
        let wanted = Arc::new(wanted);
        let (mut found, mut after) = (Vec::new(), cursor);
        while found.len() < limit {
            let from = after;
            let (page, last) = self
                .run(move |connection| {
                    let page = format!("WHERE path > ?1 ORDER BY path LIMIT {PAGE}");
                    let rows = authentic::looked_at(connection, &SECRETS, &page, [&from])?;
                    let last = match rows.last() {
                        Some(Ok(row)) => Some(row.get("path")?),
                        Some(Err(refused)) => Some(refused.get("path")?),
                        None => None,
                    };
                    let page = rows.iter().flatten().map(record);
                    Ok((page.collect::<Result<Vec<_>, _>>()?, last))
                })
                .await?;
            let Some(last) = last else { break };
            after = last;
            let wanted = wanted.clone();
            let chosen = tokio::task::spawn_blocking(move || {
                let chosen = page.into_iter().filter(|record| wanted(record));
                chosen.collect::<Vec<_>>()
            });
            found.extend(
                chosen
                    .await
                    .map_err(|_| StoreError::Unavailable("a search ended early".to_owned()))?,
            );
        }
        found.truncate(limit);
        Ok(found)
    }

    /// Removes a secret. Its leases keep what they need.
    ///
    /// # Errors
    /// `NotFound`; `InUse` for a base secret with linked dynamics, and for a dynamic secret with
    /// leases somebody holds, or while its password is being rotated.
    pub(crate) async fn delete_secret(&self, path: SecretPath) -> Result<(), StoreError> {
        self.run(move |connection| {
            let record = load(connection, &path)?;
            if exists(
                connection,
                "SELECT 1 FROM secrets WHERE linked = ?1",
                &record.id,
            )? {
                return Err(StoreError::InUse(format!(
                    "dynamic secrets are linked to `{path}`"
                )));
            }
            let live =
                "SELECT 1 FROM leases WHERE path = ?1 AND state IN ('pending', 'active') LIMIT 1";
            if record.kind == Kind::Dynamic && exists(connection, live, path.as_str())? {
                return Err(StoreError::InUse(format!(
                    "`{path}` has live leases; revoke them, or delete with ?leases=revoke (or, where the server is gone for good, ?leases=detach)"
                )));
            }
            match record.kind {
                Kind::Base => {
                    rotations::check_none(connection, &record)?;
                    unproven::drop_of(connection, &record.id)?;
                }
                Kind::Dynamic => rotations::remember_pool(connection, &record)?,
                Kind::Static => {}
            }
            connection.execute("DELETE FROM secrets WHERE id = ?1", [&record.id])?;
            Ok(())
        })
        .await
    }
}

impl Store {
    /// Every base secret that a dynamic one is linked to, with each pool that uses it; and where
    /// none is linked any more, with the last that did, while it has the credentials. Distrusted pools
    /// are left out.
    ///
    /// # Errors
    /// The store is away.
    pub(crate) async fn bases_in_use(&self) -> Result<Vec<(SecretPath, BaseFacts)>, StoreError> {
        let sealer = self.sealer.clone();
        self.run(move |connection| {
            let which = "WHERE id IN (SELECT min(id) FROM secrets WHERE linked IS NOT NULL GROUP BY linked, pool)
                 ORDER BY path";
            let mut found = Vec::new();
            for dynamic in authentic::sound_rows(connection, &SECRETS, which, NONE)? {
                let base = row(connection, &dynamic.get::<String>("linked")?)?;
                let facts = linked_facts(connection, &sealer, &dynamic, &base)?;
                found.push((path_of(&base)?, facts));
            }
            let which = "WHERE NOT EXISTS (SELECT 1 FROM secrets d WHERE d.linked = secret_id)
                 AND EXISTS (SELECT 1 FROM secrets s WHERE s.id = secret_id)
                 AND EXISTS (SELECT 1 FROM pools p WHERE p.name = pool) ORDER BY secret_id";
            for last in authentic::sound_rows(connection, &BASE_POOLS, which, NONE)? {
                let row = row(connection, &last.get::<String>("secret_id")?)?;
                let base = base_ref(&row)?;
                if last.get::<Option<u64>>("version")? != Some(base.version) {
                    continue;
                }
                let pool: String = last.get("pool")?;
                let facts = facts_of(connection, &sealer, base, &pool)?;
                found.push((path_of(&row)?, facts));
            }
            found.retain(|(_, facts)| facts.pool.distrusted.is_none());
            Ok(found)
        })
        .await
    }
}

impl Store {
    /// Dynamic secrets with accounts that somebody holds.
    ///
    /// # Errors
    /// The store is away.
    pub(crate) async fn paths_with_accounts(&self) -> Result<Vec<SecretPath>, StoreError> {
        self.run(move |connection| {
            let which = "WHERE linked IS NOT NULL AND EXISTS (SELECT 1 FROM leases l
                 WHERE l.path = secrets.path AND l.state IN ('pending', 'active')) ORDER BY path";
            let rows = authentic::sound_rows(connection, &SECRETS, which, NONE)?;
            rows.iter().map(path_of).collect()
        })
        .await
    }
}

fn base_ref(base: &Entry) -> Result<BaseRef, StoreError> {
    Ok(BaseRef {
        id: base.get("id")?,
        version: base.get("version")?,
    })
}

/// What an account of a dynamic secret is made with.
fn base_facts(
    connection: &Connection,
    sealer: &Sealer,
    record: &Record,
) -> Result<BaseFacts, StoreError> {
    let dynamic = row(connection, &record.id)?;
    let base = row(connection, &dynamic.get::<String>("linked")?)?;
    linked_facts(connection, sealer, &dynamic, &base)
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
