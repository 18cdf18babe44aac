//! Replaces a file as a whole: a reader sees either the old or the new content, even if this process is killed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Gid, Mode, Uid, fchmod, fchown};

use crate::failure::Failure;

/// Owner and group of the files. By default both are those of this process.
#[derive(Clone, Copy, Default)]
pub(crate) struct Owner {
    pub(crate) user: Option<u32>,
    /// A group that may read the files, but not write them.
    pub(crate) group: Option<u32>,
}

impl Owner {
    /// Reads the names or numbers of a user and a group. Names are looked up in `/etc/passwd` and `/etc/group`.
    ///
    /// # Errors
    /// A name is not in its file.
    pub(crate) fn read(user: Option<&str>, group: Option<&str>) -> Result<Self, Failure> {
        let of = |option: &str, name: Option<&str>, file: &str| {
            name.map(|name| {
                let lines = fs::read_to_string(file).unwrap_or_default();
                id(name, &lines).ok_or_else(|| {
                    Failure::Usage(format!(
                        "{option}: {name} is not in {file}; a number can be given too"
                    ))
                })
            })
            .transpose()
        };
        Ok(Self {
            user: of("--owner", user, "/etc/passwd")?,
            group: of("--group", group, "/etc/group")?,
        })
    }
}

/// The number of a name, which is the third field of its line (passwd(5), group(5)).
fn id(name: &str, lines: &str) -> Option<u32> {
    if let Ok(number) = name.parse() {
        return Some(number);
    }
    let mut lines = lines
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>());
    let found = lines.find(|fields| fields.first() == Some(&name))?;
    found.get(2)?.parse().ok()
}

/// A file that is replaced, and who may read it.
pub(super) struct Target {
    file: PathBuf,
    owner: Owner,
    mode: Mode,
}

impl Target {
    /// `is_private`: the group may not read it either.
    pub(super) fn new(file: PathBuf, owner: Owner, is_private: bool) -> Self {
        let mode = match owner.group.is_some() && !is_private {
            true => Mode::RUSR | Mode::WUSR | Mode::RGRP,
            false => Mode::RUSR | Mode::WUSR,
        };
        Self { file, owner, mode }
    }

    pub(super) fn file(&self) -> &Path {
        &self.file
    }

    /// Tests whether the new file can be made: makes it, and removes it.
    pub(super) fn check(&self) -> Result<(), Failure> {
        if self.file.is_dir() {
            let error = io::Error::from(io::ErrorKind::IsADirectory);
            return Err(self.unwritable(&error));
        }
        self.begin()
            .and_then(|_| fs::remove_file(self.beside()))
            .map_err(|error| self.unwritable(&error))
    }

    /// Writes the new file, and renames it to the name of the old one.
    pub(super) fn replace(&self, content: &[u8]) -> Result<(), Failure> {
        let replaced = || {
            let mut new = self.begin()?;
            new.write_all(content)?;
            new.sync_all()?;
            fs::rename(self.beside(), &self.file)
        };
        replaced().map_err(|error| {
            // The file has a password.
            let _ = fs::remove_file(self.beside());
            self.unwritable(&error)
        })?;
        // This makes the rename durable. A file system that does not support it has renamed the file nevertheless.
        let _ = File::open(self.directory()).and_then(|directory| directory.sync_all());
        Ok(())
    }

    /// An empty file with the mode and owner of the new one. A file that a killed process has left is removed.
    fn begin(&self) -> io::Result<File> {
        let beside = self.beside();
        match fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // `create_new` fails if another user of the directory has made the file or a link with its name.
        let mut options = OpenOptions::new();
        let new = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&beside)?;
        let given = || {
            let Owner { user, group } = self.owner;
            if user.is_some() || group.is_some() {
                fchown(&new, user.map(Uid::from_raw), group.map(Gid::from_raw))?;
            }
            fchmod(&new, self.mode)
        };
        match given() {
            Ok(()) => Ok(new),
            Err(error) => {
                let _ = fs::remove_file(&beside);
                Err(error.into())
            }
        }
    }

    fn directory(&self) -> &Path {
        let parent = self.file.parent();
        let named = parent.filter(|parent| !parent.as_os_str().is_empty());
        named.unwrap_or(Path::new("."))
    }

    /// The temporary name of the new file, in the same directory. It is always the same, so at most one file is left
    /// behind.
    fn beside(&self) -> PathBuf {
        let mut name = std::ffi::OsString::from(".");
        name.push(self.file.file_name().unwrap_or_default());
        name.push(".mayfly-new");
        self.directory().join(name)
    }

    fn unwritable(&self, error: &io::Error) -> Failure {
        Failure::Local(format!("cannot write {}: {error}", self.file.display()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, symlink};

    fn target(file: &Path, owner: Owner, is_private: bool) -> Target {
        Target::new(file.to_owned(), owner, is_private)
    }

    #[test]
    fn a_file_is_replaced_whole_and_closed_to_others() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("env");
        fs::write(&file, "old, with mode 0644").unwrap();
        let target = target(&file, Owner::default(), false);
        target.check().unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "old, with mode 0644");
        target.replace(b"new").unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "new");
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_group_may_read_but_not_a_password_file() {
        let directory = tempfile::tempdir().unwrap();
        let group = fs::metadata(directory.path()).unwrap().gid();
        let owner = Owner {
            user: None,
            group: Some(group),
        };
        for (is_private, mode) in [(false, 0o640), (true, 0o600)] {
            let file = directory.path().join(format!("{mode:o}"));
            target(&file, owner, is_private).replace(b"x").unwrap();
            let found = fs::metadata(&file).unwrap();
            assert_eq!((found.mode() & 0o777, found.gid()), (mode, group));
        }
    }

    /// Another user of the directory lays a link where the new file will be. Its target stays as it is.
    #[test]
    fn a_planted_link_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("env");
        let (victim, planted) = (directory.path().join("victim"), ".env.mayfly-new");
        fs::write(&victim, "untouched").unwrap();
        symlink(&victim, directory.path().join(planted)).unwrap();
        target(&file, Owner::default(), false)
            .replace(b"secret")
            .unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
        assert_eq!(fs::read_to_string(&file).unwrap(), "secret");
        assert!(!fs::symlink_metadata(&file).unwrap().is_symlink());
    }

    #[test]
    fn a_place_that_cannot_be_written_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let absent = directory.path().join("absent/env");
        for file in [absent.as_path(), directory.path()] {
            let refused = target(file, Owner::default(), false).check().unwrap_err();
            assert!(refused.to_string().contains(&file.display().to_string()));
        }
    }

    #[test]
    fn owners_are_names_or_numbers() {
        let lines = "root:x:0:0:root:/root:/bin/sh\napp:x:1001:1002::/:/bin/false\n";
        assert_eq!(id("app", lines), Some(1001));
        assert_eq!(id("70", lines), Some(70));
        assert_eq!((id("ap", lines), id("", lines)), (None, None));
        let refused = Owner::read(Some("no-such-user"), None).err().unwrap();
        assert_eq!(refused.exit_code(), 2);
    }
}
