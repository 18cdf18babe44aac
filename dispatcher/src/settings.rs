//! The dispatcher's settings and flags. `default.toml` beside this file is the documentation
//! and the defaults.

use std::path::{Path, PathBuf};
use std::time::Duration;

use mayfly_common::broker::{AmqpSettings, Login};
use mayfly_common::private_file;
use mayfly_common::process;
use mayfly_common::serve::{ListenSettings, Listening, Room, TlsSettings};
use mayfly_common::settings::{SettingsError, effective, load, redacted, secret_or_file};
use mayfly_common::telemetry::LogSettings;
use mayfly_common::trace::TraceSettings;
use mayfly_protocol::names::random_text;
use mayfly_protocol::secret::Secret;
use serde::{Deserialize, Serialize, Serializer};

use crate::store::{Backend, Place, Rekey, Url};

/// The documented default file.
pub(crate) const DEFAULTS: &str = include_str!("default.toml");
/// Why a run is refused without a broker.
pub(crate) const NO_BROKER: &str = "amqp.url is missing";
/// Name of the SQLite store, below the data directory.
const STORE_FILE: &str = "mayfly.db";

/// Mayfly's dispatcher: the HTTP API, the lease store, and the tasks for the engines.
#[derive(Debug, clap::Parser)]
#[command(name = "mayfly-dispatcher", version = mayfly_common::VERSION)]
pub(crate) struct Flags {
    /// Flags of every program.
    #[command(flatten)]
    pub(crate) common: process::CommonFlags,
    /// Copy the store (SQLite) to this new file, into this directory under a new name, or to standard output
    /// (`-`), check the copy, and exit. A dispatcher may run meanwhile
    #[arg(long, value_name = "TO", group = "instead")]
    pub(crate) backup: Option<PathBuf>,
    /// With --backup DIRECTORY: keep only this number of copies there, the newest
    #[arg(long, value_name = "N", requires = "backup", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) keep: Option<u16>,
    /// Put a copy made with --backup in the store's place, from this file or from standard input (`-`), and exit;
    /// the earlier store is kept next to it. No dispatcher may be running with it
    #[arg(long, value_name = "FROM", group = "instead")]
    pub(crate) restore: Option<PathBuf>,
    /// Mark the store as restored from a backup that was not made by --backup, and exit. Do this before a
    /// dispatcher starts with it
    #[arg(long, group = "instead")]
    pub(crate) restored: bool,
    /// Move the store to a new, empty one, and exit: `sqlite:PATH`, or a file that contains `postgres://…`.
    /// The rows are verified. After that no dispatcher opens the old store
    #[arg(long, value_name = "TO", group = "instead")]
    pub(crate) copy_store: Option<String>,
    /// Make a new root token, write it to this new file, and exit. The old one is refused from then on.
    /// Dispatchers may run meanwhile
    #[arg(long, value_name = "FILE", group = "instead")]
    pub(crate) new_root_token: Option<PathBuf>,
    /// Renew a key, and exit; see "Renew a key" in the README. Dispatchers may run meanwhile
    #[arg(long, value_name = "KEY", group = "instead")]
    pub(crate) rekey: Option<Rekey>,
    /// With --rekey dispatcher: replace the present key with the next one. All pools must have the next key
    #[arg(long, requires = "rekey")]
    pub(crate) finish: bool,
    /// End the upgrade of the store now instead of one hour after its begin, and exit. Dispatchers of the
    /// earlier version can then not use it any more
    #[arg(long, group = "instead")]
    pub(crate) finish_upgrade: bool,
    /// Take the broker's virtual host over from an installation that is gone for good, and exit. The
    /// dispatchers of that installation must be stopped
    #[arg(long, group = "instead")]
    pub(crate) take_over_broker: bool,
    /// Directory of the master key, the root token and the store
    #[arg(long, value_name = "DIR")]
    data_dir: Option<String>,
    /// Address of the API
    #[arg(long, value_name = "ADDRESS")]
    http_listen: Option<String>,
}

impl Flags {
    /// Whether something is asked for that needs the store alone, and no broker.
    fn is_of_store(&self) -> bool {
        self.backup.is_some()
            || self.restore.is_some()
            || self.restored
            || self.copy_store.is_some()
            || self.new_root_token.is_some()
            || self.rekey.is_some()
            || self.finish_upgrade
    }
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    data_dir: PathBuf,
    http: Http,
    admin: ListenSettings,
    #[serde(default)]
    amqp: AmqpSettings,
    store: StoreUrl,
    #[serde(default)]
    seal: Seal,
    #[serde(default)]
    init: Init,
    create: Create,
    lease: Lease,
    limits: ReadLimits,
    log: LogSettings,
    traces: TraceSettings,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct StoreUrl {
    #[serde(serialize_with = "without_password")]
    url: Option<Secret>,
    url_file: Option<PathBuf>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Seal {
    key_file: Option<PathBuf>,
    next_key_file: Option<PathBuf>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Init {
    root_token_file: Option<PathBuf>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Http {
    listen: String,
    #[serde(default)]
    tls: TlsSettings,
    allow_plaintext: bool,
    max_connections: u64,
    max_connections_per_address: u64,
}

impl Http {
    fn room(&self) -> Result<Room, SettingsError> {
        let most = within("http.max_connections", self.max_connections, 1, 1_000_000)?;
        let per_address = within(
            "http.max_connections_per_address",
            self.max_connections_per_address,
            1,
            1_000_000,
        )?;
        let count = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        Ok(Room {
            connections: count(most),
            connections_per_address: count(per_address),
        })
    }
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct ReadLimits {
    reads_per_server: u64,
    reads_per_caller: u64,
    waiting_reads_per_caller: u64,
}

/// How many reads there may be at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shares {
    pub(crate) per_server: usize,
    /// Of one server and one caller.
    pub(crate) per_caller: usize,
    /// Of one server and one caller, those that wait for their turn.
    pub(crate) waiting_per_caller: usize,
}

impl ReadLimits {
    fn shares(&self) -> Result<Shares, SettingsError> {
        let count = |key: &str, n: u64| -> Result<usize, SettingsError> {
            let n = within(&format!("limits.{key}"), n, 1, 100_000)?;
            Ok(usize::try_from(n).unwrap_or(usize::MAX))
        };
        Ok(Shares {
            per_server: count("reads_per_server", self.reads_per_server)?,
            per_caller: count("reads_per_caller", self.reads_per_caller)?,
            waiting_per_caller: count("waiting_reads_per_caller", self.waiting_reads_per_caller)?,
        })
    }
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Create {
    deadline_seconds: u64,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Lease {
    max_ttl_seconds: u64,
    sweep_seconds: u64,
    sweep_grace_seconds: u64,
    refresh_seconds: u64,
    history_days: u64,
}

/// Limits of the dispatcher and its callers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Maximum wait of a caller for an account.
    pub(crate) create_deadline: Duration,
    /// The longest `ttl` or `maxTtl`, in seconds.
    pub(crate) max_ttl_seconds: u64,
    /// Pause between two sweeps of a server.
    pub(crate) sweep_every: Duration,
    /// A sweep ignores roles that ended less than this ago.
    pub(crate) sweep_grace: Duration,
    /// Between two looks at the grant roles of living accounts.
    pub(crate) refresh_every: Duration,
    /// Leases that have ended are kept for this time after they were made.
    pub(crate) history: Duration,
}

/// The settings after all checks.
#[derive(Debug)]
pub(crate) struct Settings {
    /// Address and TLS of the API.
    pub(crate) http: Listening,
    /// Connections of the API, in all and of one address.
    pub(crate) http_room: Room,
    /// Address and TLS of the admin listener.
    pub(crate) admin: Listening,
    /// The broker and the login. `None` for a command that needs only the store.
    pub(crate) login: Option<Login>,
    /// Where the store and its keys are.
    pub(crate) place: Place,
    /// Limits of requests and leases.
    pub(crate) limits: Limits,
    /// How many reads there are at a time.
    pub(crate) shares: Shares,
    /// Level and format of the log.
    pub(crate) log: LogSettings,
    /// The receiver of spans.
    pub(crate) traces: TraceSettings,
    /// Name of this process among dispatchers, a new one for each start.
    pub(crate) name: String,
    /// As a settings file, secrets redacted.
    pub(crate) effective: String,
}

impl Settings {
    /// Reads and checks everything; opens nothing but the files that hold settings.
    ///
    /// # Errors
    /// The first thing wrong, with its key.
    pub(crate) fn load(flags: &Flags) -> Result<Self, SettingsError> {
        let given = flags.common.overrides(&[
            ("data_dir", &flags.data_dir),
            ("http.listen", &flags.http_listen),
        ]);
        let raw = load(DEFAULTS, flags.common.config.as_deref(), &given)?;
        Self::check(raw, flags.is_of_store())
    }

    fn check(mut raw: Raw, of_store: bool) -> Result<Self, SettingsError> {
        raw.traces.check()?;
        // A command on the store runs without the broker's credentials, such as a backup next to a unit or a pod.
        let login = match of_store {
            true => None,
            false => Some(Login::new(raw.amqp.clone())?),
        };
        let beside = |name: &str| raw.data_dir.join(name);
        let key_file = raw.seal.key_file.unwrap_or_else(|| beside("master-key"));
        let root_token_file = raw.init.root_token_file;
        let root_token_file = root_token_file.unwrap_or_else(|| beside("root-token"));
        for (key, file) in [
            ("seal.key_file", Some(&key_file)),
            ("seal.next_key_file", raw.seal.next_key_file.as_ref()),
            ("init.root_token_file", Some(&root_token_file)),
        ] {
            // One that is absent may be made later, or is missed where it is needed.
            if let Some(file) = file.filter(|file| file.exists()) {
                private_file::check(file)
                    .map_err(|reason| SettingsError(format!("{key}: {reason}")))?;
            }
        }
        let http_room = raw.http.room()?;
        let http = Listening::http(&raw.http.listen, &raw.http.tls, raw.http.allow_plaintext)?;
        let admin = Listening::admin(&raw.admin)?;
        let backend = backend(&raw.store, &raw.data_dir)?;
        raw.seal.key_file = Some(key_file.clone());
        raw.init.root_token_file = Some(root_token_file.clone());
        if let (Backend::Sqlite(file), None) = (&backend, &raw.store.url_file) {
            raw.store.url = Some(Secret::new(format!("sqlite:{}", file.display())));
        }
        Ok(Self {
            http,
            http_room,
            admin,
            login,
            limits: limits(&raw.create, &raw.lease)?,
            shares: raw.limits.shares()?,
            effective: effective(&raw)?,
            name: random_text(16),
            place: Place {
                backend,
                key_file,
                next_key_file: raw.seal.next_key_file,
                root_token_file,
                data_dir: raw.data_dir,
            },
            log: raw.log,
            traces: raw.traces,
        })
    }
}

fn limits(create: &Create, lease: &Lease) -> Result<Limits, SettingsError> {
    let seconds = |key: &str, value: u64, most: u64| -> Result<Duration, SettingsError> {
        within(key, value, 1, most).map(Duration::from_secs)
    };
    let deadline = create.deadline_seconds;
    Ok(Limits {
        create_deadline: seconds("create.deadline_seconds", deadline, 600)?,
        max_ttl_seconds: within(
            "lease.max_ttl_seconds",
            lease.max_ttl_seconds,
            1,
            10 * 31_536_000,
        )?,
        sweep_every: seconds("lease.sweep_seconds", lease.sweep_seconds, 86_400)?,
        sweep_grace: seconds(
            "lease.sweep_grace_seconds",
            lease.sweep_grace_seconds,
            86_400,
        )?,
        refresh_every: seconds("lease.refresh_seconds", lease.refresh_seconds, 86_400)?,
        history: within("lease.history_days", lease.history_days, 1, 3650)
            .map(|days| Duration::from_secs(days * 86_400))?,
    })
}

/// A SQLite URL as it is, and `[secret]` for all others: they may hold a password.
fn without_password<S: Serializer>(url: &Option<Secret>, to: S) -> Result<S::Ok, S::Error> {
    match url.as_ref().map(Secret::expose) {
        Some(url) if url.starts_with("sqlite:") => to.serialize_some(url),
        _ => redacted(url, to),
    }
}

fn within(key: &str, value: u64, least: u64, most: u64) -> Result<u64, SettingsError> {
    if (least..=most).contains(&value) {
        Ok(value)
    } else {
        Err(SettingsError(format!(
            "{key} must be from {least} to {most}; it is {value}"
        )))
    }
}

/// The place that `--copy-store` names: `sqlite:PATH`, or a file with a URL. A URL with a password is not for the
/// command line.
///
/// # Errors
/// What is wrong.
pub(crate) fn copy_target(to: &str, data_dir: &Path) -> Result<Backend, SettingsError> {
    let store = match to.split_once(':') {
        Some(("sqlite", _)) => StoreUrl {
            url: Some(Secret::new(to)),
            url_file: None,
        },
        Some(("postgres" | "postgresql", _)) => {
            return Err(SettingsError(
                "--copy-store: others can see a password on the command line; write the URL to a file of mode 0600 and name the file".to_owned(),
            ));
        }
        _ => StoreUrl {
            url: None,
            url_file: Some(PathBuf::from(to)),
        },
    };
    backend(&store, data_dir)
        .map_err(|SettingsError(reason)| SettingsError(format!("--copy-store: {reason}")))
}

fn backend(store: &StoreUrl, data_dir: &Path) -> Result<Backend, SettingsError> {
    if store.url.is_none() && store.url_file.is_none() {
        return Ok(Backend::Sqlite(data_dir.join(STORE_FILE)));
    }
    let url = secret_or_file("store.url", store.url.clone(), store.url_file.as_ref())?;
    // It may hold a password: it is not repeated.
    let refuse = |why: &str| Err(SettingsError(format!("store.url {why}")));
    match url.expose().split_once(':') {
        Some(("sqlite", "")) => refuse("lacks the path: sqlite:PATH"),
        Some(("sqlite", STORE_FILE)) => Ok(Backend::Sqlite(data_dir.join(STORE_FILE))),
        Some(("sqlite", path)) => Ok(Backend::Sqlite(PathBuf::from(path))),
        Some(("postgres" | "postgresql", _)) => match Url::parse(&url) {
            Ok(url) => Ok(Backend::Postgres(Box::new(url))),
            Err(why) => refuse(&why),
        },
        Some(_) | None => refuse("must be sqlite:PATH or postgres://…"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use clap::Parser;
    use mayfly_common::settings::documented_keys;

    fn with(toml: &str) -> Result<Settings, SettingsError> {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("settings");
        std::fs::write(&file, toml).unwrap();
        let flags = Flags::parse_from(["x", "--config", file.to_str().unwrap()]);
        Settings::load(&flags)
    }

    const AMQP: &str = "[amqp]\nurl = 'amqp://u:hunter2@localhost:1/%2f'\n";

    #[test]
    fn the_defaults_are_settings() {
        let settings = with(AMQP).unwrap();
        assert_eq!(
            settings.place.backend.to_string(),
            "./mayfly-data/mayfly.db"
        );
        assert_eq!(
            settings.place.key_file,
            PathBuf::from("./mayfly-data/master-key")
        );
        assert!(!settings.effective.contains("hunter2"));
        let again = with(
            &settings
                .effective
                .replace("[secret]", "amqp://u:p@localhost:1/%2f"),
        )
        .unwrap();
        assert_eq!(
            again.effective, settings.effective,
            "what is printed is a settings file"
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (toml, key) in [
            ("", "amqp.url"),
            ("[http]\nlisten = 'x'", "amqp.url"),
            (&format!("{AMQP}[http]\nlisten = 'x'"), "http.listen"),
            (&format!("{AMQP}[http]\nlisen = 'x'"), "lisen"),
            (
                &format!("{AMQP}[http]\nlisten = '0.0.0.0:8470'"),
                "http.allow_plaintext",
            ),
            (
                &format!("{AMQP}[admin]\nlisten = '[::]:8471'"),
                "admin.allow_plaintext",
            ),
            (
                "[amqp]\nurl = 'amqp://u:hunter2@h:1/%2f'",
                "amqp.allow_plaintext",
            ),
            (
                &format!("{AMQP}[http.tls]\ncert_file = '/absent'"),
                "http.tls.key_file",
            ),
            (
                &format!("{AMQP}[store]\nurl = 'postgres://u:p@h:x/d'"),
                "store.url",
            ),
            (&format!("{AMQP}[store]\nurl = 'mysql:x'"), "store.url"),
            (
                &format!("{AMQP}[http]\nmax_connections_per_address = 0"),
                "http.max_connections_per_address",
            ),
            (
                &format!("{AMQP}[limits]\nreads_per_caller = 0"),
                "limits.reads_per_caller",
            ),
            (
                &format!("{AMQP}[create]\ndeadline_seconds = 0"),
                "create.deadline_seconds",
            ),
        ] {
            let error = with(toml).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
    }

    /// A key that the default file documents is printed by `--check-config`, and the other way round.
    #[test]
    fn every_documented_key_is_printed() {
        let all = "amqp.url amqp.url_file amqp.ca_file amqp.client_cert_file amqp.client_key_file \
                   store.url store.url_file seal.key_file seal.next_key_file init.root_token_file \
                   http.tls.cert_file http.tls.key_file http.tls.client_ca_file \
                   admin.tls.cert_file admin.tls.key_file admin.tls.client_ca_file";
        let all = all.split_whitespace();
        let flags: Vec<_> = all
            .map(|key| (key, "postgres://u:hunter2@h/d".to_owned()))
            .collect();
        let raw: Raw = load(DEFAULTS, None, &flags).unwrap();
        assert_eq!(
            documented_keys(&effective(&raw).unwrap()),
            documented_keys(DEFAULTS)
        );
    }

    #[test]
    fn no_password_is_printed() {
        let settings = with(&format!("{AMQP}[store]\nurl = 'postgres://u:hunter2@h/d'")).unwrap();
        assert!(!settings.effective.contains("hunter2"));
        assert!(settings.effective.contains("[store]\nurl = \"[secret]\""));
    }
}
