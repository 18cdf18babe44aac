//! `mayfly exec --restart` stops the command and starts it again with a new credential.

use std::ffi::{OsStr, OsString};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use tokio::process::Child;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::child::{self, Signals};
use crate::client::Api;
use crate::credential::Credential;
use crate::failure::Failure;
use crate::keeper::{Keeper, Lease};
use crate::protection::{self, Protection};

/// Maximum wait for a read that is in progress when the command ends, so that its lease is revoked too.
const LAST_READ: Duration = Duration::from_secs(10);

/// The way in which the command is stopped.
pub(super) struct Stop {
    signal: Signal,
    grace: Duration,
}

impl Stop {
    /// `grace` is in seconds.
    pub(super) fn new(signal: Signal, grace: u64) -> Self {
        Self {
            signal,
            grace: Duration::from_secs(grace),
        }
    }

    /// Stops the command with its signal, and after the grace with SIGKILL. Returns its exit code.
    async fn stop(&self, command: &mut Child, signals: &mut Signals) -> io::Result<u8> {
        child::stop(command, self.signal, self.grace, signals).await
    }
}

/// Runs the command with the newest credential, until it ends by itself or by a signal to this process.
pub(super) async fn run(
    path: &str,
    ttl: Option<u64>,
    command: (&OsStr, &[OsString]),
    stop: &Stop,
    api: Api,
) -> Result<u8, Failure> {
    let api = Arc::new(api);
    let keeper = Arc::new(Keeper::new(api.clone(), path, ttl)?);
    // From here on signals do not end this process, because it may have leases to revoke.
    let mut signals = Signals::listen()
        .map_err(|error| Failure::Local(format!("cannot listen for signals: {error}")))?;
    let kept = keeper.clone();
    let mut reading = tokio::spawn(async move { kept.run().await });
    // The select below drops the future of `supervise` when the keeper ends. The command is kept here, so that it is
    // always waited for.
    let mut running = None;
    let mut done = tokio::select! {
        refused = &mut reading => match refused {
            Ok(Err(failure)) => Err(failure),
            Ok(Ok(())) | Err(_) => Err(Failure::Local("leases are no longer read and renewed".into())),
        },
        code = supervise(command, stop, (&keeper, &api), &mut signals, &mut running) => code,
    };
    if let Some(mut command) = running
        && let Err(error) = stop.stop(&mut command, &mut signals).await
    {
        done = Err(Failure::Local(format!(
            "cannot wait for the command: {error}"
        )));
    }
    keeper.stop();
    if !reading.is_finished() {
        // If there is no answer, the lease ends by itself.
        let _ = timeout(LAST_READ, &mut reading).await;
    }
    keeper.revoke_all().await;
    done
}

async fn supervise(
    (program, arguments): (&OsStr, &[OsString]),
    stop: &Stop,
    (keeper, api): (&Keeper, &Api),
    signals: &mut Signals,
    running: &mut Option<Child>,
) -> Result<u8, Failure> {
    let mut newest = keeper.newest();
    let mut known: Option<Option<Protection>> = None;
    loop {
        let lease = tokio::select! {
            lease = next(&mut newest) => lease,
            // No command is running that could get the signal.
            signal = signals.next() => return Ok(child::killed_by(signal.as_raw())),
        };
        let credential = Credential::read(&lease.answer)?;
        match protection::ask(api, keeper.path()).await {
            Ok(protection) => known = Some(protection),
            Err(failure) if known.is_none() => return Err(failure),
            // The last lease stays in use.
            Err(_) => {}
        }
        let protection = known.as_ref().and_then(Option::as_ref);
        let protected = protection::of_command(protection, &credential, protection::is_set)?;
        let command = match protected.start(program, arguments, &credential.environment()) {
            Ok(command) => running.insert(command),
            Err(code) => return Ok(code),
        };
        drop(credential);
        let mut ended = tokio::select! {
            ended = child::finish(command, signals) => Some(ended),
            _ = newest.changed() => None,
        };
        newest.mark_changed();
        // If a signal asked the command to end, it is not started again.
        if ended.is_none() && signals.ask_for_end() {
            ended = Some(child::finish(command, signals).await);
        }
        if ended.is_none() {
            let stopped = stop.stop(command, signals).await;
            if stopped.is_err() || signals.ask_for_end() {
                ended = Some(stopped);
            }
        }
        *running = None;
        if let Some(ended) = ended {
            return ended
                .map_err(|error| Failure::Local(format!("cannot wait for the command: {error}")));
        }
        // No command uses this lease any more.
        keeper.end(&lease).await;
    }
}

/// Waits for a lease that is newer than the last one seen.
async fn next(newest: &mut watch::Receiver<Option<Arc<Lease>>>) -> Arc<Lease> {
    loop {
        if let Some(lease) = newest.borrow_and_update().clone() {
            return lease;
        }
        if newest.changed().await.is_err() {
            // This is never reached: the keeper lives as long as its receivers here.
            std::future::pending::<()>().await;
        }
    }
}
