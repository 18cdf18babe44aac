//! The engine: takes tasks from its pool's queues, makes and ends PostgreSQL roles, reports. It
//! only dials out. Start: settings, logs, admin listener, broker, consumers. End: SIGTERM stops
//! the consumers, what was begun is finished, then the connection is closed.

mod authorities;
mod bundles;
mod ended;
mod metrics;
mod pg;
mod requests;
mod revocations;
mod settings;
mod verdicts;
mod work;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Parser;
use jiff::Timestamp;
use mayfly_common::broker::{Broker, Incoming, Options, Part, Source};
use mayfly_common::panics::caught;
use mayfly_common::settings::EXIT_BAD_CONFIGURATION;
use mayfly_common::trace::Export;
use mayfly_common::{VERSION, admin, telemetry};
use mayfly_protocol::task::{Kind, ReplyResult, Verdict};
use mayfly_protocol::timing::timing;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use crate::metrics::{Elsewhere, Ending, Metrics};
use crate::settings::Settings;
use crate::work::{Dispatcher, Engine};

/// How often an engine sees to the queue of certificate authorities.
const TEND_AUTHORITIES_EVERY: Duration = Duration::from_secs(5);
/// How often unused database connections are looked through.
const CLOSE_IDLE_EVERY: Duration = Duration::from_millis(500);
/// How often it is looked which grant roles lack something for now.
const GO_ON_EVERY: Duration = Duration::from_millis(500);

/// Makes and ends PostgreSQL roles for one pool.
#[derive(Parser)]
#[command(name = "mayfly-engine", version)]
struct Arguments {
    /// TOML file with settings; see the documented defaults with --print-defaults
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print the effective settings, secrets redacted, and exit
    #[arg(long)]
    check_config: bool,
    /// Print the documented default settings and exit
    #[arg(long)]
    print_defaults: bool,
    /// Address of /healthz, /readyz and /metrics
    #[arg(long, value_name = "HOST:PORT")]
    admin_listen: Option<String>,
    /// File that holds the broker's URL
    #[arg(long, value_name = "FILE")]
    amqp_url_file: Option<String>,
    /// The pool's key file
    #[arg(long, value_name = "FILE")]
    pool_key_file: Option<String>,
    /// Name of this engine
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    /// text or json
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<String>,
}

impl Arguments {
    fn flags(&self) -> Vec<(&'static str, String)> {
        [
            ("admin.listen", &self.admin_listen),
            ("amqp.url_file", &self.amqp_url_file),
            ("pool.key_file", &self.pool_key_file),
            ("engine.name", &self.name),
            ("log.level", &self.log_level),
            ("log.format", &self.log_format),
        ]
        .into_iter()
        .filter_map(|(key, value)| Some((key, value.clone()?)))
        .collect()
    }
}

#[allow(clippy::print_stdout, reason = "what was asked to be printed")]
fn main() -> ExitCode {
    mayfly_common::fault::set_windows();
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // clap prints its own words, on the stream they belong to.
            let _ = error.print();
            return match error.use_stderr() {
                true => ExitCode::from(EXIT_BAD_CONFIGURATION),
                false => ExitCode::SUCCESS,
            };
        }
    };
    if arguments.print_defaults {
        print!("{}", settings::DEFAULTS);
        return ExitCode::SUCCESS;
    }
    let bad_configuration = |error: mayfly_common::settings::SettingsError| {
        eprintln!("mayfly-engine: {error}");
        ExitCode::from(EXIT_BAD_CONFIGURATION)
    };
    let settings = match Settings::load(arguments.config.as_deref(), &arguments.flags()) {
        Ok(settings) => settings,
        Err(error) => return bad_configuration(error),
    };
    if let Err(error) = telemetry::start(&settings.log) {
        return bad_configuration(error);
    }
    if arguments.check_config {
        print!("{}", settings.describe());
        return ExitCode::SUCCESS;
    }
    if !mayfly_common::process::keep_memory_private() {
        warn!("the memory of this process could not be kept from core files");
    }
    // lapin's TLS asks for the process-wide default.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let name = settings.name.to_string();
    let export = match Export::start(&settings.traces, "mayfly-engine", &name) {
        Ok(export) => export,
        Err(error) => return bad_configuration(error),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let ended = match runtime {
        Ok(runtime) => runtime.block_on(run(settings)),
        Err(error) => Err(format!("no runtime: {error}")),
    };
    export.end();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!(error, "the engine cannot run");
            ExitCode::FAILURE
        }
    }
}

async fn run(settings: Settings) -> Result<(), String> {
    let listener = admin::listen("admin.listen", settings.admin.address).await?;
    // Consumers end at `stop`; the connection and the listener at `close`, after what was begun.
    let (stop, close) = (CancellationToken::new(), CancellationToken::new());
    let (work, plumbing) = (TaskTracker::new(), TaskTracker::new());
    let options = Options {
        login: settings.login,
        name: format!("mayfly-engine {}", settings.name),
        part: Part::Engine,
    };
    let broker = Broker::start(options, &plumbing, close.clone());
    let engine = Arc::new(Engine {
        metrics: Metrics::new(&settings.pool).map_err(|error| error.to_string())?,
        name: settings.name,
        pool: settings.pool,
        pool_keys: settings.pool_keys,
        dispatcher: Dispatcher::new(settings.dispatcher_keys)?,
        started: Timestamp::now(),
        broker,
        servers: pg::Servers::to(settings.hosts, settings.connections),
        grant_roles: pg::GrantRoles::default(),
        verdicts: verdicts::Verdicts::default(),
        unopened: Semaphore::new(revocations::UNOPENED),
        ended: ended::Ended::default(),
        authorities: bundles::Bundles::default(),
    });
    info!(engine = %engine.name, pool = %engine.pool, version = VERSION, "the engine starts");

    let pool = engine.pool.clone();
    let (creates, creating) = consume(
        &engine,
        Source::Creates(pool.clone()),
        requests::PREFETCH,
        &work,
        &stop,
    );
    let (revokes, revoking) = consume(
        &engine,
        Source::Revokes(pool.clone()),
        revocations::PREFETCH,
        &work,
        &stop,
    );
    let (orders, _) = consume(
        &engine,
        Source::Pings(pool, engine.name.clone()),
        16,
        &work,
        &stop,
    );
    work.spawn(requests::run(engine.clone(), creates, work.clone()));
    work.spawn(revocations::run(engine.clone(), revokes, work.clone()));
    plumbing.spawn(take_orders(engine.clone(), orders));
    let is_announced = Arc::new(AtomicBool::new(false));
    plumbing.spawn(every(timing().heartbeat_every, stop.clone(), {
        let (engine, announced) = (engine.clone(), is_announced.clone());
        async move || {
            // The first is sent as soon as it can be; only then is the engine ready.
            if engine.broker.up().await && engine.send_heartbeat(false).await {
                announced.store(true, Ordering::Relaxed);
            }
        }
    }));
    plumbing.spawn(every(CLOSE_IDLE_EVERY, close.clone(), {
        let engine = engine.clone();
        async move || {
            engine.servers.close_idle();
            engine.grant_roles.forget_unused();
        }
    }));
    plumbing.spawn(every(CLOSE_IDLE_EVERY, close.clone(), {
        let engine = engine.clone();
        async move || engine.servers.tend_kept().await
    }));
    plumbing.spawn(every(TEND_AUTHORITIES_EVERY, close.clone(), {
        let engine = engine.clone();
        async move || {
            if engine.broker.up().await {
                engine.tend_authorities().await;
            }
        }
    }));
    plumbing.spawn(every(GO_ON_EVERY, stop.clone(), {
        let (engine, stop) = (engine.clone(), stop.clone());
        async move || {
            tokio::select! {
                () = stop.cancelled() => {}
                () = engine.grant_roles.go_on(&engine.servers) => {}
            }
        }
    }));
    plumbing.spawn(every(CLOSE_IDLE_EVERY, close.clone(), {
        let engine = engine.clone();
        async move || engine.servers.tend_standbys().await
    }));
    let (readiness, measured) = (engine.clone(), engine.clone());
    let draining = stop.clone();
    let ready = move || match (draining.is_cancelled(), readiness.broker.is_up()) {
        (true, _) => Err("draining".to_owned()),
        (_, false) => Err("the broker is not connected".to_owned()),
        _ if *creating.borrow() && *revoking.borrow() && is_announced.load(Ordering::Relaxed) => {
            Ok(())
        }
        _ => Err("not consuming yet".to_owned()),
    };
    let tls = settings.admin.tls.clone();
    plumbing.spawn(admin::serve(
        listener,
        settings.admin.tls,
        ready,
        move || {
            measured.metrics.tls(tls.as_ref());
            measured.metrics.waiting(measured.grant_roles.waiting());
            measured.metrics.text(&Elsewhere {
                unreadable: measured.broker.unreadable(),
                reconnects: measured.broker.reconnects(),
                clock_skew_seconds: measured.servers.clock_skew(),
                quarantined: measured.servers.quarantined(),
            })
        },
        close.clone(),
    ));

    admin::asked_to_stop()
        .await
        .map_err(|error| format!("no signal handler: {error}"))?;
    stop.cancel();
    work.close();
    if tokio::time::timeout(timing().drain_within, work.wait())
        .await
        .is_err()
    {
        warn!("some tasks are not done; others will take them");
    }
    engine.send_heartbeat(true).await;
    close.cancel();
    plumbing.close();
    let _ = tokio::time::timeout(Duration::from_secs(3), plumbing.wait()).await;
    info!(engine = %engine.name, "the engine has stopped");
    Ok(())
}

/// Starts consuming; tells whether the broker delivers.
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

/// What is for this engine alone: pings and verdicts.
async fn take_orders(engine: Arc<Engine>, mut orders: mpsc::Receiver<Incoming>) {
    while let Some(order) = orders.recv().await {
        caught("an order", take_order(&engine, order)).await;
    }
}

async fn take_order(engine: &Engine, order: Incoming) {
    let kind = order.head.kind;
    engine.metrics.begun(kind);
    let arrived = order.arrived;
    let mut name = None;
    let taken = match kind {
        Kind::Verdict => engine
            .open::<Verdict>(&order)
            .map(|verdict| engine.verdicts.deliver(verdict)),
        _ => engine
            .open_request::<()>(&order)
            .map(|((), asked)| name = asked),
    };
    let ending = match taken {
        Ok(()) => Ending::Ok,
        Err(error) => {
            engine.metrics.refused(error.reason());
            Ending::Refused
        }
    };
    if kind == Kind::Ping && taken.is_ok() {
        engine
            .reply(&order, name, ReplyResult::Pong(engine.heartbeat(false)))
            .await;
    }
    order.ack().await;
    engine
        .metrics
        .ended(kind, ending, arrived.elapsed().as_secs_f64());
}

/// Does something again and again until `stop`, the first time at once.
async fn every(period: Duration, stop: CancellationToken, mut act: impl AsyncFnMut()) {
    let mut ticks = tokio::time::interval(period);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => drop(caught("a task that comes again", act()).await),
        }
    }
}
