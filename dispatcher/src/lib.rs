//! The dispatcher: the HTTP API, the lease store, the tasks for engines, the reconciler. This file has the
//! order of its start and of its end.

mod app;
mod command;
mod engines;
mod error;
mod http;
mod leases;
mod metrics;
mod password;
mod pbkdf2;
mod secrets;
mod servers;
mod settings;
mod start;
mod store;
mod upkeep;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use mayfly_common::VERSION;
use mayfly_common::broker::{Broker, Incoming, Login, Options, Part};
use mayfly_common::panics;
use mayfly_common::process::{self, Common, Process, Program};
use mayfly_common::serve::{self, Room};
use mayfly_common::settings::SettingsError;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::app::App;
use crate::settings::{Flags, NO_BROKER, Settings};
use crate::start::Front;
use crate::store::{Identity, Store};

#[doc(hidden)]
pub use crate::store::add_history;

/// Maximum number of replies that wait to be opened.
const REPLIES: usize = 1024;
/// Maximum time of each step of a stop after requests and issues are done.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);

/// Runs a dispatcher until SIGTERM, or does what the command line asks for instead.
#[must_use]
pub fn start() -> ExitCode {
    process::start::<Flags>()
}

impl Program for Flags {
    const NAME: &'static str = "mayfly-dispatcher";
    const DEFAULTS: &'static str = settings::DEFAULTS;
    type Settings = Settings;

    fn flags(&self) -> &process::CommonFlags {
        &self.common
    }

    fn settings(&self) -> Result<Settings, SettingsError> {
        Settings::load(self)
    }

    fn common(settings: &Settings) -> Common<'_> {
        Common {
            instance: &settings.name,
            admin: &settings.admin,
            log: &settings.log,
            traces: &settings.traces,
            effective: &settings.effective,
        }
    }

    fn act_instead(&self, settings: &Settings) -> Option<Result<(), String>> {
        command::act(self, settings)
    }

    async fn run(settings: Settings, process: Process) -> Result<(), String> {
        run(settings, process).await
    }
}

/// The wanted number of connections, or less if the process may open fewer files.
fn room(wanted: Room) -> Room {
    let possible = serve::connections_possible();
    if possible < wanted.connections {
        warn!(
            wanted = wanted.connections,
            possible,
            "there will be fewer connections than http.max_connections: the process may not open that many files"
        );
    }
    Room {
        connections: wanted.connections.min(possible),
        ..wanted
    }
}

async fn run(settings: Settings, mut process: Process) -> Result<(), String> {
    let metrics = metrics::Metrics::new().map_err(|error| error.to_string())?;
    let stop_admin = CancellationToken::new();
    let front = Arc::new(Front::new(metrics.clone()));
    let (ready, shown) = (front.clone(), front.clone());
    let listeners = [
        ("http", settings.http.tls.clone()),
        ("admin", settings.admin.tls.clone()),
    ];
    let serving_admin = tokio::spawn(process.admin.serve(
        move || ready.ready(),
        move || shown.text(&listeners),
        stop_admin.clone(),
    ));
    let mut asked_to_stop = std::pin::pin!(process.stop.asked());
    let opened = tokio::select! {
        opened = start::open(&settings.place, &front) => opened,
        () = &mut asked_to_stop => return Ok(()),
    };
    let (store, identity, _lock) = opened.map_err(|error| error.to_string())?;
    store.observe_commits(metrics.commits());
    let listener = serve::listen("http.listen", settings.http.address).await?;
    let listening = listener.local_addr().map_err(|error| error.to_string())?;

    // The parts end in this order: the API, issues, the broker's consumers, the store, the admin listener.
    let (stop_api, stop_work) = (CancellationToken::new(), CancellationToken::new());
    let work = TaskTracker::new();
    let (http_tls, http_room) = (settings.http.tls.clone(), settings.http_room);
    let (broker, replies) = connect(settings.login.clone(), &identity, &work, &stop_work)?;
    let app = Arc::new(app(settings, store, identity, broker, metrics));
    engines::inbox::start(&app, &work, &stop_work);
    leases::inbox::start(&app, replies, &work, &stop_work);
    start_loops(&app, &work, &stop_work);
    front.shows(app.clone());
    let mut serving_api = tokio::spawn(http::serve(
        app.clone(),
        listener,
        http_tls,
        room(http_room),
        stop_api.clone(),
    ));
    info!(version = VERSION, installation = %app.identity.installation, %listening, "the dispatcher is running");

    tokio::select! {
        () = &mut asked_to_stop => {}
        taken = app.broker.taken_at_start() => return Err(taken.to_string()),
        ended = &mut serving_api => return Err(format!("the API ended: {ended:?}")),
    }
    app.draining.store(true, Ordering::Relaxed);
    stop_api.cancel();
    finish_requests(&app, serving_api).await;
    stop_work.cancel();
    work.close();
    if tokio::time::timeout(DRAIN_LIMIT, work.wait())
        .await
        .is_err()
    {
        warn!("some work was still in progress at the stop; the next leader finds it in the store");
    }
    // Another dispatcher can lead at once. Otherwise it would wait until the term of this dispatcher is over.
    let _ = app.store.step_down(app.name.clone()).await;
    app.store.close().await;
    stop_admin.cancel();
    let _ = tokio::time::timeout(DRAIN_LIMIT, serving_admin).await;
    info!("stopped");
    Ok(())
}

/// Connects to the broker in the background.
fn connect(
    login: Option<Login>,
    identity: &Identity,
    work: &TaskTracker,
    stop: &CancellationToken,
) -> Result<(Broker, mpsc::Receiver<Incoming>), String> {
    let (reply_sink, replies) = mpsc::channel(REPLIES);
    let options = Options {
        login: login.ok_or(NO_BROKER)?,
        name: format!("mayfly-dispatcher {VERSION}"),
        part: Part::Dispatcher(reply_sink, identity.installation),
    };
    Ok((Broker::start(options, work, stop.clone()), replies))
}

fn app(
    settings: Settings,
    store: Store,
    identity: Identity,
    broker: Broker,
    metrics: metrics::Metrics,
) -> App {
    App {
        store,
        broker,
        identity,
        registry: app::registry::Registry::default(),
        replies: app::replies::Replies::default(),
        fair: app::turns::Fair::new(settings.shares),
        clocks: app::clocks::Clocks::default(),
        tokens: app::token_lookup::Tokens::new(),
        metrics,
        limits: settings.limits,
        issues: TaskTracker::new(),
        reconcile: Notify::new(),
        tidying: app::tidy_queue::TidyQueue::default(),
        name: settings.name,
        leads: false.into(),
        park_again: Notify::new(),
        see_parked: Notify::new(),
        probe_astray: Notify::new(),
        failed_reads: app::failed_reads::FailedReads::default(),
        authorities: app::bundles::Bundles::default(),
        draining: false.into(),
    }
}

/// Waits until requests and issues are done. A client may keep an idle connection open; a request ends by its
/// deadline.
async fn finish_requests(app: &App, serving_api: JoinHandle<()>) {
    let limit = app.limits.create_deadline + DRAIN_LIMIT;
    app.issues.close();
    let finishing = async {
        let _ = serving_api.await;
        app.issues.wait().await;
    };
    if tokio::time::timeout(limit, finishing).await.is_err() {
        warn!("requests were in progress at the end; the reconciler ends their leases");
    }
}

/// Starts the loops that end with the dispatcher.
fn start_loops(app: &Arc<App>, work: &TaskTracker, stop: &CancellationToken) {
    let begun = app.now();
    let keep = Keep { app, work, stop };
    keep.running("the reconciler", move |app, stop| {
        leases::reconcile::run(app, begun, stop)
    });
    keep.running(
        "the search for accounts that are due together",
        leases::together::run,
    );
    keep.running("the sweep", leases::sweep::run);
    keep.running("the check of the broker", upkeep::watch_broker);
    keep.running("the repeated parking of lost ends", leases::park_again::run);
    keep.running("the probe of the delay levels", engines::delays::watch);
    keep.running("the count of messages", upkeep::count_queues);
    keep.running("housekeeping", upkeep::housekeeping);
    keep.running("the recovery of rotations", servers::rotate::recover);
    keep.running("the refresh of grant roles", servers::refresh::run);
    keep.running("tidying", servers::tidy::run);
    keep.running("the look-up of tokens", async |app, stop| {
        let (store, metrics) = (app.store.clone(), app.metrics.clone());
        app.tokens.run(store, metrics, stop).await;
    });
}

/// Runs loops until the stop.
struct Keep<'a> {
    app: &'a Arc<App>,
    work: &'a TaskTracker,
    stop: &'a CancellationToken,
}

impl Keep<'_> {
    /// Runs a loop until the stop, and again after a panic.
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
