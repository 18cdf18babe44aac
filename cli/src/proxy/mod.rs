//! `mayfly proxy`: a PostgreSQL server for local clients, which log in with any name. It logs in to the real server
//! with the account of a lease, and moves sessions to the account of the next lease when they are idle.
//!
//! SQL passes as it is. The proxy reads the types of messages, command tags and the start of a session.

mod cancels;
mod carried;
mod client;
mod end_point;
mod errors;
mod frames;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod fuzz;
mod hold;
mod leaving;
mod listen;
mod metrics;
mod notes;
mod relay;
mod scram;
mod settings;
mod site;
mod startup;
mod stream;
mod talk;
mod target;
mod upstream;
mod vanished;
mod wires;

use std::ffi::OsString;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use mayfly_common::admin::Admin;
use mayfly_common::serve::connections_possible;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use rustix::process::Signal;
use tokio::process::Child;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::child::{self, Signals};
use crate::client::Api;
use crate::failure::Failure;
use crate::keeper::Keeper;
use crate::ui;
use client::Shared;
use listen::{Listener, Place};
use metrics::Metrics;
use scram::Verifier;
pub(crate) use settings::{DRAIN_SECONDS, LISTEN, Listen, MAX_CONNECTIONS, Settings};
use site::Site;

/// Pause after the system had no socket for a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Time for the remaining work after the command has ended.
const AFTER_COMMAND: Duration = Duration::from_secs(1);
/// Time for the last message of sessions that are cut.
const AFTER_CUT: Duration = Duration::from_secs(5);
/// Maximum wait for a read that is in progress when the proxy ends, so that its lease is revoked too.
const LAST_READ: Duration = Duration::from_secs(10);
/// Files of a session: the client's connection and the server's.
const FILES_OF_SESSION: usize = 2;

/// Threads that pass bytes on: half of the processors, since the program needs some of them too. Threads wake each
/// other: on two processors a second thread adds a tenth to what a transaction of `pgbench -S` costs.
pub(crate) fn threads() -> usize {
    thread::available_parallelism().map_or(1, |processors| (processors.get() / 2).max(1))
}

/// Runs until a signal or the end of the command. The result is the exit code.
pub(crate) async fn run(
    settings: &Settings,
    command: &[OsString],
    api: Api,
) -> Result<u8, Failure> {
    let most = settings.most()?;
    if connections_possible() < most * FILES_OF_SESSION {
        ui::warning(&format!(
            "the limit on open files is too low for {most} sessions: raise it (ulimit -n)"
        ));
    }
    let metrics = Metrics::new().map_err(|error| Failure::Local(error.to_string()))?;
    let vanished = watch::Sender::default();
    let mut proxy = Proxy {
        sites: Vec::new(),
        shared: Arc::new(Shared::new(most, vanished.clone())),
        stop: CancellationToken::new(),
        clients: TaskTracker::new(),
        following: JoinSet::new(),
        watching: JoinSet::new(),
        keeping: JoinSet::new(),
        admin: JoinSet::new(),
    };
    // From here on a signal does not end this process, which may have leases to give back.
    let mut signals = Signals::listen()
        .map_err(|error| Failure::Local(format!("cannot listen for signals: {error}")))?;
    proxy.watching.spawn(vanished::watch(vanished));
    let places = proxy.open(settings, &Arc::new(api), &metrics).await?;
    proxy.serve_admin(settings, metrics).await?;
    // The select below drops the future of `work` when a listener is refused. The command is kept here, so that it is
    // always waited for.
    let mut running = None;
    let work = work(
        &proxy.sites,
        &places,
        settings,
        command,
        &mut signals,
        &mut running,
    );
    let done = tokio::select! {
        done = work => done,
        failure = refused(&mut proxy.keeping) => Err(failure),
    };
    if let Some(mut command) = running {
        let grace = settings.drain();
        // The failure is already known.
        let _ = child::stop(&mut command, Signal::TERM, grace, &mut signals).await;
    }
    let drain = match (&done, command.is_empty()) {
        (Ok(_), true) => settings.drain(),
        _ => AFTER_COMMAND,
    };
    proxy.end(drain, &mut signals).await;
    done
}

/// Waits for a signal, or runs the command. It is in `running` until it has ended.
async fn work(
    sites: &[Arc<Site>],
    places: &[Place],
    settings: &Settings,
    command: &[OsString],
    signals: &mut Signals,
    running: &mut Option<Child>,
) -> Result<u8, Failure> {
    let (Some((program, arguments)), Some(place)) = (command.split_first(), places.first()) else {
        signals.next().await;
        return Ok(0);
    };
    // Each listener then has an account, so no client is refused later for lack of one.
    let accounts = async {
        let mut databases = Vec::new();
        for site in sites {
            databases.push(site.database().await);
        }
        databases
    };
    let databases = tokio::select! {
        databases = accounts => databases,
        signal = signals.next() => return Ok(child::killed_by(signal.as_raw())),
    };
    let database = databases.first().map_or("", String::as_str);
    let child = match child::start(program, arguments, environment(place, database, settings)) {
        Ok(child) => running.insert(child),
        Err(code) => return Ok(code),
    };
    let ended = child::finish(child, signals).await;
    *running = None;
    ended.map_err(|error| Failure::Local(format!("cannot wait for the command: {error}")))
}

/// The failure of a keeper whose first read was refused.
async fn refused(keeping: &mut JoinSet<Result<(), Failure>>) -> Failure {
    loop {
        match keeping.join_next().await {
            Some(Ok(Err(failure))) => return failure,
            Some(Err(error)) => return Failure::Local(error.to_string()),
            Some(Ok(Ok(()))) => {}
            None => std::future::pending().await,
        }
    }
}

/// The variables with which a command connects to its listener.
fn environment(place: &Place, database: &str, settings: &Settings) -> Vec<(&'static str, String)> {
    let (host, port) = place.host_and_port();
    let part = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
    let password = settings.listen.first().and_then(|it| it.place().ok());
    let password = password.and_then(|(_, password)| password);
    let secret = match &password {
        Some(password) => format!(":{}", part(password.expose())),
        None => String::new(),
    };
    let address = match place {
        Place::Tcp(_) if host.contains(':') => format!("[{host}]"),
        Place::Tcp(_) => host.clone(),
        Place::Unix(..) => part(&host),
    };
    let url = format!(
        "postgresql://mayfly{secret}@{address}:{port}/{}?sslmode=disable",
        part(database)
    );
    let mut environment = vec![
        ("DATABASE_URL", url),
        ("PGHOST", host),
        ("PGPORT", port.to_string()),
        ("PGDATABASE", database.to_owned()),
        ("PGUSER", "mayfly".to_owned()),
        // The proxy has no TLS: the connection does not leave this machine.
        ("PGSSLMODE", "disable".to_owned()),
        ("PGGSSENCMODE", "disable".to_owned()),
        ("PGCHANNELBINDING", "disable".to_owned()),
        ("PGTARGETSESSIONATTRS", "any".to_owned()),
    ];
    if let Some(password) = password {
        environment.push(("PGPASSWORD", password.expose().to_owned()));
    }
    environment
}

/// The parts of a running proxy.
struct Proxy {
    sites: Vec<Arc<Site>>,
    shared: Arc<Shared>,
    /// Ends the listeners and the admin listener.
    stop: CancellationToken,
    clients: TaskTracker,
    following: JoinSet<()>,
    /// Looks for vanished peers.
    watching: JoinSet<()>,
    keeping: JoinSet<Result<(), Failure>>,
    admin: JoinSet<()>,
}

impl Proxy {
    /// Opens all listeners, and begins to read leases.
    async fn open(
        &mut self,
        settings: &Settings,
        api: &Arc<Api>,
        metrics: &Metrics,
    ) -> Result<Vec<Place>, Failure> {
        let mut opened = Vec::new();
        for listen in &settings.listen {
            let (place, password) = listen.place()?;
            let keeper = Keeper::new(api.clone(), &listen.secret, listen.ttl_seconds)?;
            let (listener, place) = Listener::open(&place).await.map_err(Failure::Local)?;
            let password = password.as_ref().map(Verifier::new);
            let name = place.to_string();
            let site = Site::new(name, keeper, api.clone(), password, listen.hold, metrics);
            opened.push((listener, place, Arc::new(site)));
        }
        let mut places = Vec::new();
        for (listener, place, site) in opened {
            ui::plan(&format!("{place}: listening for {}", site.keeper.path()));
            places.push(place);
            let kept = site.clone();
            self.keeping.spawn(async move { kept.keeper.run().await });
            let followed = site.clone();
            self.following.spawn(followed.follow());
            self.clients.spawn(accept(
                listener,
                site.clone(),
                self.shared.clone(),
                self.stop.clone(),
                self.clients.clone(),
            ));
            self.sites.push(site);
        }
        Ok(places)
    }

    async fn serve_admin(&mut self, settings: &Settings, metrics: Metrics) -> Result<(), Failure> {
        let Some(address) = settings.admin_listen else {
            return Ok(());
        };
        let admin = Admin::at(address).await.map_err(Failure::Local)?;
        let (ready, measured) = (self.sites.clone(), self.sites.clone());
        let stop = self.stop.clone();
        let stopped = stop.clone();
        self.admin.spawn(admin.serve(
            move || match stopped.is_cancelled() {
                true => Err("draining".to_owned()),
                false => ready.iter().try_for_each(|site| {
                    site.not_ready()
                        .map_err(|why| format!("{}: {why}", site.name))
                }),
            },
            move || {
                measured.iter().for_each(|site| site.measure());
                metrics.text()
            },
            stop,
        ));
        Ok(())
    }

    /// Ends all sessions, and revokes the leases. A second signal cuts at once.
    async fn end(mut self, drain: Duration, signals: &mut Signals) {
        self.following.shutdown().await;
        self.stop.cancel();
        for site in &self.sites {
            site.drain(Instant::now() + drain);
        }
        self.clients.close();
        tokio::select! {
            () = self.clients.wait() => {}
            () = sleep(drain + AFTER_CUT) => {}
            _ = signals.next() => {
                self.sites.iter().for_each(|site| site.drain(Instant::now()));
                let _ = timeout(AFTER_CUT, self.clients.wait()).await;
            }
        }
        self.sites.iter().for_each(|site| site.keeper.stop());
        let last_reads = async { while self.keeping.join_next().await.is_some() {} };
        let _ = timeout(LAST_READ, last_reads).await;
        let mut revoking = JoinSet::new();
        for site in self.sites {
            revoking.spawn(async move { site.keeper.revoke_all().await });
        }
        revoking.join_all().await;
        self.admin.shutdown().await;
    }
}

/// Takes clients until `stop`.
async fn accept(
    listener: Listener,
    site: Arc<Site>,
    shared: Arc<Shared>,
    stop: CancellationToken,
    clients: TaskTracker,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        match accepted {
            Ok(stream) => {
                clients.spawn(client::serve(stream, site.clone(), shared.clone()));
            }
            Err(error) if is_of_the_client(&error) => {}
            Err(error) => {
                ui::warning(&format!(
                    "{}: a connection was not accepted: {error}",
                    site.name
                ));
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Whether the client caused the failure of an accept. If the system has no free socket, the next accept fails too.
fn is_of_the_client(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::NotConnected
            | io::ErrorKind::InvalidInput
    )
}
