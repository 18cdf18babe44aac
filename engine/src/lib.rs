//! The engine takes tasks from its pool's queues, makes and ends PostgreSQL roles, and reports the results. It
//! accepts no connections except at its admin listener. After SIGTERM the consumers end, tasks in progress are
//! finished, and the connection is closed.

mod authorities;
mod bundles;
mod ended;
mod metrics;
mod orders;
mod pg;
mod requests;
mod revocations;
mod settings;
mod tend;
mod verdicts;
mod work;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use jiff::Timestamp;
use mayfly_common::VERSION;
use mayfly_common::admin::Readiness;
use mayfly_common::broker::{Broker, Incoming, Options, Part, Source};
use mayfly_common::process::{self, Common, CommonFlags, Process, Program};
use mayfly_common::settings::SettingsError;
use mayfly_protocol::timing::timing;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::metrics::{Elsewhere, Metrics};
use crate::settings::Settings;
use crate::work::{Dispatcher, Engine};

/// Maximum time for the last heartbeat and the close of the connection at a stop.
const CLOSE_WITHIN: Duration = Duration::from_secs(3);

/// Makes and ends PostgreSQL roles for one pool.
#[derive(clap::Parser)]
#[command(name = "mayfly-engine", version)]
struct Arguments {
    #[command(flatten)]
    flags: CommonFlags,
    /// The pool's key file
    #[arg(long, value_name = "FILE")]
    pool_key_file: Option<String>,
    /// Name of this engine
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
}

/// Runs an engine until SIGTERM, as the command line says.
#[must_use]
pub fn start() -> ExitCode {
    process::start::<Arguments>()
}

impl Program for Arguments {
    const NAME: &'static str = "mayfly-engine";
    const DEFAULTS: &'static str = settings::DEFAULTS;
    type Settings = Settings;

    fn flags(&self) -> &CommonFlags {
        &self.flags
    }

    fn settings(&self) -> Result<Settings, SettingsError> {
        let flags = self.flags.overrides(&[
            ("pool.key_file", &self.pool_key_file),
            ("engine.name", &self.name),
        ]);
        Settings::load(self.flags.config.as_deref(), &flags)
    }

    fn common(settings: &Settings) -> Common<'_> {
        Common {
            instance: settings.name.as_str(),
            admin: &settings.admin,
            log: &settings.log,
            traces: &settings.traces,
            effective: &settings.effective,
        }
    }

    async fn run(settings: Settings, process: Process) -> Result<(), String> {
        run(settings, process).await
    }
}

async fn run(settings: Settings, mut process: Process) -> Result<(), String> {
    // Consumers end at `stop`; the connection and the listener at `close`, after tasks in progress.
    let (stop, close) = (CancellationToken::new(), CancellationToken::new());
    let (work, plumbing) = (TaskTracker::new(), TaskTracker::new());
    let tls = settings.admin.tls.clone();
    let engine = Arc::new(engine(settings, &plumbing, &close)?);
    info!(engine = %engine.name, pool = %engine.pool, version = VERSION, "the engine starts");

    let is_consuming = consume_all(&engine, &work, &plumbing, &stop);
    let is_announced = tend::start(&engine, &plumbing, &stop, &close);
    let (readiness, measured) = (engine.clone(), engine.clone());
    let draining = stop.clone();
    let ready = move || -> Readiness {
        match (draining.is_cancelled(), readiness.broker.is_up()) {
            (true, _) => Err("draining".to_owned()),
            (_, false) => Err("the broker is not connected".to_owned()),
            _ if is_consuming() && is_announced.load(Ordering::Relaxed) => Ok(()),
            _ => Err("not consuming yet".to_owned()),
        }
    };
    let metrics = move || {
        measured.metrics.tls(tls.as_ref());
        measured.metrics.waiting(measured.grant_roles.waiting());
        measured.metrics.text(&Elsewhere {
            unreadable: measured.broker.unreadable(),
            reconnects: measured.broker.reconnects(),
            clock_skew_seconds: measured.servers.clock_skew(),
            quarantined: measured.servers.quarantined(),
        })
    };
    plumbing.spawn(process.admin.serve(ready, metrics, close.clone()));

    process.stop.asked().await;
    stop.cancel();
    work.close();
    // RabbitMQ delivers the unfinished tasks to other engines.
    if tokio::time::timeout(timing().drain_within, work.wait())
        .await
        .is_err()
    {
        warn!("some tasks are not done; other engines will get them");
    }
    engine.send_heartbeat(true).await;
    close.cancel();
    plumbing.close();
    let _ = tokio::time::timeout(CLOSE_WITHIN, plumbing.wait()).await;
    info!(engine = %engine.name, "the engine has stopped");
    Ok(())
}

fn engine(
    settings: Settings,
    plumbing: &TaskTracker,
    close: &CancellationToken,
) -> Result<Engine, String> {
    let options = Options {
        login: settings.login,
        name: format!("mayfly-engine {}", settings.name),
        part: Part::Engine,
    };
    Ok(Engine {
        metrics: Metrics::new(&settings.pool).map_err(|error| error.to_string())?,
        name: settings.name,
        pool: settings.pool,
        pool_keys: settings.pool_keys,
        dispatcher: Dispatcher::new(settings.dispatcher_keys)?,
        started: Timestamp::now(),
        broker: Broker::start(options, plumbing, close.clone()),
        servers: pg::Servers::to(settings.hosts, settings.connections),
        grant_roles: pg::GrantRoles::default(),
        verdicts: verdicts::Verdicts::default(),
        unopened: Semaphore::new(revocations::UNOPENED),
        reports: Semaphore::new(revocations::REPORTS),
        ended: ended::Ended::default(),
        authorities: bundles::Bundles::default(),
    })
}

/// Starts the consumers of this engine's queues. The result shows whether the broker delivers tasks.
fn consume_all(
    engine: &Arc<Engine>,
    work: &TaskTracker,
    plumbing: &TaskTracker,
    stop: &CancellationToken,
) -> impl Fn() -> bool + Send + Sync + 'static {
    let pool = engine.pool.clone();
    let start = |source, prefetch| consume(engine, source, prefetch, work, stop);
    let (creates, creating) = start(Source::Creates(pool.clone()), requests::PREFETCH);
    let (revokes, revoking) = start(Source::Revokes(pool.clone()), revocations::PREFETCH);
    let pings = Source::Pings(pool, engine.name.clone());
    let (for_this_one, _) = start(pings, orders::PREFETCH);
    work.spawn(requests::run(engine.clone(), creates, work.clone()));
    work.spawn(revocations::run(engine.clone(), revokes, work.clone()));
    plumbing.spawn(orders::run(engine.clone(), for_this_one));
    move || *creating.borrow() && *revoking.borrow()
}

/// Starts one consumer, with a flag for whether the broker delivers.
fn consume(
    engine: &Arc<Engine>,
    source: Source,
    prefetch: u16,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) -> (mpsc::Receiver<Incoming>, watch::Receiver<bool>) {
    let (sink, incoming) = mpsc::channel(usize::from(prefetch));
    let (attached, is_attached) = watch::channel(false);
    let (broker, stop) = (engine.broker.clone(), stop.clone());
    tasks.spawn(async move { broker.consume(source, prefetch, sink, stop, attached).await });
    (incoming, is_attached)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }
}
