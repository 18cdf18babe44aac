//! The dispatcher: the HTTP API, the lease store, the tasks for engines, the reconciler. This
//! file is the order of its start and of its end.

mod app;
mod engines;
mod error;
mod http;
mod leases;
mod metrics;
mod secrets;
mod servers;
mod settings;
mod start;
mod store;
mod upkeep;

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use clap::Parser;
use mayfly_common::admin;
use mayfly_common::broker::{Broker, Options, Part, take_over};
use mayfly_common::panics;
use mayfly_common::serve::{self, Room};
use mayfly_common::settings::EXIT_BAD_CONFIGURATION;
use mayfly_common::trace::Export;
use mayfly_common::{VERSION, telemetry};
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use crate::app::App;
use crate::settings::{Flags, Settings, copy_target};
use crate::start::Front;
use crate::store::OpenError;

/// Threads of the runtime; the work waits for the broker and the disk, not for processors.
const WORKERS: usize = 2;
/// Replies that may wait to be opened.
const REPLIES: usize = 1024;
/// Settings are refused without it before this is said.
const NO_BROKER: &str = "amqp.url is missing";
/// For what is left once requests and issues are done.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    mayfly_common::fault::set_windows();
    let flags = match Flags::try_parse() {
        Ok(flags) => flags,
        Err(error) => {
            // clap prints its own words, on the stream they belong to.
            let _ = error.print();
            return if error.use_stderr() {
                ExitCode::from(EXIT_BAD_CONFIGURATION)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    let settings = match Settings::load(&flags) {
        Ok(settings) => settings,
        Err(error) => return refuse(&error),
    };
    if let Err(error) = telemetry::start(&settings.log) {
        return refuse(&error);
    }
    if flags.check_config {
        let printed = std::io::stdout().write_all(settings.redacted().as_bytes());
        return if printed.is_ok() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        };
    }
    if !mayfly_common::process::keep_memory_private() {
        warn!("the memory of this process could not be kept from core files");
    }
    if rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .is_err()
    {
        warn!("another TLS provider was installed before");
    }
    if let Some(done) = command(&flags, &settings) {
        return match done {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                error!("{error}");
                ExitCode::FAILURE
            }
        };
    }
    let name = mayfly_protocol::names::random_text(16);
    let export = match Export::start(&settings.traces, "mayfly-dispatcher", &name) {
        Ok(export) => export,
        Err(error) => return refuse(&error),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .enable_all()
        .build();
    let ended = match runtime {
        Ok(runtime) => runtime.block_on(run(settings, name)),
        Err(error) => Err(error.to_string()),
    };
    export.end();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            error!("{reason}");
            ExitCode::FAILURE
        }
    }
}

/// What is asked for instead of a dispatcher, done.
fn command(flags: &Flags, settings: &Settings) -> Option<Result<(), String>> {
    let place = &settings.place;
    if flags.take_over_broker {
        return Some(take_over_broker(settings));
    }
    let done: Result<(), OpenError> = if let Some(file) = &flags.backup {
        store::back_up(place, file, flags.keep.map(usize::from))
    } else if let Some(file) = &flags.restore {
        store::restore(place, file)
    } else if let Some(to) = &flags.copy_store {
        return Some(copy_store(settings, to));
    } else if flags.restored {
        store::mark_restored(place).map(|()| info!("the store is marked as restored"))
    } else if let Some(file) = &flags.new_root_token {
        store::new_root_token(place, file).map(|()| {
            info!(file = %file.display(), "the root token is replaced; the new one is in this file");
        })
    } else if let Some(key) = flags.rekey {
        store::rekey(place, key, flags.finish)
    } else if flags.finish_upgrade {
        store::finish_upgrade(place).map(|was_under_way| {
            if !was_under_way {
                info!("no upgrade of this store is under way");
            }
        })
    } else {
        return None;
    };
    Some(done.map_err(|error| error.to_string()))
}

fn copy_store(settings: &Settings, to: &str) -> Result<(), String> {
    let to = copy_target(to, &settings.place.data_dir).map_err(|error| error.to_string())?;
    store::copy_store(&settings.place, &to).map_err(|error| error.to_string())
}

/// Makes the broker's virtual host this installation's.
fn take_over_broker(settings: &Settings) -> Result<(), String> {
    let ours = store::installation(&settings.place).map_err(|error| error.to_string())?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    let login = settings.login.as_ref().ok_or(NO_BROKER)?;
    let taking = take_over(login, &ours);
    let was_another_s = runtime
        .block_on(taking)
        .map_err(|error| error.to_string())?;
    match was_another_s {
        true => {
            info!(installation = %ours, "the virtual host of the broker is this installation's now")
        }
        false => {
            info!(installation = %ours, "the virtual host of the broker is this installation's already")
        }
    }
    Ok(())
}

fn refuse(error: &dyn std::fmt::Display) -> ExitCode {
    let _ = writeln!(
        std::io::stderr(),
        "mayfly-dispatcher: bad configuration: {error}"
    );
    ExitCode::from(EXIT_BAD_CONFIGURATION)
}

/// As many connections as are wanted, or as the system has files for.
fn room(wanted: Room) -> Room {
    let possible = serve::connections_possible();
    if possible < wanted.connections {
        warn!(
            wanted = wanted.connections,
            possible,
            "there will be fewer connections than http.max_connections: the process may not open so many files"
        );
    }
    Room {
        connections: wanted.connections.min(possible),
        ..wanted
    }
}

async fn run(settings: Settings, name: String) -> Result<(), String> {
    let metrics = metrics::Metrics::new().map_err(|error| error.to_string())?;
    let admin_listener = admin::listen("admin.listen", settings.admin.address).await?;
    let stop_admin = CancellationToken::new();
    let front = Arc::new(Front::new(metrics.clone()));
    let (ready, shown) = (front.clone(), front.clone());
    let listeners = [
        ("http", settings.http.tls.clone()),
        ("admin", settings.admin.tls.clone()),
    ];
    let serving_admin = tokio::spawn(admin::serve(
        admin_listener,
        settings.admin.tls.clone(),
        move || ready.ready(),
        move || shown.text(&listeners),
        stop_admin.clone(),
    ));
    let mut asked_to_stop = std::pin::pin!(admin::asked_to_stop());
    let (store, identity, _lock) = tokio::select! {
        opened = start::open(&settings.place, &front) => opened.map_err(|error| error.to_string())?,
        asked = &mut asked_to_stop => return asked.map_err(|error| error.to_string()),
    };
    store.observe_commits(metrics.commits());
    let api_listener = admin::listen("http.listen", settings.http.address).await?;
    let listening = api_listener
        .local_addr()
        .map_err(|error| error.to_string())?;

    // Ended in this order: the API takes no more requests, issues are finished, the broker's
    // consumers end, the store closes, and last the admin listener.
    let (stop_api, stop_work) = (CancellationToken::new(), CancellationToken::new());
    let work = TaskTracker::new();

    let (reply_sink, replies) = mpsc::channel(REPLIES);
    let options = Options {
        login: settings.login.ok_or(NO_BROKER)?,
        name: format!("mayfly-dispatcher {VERSION}"),
        part: Part::Dispatcher(reply_sink, identity.installation),
    };
    let broker = Broker::start(options, &work, stop_work.clone());
    let app = Arc::new(App {
        store,
        broker,
        identity,
        registry: engines::registry::Registry::default(),
        replies: engines::replies::Replies::default(),
        fair: leases::turns::Fair::new(settings.shares),
        clocks: servers::clocks::Clocks::default(),
        tokens: http::token_lookup::Tokens::new(),
        metrics,
        limits: settings.limits,
        issues: TaskTracker::new(),
        reconcile: Notify::new(),
        tidying: servers::tidy_queue::TidyQueue::default(),
        name,
        leads: false.into(),
        park_again: Notify::new(),
        see_parked: Notify::new(),
        probe_astray: Notify::new(),
        failed_reads: leases::failed_reads::FailedReads::default(),
        authorities: engines::bundles::Bundles::default(),
        draining: false.into(),
    });
    engines::inbox::start(&app, replies, &work, &stop_work);
    let begun = app.now();
    let keep = Keep {
        app: &app,
        work: &work,
        stop: &stop_work,
    };
    keep.running("the reconciler", move |app, stop| {
        leases::reconcile::run(app, begun, stop)
    });
    keep.running("the sweep", leases::sweep::run);
    keep.running("the look at the broker", upkeep::watch_broker);
    keep.running("parking again what was lost", leases::park_again::run);
    keep.running("the look at the delay levels", engines::delays::watch);
    keep.running("the count of messages", upkeep::count_queues);
    keep.running("housekeeping", upkeep::housekeeping);
    keep.running("the recovery of rotations", servers::rotate::recover);
    keep.running("the look at grants", servers::refresh::run);
    keep.running("tidying", servers::tidy::run);
    keep.running("the memory of tokens", async |app, stop| {
        let (store, metrics) = (app.store.clone(), app.metrics.clone());
        app.tokens.run(store, metrics, stop).await;
    });
    front.shows(app.clone());
    let mut serving_api = tokio::spawn(http::serve(
        app.clone(),
        api_listener,
        settings.http.tls,
        room(settings.http_room),
        stop_api.clone(),
    ));
    info!(version = VERSION, installation = %app.identity.installation, %listening, "the dispatcher is running");

    tokio::select! {
        asked = &mut asked_to_stop => asked.map_err(|error| error.to_string())?,
        taken = app.broker.taken_at_start() => return Err(taken.to_string()),
        ended = &mut serving_api => return Err(format!("the API ended: {ended:?}")),
    }
    app.draining.store(true, Ordering::Relaxed);
    stop_api.cancel();
    // An idle connection may stay open for as long as its client likes; a request may not.
    let patience = app.limits.create_deadline + DRAIN_LIMIT;
    app.issues.close();
    let finishing = async {
        let _ = serving_api.await;
        app.issues.wait().await;
    };
    if tokio::time::timeout(patience, finishing).await.is_err() {
        warn!("requests were still under way at the end; the reconciler ends their leases");
    }
    stop_work.cancel();
    work.close();
    if tokio::time::timeout(DRAIN_LIMIT, work.wait())
        .await
        .is_err()
    {
        warn!("some work was still under way at the end; it is found in the store");
    }
    // Another one need not wait until this one's term is over.
    let _ = app.store.step_down(app.name.clone()).await;
    app.store.close().await;
    stop_admin.cancel();
    let _ = tokio::time::timeout(DRAIN_LIMIT, serving_admin).await;
    info!("stopped");
    Ok(())
}

/// Starts the loops that end with the dispatcher.
struct Keep<'a> {
    app: &'a Arc<App>,
    work: &'a TaskTracker,
    stop: &'a CancellationToken,
}

impl Keep<'_> {
    /// Runs a loop until the stop, also where it panics.
    fn running<F: Future<Output = ()> + Send + 'static>(
        &self,
        what: &'static str,
        begin: impl Fn(Arc<App>, CancellationToken) -> F + Send + Sync + 'static,
    ) {
        let (app, stop) = (self.app.clone(), self.stop.clone());
        self.work.spawn(async move {
            let begin = || begin(app.clone(), stop.clone());
            panics::restarted(what, stop.clone(), begin).await;
        });
    }
}
