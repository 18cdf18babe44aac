//! Settings of `mayfly proxy`, from flags or from a file.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mayfly_common::private_file;
use mayfly_protocol::secret::Secret;
use serde::Deserialize;
use zeroize::Zeroizing;

use super::listen::Place;
use crate::failure::Failure;

/// Default for the number of sessions of all listeners together.
pub(crate) const MAX_CONNECTIONS: usize = 1000;
/// Time for sessions that are in use when the proxy ends, in seconds.
pub(crate) const DRAIN_SECONDS: u64 = 30;
/// Where a single listener is, unless an address is given.
pub(crate) const LISTEN: &str = "127.0.0.1:6432";
/// Minimum length of a client's password, because it can be tried over a network.
const PASSWORD_MIN: usize = 16;

/// A secret and where clients find it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Listen {
    /// The dynamic secret's path.
    pub(crate) secret: String,
    /// The address, as of `--listen`.
    pub(crate) listen: String,
    /// Life of the credentials in seconds, at most the secret's own.
    pub(crate) ttl_seconds: Option<u64>,
    /// Sessions get a new account under their clients.
    #[serde(default)]
    pub(crate) hold: bool,
    /// The file with the password that clients must know.
    pub(crate) client_password_file: Option<PathBuf>,
}

/// The file of `--config`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Settings {
    /// The listeners, at least one.
    pub(crate) listen: Vec<Listen>,
    /// The address of `/healthz`, `/readyz` and `/metrics`.
    pub(crate) admin_listen: Option<SocketAddr>,
    /// Sessions of all listeners together.
    pub(crate) max_connections: Option<usize>,
    /// Time for sessions that are in use when the proxy ends.
    pub(crate) drain_seconds: Option<u64>,
}

impl Settings {
    /// Reads a file of TOML.
    pub(crate) fn read(path: &Path) -> Result<Self, Failure> {
        let wrong = |why: &dyn std::fmt::Display| {
            Failure::Usage(format!("--config: {}: {why}", path.display()))
        };
        let text = std::fs::read_to_string(path).map_err(|error| wrong(&error))?;
        let settings: Self = toml::from_str(&text).map_err(|error| wrong(&error))?;
        match settings.listen.is_empty() {
            true => Err(wrong(&"has no [[listen]]")),
            false => Ok(settings),
        }
    }

    pub(super) fn most(&self) -> Result<usize, Failure> {
        match self.max_connections.unwrap_or(MAX_CONNECTIONS) {
            0 => Err(Failure::Usage("max_connections must be positive".into())),
            most => Ok(most),
        }
    }

    pub(super) fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_seconds.unwrap_or(DRAIN_SECONDS))
    }
}

impl Listen {
    /// The listener's address, and the password that clients must know. A listener that other machines or users can
    /// reach needs a password.
    pub(super) fn place(&self) -> Result<(Place, Option<Secret>), Failure> {
        let place: Place = self.listen.parse().map_err(Failure::Usage)?;
        if self.ttl_seconds == Some(0) {
            return Err(Failure::Usage("ttl_seconds must be positive".into()));
        }
        match &self.client_password_file {
            Some(file) => Ok((place, Some(password(file)?))),
            None if place.is_private() => Ok((place, None)),
            None => Err(Failure::Usage(format!(
                "{place} can be reached from other machines, and every client there would get the database: give --client-password-file (client_password_file), or listen on loopback or a socket"
            ))),
        }
    }
}

/// The password in a file that others cannot read.
fn password(file: &Path) -> Result<Secret, Failure> {
    let wrong = |why: String| Failure::Usage(format!("--client-password-file: {why}"));
    private_file::check(file).map_err(wrong)?;
    let text = std::fs::read_to_string(file).map(Zeroizing::new);
    let text = text.map_err(|error| wrong(format!("cannot read {}: {error}", file.display())))?;
    let password = private_file::trimmed(&text);
    // Other characters would have to be normalized (RFC 4013), and drivers differ in that.
    if !password.bytes().all(|byte| (0x21..=0x7e).contains(&byte)) || password.len() < PASSWORD_MIN
    {
        return Err(wrong(format!(
            "{} must hold at least {PASSWORD_MIN} visible ASCII characters",
            file.display()
        )));
    }
    Ok(Secret::new(password))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn listen(address: &str, file: Option<&Path>) -> Listen {
        Listen {
            secret: "db:app".to_owned(),
            listen: address.to_owned(),
            ttl_seconds: None,
            hold: false,
            client_password_file: file.map(Path::to_owned),
        }
    }

    /// The attack is a connection from the network. A listener for the network needs a password.
    #[test]
    fn a_listener_for_others_needs_a_password() {
        for address in ["0.0.0.0:6432", "[::]:6432", "192.0.2.1:1"] {
            let refused = listen(address, None).place().unwrap_err();
            assert!(refused.to_string().contains("--client-password-file"));
            assert_eq!(refused.exit_code(), 2);
        }
        for address in ["127.0.0.1:6432", "[::1]:1", "unix:/run/app"] {
            assert!(listen(address, None).place().is_ok(), "{address}");
        }
    }

    #[test]
    fn a_password_is_long_and_in_a_closed_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("password");
        for (text, mode, why) in [
            ("0123456789abcdef\n", 0o600, None),
            ("0123456789abcdef", 0o644, Some("chmod 600")),
            ("0123456789abcde", 0o600, Some("at least 16")),
            ("0123456789 abcdef", 0o600, Some("visible ASCII")),
            ("0123456789abcdefé", 0o600, Some("visible ASCII")),
        ] {
            std::fs::write(&file, text).unwrap();
            std::fs::set_permissions(&file, PermissionsExt::from_mode(mode)).unwrap();
            let result = listen("0.0.0.0:1", Some(&file)).place();
            match (result, why) {
                (Ok((_, password)), None) => {
                    assert_eq!(password.unwrap().expose(), "0123456789abcdef");
                }
                (Err(error), Some(why)) => assert!(error.to_string().contains(why), "{error}"),
                (result, _) => panic!("{text}: {result:?}"),
            }
        }
    }

    #[test]
    fn a_file_names_its_mistakes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let read = |text: &str| {
            std::fs::write(file.path(), text).unwrap();
            Settings::read(file.path())
        };
        let whole = "max_connections = 5\n[[listen]]\nsecret = \"a:b\"\nlisten = \"127.0.0.1:1\"\n[[listen]]\nsecret = \"c\"\nlisten = \"unix:/x\"\nttl_seconds = 60\n";
        let settings = read(whole).unwrap();
        assert_eq!((settings.listen.len(), settings.most().unwrap()), (2, 5));
        for (text, why) in [
            ("", "listen"),
            ("listen = []", "no [[listen]]"),
            ("[[listen]]\nsecret = \"a\"", "listen"),
            (
                "[[listen]]\nsecret = \"a\"\nlisten = \"x\"\nheld = true",
                "held",
            ),
        ] {
            let refused = read(text).unwrap_err();
            assert!(refused.to_string().contains(why), "{refused}");
        }
    }
}
