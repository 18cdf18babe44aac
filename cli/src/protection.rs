//! How the connection to the server of a secret is protected, according to its base secret.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::Path;

use mayfly_protocol::pg_login::{Rule, WrittenIn};
use mayfly_protocol::target::{Auth, ChannelBinding, Endpoint, SslMode};
use serde::Deserialize;
use tempfile::TempDir;
use tokio::process::Child;
use zeroize::Zeroizing;

use crate::child;
use crate::client::Api;
use crate::credential::Credential;
use crate::failure::Failure;
use crate::route::Route;

/// How connections to the server are protected.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Protection {
    /// The sslmode. `None`: the default for the hosts.
    pub(crate) sslmode: Option<SslMode>,
    #[serde(default)]
    pub(crate) auth: Auth,
    pub(crate) channel_binding: Option<ChannelBinding>,
    pub(crate) sslrootcert: Option<String>,
}

/// Asks the dispatcher. `None`: the dispatcher is of an earlier version that cannot answer, or the secret is not a
/// dynamic one.
pub(crate) async fn ask(api: &Api, path: &str) -> Result<Option<Protection>, Failure> {
    let route = Route::secret(path)?.then("::connection");
    match api.get(&route).await {
        Ok(answer) => serde_json::from_value(answer).map(Some).map_err(|error| {
            Failure::Local(format!(
                "the dispatcher's answer about the connection: {error}"
            ))
        }),
        Err(Failure::Refused(refusal)) if matches!(refusal.status, 400 | 404) => Ok(None),
        Err(failure) => Err(failure),
    }
}

impl Protection {
    /// The variables with which libpq protects connections to these places. libpq before 16 ignores `PGREQUIREAUTH`.
    pub(crate) fn variables(&self, places: &[(String, u16)]) -> Vec<(&'static str, &'static str)> {
        let endpoints: Vec<Endpoint> = places
            .iter()
            .map(|(host, port)| Endpoint {
                host: host.clone(),
                port: *port,
            })
            .collect();
        let sslmode = self
            .sslmode
            .unwrap_or_else(|| SslMode::default_for(&endpoints));
        let rule = Rule {
            methods: self.auth.into(),
            sslmode,
            channel_binding: self.channel_binding,
            written_in: WrittenIn::BaseSecret,
            is_trial: false,
        };
        let mode = match sslmode {
            SslMode::Disable => "disable",
            SslMode::Prefer => "prefer",
            SslMode::Require => "require",
            SslMode::VerifyFull => "verify-full",
        };
        let auth = match self.auth {
            Auth::Scram => "scram-sha-256,none",
            Auth::Md5 => "scram-sha-256,md5,none",
            Auth::Password => "scram-sha-256,md5,password,none",
        };
        let mut variables = vec![("PGSSLMODE", mode), ("PGREQUIREAUTH", auth)];
        // A Unix socket has no TLS to bind a login to.
        let has_network = places.iter().any(|(host, _)| !host.starts_with('/'));
        match rule.binding() {
            ChannelBinding::Require if has_network => {
                variables.push(("PGCHANNELBINDING", "require"));
            }
            ChannelBinding::Disable => variables.push(("PGCHANNELBINDING", "disable")),
            ChannelBinding::Require | ChannelBinding::Prefer => {}
        }
        variables
    }

    /// The file of the machine's authorities, if the server is verified and the secret has no authorities. Engines
    /// use the same authorities. A user's own `~/.postgresql/root.crt` stays in use.
    pub(crate) fn roots_of_machine(
        &self,
        places: &[(String, u16)],
    ) -> Option<(&'static str, String)> {
        let is_verified = self
            .variables(places)
            .contains(&("PGSSLMODE", "verify-full"));
        let wanted = is_verified && self.sslrootcert.is_none() && !has_own_roots();
        wanted.then(|| ("PGSSLROOTCERT", machine_roots()))
    }
}

/// The protection of one command that runs with a credential.
pub(crate) struct Protected {
    variables: Vec<(&'static str, String)>,
    /// The directory of the certificates, which must live until the command has ended.
    directory: Option<TempDir>,
}

impl Protected {
    /// Starts the command with these variables and those that protect its connections. If it cannot be started, the
    /// result is an exit code.
    pub(crate) fn start(
        &self,
        program: &OsStr,
        arguments: &[OsString],
        variables: &[(&'static str, Zeroizing<String>)],
    ) -> Result<Child, u8> {
        let credential = variables
            .iter()
            .map(|(name, value)| (*name, value.as_str()));
        let protecting = self
            .variables
            .iter()
            .map(|(name, value)| (*name, value.as_str()));
        child::start(program, arguments, credential.chain(protecting))
    }
}

/// The protection of a command's connections. `is_kept` chooses variables of this process that are not changed.
///
/// # Errors
/// The file for the root certificates cannot be made.
pub(crate) fn of_command(
    protection: Option<&Protection>,
    credential: &Credential,
    is_kept: impl Fn(&str, &str) -> bool,
) -> Result<Protected, Failure> {
    let mut protected = Protected {
        variables: Vec::new(),
        directory: None,
    };
    let Some(protection) = protection else {
        return Ok(protected);
    };
    let wanted = protection.variables(&credential.places);
    let wanted = wanted.into_iter();
    let wanted = wanted.filter(|(name, value)| !is_kept(name, value));
    protected.variables = wanted
        .map(|(name, value)| (name, value.to_owned()))
        .collect();
    if let Some(roots) = &protection.sslrootcert {
        if !is_kept("PGSSLROOTCERT", "") {
            let directory = child::private_directory()?;
            let file = directory.path().join("root.crt");
            let written = fs::write(&file, roots);
            written.map_err(|error| {
                Failure::Local(format!("cannot write {}: {error}", file.display()))
            })?;
            let file = file.to_string_lossy().into_owned();
            protected.variables.push(("PGSSLROOTCERT", file));
            protected.directory = Some(directory);
        }
    } else if std::env::var_os("PGSSLROOTCERT").is_none() {
        let roots = protection.roots_of_machine(&credential.places);
        protected.variables.extend(roots);
    }
    Ok(protected)
}

/// The file of the machine's authorities: that of `SSL_CERT_FILE`, or of Debian, Red Hat, SUSE or Alpine. Without
/// such a file it is `system`, which libpq accepts from version 16 on (PostgreSQL documentation, 34.19.1).
fn machine_roots() -> String {
    let named = std::env::var("SSL_CERT_FILE").ok();
    let usual = [
        "/etc/ssl/certs/ca-certificates.crt",
        "/etc/pki/tls/certs/ca-bundle.crt",
        "/etc/ssl/ca-bundle.pem",
        "/etc/ssl/cert.pem",
    ];
    let mut all = named.into_iter().chain(usual.map(str::to_owned));
    let found = all.find(|file| Path::new(file).is_file());
    found.unwrap_or_else(|| "system".to_owned())
}

/// Whether libpq finds root certificates by itself.
fn has_own_roots() -> bool {
    std::env::home_dir().is_some_and(|home| Path::new(&home).join(".postgresql/root.crt").exists())
}

/// Keeps a variable that the user has set.
pub(crate) fn is_set(name: &str, _: &str) -> bool {
    std::env::var_os(name).is_some()
}

/// Keeps a variable that the user has set if it protects more.
pub(crate) fn is_stricter(name: &str, wanted: &str) -> bool {
    std::env::var(name).is_ok_and(|own| protects_more(name, &own, wanted))
}

fn protects_more(name: &str, own: &str, wanted: &str) -> bool {
    let modes = [
        "disable",
        "allow",
        "prefer",
        "require",
        "verify-ca",
        "verify-full",
    ];
    let rank = |mode| modes.iter().position(|known| *known == mode);
    match name {
        "PGSSLMODE" => rank(own) > rank(wanted),
        "PGCHANNELBINDING" => own == "require",
        _ => false,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::credential::tests::at;
    use serde_json::{Value, json};

    fn of(protection: Value) -> Protection {
        serde_json::from_value(protection).unwrap()
    }

    fn variables(host: &str, protection: Value) -> Vec<(&'static str, &'static str)> {
        of(protection).variables(&[(host.to_owned(), 5432)])
    }

    #[test]
    fn libpq_is_as_strict_as_an_engine() {
        let scram = ("PGREQUIREAUTH", "scram-sha-256,none");
        let bound = ("PGCHANNELBINDING", "require");
        for (host, protection, expected) in [
            (
                "db",
                json!({}),
                vec![("PGSSLMODE", "require"), scram, bound],
            ),
            ("::1", json!({}), vec![("PGSSLMODE", "prefer"), scram]),
            (
                "/run/pg",
                json!({"sslmode": "require"}),
                vec![("PGSSLMODE", "require"), scram],
            ),
            (
                "db",
                json!({"sslmode": "verify-full"}),
                vec![("PGSSLMODE", "verify-full"), scram],
            ),
            (
                "db",
                json!({"sslmode": "require", "auth": "md5"}),
                vec![
                    ("PGSSLMODE", "require"),
                    ("PGREQUIREAUTH", "scram-sha-256,md5,none"),
                ],
            ),
            (
                "db",
                json!({"channelBinding": "disable", "new": 1}),
                vec![
                    ("PGSSLMODE", "require"),
                    scram,
                    ("PGCHANNELBINDING", "disable"),
                ],
            ),
        ] {
            assert_eq!(variables(host, protection), expected, "{host}");
        }
    }

    #[test]
    fn root_certificates_are_in_a_file_of_this_user_until_the_end() {
        let credential = at(&[("db", 5432)], "app", "u", "p");
        let protection = of(json!({"sslmode": "verify-full", "sslrootcert": "PEM"}));
        let protected = of_command(Some(&protection), &credential, |_, _| false).unwrap();
        let (name, file) = protected.variables.last().unwrap().clone();
        assert_eq!(name, "PGSSLROOTCERT");
        assert_eq!(fs::read_to_string(&file).unwrap(), "PEM");
        drop(protected);
        assert!(!Path::new(&file).exists());
        let kept = of_command(Some(&protection), &credential, |_, _| true).unwrap();
        assert!(kept.variables.is_empty());
        let unknown = of_command(None, &credential, |_, _| false).unwrap();
        assert!(unknown.variables.is_empty());
    }

    #[test]
    fn a_stricter_mode_stays() {
        assert!(protects_more("PGSSLMODE", "verify-full", "require"));
        assert!(!protects_more("PGSSLMODE", "prefer", "require"));
        assert!(!protects_more("PGSSLMODE", "other", "disable"));
        assert!(protects_more("PGCHANNELBINDING", "require", "disable"));
        assert!(!protects_more("PGREQUIREAUTH", "password", "scram-sha-256"));
    }
}
