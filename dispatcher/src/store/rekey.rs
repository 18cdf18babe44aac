//! `mayfly-dispatcher --rekey` renews a key of a store. Dispatchers may run with it; they use the new key within 1
//! s.

use std::sync::Arc;

use mayfly_common::fault;
use tracing::info;

use super::commands::{failed, with_key};
use super::open::{OpenError, Place, write_private};
use super::sealer::{Keys, Sealer, Sealing};
use super::sql::Connection;
use super::{StoreError, generations, key_files, keys, reseal};
use crate::store::Generation;

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Rekey {
    /// The key that the store is sealed with: the one of the key file, or of the file that seal.next_key_file names.
    Master,
    /// The derivation key, from which the passwords of new leases come.
    Derivation,
    /// The key that seals tasks: adds the next key, or replaces the present one with --finish.
    Dispatcher,
}

/// Renews the key. With `finish` the dispatcher's next key takes the place of the present one.
///
/// # Errors
/// See [`OpenError`].
pub(crate) fn rekey(place: &Place, what: Rekey, finish: bool) -> Result<(), OpenError> {
    match (what, finish) {
        (Rekey::Master, false) => master(place),
        (Rekey::Derivation, false) => generation(place, generations::add_derivation),
        (Rekey::Dispatcher, false) => generation(place, generations::add_dispatcher),
        (Rekey::Dispatcher, true) => generation(place, generations::finish_dispatcher),
        (Rekey::Master | Rekey::Derivation, true) => Err(failed(
            place,
            &"--finish is only for --rekey dispatcher: the other keys are renewed at once",
        )),
    }
}

/// Renews a key of which the store keeps generations.
fn generation(
    place: &Place,
    change: impl FnOnce(&Connection, &Sealer) -> Result<Generation, StoreError> + Send,
) -> Result<(), OpenError> {
    with_key(place, |connection| {
        let failed = |error: &dyn std::fmt::Display| failed(place, error);
        let sealer = connection.ring().map_err(|e| failed(&e))?.sealer.clone();
        step("begun");
        let generation = change(connection, &sealer).map_err(|e| failed(&e))?;
        step("written");
        connection.commit().map_err(|e| failed(&e))?;
        step("committed");
        info!(
            generation,
            "the key is renewed; running dispatchers will use it"
        );
        Ok(())
    })
}

/// Renews the master key: everything is sealed and authenticated under another key, in one transaction. Running
/// dispatchers notice it. By default this makes a new key, which replaces the key file. If `seal.next_key_file`
/// names a file, the new key is the one in that file. Every dispatcher must have that file by then, and no file is
/// changed.
///
/// If the process is killed at any step, the store opens with exactly one of the two keys, and a start reads the
/// files of both: the new key is on the disk before the COMMIT, and the old one is replaced after it.
///
/// # Errors
/// See [`OpenError`].
fn master(place: &Place) -> Result<(), OpenError> {
    let files = place.key_files();
    with_key(place, |connection| {
        let database = |error: &dyn std::fmt::Display| failed(place, error);
        // If an earlier run was interrupted, unlocking the store has finished it.
        connection.commit().map_err(|e| database(&e))?;
        let _lock = match files.next {
            Some(_) => None,
            None => Some(files.lock()?),
        };
        let next = match &files.next {
            Some(next) => next.clone(),
            None => {
                write_private(&files.written(), &Keys::random())?;
                key_files::sync_directory(&files.key).map_err(|error| OpenError::File {
                    file: files.written(),
                    error,
                })?;
                files.written()
            }
        };
        step("key_written");
        let renewed = key_files::read(&next)?.ok_or_else(|| OpenError::Key {
            file: next.clone(),
            reason: "the next master key is missing",
        })?;
        connection.begin(&[]).map_err(|e| database(&e))?;
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
        // This is the last check that the next start will find the key.
        if key_files::read(&next)?.is_none_or(|keys| keys.id != sealing.keys.id) {
            return Err(OpenError::Key {
                file: next,
                reason: "the file of the next master key has changed meanwhile",
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
            "the master key is renewed; earlier backups open only with the old one"
        );
        Ok(())
    })
}

/// A step at which the fault suite can kill the process.
fn step(name: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build();
    if let Ok(runtime) = runtime {
        runtime.block_on(fault::point("rekey", name));
    }
}
