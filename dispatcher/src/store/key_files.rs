//! The files that hold the master key: the key file, and the next key while it is being renewed.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mayfly_protocol::secret::Secret;

use super::open::{OpenError, create_private};
use super::sealer::Keys;

/// Number of tries to find a key file before it counts as missing. A rename may be in progress.
const LOOKS: u32 = 3;

/// Where the master key is.
#[derive(Debug, Clone)]
pub(crate) struct KeyFiles {
    pub(crate) key: PathBuf,
    /// The next master key, if it is distributed by hand.
    pub(crate) next: Option<PathBuf>,
}

impl KeyFiles {
    /// The file to which `--rekey master` writes the new key before it is in force.
    pub(super) fn written(&self) -> PathBuf {
        beside(&self.key, ".next")
    }

    /// Takes the lock against a second `--rekey master`, and against a start that finishes the first run.
    ///
    /// # Errors
    /// The lock cannot be made, or is taken.
    pub(super) fn lock(&self) -> Result<File, OpenError> {
        let path = beside(&self.key, ".lock");
        let file = create_private(&path)?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(std::fs::TryLockError::WouldBlock) => Err(OpenError::Key {
                file: path,
                reason: "this master key is being renewed by another process",
            }),
            Err(std::fs::TryLockError::Error(error)) => Err(OpenError::File { file: path, error }),
        }
    }

    /// The keys of all key files that exist, each with its file.
    ///
    /// # Errors
    /// A file cannot be read, or holds something else.
    fn all(&self) -> Result<Vec<(PathBuf, Keys)>, OpenError> {
        let mut found = Vec::new();
        let files = [
            Some(self.key.clone()),
            Some(self.written()),
            self.next.clone(),
        ];
        for file in files.into_iter().flatten() {
            if let Some(keys) = read(&file)? {
                found.push((file, keys));
            }
        }
        Ok(found)
    }

    /// The keys with this id, and their file.
    pub(super) fn find(&self, id: &str) -> Result<(PathBuf, Keys), OpenError> {
        for look in 1.. {
            let found = self.all()?.into_iter().find(|(_, keys)| keys.id == id);
            if let Some(found) = found {
                return Ok(found);
            }
            if look == LOOKS {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Err(match self.key.exists() {
            true => OpenError::Key {
                file: self.key.clone(),
                reason: "this master key does not open the store: it belongs to another store, or the key was renewed",
            },
            false => OpenError::Key {
                file: self.key.clone(),
                reason: "the master key of this store is missing",
            },
        })
    }

    /// Replaces the old key file by the file that `--rekey master` wrote. The store is sealed with the new key by
    /// then.
    pub(super) fn take_written(&self) -> Result<(), OpenError> {
        let file = |error| OpenError::File {
            file: self.key.clone(),
            error,
        };
        std::fs::rename(self.written(), &self.key).map_err(file)?;
        sync_directory(&self.key).map_err(file)
    }
}

/// The file with this name and a suffix.
pub(super) fn beside(file: &Path, suffix: &str) -> PathBuf {
    let mut path = file.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

/// Syncs the directory, so that a new or renamed file survives a crash.
pub(super) fn sync_directory(file: &Path) -> std::io::Result<()> {
    let parent = file
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

/// The master key in a file. `None`: the file does not exist.
pub(super) fn read(file: &Path) -> Result<Option<Keys>, OpenError> {
    match std::fs::read_to_string(file) {
        Ok(text) => match Keys::new(&Secret::new(text)) {
            Some(keys) => Ok(Some(keys)),
            None => Err(OpenError::Key {
                file: file.to_owned(),
                reason: "a master key is 32 bytes in base64",
            }),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(OpenError::File {
            file: file.to_owned(),
            error,
        }),
    }
}
