//! The dispatcher's settings and flags. `default.toml` beside this file is the documentation
//! and the defaults.

mod backend;
mod raw;

use std::path::PathBuf;
use std::time::Duration;

use mayfly_common::broker::Login;
use mayfly_common::private_file;
use mayfly_common::process;
use mayfly_common::serve::{Listening, Room};
use mayfly_common::settings::{SettingsError, effective, load};
use mayfly_common::telemetry::LogSettings;
use mayfly_common::trace::TraceSettings;
use mayfly_protocol::names::random_text;
use mayfly_protocol::secret::Secret;

use crate::store::{Backend, Place, Rekey};
use backend::backend;
pub(crate) use backend::copy_target;
use raw::{Create, Lease, Raw, within};

/// The documented default file.
pub(crate) const DEFAULTS: &str = include_str!("default.toml");
/// Why a run is refused without a broker.
pub(crate) const NO_BROKER: &str = "amqp.url is missing";

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
    /// With --backup DIRECTORY: keep only this number of copies there, the newest ones
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
    /// Make a new root token, write it to this new file, and exit. The old token is refused from then on.
    /// Dispatchers may run meanwhile
    #[arg(long, value_name = "FILE", group = "instead")]
    pub(crate) new_root_token: Option<PathBuf>,
    /// Renew a key, and exit; see "Renew a key" in the README. Dispatchers may run meanwhile
    #[arg(long, value_name = "KEY", group = "instead")]
    pub(crate) rekey: Option<Rekey>,
    /// With --rekey dispatcher: replace the present key with the next key. All pools must have the next key
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
    /// Whether the flags ask for something that needs only the store, and no broker.
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

/// Maximum number of concurrent reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shares {
    pub(crate) per_server: usize,
    /// Reads of one caller at one server.
    pub(crate) per_caller: usize,
    /// Reads of one caller that wait for their turn at one server.
    pub(crate) waiting_per_caller: usize,
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
    /// A sweep ignores roles that ended less than this time ago.
    pub(crate) sweep_grace: Duration,
    /// Pause between two checks of the grant roles of live accounts.
    pub(crate) refresh_every: Duration,
    /// Leases that have ended are kept for this time after they were made.
    pub(crate) history: Duration,
}

/// The settings after all checks.
#[derive(Debug)]
pub(crate) struct Settings {
    /// Address and TLS of the API.
    pub(crate) http: Listening,
    /// Limits on the API's connections, in total and for one address.
    pub(crate) http_room: Room,
    /// Address and TLS of the admin listener.
    pub(crate) admin: Listening,
    /// The broker and the login. `None` for a command that needs only the store.
    pub(crate) login: Option<Login>,
    /// Where the store and its keys are.
    pub(crate) place: Place,
    /// Limits of requests and leases.
    pub(crate) limits: Limits,
    /// Maximum number of concurrent reads.
    pub(crate) shares: Shares,
    /// Level and format of the log.
    pub(crate) log: LogSettings,
    /// The receiver of spans.
    pub(crate) traces: TraceSettings,
    /// Name of this process among dispatchers, a new one for each start.
    pub(crate) name: String,
    /// The settings as a settings file, with secrets redacted.
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
        // A command on the store needs no credentials of the broker. It may run next to a unit or a pod, such as a
        // backup.
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
            // A missing file may be made later, or its absence is reported when it is needed.
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
