//! What is done with a store from the command line, with the master key at hand and mostly beside
//! running dispatchers: copies, marks, another root token, another master key.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicI64;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use jiff::Timestamp;
use mayfly_common::fault;
use mayfly_common::secret::Secret;
use tracing::{info, warn};
use zeroize::Zeroizing;

use super::open::{
    COPIED, Keeping, OpenError, Place, create_private, is_used, lock, open_sqlite, put_free,
    write_private,
};
use super::postgres::Postgres;
use super::sealer::{Keys, Sealing};
use super::sql::{Connection, Database};
use super::{keys, reseal, tokens};

/// Runs this with the store's database, in which a transaction has begun. Nothing of it is usable
/// yet that needs the master key.
fn with_store<T: Send>(
    place: &Place,
    work: impl FnOnce(&mut Connection) -> Result<T, OpenError> + Send,
) -> Result<T, OpenError> {
    let opened = || {
        let database = |error: &dyn std::fmt::Display| failed(place, error);
        let mut connection = match &place.keeping {
            Keeping::Sqlite(file) => open_sqlite(file)?,
            Keeping::Postgres(url) => {
                let offset = Arc::new(AtomicI64::new(0));
                let postgres = Postgres::open((**url).clone(), offset);
                let postgres = postgres.map_err(|reason| database(&reason))?;
                Connection::locked(Database::Postgres(Box::new(postgres)))
            }
        };
        connection.begin().map_err(|e| database(&e))?;
        if !is_used(&connection).map_err(|e| database(&e))? {
            return Err(database(&"there is nothing in this store"));
        }
        work(&mut connection)
    };
    // PostgreSQL's has a runtime of its own, which cannot be driven from within another.
    let done = std::thread::scope(|scope| scope.spawn(opened).join());
    done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn failed(place: &Place, error: &dyn std::fmt::Display) -> OpenError {
    OpenError::Database {
        place: place.keeping.to_string(),
        reason: error.to_string(),
    }
}

/// The same, unlocked with the master key.
fn with_key<T: Send>(
    place: &Place,
    work: impl FnOnce(&Connection) -> Result<T, OpenError> + Send,
) -> Result<T, OpenError> {
    with_store(place, |connection| {
        // A dispatcher of the version before may be running with it, and could not go on.
        if !keys::is_sealed_by_this_version(connection).map_err(|e| failed(place, &e))? {
            return Err(failed(
                place,
                &"start a dispatcher of this version with this store first",
            ));
        }
        keys::unlock(connection, &place.key_files())?;
        work(connection)
    })
}

/// Copies a SQLite store, whether a dispatcher is running with it or not. The copy knows that it is
/// one: leases that were being made when it was taken may have been handed out since.
///
/// # Errors
/// See [`OpenError`]; one for a store in PostgreSQL, which has tools of its own.
pub(crate) fn back_up(place: &Place, to: &Path) -> Result<(), OpenError> {
    let Keeping::Sqlite(file) = &place.keeping else {
        return Err(OpenError::Database {
            place: place.keeping.to_string(),
            reason: "a store in PostgreSQL is backed up with PostgreSQL's own tools".to_owned(),
        });
    };
    let database = |error: &dyn std::fmt::Display| OpenError::Database {
        place: file.display().to_string(),
        reason: error.to_string(),
    };
    let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_WRITE;
    let store = rusqlite::Connection::open_with_flags(file, flags).map_err(|e| database(&e))?;
    store
        .busy_timeout(std::time::Duration::from_secs(10))
        .map_err(|e| database(&e))?;
    if to.exists() {
        return Err(OpenError::File {
            file: to.to_owned(),
            error: std::io::ErrorKind::AlreadyExists.into(),
        });
    }
    // Taken before the copy: what is recorded meanwhile is doubtful too.
    let copied = Timestamp::now().as_millisecond().to_string();
    create_private(to, false)?;
    let copy = || -> Result<(), rusqlite::Error> {
        let name = to.to_string_lossy();
        store.execute("VACUUM INTO ?1", [&*name])?;
        let copy = rusqlite::Connection::open(to)?;
        copy.execute(
            "INSERT INTO meta (key, value) VALUES (?1, ?2) ON CONFLICT (key) DO UPDATE SET value = ?2",
            rusqlite::params![COPIED, copied.as_bytes()],
        )?;
        copy.close().map_err(|(_, error)| error)
    };
    copy().map_err(|error| {
        let _ = std::fs::remove_file(to);
        database(&error)
    })
}

/// Marks a store as restored from a backup that does not say so itself, such as PostgreSQL's own.
/// Leases that were being made then may have been handed out since.
///
/// # Errors
/// See [`OpenError`]; one for a store that has never been used.
pub(crate) fn mark_restored(place: &Place) -> Result<(), OpenError> {
    let _lock = match &place.keeping {
        Keeping::Sqlite(file) => Some(lock(file)?),
        Keeping::Postgres(_) => None,
    };
    with_store(place, |connection| {
        let now = connection.now().as_millisecond().to_string();
        put_free(connection, COPIED, now.as_bytes()).map_err(|e| failed(place, &e))?;
        connection.commit().map_err(|e| failed(place, &e))
    })
}

/// Makes another root token, which is written to a new file of mode 0600. The one before is refused
/// as soon as this has returned, by every dispatcher with this store.
///
/// # Errors
/// See [`OpenError`]; the file exists. Then the root token is the one of before.
pub(crate) fn new_root_token(place: &Place, file: &Path) -> Result<(), OpenError> {
    with_key(place, |connection| {
        let random = Zeroizing::new(rand::random::<[u8; 32]>());
        let token = Secret::new(BASE64_URL_SAFE_NO_PAD.encode(*random));
        // The file first: a crash in between leaves one that is of no use, and not a root token
        // that nobody knows.
        write_new(file, &token)?;
        let done = tokens::put_root(connection, &token, connection.now())
            .map_err(|e| failed(place, &e))
            .and_then(|()| connection.commit().map_err(|e| failed(place, &e)));
        if done.is_err() {
            warn!(file = %file.display(), "the root token may not have been replaced; try which of the two is in force, and repeat this");
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
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(failed)?;
    writeln!(file, "{}", secret.expose())
        .and_then(|()| file.sync_all())
        .and_then(|()| keys::sync_directory(path))
        .map_err(failed)
}

/// Ends an upgrade before its hour is over: dispatchers of the version before cannot use the store
/// any more, and what they wrote counts until now. Whether one was under way.
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

/// Renews the master key: everything is sealed and authenticated under another, in one transaction.
/// Running dispatchers follow. The new key is made here and takes the key file's place; or it is
/// what is in the file that `seal.next_key_file` names, which every dispatcher must have by then,
/// and no file is touched.
///
/// Killed at any step the store opens with exactly one of the two keys, and each is in a file that
/// a start looks into: the new one is on the disk before the transaction ends, and the old one is
/// replaced after.
///
/// # Errors
/// See [`OpenError`].
pub(crate) fn renew_master_key(place: &Place) -> Result<(), OpenError> {
    let files = place.key_files();
    with_key(place, |connection| {
        let database = |error: &dyn std::fmt::Display| failed(place, error);
        // What an earlier one left undone is done by now.
        connection.commit().map_err(|e| database(&e))?;
        let _lock = match files.next {
            Some(_) => None,
            None => Some(files.lock()?),
        };
        let next = match &files.next {
            Some(next) => next.clone(),
            None => {
                write_private(&files.written(), &Keys::random())?;
                keys::sync_directory(&files.key).map_err(|error| OpenError::File {
                    file: files.written(),
                    error,
                })?;
                files.written()
            }
        };
        step("key_written");
        let renewed = keys::read(&next)?.ok_or_else(|| OpenError::Key {
            file: next.clone(),
            reason: "the next master key is missing",
        })?;
        connection.begin().map_err(|e| database(&e))?;
        keys::follow(connection).map_err(|e| database(&e))?;
        let present = connection.sealing().map_err(|e| database(&e))?;
        if present.upgrade_until.is_some() {
            return Err(database(
                &"it is being upgraded; `mayfly-dispatcher --finish-upgrade` first",
            ));
        }
        if present.keys.id == renewed.id {
            return Err(OpenError::Key {
                file: next,
                reason: "the store is sealed with this master key already",
            });
        }
        let sealing = Sealing {
            keys: Arc::new(renewed),
            upgrade_until: None,
        };
        reseal::all(connection, &sealing).map_err(|e| database(&e))?;
        keys::record(connection, &sealing).map_err(|e| database(&e))?;
        step("resealed");
        // The last moment to see that the key is where a start will look for it.
        if keys::read(&next)?.is_none_or(|keys| keys.id != sealing.keys.id) {
            return Err(OpenError::Key {
                file: next,
                reason: "the next master key was changed meanwhile",
            });
        }
        connection.commit().map_err(|e| database(&e))?;
        step("committed");
        if files.next.is_none() {
            files.take_written()?;
        }
        step("renamed");
        info!(
            key = sealing.keys.id,
            "the master key is renewed; backups made before open with the old one alone"
        );
        Ok(())
    })
}

/// A step at which the fault suite can strike.
fn step(name: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build();
    if let Ok(runtime) = runtime {
        runtime.block_on(fault::point("rekey", name));
    }
}
