//! Copies of a SQLite store: `--backup` and `--restore`. Each copy is checked when it is made and again
//! before it is restored.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use mayfly_common::private_file;
use mayfly_protocol::names;
use tracing::{info, warn};

use super::authentic::TABLES;
use super::open::{Backend, COPIED, NO_TEMPORARY_FILES, OpenError, Place, lock};
use super::sql::{Connection, Database};
use super::{StoreError, commands, copying, key_files, keys};

/// The name that stands for standard input or output.
const STDIO: &str = "-";
/// Beginning and end of the names of copies in a directory. Between them is the timestamp in UTC.
const NAME: (&str, &str) = ("mayfly-", ".db");
/// Name suffix of incomplete copies.
const PARTIAL: &str = ".partial";

/// The result of a copy's check.
struct Checked {
    rows: u64,
    /// Number of refused rows. `None`: there is no master key.
    refused: Option<u64>,
}

fn sqlite_file(place: &Place) -> Result<&Path, OpenError> {
    match &place.backend {
        Backend::Sqlite(file) => Ok(file),
        Backend::Postgres(_) => Err(commands::failed(
            place,
            &"back up and restore a store in PostgreSQL with PostgreSQL's tools; after a restore use --restored",
        )),
    }
}

fn file_error(file: &Path) -> impl Fn(std::io::Error) -> OpenError + use<> {
    let file = file.to_owned();
    move |error| OpenError::File {
        file: file.clone(),
        error,
    }
}

/// Copies a SQLite store: to a new file, to a new file in a directory, or to standard output (`-`). A dispatcher may
/// be running with the store. The copy is checked before it gets its name. It is marked as a copy, because leases
/// that were being made at that time may have been handed out since. If `keep` is given, only that number of copies
/// stays in the directory, the newest ones.
///
/// # Errors
/// See [`OpenError`]; one for a store in PostgreSQL, which has tools of its own.
pub(crate) fn back_up(place: &Place, to: &Path, keep: Option<usize>) -> Result<(), OpenError> {
    let store = sqlite_file(place)?;
    if to.as_os_str() == STDIO {
        let copy = key_files::beside(store, &format!(".{}{PARTIAL}", names::random_text(8)));
        let made = copy_to(place, store, &copy).and_then(|checked| {
            let mut file = File::open(&copy).map_err(file_error(&copy))?;
            let mut out = std::io::stdout().lock();
            let written = std::io::copy(&mut file, &mut out).and_then(|_| out.flush());
            written.map_err(file_error(to))?;
            Ok(checked)
        });
        let _ = std::fs::remove_file(&copy);
        return made.map(|checked| log_copy(&checked, to));
    }
    if !to.is_dir() {
        if keep.is_some() {
            return Err(commands::failed(
                place,
                &"--keep is for copies in a directory",
            ));
        }
        // An existing file with this name is not changed, even if it is a link.
        return copy_to(place, store, to).map(|checked| log_copy(&checked, to));
    }
    let name = Timestamp::now().strftime("%Y%m%dT%H%M%SZ");
    let copy = to.join(format!("{}{name}{}", NAME.0, NAME.1));
    let partial = key_files::beside(&copy, PARTIAL);
    let checked = copy_to(place, store, &partial)?;
    // Unlike a rename, a link fails if the name exists.
    let named = std::fs::hard_link(&partial, &copy);
    let _ = std::fs::remove_file(&partial);
    named
        .and_then(|()| key_files::sync_directory(&copy))
        .map_err(file_error(&copy))?;
    log_copy(&checked, &copy);
    match keep {
        Some(keep) => forget(to, keep).map_err(file_error(to)),
        None => Ok(()),
    }
}

fn log_copy(checked: &Checked, to: &Path) {
    if let Some(refused @ 1..) = checked.refused {
        warn!(
            refused,
            "rows of the copy are not authentic; the store has the same rows"
        );
    }
    info!(file = %to.display(), rows = checked.rows, codes = checked.refused.is_some(),
        "the store is copied and the copy is checked; it does not contain the master key");
}

/// Deletes all but the newest copies in a directory, and earlier copies that were left incomplete.
fn forget(directory: &Path, keep: usize) -> std::io::Result<()> {
    let mut whole: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let Some(name) = name.filter(|name| name.starts_with(NAME.0)) else {
            continue;
        };
        // The names sort in the order of their timestamps.
        if name.ends_with(PARTIAL) {
            let _ = std::fs::remove_file(&path);
        } else if name.ends_with(NAME.1) && name.len() == "mayfly-20260101T000000Z.db".len() {
            whole.push(path);
        }
    }
    whole.sort();
    let old = whole.len().saturating_sub(keep.max(1));
    for path in whole.drain(..old) {
        std::fs::remove_file(&path)?;
        info!(file = %path.display(), "an old copy is deleted");
    }
    Ok(())
}

/// Makes a checked copy with this name, which must be new.
fn copy_to(place: &Place, store: &Path, to: &Path) -> Result<Checked, OpenError> {
    let database = |error: rusqlite::Error| commands::failed(place, &error);
    let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_WRITE;
    let connection = rusqlite::Connection::open_with_flags(store, flags).map_err(database)?;
    connection
        .busy_timeout(std::time::Duration::from_secs(10))
        .and_then(|()| connection.execute_batch(NO_TEMPORARY_FILES))
        .map_err(database)?;
    // The timestamp is taken before the copy is made, because leases that are recorded meanwhile are doubtful too.
    let copied = Timestamp::now();
    private_file::create_new(to).map_err(file_error(to))?;
    let made = connection
        .execute("VACUUM INTO ?1", [&*to.to_string_lossy()])
        .and_then(|_| mark(to, copied))
        .map_err(database)
        .and_then(|()| check(place, to))
        .and_then(|checked| {
            let synced = File::open(to).and_then(|file| file.sync_all());
            synced.map_err(file_error(to)).map(|()| checked)
        });
    made.inspect_err(|_| {
        let _ = std::fs::remove_file(to);
    })
}

/// Records in a copy when it was made, unless it has a time already.
fn mark(copy: &Path, copied: Timestamp) -> Result<(), rusqlite::Error> {
    let connection = rusqlite::Connection::open(copy)?;
    connection.execute_batch(NO_TEMPORARY_FILES)?;
    let copied_at = copied.as_millisecond().to_string();
    connection.execute(
        "INSERT INTO meta (key, value) VALUES (?1, ?2) ON CONFLICT (key) DO UPDATE SET value = ?2",
        rusqlite::params![COPIED, copied_at.as_bytes()],
    )?;
    connection.close().map_err(|(_, error)| error)
}

/// Checks a copy: its pages, its references between rows, and the code of each row if there is a master key.
///
/// # Errors
/// The copy is damaged, or it belongs to another installation than the master key.
fn check(place: &Place, copy: &Path) -> Result<Checked, OpenError> {
    let failed = |error: &dyn std::fmt::Display| OpenError::Database {
        place: copy.display().to_string(),
        reason: format!("the copy is damaged: {error}"),
        cause: None,
    };
    let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_WRITE;
    let connection = rusqlite::Connection::open_with_flags(copy, flags).map_err(|e| failed(&e))?;
    connection
        .execute_batch(NO_TEMPORARY_FILES)
        .map_err(|e| failed(&e))?;
    let integrity: String = connection
        .query_row("PRAGMA integrity_check", [], |row| row.get(0))
        .map_err(|e| failed(&e))?;
    if integrity != "ok" {
        return Err(failed(&integrity));
    }
    let mut loose = connection
        .prepare("PRAGMA foreign_key_check")
        .map_err(|e| failed(&e))?;
    if loose.exists([]).map_err(|e| failed(&e))? {
        return Err(failed(&"rows refer to absent rows"));
    }
    drop(loose);
    let mut connection = Connection::locked(Database::Sqlite(connection));
    let is_of_this_version = keys::is_sealed_by_this_version(&connection).unwrap_or(false);
    if !is_of_this_version || !place.key_file.exists() {
        let rows = connection
            .query_row("SELECT count(*) FROM leases", super::sql::NONE, |row| {
                row.get(0)
            })
            .map_err(|e| failed(&e))?;
        return Ok(Checked {
            rows,
            refused: None,
        });
    }
    keys::unlock_moved(&mut connection, &place.key_files())?;
    let codes = || -> Result<Checked, StoreError> {
        let sealing = connection.sealing()?;
        let (mut rows, mut refused) = (0, 0);
        for table in TABLES {
            copying::walk(&connection, table, |page| {
                rows += page.len() as u64;
                let bad = page
                    .iter()
                    .filter(|(entry, mac)| !entry.is_authentic(&sealing, mac));
                refused += bad.count() as u64;
                Ok(())
            })?;
        }
        Ok(Checked {
            rows,
            refused: Some(refused),
        })
    };
    codes().map_err(|error| failed(&error))
}

/// Puts a copy in the store's place: from a file, or from standard input (`-`). The copy is checked first. The
/// earlier store is kept next to it. No dispatcher may be running with it.
///
/// # Errors
/// See [`OpenError`]. Then the store is unchanged.
pub(crate) fn restore(place: &Place, from: &Path) -> Result<(), OpenError> {
    let store = sqlite_file(place)?;
    super::open::make_dir(store.parent().unwrap_or(Path::new(".")))?;
    let _lock = lock(store)?;
    let fresh = key_files::beside(store, ".restore");
    let _ = std::fs::remove_file(&fresh);
    let ready = fetched(from, &fresh).and_then(|()| {
        let checked = check(place, &fresh)?;
        if checked.refused.is_none() {
            return Err(commands::failed(
                place,
                &"the copy cannot be checked: the master key is missing, or an older version made the copy",
            ));
        }
        mark_if_unmarked(&fresh).map_err(|error| commands::failed(place, &error))?;
        Ok(checked)
    });
    let placed =
        ready.and_then(|checked| put_in_place(store, &fresh).map(|before| (checked, before)));
    let (checked, before) = placed.inspect_err(|_| {
        let _ = std::fs::remove_file(&fresh);
    })?;
    if let Some(refused @ 1..) = checked.refused {
        warn!(
            refused,
            "rows of the copy are not authentic and will be refused"
        );
    }
    info!(rows = checked.rows, store = %store.display(),
        before = before.map(|file| file.display().to_string()).unwrap_or_default(),
        "the store is restored; the earlier one is kept");
    Ok(())
}

fn fetched(from: &Path, to: &Path) -> Result<(), OpenError> {
    let mut source: Box<dyn Read> = match from.as_os_str() == STDIO {
        true => Box::new(std::io::stdin().lock()),
        false => Box::new(File::open(from).map_err(file_error(from))?),
    };
    let mut file = private_file::create_new(to).map_err(file_error(to))?;
    std::io::copy(&mut source, &mut file)
        .and_then(|_| file.sync_all())
        .map_err(file_error(to))
}

fn mark_if_unmarked(copy: &Path) -> Result<(), rusqlite::Error> {
    let connection = rusqlite::Connection::open(copy)?;
    let marked = connection
        .prepare("SELECT 1 FROM meta WHERE key = ?1")?
        .exists([COPIED])?;
    drop(connection);
    match marked {
        true => Ok(()),
        false => mark(copy, Timestamp::now()),
    }
}

/// Puts the new file in the place of the old file. The old file is kept under another name, together with its `-wal`
/// and `-shm` files. If the process is killed at any step, there is a store in the place, and its parts belong
/// together.
fn put_in_place(store: &Path, fresh: &Path) -> Result<Option<PathBuf>, OpenError> {
    let mut kept = None;
    if store.exists() {
        // This writes the log of the old store into its file. A damaged store is kept as it is.
        if let Ok(old) = rusqlite::Connection::open(store) {
            let _ = old.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)");
            let _ = old.close();
        }
        let now = Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
        let before = key_files::beside(store, &format!(".before-{now}"));
        std::fs::hard_link(store, &before).map_err(file_error(&before))?;
        for part in ["-wal", "-shm"] {
            let (old, new) = (
                key_files::beside(store, part),
                key_files::beside(&before, part),
            );
            match std::fs::rename(&old, &new) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(file_error(&old)(error));
                }
                _ => {}
            }
        }
        kept = Some(before);
    }
    std::fs::rename(fresh, store)
        .and_then(|()| key_files::sync_directory(store))
        .map_err(file_error(store))?;
    Ok(kept)
}
