//! The master key's files, and which of them the store is sealed with. The row `sealing` of `meta` names the key by
//! its id. Every transaction reads this row, so a running dispatcher notices that the key was renewed. A key is in
//! the key file, next to it as `….next` while `--rekey master` runs, or in the file that `seal.next_key_file` names.

use std::cell::RefCell;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use tracing::{error, info, warn};

use super::authentic::{self, Entry, META};
pub(super) use super::key_files::KeyFiles;
use super::open::{OpenError, meta, put, write_private};
use super::sealer::{FIRST_FORM, Keys, Sealer, Sealing};
use super::sql::{Cell, Connection, NONE, Query, params};
use super::{StoreError, generations, key_files, reseal};

/// The row of `meta` that names the master key's id and, during an upgrade, the end of that upgrade.
pub(super) const SEALING: &str = "sealing";
const BY_KEY: &str = "WHERE key = ?1";
/// The row of `meta` with the place to which the store was moved.
pub(super) const MOVED_TO: &str = "moved_to";
/// How long dispatchers of the previous version may write to a store in PostgreSQL, after a version that
/// authenticates rows has first opened it.
const UPGRADE: SignedDuration = SignedDuration::from_hours(1);

/// What a connection needs to notice changes of the master key.
pub(super) struct Keyring {
    pub(super) sealer: Arc<Sealer>,
    files: KeyFiles,
    /// The row `sealing` that was last accepted, with its code.
    seen: RefCell<Option<(Vec<u8>, Cell)>>,
    /// The last log line about a row that is refused.
    reported: RefCell<String>,
}

fn store(error: &OpenError) -> StoreError {
    StoreError::Unavailable(error.to_string())
}

fn entry(sealing: &Sealing) -> Entry {
    let text = match sealing.upgrade_until {
        None => sealing.keys.id.clone(),
        Some(until) => format!("{} upgrade {}", sealing.keys.id, until.as_millisecond()),
    };
    META.entry(params![SEALING, text.into_bytes()])
}

fn parse(value: &[u8]) -> Option<(&str, Option<Timestamp>)> {
    let mut words = std::str::from_utf8(value).ok()?.split(' ');
    let id = words.next()?;
    match (words.next(), words.next()) {
        (None, None) => Some((id, None)),
        (Some("upgrade"), Some(ms)) => {
            let until = Timestamp::from_millisecond(ms.parse().ok()?).ok()?;
            Some((id, Some(until)))
        }
        _ => None,
    }
}

/// The key id of a moved store, and the time of the move. They replace the id of the sealing key, so that no version
/// opens the store.
fn moved(value: &[u8]) -> Option<(&str, Timestamp)> {
    let text = std::str::from_utf8(value).ok()?;
    let (id, ms) = text.split_once(" moved ")?;
    Some((id, Timestamp::from_millisecond(ms.parse().ok()?).ok()?))
}

/// Records that the store was moved to another place. It counts when the transaction is committed.
pub(super) fn record_moved(connection: &Connection, to: &str) -> Result<(), StoreError> {
    let sealing = connection.sealing()?;
    put(connection, MOVED_TO, to.as_bytes())?;
    let text = format!(
        "{} moved {}",
        sealing.keys.id,
        connection.now().as_millisecond()
    );
    let entry = META.entry(params![SEALING, text.into_bytes()]);
    authentic::put_as(connection, &entry, &["value"], &sealing)
}

/// Records how the store is sealed. It counts when the transaction is committed.
pub(super) fn record(connection: &Connection, sealing: &Sealing) -> Result<(), StoreError> {
    let entry = entry(sealing);
    authentic::put_as(connection, &entry, &["value"], sealing)
}

/// The query of [`recorded`].
fn asked() -> Query {
    authentic::query(&META, BY_KEY, [SEALING])
}

/// The row `sealing`, with its value and its code.
fn recorded(connection: &Connection) -> Result<Option<(Entry, Vec<u8>, Cell)>, StoreError> {
    let found = authentic::raw(connection, &META, BY_KEY, [SEALING])?;
    match found.into_iter().next() {
        None => Ok(None),
        Some((entry, mac)) => {
            let value = entry.get("value")?;
            Ok(Some((entry, value, mac)))
        }
    }
}

/// Whether a version that authenticates rows has opened the store.
pub(super) fn is_sealed_by_this_version(connection: &Connection) -> Result<bool, StoreError> {
    Ok(recorded(connection)?.is_some())
}

/// Makes the rows usable of a store that has been used before. Call it in a transaction.
///
/// # Errors
/// No key file holds the store's master key, or it cannot be decided which one does.
pub(super) fn unlock(connection: &mut Connection, files: &KeyFiles) -> Result<(), OpenError> {
    let refuse = |reason| OpenError::Key {
        file: files.key.clone(),
        reason,
    };
    let failed = |error: StoreError| OpenError::Database {
        place: "the store".to_owned(),
        reason: error.to_string(),
        cause: None,
    };
    let sealed_newly = authentic::raw(connection, &META, "", NONE).map_err(failed)?;
    let sealed_newly = sealed_newly.iter().any(|(entry, _)| {
        let key = entry.get::<String>("key").unwrap_or_default();
        let value = entry.get::<Vec<u8>>("value").unwrap_or_default();
        generations::is_sealed(&key) && value.first() != Some(&FIRST_FORM)
    });
    let Some((entry, value, mac)) = recorded(connection).map_err(failed)? else {
        if sealed_newly {
            return Err(refuse(
                "row `sealing` of the store's table `meta` is absent",
            ));
        }
        return upgrade(connection, files);
    };
    if let Some((_, at)) = moved(&value) {
        // Only the message needs this row, so the row need not be authentic.
        let found = authentic::raw(connection, &META, "WHERE key = ?1", [MOVED_TO]);
        let to = found
            .ok()
            .and_then(|rows| rows.first()?.0.get::<Vec<u8>>("value").ok());
        return Err(OpenError::Database {
            place: "the store".to_owned(),
            reason: format!(
                "it was moved to {} at {at} and is not used any more; name that place in store.url. If that store is lost, `mayfly-dispatcher --restored` makes this store usable, as an old copy",
                String::from_utf8_lossy(&to.unwrap_or_default())
            ),
            cause: None,
        });
    }
    let (id, upgrade_until) = parse(&value)
        .ok_or_else(|| refuse("row `sealing` of the store's table `meta` cannot be read"))?;
    let (file, keys) = files.find(id)?;
    let sealing = Sealing {
        keys: Arc::new(keys),
        upgrade_until,
    };
    // This row must be authentic even during an upgrade: the row itself proves the upgrade.
    if !entry.has_mac(&sealing, &mac) || upgrade_until.is_some() && sealed_newly {
        return Err(refuse(
            "row `sealing` of the store's table `meta` is not authentic: its last writer was not a dispatcher with this master key",
        ));
    }
    ring(connection, files, sealing, Some((value, mac)));
    if file == files.written() {
        // The store is sealed with this key. Only the last step of `--rekey master` is missing.
        match files.lock().and_then(|_lock| files.take_written()) {
            Ok(()) => info!("the master key was renewed, and its file was put in place"),
            Err(error) => {
                warn!(%error, file = %file.display(), "the master key was renewed, but its file cannot be put in its place")
            }
        }
    }
    Ok(())
}

/// Begins the upgrade of a store that no version with authenticated rows has opened yet.
fn upgrade(connection: &mut Connection, files: &KeyFiles) -> Result<(), OpenError> {
    let keys = key_files::read(&files.key)?.ok_or_else(|| OpenError::Key {
        file: files.key.clone(),
        reason: "the master key of this store is missing",
    })?;
    let until = connection.now() + UPGRADE;
    let sealing = Sealing {
        keys: Arc::new(keys),
        upgrade_until: Some(until),
    };
    ring(connection, files, sealing.clone(), None);
    let begun = if connection.is_shared() {
        info!(
            until = %until,
            "the store is being upgraded: dispatchers of the earlier version may use it until then; `mayfly-dispatcher --finish-upgrade` ends this at once"
        );
        record(connection, &sealing)
    } else {
        // No other process can have the store open.
        finish_upgrade(connection)
    };
    begun.map_err(|error| OpenError::Database {
        place: "the store".to_owned(),
        reason: error.to_string(),
        cause: None,
    })
}

/// Like [`unlock`], also for a moved store. Returns the new place of a moved store.
///
/// # Errors
/// As [`unlock`].
pub(super) fn unlock_moved(
    connection: &mut Connection,
    files: &KeyFiles,
) -> Result<Option<String>, OpenError> {
    let refuse = |reason| OpenError::Key {
        file: files.key.clone(),
        reason,
    };
    let failed = |error: StoreError| OpenError::Database {
        place: "the store".to_owned(),
        reason: error.to_string(),
        cause: None,
    };
    let found = recorded(connection).map_err(failed)?;
    let Some((entry, value, mac)) = found.filter(|(_, value, _)| moved(value).is_some()) else {
        return unlock(connection, files).map(|()| None);
    };
    let id = moved(&value).map(|(id, _)| id.to_owned());
    let (_, keys) = files.find(&id.unwrap_or_default())?;
    let sealing = Sealing {
        keys: Arc::new(keys),
        upgrade_until: None,
    };
    if !entry.has_mac(&sealing, &mac) {
        return Err(refuse(
            "row `sealing` of the store's table `meta` is not authentic: its last writer was not a dispatcher with this master key",
        ));
    }
    ring(connection, files, sealing, Some((value, mac)));
    let to = meta(connection, MOVED_TO).map_err(failed)?;
    Ok(Some(
        String::from_utf8_lossy(&to.unwrap_or_default()).into_owned(),
    ))
}

/// Makes a moved store usable again at its old place. Returns whether it was moved.
pub(super) fn unmove(connection: &mut Connection, files: &KeyFiles) -> Result<bool, OpenError> {
    let is_moved = recorded(connection).ok().flatten();
    if is_moved.is_none_or(|(_, value, _)| moved(&value).is_none()) {
        return Ok(false);
    }
    unlock_moved(connection, files)?;
    let undone = connection.sealing().and_then(|sealing| {
        record(connection, &sealing)?;
        connection.execute("DELETE FROM meta WHERE key = ?1", [MOVED_TO])?;
        Ok(())
    });
    undone.map(|()| true).map_err(|error| OpenError::Database {
        place: "the store".to_owned(),
        reason: error.to_string(),
        cause: None,
    })
}

/// Makes the rows usable of a store that has the same seal as another store.
pub(super) fn share(connection: &mut Connection, files: &KeyFiles, sealing: Sealing) {
    ring(connection, files, sealing, None);
}

/// Accepts only authentic rows from now on. Call it in a transaction of its own. It counts when that is committed
/// and [`follow`] has seen it.
pub(super) fn finish_upgrade(connection: &Connection) -> Result<(), StoreError> {
    let sealing = Sealing {
        upgrade_until: None,
        ..connection.sealing()?
    };
    reseal::all(connection, &sealing)?;
    record(connection, &sealing)?;
    info!(
        "the upgrade is over: rows that no dispatcher of this version wrote are refused from now on"
    );
    Ok(())
}

/// Makes the rows of a new store usable.
pub(super) fn begin(connection: &mut Connection, files: &KeyFiles) -> Result<(), OpenError> {
    let keys = match key_files::read(&files.key)? {
        Some(keys) => keys,
        None => {
            let key = Keys::random();
            write_private(&files.key, &key)?;
            info!(file = %files.key.display(), "made the master key; keep a copy of it, separate from the store's backups");
            Keys::new(&key).ok_or_else(|| OpenError::Key {
                file: files.key.clone(),
                reason: "a master key is 32 bytes in base64",
            })?
        }
    };
    let sealing = Sealing {
        keys: Arc::new(keys),
        upgrade_until: None,
    };
    ring(connection, files, sealing.clone(), None);
    record(connection, &sealing).map_err(|error| OpenError::Database {
        place: "the store".to_owned(),
        reason: error.to_string(),
        cause: None,
    })
}

fn ring(
    connection: &mut Connection,
    files: &KeyFiles,
    sealing: Sealing,
    seen: Option<(Vec<u8>, Cell)>,
) {
    connection.unlock(Keyring {
        sealer: Arc::new(Sealer::new(sealing)),
        files: files.clone(),
        seen: RefCell::new(seen),
        reported: RefCell::default(),
    });
}

/// Begins a transaction in which the store's rows can be used, with these queries ([`Connection::begin`]). Returns
/// whether an upgrade is over, see [`follow`].
///
/// # Errors
/// No transaction can begin, or an error of [`follow`].
pub(super) fn begin_with(
    connection: &Connection,
    ahead: impl IntoIterator<Item = Query>,
) -> Result<bool, StoreError> {
    let ahead: Vec<Query> = std::iter::once(asked()).chain(ahead).collect();
    connection.begin(&ahead).map_err(|error| {
        // The connection has logged its own failures.
        StoreError::Unavailable(error.to_string())
    })?;
    follow(connection)
}

/// Notices a change of the store's sealing since the last transaction. Returns whether an upgrade is over, which
/// must then be finished.
///
/// # Errors
/// The row is not accepted, or no file has the key that it names. Then the store cannot be used.
pub(super) fn follow(connection: &Connection) -> Result<bool, StoreError> {
    let ring = connection.ring()?;
    let before = ring.sealer.sealing();
    match taken_up(connection, ring, &before) {
        Ok(sealing) => {
            ring.reported.borrow_mut().clear();
            let until = sealing.upgrade_until;
            Ok(until.is_some_and(|until| connection.now() >= until))
        }
        Err(error) => {
            let text = error.to_string();
            if *ring.reported.borrow() != text {
                error!(%error, "the lease store cannot be used");
                *ring.reported.borrow_mut() = text;
            }
            Err(error)
        }
    }
}

fn taken_up(
    connection: &Connection,
    ring: &Keyring,
    before: &Sealing,
) -> Result<Sealing, StoreError> {
    let refuse = |why: &str| StoreError::Unavailable(format!("meta row {SEALING} {why}"));
    let (entry, value, mac) = recorded(connection)?.ok_or_else(|| refuse("was deleted"))?;
    let found = Some((value.clone(), mac.clone()));
    if *ring.seen.borrow() == found {
        return Ok(before.clone());
    }
    if moved(&value).is_some() {
        return Err(refuse(
            "says that the store was moved to another place with --copy-store; stop this dispatcher and name the new place in store.url",
        ));
    }
    let (id, upgrade_until) = parse(&value).ok_or_else(|| refuse("is unreadable"))?;
    let keys = if id == before.keys.id {
        before.keys.clone()
    } else {
        Arc::new(ring.files.find(id).map_err(|error| store(&error))?.1)
    };
    let sealing = Sealing {
        keys,
        upgrade_until,
    };
    // An upgrade that is over does not begin a second time.
    let goes_back = before.upgrade_until.is_none() && upgrade_until.is_some();
    if !entry.has_mac(&sealing, &mac) || goes_back {
        return Err(refuse(
            "is not authentic: its last writer was not a dispatcher with this master key",
        ));
    }
    if sealing.keys.id != before.keys.id {
        info!(key = sealing.keys.id, "the master key was renewed");
    }
    ring.sealer.change(sealing.clone());
    *ring.seen.borrow_mut() = found;
    Ok(sealing)
}
