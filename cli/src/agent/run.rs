//! The agent's work from its start to its end.

use std::convert::Infallible;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::time::{Instant, sleep, timeout};

use super::settings::{AgentArgs, Settings};
use super::shown::Shown;
use super::sinks::Sink;
use super::watch::Watched;
use crate::child::Signals;
use crate::client::Api;
use crate::credential::Credential;
use crate::failure::Failure;
use crate::keeper::{Keeper, Lease};
use crate::listener::Listener;
use crate::protection;
use crate::route::Route;
use crate::ui;

/// Maximum time of a renewal. No renewal is requested in the last part of a maximum.
const CALL_MARGIN: Duration = Duration::from_secs(2);
/// Minimum life of an account after its replacement, if its maximum allows it.
const OVERLAP: Duration = Duration::from_secs(30);
/// Pause before files are written again after a failure.
const WRITE_AGAIN: Duration = Duration::from_secs(2);
/// Maximum wait for a read that is in progress when the agent ends, so that its lease is revoked too.
const LAST_READ: Duration = Duration::from_secs(10);

/// Runs the agent until it is ended, or writes the files once. `connect` makes the client of the dispatcher.
///
/// # Errors
/// A setting is wrong, the secret cannot be read and waiting cannot help, or a file cannot be written at the start.
pub(crate) async fn run(
    args: AgentArgs,
    connect: impl FnOnce() -> Result<Api, Failure>,
) -> Result<(), Failure> {
    let settings = Settings::resolve(args)?;
    // A credential is requested only if it can be written.
    settings.sinks.iter().try_for_each(Sink::check)?;
    let api = connect()?;
    match settings.is_once {
        true => once(&settings, &api).await,
        false => stay(settings, Arc::new(api)).await,
    }
}

async fn once(settings: &Settings, api: &Api) -> Result<(), Failure> {
    let route = Route::secret(&settings.secret)?.with("ttl", settings.ttl);
    let answer = api.get_long(&route).await?;
    ui::warnings(&answer);
    let credential = read(&answer, settings, api).await?;
    write(&settings.sinks, &credential, &[])?;
    settings.notify.inform().await;
    Ok(())
}

async fn stay(settings: Settings, api: Arc<Api>) -> Result<(), Failure> {
    let watched = settings.watch_pid.map(Watched::of).transpose()?;
    let listener = match settings.listen {
        Some(address) => Some(Listener::open(address).await?),
        None => None,
    };
    let keeper = Arc::new(Keeper::new(api.clone(), &settings.secret, settings.ttl)?);
    // From here on signals do not end this process, because it may have leases to revoke.
    let mut signals = Signals::listen()
        .map_err(|error| Failure::Local(format!("cannot listen for signals: {error}")))?;
    let shown = Arc::new(Shown::default());
    let kept = keeper.clone();
    let mut reading = tokio::spawn(async move { kept.run().await });
    let done = tokio::select! {
        refused = &mut reading => refused.unwrap_or_else(|error| {
            Err(Failure::Local(format!("leases are no longer read and renewed: {error}")))
        }),
        never = deliver(&keeper, &settings, &api, &shown) => match never {},
        never = serve(listener, shown.clone()) => match never {},
        _ = signals.next() => Ok(()),
        () = shown.quit() => Ok(()),
        () = end_of(watched) => Ok(()),
    };
    keeper.stop();
    if !reading.is_finished() {
        tokio::select! {
            _ = timeout(LAST_READ, &mut reading) => {}
            _ = signals.next() => {}
        }
    }
    if !settings.is_keeping {
        keeper.revoke_all().await;
    }
    done
}

async fn serve(listener: Option<Listener>, shown: Arc<Shown>) -> Infallible {
    match listener {
        Some(listener) => listener.serve(move |request| shown.answer(request)).await,
        None => pending().await,
    }
}

async fn end_of(watched: Option<Watched>) {
    match watched {
        Some(process) => process.ended().await,
        None => pending().await,
    }
}

/// A lease whose credential programs may have.
struct Delivered {
    lease: Arc<Lease>,
    credential: Credential,
}

/// Writes each new credential, and lets the previous account end. While files cannot be written, the previous
/// credential is renewed.
async fn deliver(keeper: &Keeper, settings: &Settings, api: &Api, shown: &Shown) -> Infallible {
    let mut newest = keeper.newest();
    let mut delivered: Vec<Delivered> = Vec::new();
    loop {
        let lease = newest.borrow_and_update().clone();
        let is_new = |lease: &Arc<Lease>| {
            let written = delivered.first();
            written.is_none_or(|written| written.lease.id != lease.id)
        };
        if let Some(lease) = lease.filter(is_new) {
            delivered.retain(|it| it.lease.end() > Instant::now());
            let previous: Vec<&Credential> = delivered.iter().map(|it| &it.credential).collect();
            let credential = read(&lease.answer, settings, api).await;
            let written = credential.and_then(|credential| {
                write(&settings.sinks, &credential, &previous)?;
                Ok(credential)
            });
            match written {
                Ok(credential) => {
                    shown.is_written(&lease);
                    ui::plan(&format!(
                        "the files have the credential of lease {}",
                        lease.id
                    ));
                    delivered.insert(0, Delivered { lease, credential });
                    // The program needs the time that the dispatcher takes for a renewal.
                    let left = async {
                        if let Some(previous) = delivered.get(1) {
                            leave(&previous.lease, api, shown).await;
                        }
                    };
                    tokio::join!(settings.notify.inform(), left);
                    keeper.forget_ended();
                }
                Err(failure) => {
                    shown.is_not_written(&failure);
                    sleep(WRITE_AGAIN).await;
                    continue;
                }
            }
        }
        if newest.changed().await.is_err() {
            return pending().await;
        }
    }
}

/// Lets the account of a previous credential live to its end. This end is at least [`OVERLAP`] away if its maximum
/// allows it.
async fn leave(lease: &Lease, api: &Api, shown: &Shown) {
    lease.stop_renewing();
    let most = lease.most.get().copied();
    if let Some(wanted) = overlap(lease.end(), most, Instant::now()) {
        // `lease.end()` shows whether this succeeded.
        let _ = lease.renew(api, wanted.as_secs()).await;
    }
    let left = lease.end().saturating_duration_since(Instant::now());
    // The renewal itself took up to a second.
    if left + Duration::from_secs(1) < OVERLAP && shown.warns_first() {
        ui::warning(&format!(
            "after a change of the account the previous account lives for only {} s, less than {} s; then its connections end. A maxTtl of {} s or more is long enough",
            left.as_secs(),
            OVERLAP.as_secs(),
            4 * OVERLAP.as_secs()
        ));
    }
}

/// How long a replaced account is to live from `now`, if its `end` is earlier than that. `most`: the timestamp beyond
/// which the end cannot be moved.
fn overlap(end: Instant, most: Option<Instant>, now: Instant) -> Option<Duration> {
    let possible = most.map(|most| {
        let left = most.saturating_duration_since(now);
        left.saturating_sub(CALL_MARGIN)
    });
    let wanted = OVERLAP.min(possible.unwrap_or(OVERLAP));
    (end < now + wanted).then_some(wanted)
}

/// The credential of an answer, with the protection that files for libpq name.
async fn read(answer: &Value, settings: &Settings, api: &Api) -> Result<Credential, Failure> {
    let mut credential = Credential::read(answer)?;
    let Some(file) = &settings.roots else {
        return Ok(credential);
    };
    if let Some(protection) = protection::ask(api, &settings.secret).await? {
        let variables = protection.variables(&credential.places).into_iter();
        credential.protection = variables
            .map(|(name, value)| (name, value.to_owned()))
            .collect();
        if protection.sslrootcert.is_some() {
            let file = ("PGSSLROOTCERT", file.to_string_lossy().into_owned());
            credential.protection.push(file);
        } else {
            credential
                .protection
                .extend(protection.roots_of_machine(&credential.places));
        }
        credential.roots = protection.sslrootcert;
    }
    Ok(credential)
}

fn write(sinks: &[Sink], new: &Credential, previous: &[&Credential]) -> Result<(), Failure> {
    sinks.iter().try_for_each(|sink| sink.write(new, previous))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All numbers are seconds from now.
    #[test]
    fn a_replaced_account_lives_for_half_a_minute_if_its_maximum_allows_it() {
        let now = Instant::now();
        let at = |second| now + Duration::from_secs(second);
        for (end, most, expected) in [
            (5, None, Some(30)),
            (5, Some(600), Some(30)),
            (29, Some(600), Some(30)),
            // The account lives long enough.
            (30, Some(600), None),
            (300, Some(600), None),
            // The maximum counts first, and the renewal itself takes up to 2 s.
            (5, Some(32), Some(30)),
            (5, Some(31), Some(29)),
            (5, Some(12), Some(10)),
            (5, Some(7), None),
            (5, Some(5), None),
            (0, Some(1), None),
        ] {
            let wanted = overlap(at(end), most.map(at), now);
            assert_eq!(wanted, expected.map(Duration::from_secs), "{end} {most:?}");
        }
    }
}
