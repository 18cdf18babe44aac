//! Commands on a store: copies, marks, a new root token, a new master key. They need the master key. Most of them
//! can run while dispatchers run.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicI64;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use mayfly_common::private_file;
use mayfly_protocol::names::InstallationId;
use mayfly_protocol::secret::Secret;
use tracing::{info, warn};
use zeroize::Zeroizing;

use super::open::{
    Backend, COPIED, NO_TEMPORARY_FILES, OpenError, Place, identity, is_used, lock, put_free,
};
use super::postgres::Postgres;
use super::sql::{Connection, Database};
use super::{key_files, keys, tokens};

/// Runs `work` with the store's database, in a transaction. Rows that need the master key cannot be used yet.
fn with_store<T: Send>(
    place: &Place,
    work: impl FnOnce(&mut Connection) -> Result<T, OpenError> + Send,
) -> Result<T, OpenError> {
    let opened = || {
        let database = |error: &dyn std::fmt::Display| failed(place, error);
        let mut connection = match &place.backend {
            Backend::Sqlite(file) => beside(place, file)?,
            Backend::Postgres(url) => {
                let offset = Arc::new(AtomicI64::new(0));
                let postgres = Postgres::open((**url).clone(), offset);
                let postgres = postgres.map_err(|error| database(&error))?;
                Connection::locked(Database::Postgres(Box::new(postgres)))
            }
        };
        connection.begin(&[]).map_err(|e| database(&e))?;
        if !is_used(&connection).map_err(|e| database(&e))? {
            return Err(database(&"this store is empty"));
        }
        work(&mut connection)
    };
    // The PostgreSQL connection has its own runtime, which cannot run inside another runtime.
    let done = std::thread::scope(|scope| scope.spawn(opened).join());
    done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

pub(super) fn failed(place: &Place, error: &dyn std::fmt::Display) -> OpenError {
    OpenError::Database {
        place: place.backend.to_string(),
        reason: error.to_string(),
        cause: None,
    }
}

/// Opens a SQLite store that a dispatcher may have open too.
fn beside(place: &Place, file: &Path) -> Result<Connection, OpenError> {
    let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_WRITE;
    let store =
        rusqlite::Connection::open_with_flags(file, flags).map_err(|e| failed(place, &e))?;
    store
        .execute_batch(
            "PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; PRAGMA busy_timeout = 10000;
             PRAGMA secure_delete = ON;",
        )
        .and_then(|()| store.execute_batch(NO_TEMPORARY_FILES))
        .map_err(|e| failed(place, &e))?;
    Ok(Connection::locked(Database::Sqlite(store)))
}

/// Like [`with_store`], and unlocks the store with the master key.
pub(super) fn with_key<T: Send>(
    place: &Place,
    work: impl FnOnce(&Connection) -> Result<T, OpenError> + Send,
) -> Result<T, OpenError> {
    with_store(place, |connection| {
        // A dispatcher of the earlier version may run with this store and would fail.
        if !keys::is_sealed_by_this_version(connection).unwrap_or(false) {
            return Err(failed(
                place,
                &"this store is of an older version; start a dispatcher of this version with it first",
            ));
        }
        keys::unlock(connection, &place.key_files())?;
        work(connection)
    })
}

/// Marks a store as restored from a backup that has no such mark, such as one of PostgreSQL's own tools. Leases that
/// were being made then may have been handed out since. A store that was moved to another place is used again at its
/// old place.
///
/// # Errors
/// See [`OpenError`]. A store that was never used is refused too.
pub(crate) fn mark_restored(place: &Place) -> Result<(), OpenError> {
    let _lock = match &place.backend {
        Backend::Sqlite(file) => Some(lock(file)?),
        Backend::Postgres(_) => None,
    };
    with_store(place, |connection| {
        let now = connection.now().as_millisecond().to_string();
        put_free(connection, COPIED, now.as_bytes()).map_err(|e| failed(place, &e))?;
        if keys::unmove(connection, &place.key_files())? {
            info!("the store was marked as moved to another place; it is used here again");
        }
        connection.commit().map_err(|e| failed(place, &e))
    })
}

/// Makes a new root token and writes it to a new file of mode 0600. After this every dispatcher with this store
/// refuses the earlier token.
///
/// # Errors
/// See [`OpenError`]; or the file exists. Then the root token is unchanged.
pub(crate) fn new_root_token(place: &Place, file: &Path) -> Result<(), OpenError> {
    with_key(place, |connection| {
        let random = Zeroizing::new(rand::random::<[u8; 32]>());
        let token = Secret::new(BASE64_URL_SAFE_NO_PAD.encode(*random));
        // The file is written first: a crash after it leaves a useless file, not a root token that nobody knows.
        write_new(file, &token)?;
        let done = tokens::put_root(connection, &token, connection.now())
            .map_err(|e| failed(place, &e))
            .and_then(|()| connection.commit().map_err(|e| failed(place, &e)));
        if done.is_err() {
            warn!(file = %file.display(), "it is not known whether the root token was replaced; test which of the two works, and repeat this command");
        }
        done
    })
}

/// Writes a secret into a file that must not exist, not even as a link.
fn write_new(path: &Path, secret: &Secret) -> Result<(), OpenError> {
    let failed = |error| OpenError::File {
        file: path.to_owned(),
        error,
    };
    let mut file = private_file::create_new(path).map_err(failed)?;
    writeln!(file, "{}", secret.expose())
        .and_then(|()| file.sync_all())
        .and_then(|()| key_files::sync_directory(path))
        .map_err(failed)
}

/// The installation that the store belongs to.
///
/// # Errors
/// See [`OpenError`].
pub(crate) fn installation(place: &Place) -> Result<InstallationId, OpenError> {
    with_key(place, |connection| {
        let ring = connection.ring().map_err(|e| failed(place, &e))?;
        let identity = identity(connection, &ring.sealer).map_err(|e| failed(place, &e))?;
        Ok(identity.installation)
    })
}

/// Ends an upgrade before its hour has passed. After this, dispatchers of the earlier version cannot use the store;
/// what they wrote before counts. Returns whether an upgrade was in progress.
///
/// # Errors
/// See [`OpenError`].
pub(crate) fn finish_upgrade(place: &Place) -> Result<bool, OpenError> {
    with_key(place, |connection| {
        let sealing = connection.sealing().map_err(|e| failed(place, &e))?;
        if sealing.upgrade_until.is_none() {
            return Ok(false);
        }
        keys::finish_upgrade(connection).map_err(|e| failed(place, &e))?;
        connection.commit().map_err(|e| failed(place, &e))?;
        Ok(true)
    })
}
