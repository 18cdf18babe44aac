//! Creates, changes, reads, lists and deletes secrets.

use std::sync::Arc;

use jiff::Timestamp;
use mayfly_protocol::names::SecretPath;

use super::authentic::{self, SECRETS};
use super::bases::{self, BaseFacts};
use super::secret_row::{self, Record, Revised, load, open_data, path_of, record, replace, write};
use super::sql::NONE;
use super::{Lane, Store, StoreError, exists, onward, rotations, unproven};
use crate::error::Problems;
use crate::secrets::{Content, Kind, Object};

/// The result of reading a secret.
#[derive(Debug)]
pub(crate) struct Reading {
    /// The secret without its data.
    pub(crate) record: Record,
    pub(crate) data: Object,
    /// What an account is made with. `None`: it is not a dynamic secret.
    pub(crate) base: Option<BaseFacts>,
}

/// Secrets that one query of a list reads.
const PAGE: usize = 500;

impl Store {
    /// Adds a secret.
    ///
    /// # Errors
    /// `Exists`; `Invalid` if it names something that does not exist.
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
                    "secret `{}` exists already",
                    record.path
                )));
            }
            write(connection, &sealer, &record, &revised)?;
            Ok(record)
        })
        .await
    }

    /// Changes a secret by `revise`, which gets the present content.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` from `revise`, for another kind, or if it names something that does not exist.
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

    /// Loads a secret without its data.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) async fn describe_secret(&self, path: SecretPath) -> Result<Record, StoreError> {
        self.read(Lane::Rows, move |connection| load(connection, &path))
            .await
    }

    /// Loads a secret with its data. For a dynamic secret also loads what an account is made with.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) async fn read_secret(&self, path: SecretPath) -> Result<Reading, StoreError> {
        let ahead = {
            let path = path.clone();
            move || {
                let facts = bases::facts_asked(&path);
                std::iter::once(secret_row::asked(&path))
                    .chain(facts)
                    .collect()
            }
        };
        self.read_rows(ahead, move |connection| {
            let sealer = connection.sealer()?;
            let row = secret_row::row_at(connection, &path)?;
            let record = record(&row)?;
            let data = secret_row::data_of(sealer, &record, &row)?;
            let base = match record.kind {
                Kind::Static | Kind::Base => None,
                Kind::Dynamic => Some(bases::base_facts(connection, sealer, &row)?),
            };
            Ok(Reading { record, data, base })
        })
        .await
    }

    /// At most `limit` secrets after `cursor`, by path, for which `wanted` is true. One job reads at most one page
    /// of them, and `wanted` does not run on the store's thread. So a search over many secrets delays nobody else.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn secrets(
        &self,
        cursor: String,
        limit: usize,
        wanted: impl Fn(&Record) -> bool + Send + Sync + 'static,
    ) -> Result<Vec<Record>, StoreError> {
        let wanted = Arc::new(wanted);
        let (mut found, mut after) = (Vec::new(), cursor);
        while found.len() < limit {
            let from = after.clone();
            let (page, last) = self
                .read(Lane::Pages, move |connection| {
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
            let Some(last) = last.map(onward).filter(|last| *last > after) else {
                break;
            };
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
    /// `NotFound`; `InUse` for a base secret that dynamic secrets name or whose password is being rotated, and for a
    /// dynamic secret with live leases.
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
                    "`{path}` has live leases; revoke them, or delete with ?leases=revoke (or with ?leases=detach, if the server is gone for good)"
                )));
            }
            match record.kind {
                Kind::Base => {
                    rotations::check_none(connection, &record)?;
                    unproven::drop_of(connection, &record.id)?;
                }
                Kind::Dynamic => bases::remember_pool(connection, &record)?,
                Kind::Static => {}
            }
            connection.execute("DELETE FROM secrets WHERE id = ?1", [&record.id])?;
            Ok(())
        })
        .await
    }
}

impl Store {
    /// Dynamic secrets with accounts that somebody holds.
    ///
    /// # Errors
    /// The store is unreachable.
    pub(crate) async fn paths_with_accounts(&self) -> Result<Vec<SecretPath>, StoreError> {
        self.read(Lane::Pages, move |connection| {
            let which = "WHERE linked IS NOT NULL AND EXISTS (SELECT 1 FROM leases l
                 WHERE l.path = secrets.path AND l.state IN ('pending', 'active')) ORDER BY path";
            let rows = authentic::sound_rows(connection, &SECRETS, which, NONE)?;
            rows.iter().map(path_of).collect()
        })
        .await
    }
}
