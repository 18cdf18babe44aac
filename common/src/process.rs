//! The start of a program that runs until it is asked to stop, once for the dispatcher and the engine: flags,
//! settings, logs, a private memory, TLS, spans, signals, the admin listener; then the program itself.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{error, info, warn};

use crate::admin::Admin;
use crate::serve::Listening;
use crate::settings::{EXIT_BAD_CONFIGURATION, SettingsError};
use crate::telemetry::{self, LogSettings};
use crate::trace::{Export, TraceSettings};

/// Threads of the runtime. The programs wait for the broker, the disk and databases, not for processors.
const WORKERS: usize = 2;

/// A program, by its command line.
pub trait Program: Parser {
    /// Name of the program, such as `mayfly-engine`.
    const NAME: &'static str;
    /// The documented default settings, in TOML.
    const DEFAULTS: &'static str;
    /// The settings after all checks.
    type Settings;

    /// The flags that every program has.
    fn flags(&self) -> &CommonFlags;

    /// Reads and checks the settings. Opens nothing but the files that hold settings.
    ///
    /// # Errors
    /// The first thing wrong, with its key.
    fn settings(&self) -> Result<Self::Settings, SettingsError>;

    /// The part of the settings that every program has.
    fn common(settings: &Self::Settings) -> Common<'_>;

    /// Does what the flags request instead of a run. `None`: they request a run.
    fn act_instead(&self, _settings: &Self::Settings) -> Option<Result<(), String>> {
        None
    }

    /// Runs until [`Stop::asked`]. An error is logged here, and the program exits with 1.
    fn run(
        settings: Self::Settings,
        process: Process,
    ) -> impl Future<Output = Result<(), String>> + Send;
}

/// Flags of every program.
#[derive(Debug, clap::Args)]
pub struct CommonFlags {
    /// Settings file (TOML); the environment and the flags override it. See --print-defaults
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print the effective settings, secrets redacted, and exit
    #[arg(long)]
    check_config: bool,
    /// Print the documented default settings and exit
    #[arg(long)]
    print_defaults: bool,
    /// Address of /healthz, /readyz and /metrics
    #[arg(long, value_name = "HOST:PORT")]
    admin_listen: Option<String>,
    /// File that holds amqp://user:password@host:port/vhost
    #[arg(long, value_name = "FILE")]
    amqp_url_file: Option<String>,
    /// error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    /// text or json
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<String>,
}

impl CommonFlags {
    /// The keys of settings that flags override, with their values. `more` are flags of one program.
    #[must_use]
    pub fn overrides<'a>(&self, more: &[(&'a str, &Option<String>)]) -> Vec<(&'a str, String)> {
        [
            ("admin.listen", &self.admin_listen),
            ("amqp.url_file", &self.amqp_url_file),
            ("log.level", &self.log_level),
            ("log.format", &self.log_format),
        ]
        .iter()
        .chain(more)
        .filter_map(|(key, value)| Some((*key, (*value).clone()?)))
        .collect()
    }
}

/// The part of the settings that every program has.
#[derive(Debug)]
pub struct Common<'a> {
    /// Name of this process among those of its kind, for spans.
    pub instance: &'a str,
    /// Address and TLS of the admin listener, section `[admin]`.
    pub admin: &'a Listening,
    /// Level and format of the log, section `[log]`.
    pub log: &'a LogSettings,
    /// Where spans go, section `[traces]`.
    pub traces: &'a TraceSettings,
    /// The effective settings in TOML, secrets redacted.
    pub effective: &'a str,
}

/// What a program gets to run with.
pub struct Process {
    /// The admin listener, which is open but does not answer yet.
    pub admin: Admin,
    /// The signals that ask for the end.
    pub stop: Stop,
}

/// Handlers of SIGTERM and SIGINT.
#[derive(Debug)]
pub struct Stop {
    term: Signal,
    interrupt: Signal,
}

impl Stop {
    fn new() -> Result<Self, String> {
        let handler = |kind| signal(kind).map_err(|error| format!("no signal handler: {error}"));
        Ok(Self {
            term: handler(SignalKind::terminate())?,
            interrupt: handler(SignalKind::interrupt())?,
        })
    }

    /// Waits for one of the signals. A signal that came since the start counts.
    pub async fn asked(&mut self) {
        tokio::select! {
            _ = self.term.recv() => info!("SIGTERM: stopping"),
            _ = self.interrupt.recv() => info!("SIGINT: stopping"),
        }
    }
}

/// Starts a program and returns when it has ended: 0, 64 ([`EXIT_BAD_CONFIGURATION`]) for bad flags or settings,
/// and 1 for what fails later.
pub fn start<P: Program>() -> ExitCode {
    crate::fault::set_windows();
    let program = match P::try_parse() {
        Ok(program) => program,
        Err(error) => {
            // clap writes to the stream that fits: help and version are no errors.
            let _ = error.print();
            return match error.use_stderr() {
                true => ExitCode::from(EXIT_BAD_CONFIGURATION),
                false => ExitCode::SUCCESS,
            };
        }
    };
    if program.flags().print_defaults {
        return print(P::DEFAULTS);
    }
    match begin(&program) {
        Ok(code) => code,
        Err(error) => {
            // Logging may not have begun.
            let _ = writeln!(std::io::stderr(), "{}: bad configuration: {error}", P::NAME);
            ExitCode::from(EXIT_BAD_CONFIGURATION)
        }
    }
}

fn begin<P: Program>(program: &P) -> Result<ExitCode, SettingsError> {
    let settings = program.settings()?;
    let common = P::common(&settings);
    telemetry::start(common.log)?;
    if program.flags().check_config {
        return Ok(print(common.effective));
    }
    if !keep_memory_private() {
        warn!("core files may contain the memory of this process");
    }
    // lapin and reqwest use the provider of the process.
    if rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .is_err()
    {
        warn!("another TLS provider was installed before");
    }
    if let Some(done) = program.act_instead(&settings) {
        return Ok(code_of(done));
    }
    let export = Export::start(common.traces, P::NAME, common.instance)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .enable_all()
        .build();
    let ended = match runtime {
        Ok(runtime) => runtime.block_on(run::<P>(settings)),
        Err(error) => Err(format!("no runtime: {error}")),
    };
    export.end();
    Ok(code_of(ended))
}

async fn run<P: Program>(settings: P::Settings) -> Result<(), String> {
    let stop = Stop::new()?;
    let admin = Admin::open(P::common(&settings).admin).await?;
    P::run(settings, Process { admin, stop }).await
}

fn code_of(ended: Result<(), String>) -> ExitCode {
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            error!("{reason}");
            ExitCode::FAILURE
        }
    }
}

fn print(text: &str) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Keeps the secrets in this process's memory private: the kernel writes no core file, and other
/// processes of the same user cannot read the memory (`PR_SET_DUMPABLE`, prctl(2)). `false` if the
/// kernel refuses.
fn keep_memory_private() -> bool {
    use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, none)
        .and_then(|()| set_dumpable_behavior(DumpableBehavior::NotDumpable))
        .is_ok()
}
