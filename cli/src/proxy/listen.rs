//! Where clients connect: a TCP address, or a socket in a directory.

use std::fmt;
use std::fs::Metadata;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::fs::Mode;
use rustix::process::{geteuid, umask};
use tokio::net::{TcpListener, UnixListener};

use super::stream::{Stream, tune};
use crate::ui;

/// PostgreSQL's own port: it is in the name of a socket.
const DEFAULT_PORT: u16 = 5432;

/// Where a listener is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    Tcp(SocketAddr),
    /// The socket `.s.PGSQL.PORT` in this directory.
    Unix(PathBuf, u16),
}

impl Place {
    /// Whether only users of this machine can reach it: over loopback, or by a socket of mode 0600.
    pub(super) fn is_private(&self) -> bool {
        match self {
            Self::Tcp(address) => address.ip().to_canonical().is_loopback(),
            Self::Unix(..) => true,
        }
    }

    /// Host and port as libpq takes them.
    pub(super) fn host_and_port(&self) -> (String, u16) {
        match self {
            Self::Tcp(address) if address.ip().is_unspecified() && address.is_ipv6() => {
                ("::1".to_owned(), address.port())
            }
            Self::Tcp(address) if address.ip().is_unspecified() => {
                ("127.0.0.1".to_owned(), address.port())
            }
            Self::Tcp(address) => (address.ip().to_string(), address.port()),
            Self::Unix(directory, port) => (directory.display().to_string(), *port),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(..) => write!(f, "unix:{}", socket(self).display()),
        }
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is not an address such as 127.0.0.1:6432, or unix:DIR (absolute; unix:DIR/.s.PGSQL.PORT for another port than {DEFAULT_PORT})"
            )
        };
        if let Some(path) = text.strip_prefix("unix:") {
            let path = Path::new(path);
            if !path.is_absolute() {
                return Err(wrong());
            }
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            return match (name.strip_prefix(".s.PGSQL."), path.parent()) {
                (Some(port), Some(directory)) => {
                    let port = port.parse().ok().filter(|port| *port > 0);
                    Ok(Self::Unix(directory.to_owned(), port.ok_or_else(wrong)?))
                }
                _ => Ok(Self::Unix(path.to_owned(), DEFAULT_PORT)),
            };
        }
        let numeric = match text.strip_prefix("localhost:") {
            Some(port) => format!("127.0.0.1:{port}"),
            None => text.to_owned(),
        };
        numeric.parse().map(Self::Tcp).map_err(|_| wrong())
    }
}

fn socket(place: &Place) -> PathBuf {
    match place {
        Place::Tcp(_) => PathBuf::new(),
        Place::Unix(directory, port) => directory.join(format!(".s.PGSQL.{port}")),
    }
}

/// An open listener. Its socket's file is removed with it.
#[derive(Debug)]
pub(super) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

impl Listener {
    /// Opens it. A directory that does not exist is made with mode 0700; the socket has mode 0600. The place comes
    /// back with the port that the system has chosen, if it was 0.
    ///
    /// # Errors
    /// What the system says, with the address.
    pub(super) async fn open(place: &Place) -> Result<(Self, Place), String> {
        let failed = |error: io::Error| format!("cannot listen on {place}: {error}");
        match place {
            Place::Tcp(address) => {
                let listener = TcpListener::bind(address).await.map_err(failed)?;
                let address = listener.local_addr().map_err(failed)?;
                Ok((Self::Tcp(listener), Place::Tcp(address)))
            }
            Place::Unix(directory, _) => {
                let mut builder = std::fs::DirBuilder::new();
                builder.recursive(true).mode(0o700);
                builder.create(directory).map_err(failed)?;
                if others_may_change(&directory.metadata().map_err(failed)?, geteuid().as_raw()) {
                    ui::warning(&format!(
                        "{}: other users may write into this directory, and replace this socket by their own",
                        directory.display()
                    ));
                }
                let path = socket(place);
                remove_stale(&path).map_err(failed)?;
                // The umask sets the mode when the socket is made: between bind and chmod others could connect.
                let before = umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
                let bound = UnixListener::bind(&path);
                umask(before);
                Ok((Self::Unix(bound.map_err(failed)?, path), place.clone()))
            }
        }
    }

    /// Waits for the next client.
    pub(super) async fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                tune(&stream)?;
                Ok(Stream::Tcp(stream))
            }
            Self::Unix(listener, _) => listener
                .accept()
                .await
                .map(|(stream, _)| Stream::Unix(stream)),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            // The socket may be gone already.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Whether other users than this user and root may rename and remove files of this user in a directory.
fn others_may_change(directory: &Metadata, user: u32) -> bool {
    let others_write = directory.mode() & 0o022 != 0;
    // In a sticky directory, such as /tmp, only the owner of a file may rename and remove it.
    let is_sticky = directory.mode() & 0o1000 != 0;
    ![user, 0].contains(&directory.uid()) || others_write && !is_sticky
}

/// Removes a socket that nobody listens on: its process was killed.
fn remove_stale(path: &Path) -> io::Result<()> {
    let found = match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        found => found?,
    };
    if !found.file_type().is_socket() {
        return Err(io::Error::new(
            ErrorKind::AlreadyExists,
            "a file of this name exists, which is not a socket",
        ));
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => Err(ErrorKind::AddrInUse.into()),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn places_are_read_and_shown() {
        for (text, shown, is_private) in [
            ("127.0.0.1:6432", "127.0.0.1:6432", true),
            ("localhost:1", "127.0.0.1:1", true),
            ("[::1]:6432", "[::1]:6432", true),
            ("[::ffff:127.0.0.1]:1", "[::ffff:127.0.0.1]:1", true),
            ("127.8.0.1:0", "127.8.0.1:0", true),
            ("0.0.0.0:6432", "0.0.0.0:6432", false),
            ("[::]:6432", "[::]:6432", false),
            ("10.0.0.1:6432", "10.0.0.1:6432", false),
            ("unix:/run/x", "unix:/run/x/.s.PGSQL.5432", true),
            (
                "unix:/run/x/.s.PGSQL.6432",
                "unix:/run/x/.s.PGSQL.6432",
                true,
            ),
        ] {
            let place: Place = text.parse().unwrap();
            assert_eq!(place.to_string(), shown);
            assert_eq!(place.is_private(), is_private, "{text}");
        }
        for text in [
            "",
            "6432",
            "db:6432",
            "127.0.0.1",
            "unix:run",
            "unix:",
            "unix:/x/.s.PGSQL.0",
            "unix:/x/.s.PGSQL.y",
        ] {
            assert!(text.parse::<Place>().is_err(), "{text}");
        }
    }

    #[tokio::test]
    async fn a_socket_is_for_its_user_alone() {
        let directory = tempfile::tempdir().unwrap();
        let inner = directory.path().join("new");
        let place = Place::Unix(inner.clone(), 1);
        let (listener, _) = Listener::open(&place).await.unwrap();
        let path = socket(&place);
        let mode = |path: &Path| path.metadata().unwrap().mode() & 0o777;
        assert_eq!((mode(&inner), mode(&path)), (0o700, 0o600));
        // The socket is in use.
        assert!(Listener::open(&place).await.is_err());
        drop(listener);
        assert!(!path.exists());
        // A socket that a killed process has left is replaced.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(Listener::open(&place).await.unwrap());
        std::fs::write(&path, "mine").unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        assert!(
            Listener::open(&place)
                .await
                .unwrap_err()
                .contains("not a socket")
        );
    }

    /// A user who may write into a directory can replace a socket that programs trust by a socket of their own.
    #[test]
    fn a_directory_that_others_may_change_is_seen() {
        let directory = tempfile::tempdir().unwrap();
        let user = directory.path().metadata().unwrap().uid();
        for (mode, expected) in [
            (0o700, false),
            (0o755, false),
            (0o1777, false),
            (0o777, true),
            (0o770, true),
        ] {
            std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(mode)).unwrap();
            let found = directory.path().metadata().unwrap();
            assert_eq!(others_may_change(&found, user), expected, "{mode:o}");
            // The directory belongs to another user. The user of the tests may be root.
            let is_anothers = others_may_change(&found, user + 1);
            assert_eq!(is_anothers, expected || user != 0, "{mode:o}");
        }
    }
}
