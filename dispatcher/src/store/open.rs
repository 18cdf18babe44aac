//! Opening the store: its files and their modes, the lock against a second dispatcher, the migrations, and what the
//! first start makes.

use std::fs::{DirBuilder, File};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicI64;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use jiff::Timestamp;
use mayfly_common::private_file;
use mayfly_protocol::names::InstallationId;
use mayfly_protocol::secret::Secret;
use tracing::{info, warn};
use zeroize::Zeroizing;

use super::authentic::{self, META};
use super::health::Cause;
use super::keys::{self, KeyFiles};
use super::postgres::{Postgres, Url};
use super::sealer::{CellId, Sealer};
use super::sql::{Connection, Database, NONE, Query, params};
use super::{Store, StoreError, generations, migrations, tokens};
use crate::store::Keys;

/// The row of `meta` that only a copy has: a restored backup, or a standby that took over.
pub(super) const COPIED: &str = "copied";
/// The timeline of the store's database when it was last looked at.
const TIMELINE: &str = "timeline";

/// Where the store's files are.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    /// Directory made at the first start.
    pub(crate) data_dir: PathBuf,
    pub(crate) backend: Backend,
    pub(crate) key_file: PathBuf,
    /// The next master key, if it is distributed by hand.
    pub(crate) next_key_file: Option<PathBuf>,
    /// Where the first start writes the root token, or finds it.
    pub(crate) root_token_file: PathBuf,
}

/// Where the store's rows are.
#[derive(Debug, Clone)]
pub(crate) enum Backend {
    /// A SQLite file, for one dispatcher.
    Sqlite(PathBuf),
    /// A PostgreSQL database, for several dispatchers.
    Postgres(Box<Url>),
}

/// Why the store does not open.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    /// A file cannot be made or read.
    #[error("{}: {error}", file.display())]
    File {
        file: PathBuf,
        error: std::io::Error,
    },
    /// Another process has opened it.
    #[error("{}: another dispatcher is running with this store", file.display())]
    Locked { file: PathBuf },
    /// The master key is not the key with which the store was made.
    #[error("{}: {reason}", file.display())]
    Key {
        /// The master key's file.
        file: PathBuf,
        reason: &'static str,
    },
    /// The store's own keys cannot be opened with it.
    #[error("{}: this master key does not open the store; it belongs to another store ({reason})", file.display())]
    Identity {
        /// The master key's file.
        file: PathBuf,
        /// What does not open.
        reason: String,
    },
    /// An error of SQLite, PostgreSQL or a migration.
    #[error("{place}: {reason}")]
    Database {
        /// The SQLite file, or the server.
        place: String,
        reason: String,
        /// The cause in the disk or the server, if it is known.
        cause: Option<Cause>,
    },
}

impl OpenError {
    /// Whether a start waits: the store is unreachable, or its failure is transient. It does not wait after a
    /// refused login. Settings and their files are read only at the start, so only a restart can use a corrected
    /// login.
    pub(crate) fn may_pass(&self) -> bool {
        match self {
            Self::File { error, .. } => matches!(
                error.kind(),
                ErrorKind::StorageFull | ErrorKind::QuotaExceeded
            ),
            Self::Database { cause, .. } => cause.is_some_and(Cause::may_pass),
            Self::Locked { .. } | Self::Key { .. } | Self::Identity { .. } => false,
        }
    }
}

/// The identity of this installation, made at the first start and stored sealed.
pub(crate) struct Identity {
    /// The installation that the comment of every role names.
    pub(crate) installation: InstallationId,
    /// Keys that seal tasks, open answers, and derive the passwords of leases.
    pub(crate) keys: Keys,
}

impl Store {
    /// Opens the store, and makes it if it does not exist. A SQLite store comes with the file that holds its lock:
    /// keep it until the store is closed.
    ///
    /// # Errors
    /// See [`OpenError`]; each names its file or server.
    pub(crate) fn open(place: &Place) -> Result<(Self, Identity, Option<File>), OpenError> {
        make_dir(&place.data_dir)?;
        let offset = Arc::new(AtomicI64::new(0));
        match &place.backend {
            Backend::Sqlite(file) => {
                if let Some(parent) = file.parent().filter(|p| !p.as_os_str().is_empty()) {
                    make_dir(parent)?;
                }
                let lock = lock(file)?;
                let connection = open_sqlite(file)?;
                let (store, identity) = Self::begin(place, connection, offset)?;
                Ok((store, identity, Some(lock)))
            }
            Backend::Postgres(url) => {
                // The driver's connection has its own runtime, which cannot run inside another runtime.
                let opening = || {
                    let postgres = Postgres::open((**url).clone(), offset.clone());
                    let postgres = postgres.map_err(|error| OpenError::Database {
                        place: url.to_string(),
                        cause: error.cause(),
                        reason: error.to_string(),
                    })?;
                    Self::begin(
                        place,
                        Connection::locked(Database::Postgres(Box::new(postgres))),
                        offset.clone(),
                    )
                };
                let opened = std::thread::scope(|scope| scope.spawn(opening).join());
                let (store, identity) =
                    opened.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
                Ok((store, identity, None))
            }
        }
    }

    fn begin(
        place: &Place,
        mut connection: Connection,
        offset: Arc<AtomicI64>,
    ) -> Result<(Self, Identity), OpenError> {
        let health = connection.health();
        let database = |error: &dyn std::fmt::Display| OpenError::Database {
            place: place.backend.to_string(),
            reason: error.to_string(),
            cause: health.last(),
        };
        let counting = connection.count_without_triggers();
        counting.map_err(|e| database(&e))?;
        // If two dispatchers start at once with an empty store, one of them makes the keys and the token.
        connection.begin(&[]).map_err(|e| database(&e))?;
        if is_used(&connection).map_err(|e| database(&e))? {
            keys::unlock(&mut connection, &place.key_files())?;
        } else {
            keys::begin(&mut connection, &place.key_files())?;
            first_start(&connection, place)?;
        }
        let sealer = connection.ring().map_err(|e| database(&e))?.sealer.clone();
        let identity = identity(&connection, &sealer).map_err(|error| match error {
            StoreError::Unavailable(reason) | StoreError::Unusable(reason) => OpenError::Identity {
                file: place.key_file.clone(),
                reason,
            },
            other => database(&other),
        })?;
        connection.commit().map_err(|e| database(&e))?;
        let store = Self::start(place, connection, offset).map_err(|e| database(&e))?;
        Ok((store, identity))
    }
}

/// Whether a dispatcher has started with this store before.
pub(super) fn is_used(connection: &Connection) -> Result<bool, StoreError> {
    super::exists(
        connection,
        "SELECT 1 FROM meta WHERE key = ?1",
        "installation",
    )
}

impl Place {
    /// Where the master key is.
    pub(super) fn key_files(&self) -> KeyFiles {
        KeyFiles {
            key: self.key_file.clone(),
            next: self.next_key_file.clone(),
        }
    }
}

impl std::fmt::Display for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sqlite(file) => write!(f, "{}", file.display()),
            Self::Postgres(url) => write!(f, "{url}"),
        }
    }
}

/// Keeps temporary files of SQLite in memory. A container's root file system is read-only, and a savepoint's journal
/// needs a temporary file; without a directory for it the job would fail (SQLITE_IOERR_GETTEMPPATH,
/// <https://www.sqlite.org/tempfiles.html>).
pub(super) const NO_TEMPORARY_FILES: &str = "PRAGMA temp_store = MEMORY;";

pub(super) fn open_sqlite(file: &Path) -> Result<Connection, OpenError> {
    let failed = |reason: String, cause| OpenError::Database {
        place: file.display().to_string(),
        reason,
        cause,
    };
    let database = |error: rusqlite::Error| failed(error.to_string(), Cause::of_sqlite(&error));
    // Mayfly creates the file itself, so that nobody else can read it even for a short time.
    private_file::open(file, true).map_err(|error| OpenError::File {
        file: file.to_owned(),
        error,
    })?;
    let mut connection = rusqlite::Connection::open(file).map_err(database)?;
    // `--rekey` locks the store while it writes every row again. A read waits up to 10 s for that.
    connection
        .execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;
             PRAGMA busy_timeout = 10000; PRAGMA cache_size = -8000; PRAGMA secure_delete = ON;",
        )
        .and_then(|()| connection.execute_batch(NO_TEMPORARY_FILES))
        .map_err(database)?;
    connection.set_prepared_statement_cache_capacity(64);
    migrations::sqlite()
        .and_then(|runner| runner.run(&mut connection))
        .map_err(|error| failed(error.to_string(), None))?;
    Ok(Connection::locked(Database::Sqlite(connection)))
}

/// Opens a second connection to a SQLite store that is open. It cannot write.
pub(super) fn reading_sqlite(file: &Path) -> Result<rusqlite::Connection, rusqlite::Error> {
    let connection = rusqlite::Connection::open(file)?;
    connection.execute_batch(
        "PRAGMA busy_timeout = 10000; PRAGMA cache_size = -2000; PRAGMA query_only = ON;",
    )?;
    connection.execute_batch(NO_TEMPORARY_FILES)?;
    connection.set_prepared_statement_cache_capacity(32);
    Ok(connection)
}

/// If this store was restored from a backup: when that backup was made. A promoted standby counts as a copy too,
/// unless it was synchronous: it may lack the last commits of the primary.
pub(super) fn copied_at(
    connection: &Connection,
    now: Timestamp,
) -> Result<Option<Timestamp>, StoreError> {
    if connection.is_shared()
        && let Some(timeline) = timeline(connection)?
    {
        let known = meta(connection, TIMELINE)?;
        if known.as_deref() != Some(timeline.as_bytes()) {
            put_free(connection, TIMELINE, timeline.as_bytes())?;
            if known.is_some() {
                warn!(timeline, "another server is now the store's primary");
                put_free(
                    connection,
                    COPIED,
                    now.as_millisecond().to_string().as_bytes(),
                )?;
            }
        }
    }
    let Some(bytes) = meta(connection, COPIED)? else {
        return Ok(None);
    };
    std::str::from_utf8(&bytes)
        .ok()
        .and_then(|text| text.parse().ok())
        .and_then(|ms| Timestamp::from_millisecond(ms).ok())
        .ok_or_else(|| super::unreadable(COPIED))
        .map(Some)
}

/// The timeline of the write-ahead log. Each promotion begins a new timeline (PostgreSQL documentation, 26.3.6).
/// `None`: the server does not report it, as with some managed servers.
fn timeline(connection: &Connection) -> Result<Option<String>, StoreError> {
    connection.execute_batch("SAVEPOINT timeline")?;
    let found = connection.query_row(
        "SELECT substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)",
        NONE,
        |row| row.get(0),
    );
    let end = match found {
        Ok(_) => "RELEASE timeline",
        Err(_) => "ROLLBACK TO timeline; RELEASE timeline",
    };
    connection.execute_batch(end)?;
    Ok(found.ok())
}

pub(super) fn make_dir(dir: &Path) -> Result<(), OpenError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|error| OpenError::File {
            file: dir.to_owned(),
            error,
        })
}

pub(super) fn lock(database: &Path) -> Result<File, OpenError> {
    let mut path = database.as_os_str().to_owned();
    path.push(".lock");
    let path = PathBuf::from(path);
    let file = create_private(&path)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(OpenError::Locked { file: path }),
        Err(std::fs::TryLockError::Error(error)) => Err(OpenError::File { file: path, error }),
    }
}

/// Opens a file for writing. Others cannot read it, and a link is refused.
pub(super) fn create_private(path: &Path) -> Result<File, OpenError> {
    private_file::open(path, false).map_err(|error| OpenError::File {
        file: path.to_owned(),
        error,
    })
}

/// Writes a private file whole or not at all.
pub(super) fn write_private(path: &Path, secret: &Secret) -> Result<(), OpenError> {
    private_file::write(path, secret.expose()).map_err(|error| OpenError::File {
        file: path.to_owned(),
        error,
    })
}

/// The root token: the content of its file, if keys were made beforehand, or a new token.
fn root_token(path: &Path) -> Result<Secret, OpenError> {
    let file = |error| OpenError::File {
        file: path.to_owned(),
        error,
    };
    match std::fs::read_to_string(path).map(Zeroizing::new) {
        Ok(text) if !private_file::trimmed(&text).is_empty() => {
            let token = private_file::trimmed(&text);
            if token.len() < 32 || !token.bytes().all(|b| b.is_ascii_graphic()) {
                return Err(OpenError::Key {
                    file: path.to_owned(),
                    reason: "a root token has at least 32 characters, ASCII and without spaces",
                });
            }
            info!(file = %path.display(), "first start: the root token is the one in this file");
            return Ok(Secret::new(token));
        }
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(file(error)),
    }
    let random = Zeroizing::new(rand::random::<[u8; 32]>());
    let token = Secret::new(BASE64_URL_SAFE_NO_PAD.encode(*random));
    write_private(path, &token)?;
    info!(file = %path.display(), "first start: the root token is in this file");
    Ok(token)
}

/// Makes installation, keys and root token. The token's file is written first: a crash after it leaves a file that
/// the next try uses.
fn first_start(connection: &Connection, place: &Place) -> Result<(), OpenError> {
    let token = root_token(&place.root_token_file)?;
    let made = (|| -> Result<(), StoreError> {
        let sealer = connection.ring()?.sealer.clone();
        generations::first(connection, &sealer)?;
        let installation = InstallationId::random().to_string();
        put(connection, "installation", installation.as_bytes())?;
        tokens::put_root(connection, &token, Timestamp::now())
    })();
    made.map_err(|error| OpenError::Database {
        place: place.backend.to_string(),
        reason: error.to_string(),
        cause: connection.health().last(),
    })
}

pub(super) fn meta_cell(key: &str) -> CellId<'_> {
    CellId {
        table: "meta",
        row: key,
        version: 1,
        column: "value",
    }
}

const BY_KEY: &str = "WHERE key = ?1";

pub(super) fn meta(connection: &Connection, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
    let found = authentic::row(connection, &META, BY_KEY, [key])?;
    Ok(found.map(|row| row.get("value")).transpose()?)
}

/// The query of [`meta`].
pub(super) fn meta_asked(key: &str) -> Query {
    authentic::query(&META, BY_KEY, [key])
}

pub(super) fn put(connection: &Connection, key: &str, value: &[u8]) -> Result<(), StoreError> {
    authentic::put(connection, &META.entry(params![key, value]), &["value"])
}

/// Writes a row that is not authenticated; see [`authentic::FREE_META`].
pub(super) fn put_free(connection: &Connection, key: &str, value: &[u8]) -> Result<(), StoreError> {
    connection.execute(
        "INSERT INTO meta (key, value) VALUES (?1, ?2)
         ON CONFLICT (key) DO UPDATE SET value = excluded.value",
        params![key, value],
    )?;
    Ok(())
}

pub(super) fn identity(connection: &Connection, sealer: &Sealer) -> Result<Identity, StoreError> {
    let installation = meta(connection, "installation")?
        .ok_or_else(|| StoreError::NotFound("meta row installation".to_owned()))?;
    let installation = String::from_utf8(installation).ok();
    Ok(Identity {
        installation: installation
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| super::unreadable("installation"))?,
        keys: Keys::new(generations::load(connection, sealer)?),
    })
}
