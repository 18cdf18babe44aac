//! Files with secrets. They are read only if no one else can read them, and written with mode 0600.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Refuses a file that users other than this process' user may read or write. The group may read it, if the file
/// belongs to another user: a Secret in Kubernetes belongs to root and the pod's group, and so does a credential of
/// systemd.
///
/// # Errors
/// What is wrong with the file and what helps, with the file's name. An error of the file system counts too.
pub fn check(path: &Path) -> Result<(), String> {
    let found = std::fs::metadata(path)
        .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    // The mode of a pipe has no meaning.
    if !found.is_file() {
        return Ok(());
    }
    let is_own = found.uid() == rustix::process::geteuid().as_raw();
    match found.mode() & 0o777 {
        mode if mode & 0o007 != 0 || (is_own && mode & 0o070 != 0) => Err(format!(
            "others can read {} (mode {mode:04o}), which contains a secret: chmod 600 {}",
            path.display(),
            path.display()
        )),
        _ => Ok(()),
    }
}

/// The text of a file without the white space at its ends and without a byte order mark, which editors and shells
/// of Windows write (Unicode, "Byte Order Mark FAQ").
pub fn trimmed(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || c == '\u{feff}')
}

/// Opens a file for writing without truncating it, and sets its mode to 0600. A link is followed only if that is
/// requested.
///
/// # Errors
/// What the file system says; `ELOOP` for a link.
pub fn open(path: &Path, follow_links: bool) -> io::Result<File> {
    let flags = match follow_links {
        true => rustix::fs::OFlags::empty(),
        false => rustix::fs::OFlags::NOFOLLOW,
    };
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(i32::from_ne_bytes(flags.bits().to_ne_bytes()))
        .open(path)?;
    let found = file.metadata()?;
    if found.uid() == rustix::process::geteuid().as_raw() && found.mode() & 0o077 != 0 {
        file.set_permissions(std::fs::Permissions::from_mode(0o600))?;
    }
    Ok(file)
}

/// Makes a new file of mode 0600. An existing file or link of this name stays as it is.
///
/// # Errors
/// `AlreadyExists`, and what the file system says.
pub fn create_new(path: &Path) -> io::Result<File> {
    // O_EXCL does not follow links (open(2)).
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

/// Writes a secret to a file of mode 0600, whole or not at all, and replaces a file or link of this name. A link is
/// not followed.
///
/// # Errors
/// What the file system says.
pub fn write(path: &Path, secret: &str) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = Path::new(&beside);
    match std::fs::remove_file(beside) {
        // A file that a killed process has left behind is removed.
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let mut file = create_new(beside)?;
    writeln!(file, "{secret}")?;
    file.sync_all()?;
    std::fs::rename(beside, path)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn mode(path: &Path) -> u32 {
        std::fs::symlink_metadata(path).unwrap().mode() & 0o777
    }

    fn directory() -> std::path::PathBuf {
        let name = format!("mayfly-private-{}", mayfly_protocol::names::random_text(12));
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir(&directory).unwrap();
        directory
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_a_text() {
        for text in ["token", " token\n", "\u{feff}token\r\n", "\u{feff} token"] {
            assert_eq!(trimmed(text), "token", "{text:?}");
        }
        assert_eq!(trimmed("\u{feff}\r\n"), "");
    }

    #[test]
    fn a_file_that_others_can_read_is_refused() {
        let directory = directory();
        let file = directory.join("key");
        std::fs::write(&file, "k").unwrap();
        for (bits, is_fine) in [
            (0o600, true),
            (0o400, true),
            (0o640, false),
            (0o604, false),
            (0o602, false),
            (0o666, false),
        ] {
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(bits)).unwrap();
            assert_eq!(check(&file).is_ok(), is_fine, "{bits:o}");
        }
        let refused = check(&file).unwrap_err();
        assert!(refused.contains("chmod 600"), "{refused}");
        assert!(check(&directory.join("absent")).is_err());
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn links_are_not_followed_and_modes_not_kept() {
        let directory = directory();
        let (file, other) = (directory.join("key"), directory.join("other"));
        std::fs::write(&other, "before").unwrap();
        std::fs::set_permissions(&other, std::fs::Permissions::from_mode(0o666)).unwrap();
        for name in ["key", "key.new"] {
            symlink(&other, directory.join(name)).unwrap();
        }
        write(&file, "secret").unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "secret\n");
        assert_eq!(std::fs::read_to_string(&other).unwrap(), "before");
        assert_eq!(mode(&file), 0o600);
        assert!(!std::fs::symlink_metadata(&file).unwrap().is_symlink());

        // An existing file that all may read.
        std::fs::rename(&other, &file).unwrap();
        write(&file, "again").unwrap();
        assert_eq!(mode(&file), 0o600);
        assert!(create_new(&file).is_err());
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o666)).unwrap();
        open(&file, false).unwrap();
        assert_eq!(mode(&file), 0o600);
        let link = directory.join("link");
        symlink(&file, &link).unwrap();
        assert!(open(&link, false).is_err());
        open(&link, true).unwrap();
        std::fs::remove_dir_all(directory).unwrap();
    }
}
