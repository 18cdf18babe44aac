//! The delay levels, watched: what is parked must come, and when it should. Levels that somebody
//! deletes are declared again, and the ends of all leases parked again. A probe through a short level
//! shows whether something overrides the levels' arguments, as a policy for all queues does.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use mayfly_common::broker::{Address, BrokerError, Incoming, Message, Source};
use mayfly_common::fault;
use mayfly_common::names::{PoolName, random_text};
use mayfly_common::task::{Head, Kind};
use mayfly_common::topology::LEVELS;
use mayfly_common::window::PUBLISH_LIMIT;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::app::App;
use crate::ledger;

/// Through two levels, of 500 and 250 ms: the first must hand on to the second with the same key.
const PROBE_DELAY: Duration = Duration::from_millis(750);
/// It cannot come sooner than this, unless the levels' time was overridden.
const PROBE_EARLIEST: Duration = Duration::from_millis(700);
/// A busy broker may be late; one that has restarted too. After this a probe is lost.
const PROBE_LATEST: Duration = Duration::from_secs(60);
const PROBE_EVERY: Duration = Duration::from_secs(60);
/// Whether it is set right is seen sooner.
const PROBE_SOON: Duration = Duration::from_secs(10);
/// After a look that showed nothing, as without the broker.
const PROBE_AGAIN: Duration = Duration::from_secs(2);
/// A head names a pool; probes are of none.
const PROBE_POOL: &str = "probe";
/// Between two tries to park where a level has just been declared again.
const PARK_PAUSE: Duration = Duration::from_millis(250);

/// What a person does about it.
const WAY_OUT: &str = "a policy or operator policy of RabbitMQ applies to the queues `mayfly.v1.…`; `mayfly init --broker` sets one of a higher priority, see docs/runbook.md";

/// Publishes, in a level whose queue is missing once that is there again: only what a level has taken
/// counts as parked.
///
/// # Errors
/// See [`mayfly_common::broker::Broker::publish`].
pub(crate) async fn publish(app: &App, message: Message) -> Result<(), BrokerError> {
    if !matches!(message.to, Address::Delayed(..)) {
        return app.broker.publish(message).await;
    }
    let begun = Instant::now();
    loop {
        let sent = app.broker.publish(message.clone()).await;
        if sent != Err(BrokerError::Unroutable) || begun.elapsed() >= PUBLISH_LIMIT {
            return sent;
        }
        mend(app).await;
        tokio::time::sleep(PARK_PAUSE).await;
    }
}

/// Declares everything again, and has the ends parked again that were lost with a level.
pub(crate) async fn mend(app: &App) {
    match app.broker.redeclare().await {
        Ok(absent) => {
            if !absent.is_empty() {
                fault::point("levels", "declared").await;
            }
            lost(app, &absent);
        }
        Err(error) => warn!(%error, "not declared; the next connection does it"),
    }
}

/// What a new connection has found. Where no level was there at all the broker is new, or was emptied:
/// a lease that somebody holds has its end there no more.
pub(crate) fn connected(app: &App) {
    let absent = app.broker.found_absent();
    if u32::try_from(absent.len()).is_ok_and(|count| count >= LEVELS) {
        app.park_again.notify_one();
    } else {
        lost(app, &absent);
        // A dispatcher may have died before it had parked them again.
        app.see_parked.notify_one();
    }
}

fn lost(app: &App, absent: &[u32]) {
    if absent.is_empty() {
        return;
    }
    app.metrics.levels_absent(absent.len());
    error!(
        levels = ?absent,
        "delay levels had no queue: somebody deleted it, or a policy of RabbitMQ lets it expire. It is declared again, and the ends of all leases are parked again"
    );
    app.park_again.notify_one();
}

/// Parks the ends of all leases again whenever that is asked for, until `stop`. What is asked for
/// meanwhile is done after it: ends that were parked by then may be lost again.
pub(crate) async fn park_lost(app: Arc<App>, stop: CancellationToken) {
    let mut may_mark = true;
    loop {
        let is_sure = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = app.park_again.notified() => true,
            () = app.see_parked.notified() => false,
        };
        if !is_sure {
            match app.broker.has_all_parked().await {
                Ok(false) if may_mark => {
                    info!("ends may be missing from the delay levels; all are parked again");
                }
                // It is looked again after the next connection, and each minute.
                Ok(_) | Err(_) => continue,
            }
        }
        let losses = app.broker.losses();
        if ledger::park_all(&app).await {
            let marked = app.broker.all_are_parked(losses).await;
            if let Err(error) = &marked {
                warn!(%error, "that all ends are parked could not be noted at the broker");
            }
            may_mark = !matches!(marked, Err(BrokerError::NotAllowed(_)));
        }
    }
}

/// What a probe has shown.
#[derive(Debug, PartialEq, Eq)]
enum Shown {
    /// It came in time.
    Sound,
    /// It did not, for this reason.
    Overridden(&'static str),
    /// Nothing: there was no broker, or another connection meanwhile.
    Nothing,
}

/// Judges a probe that came back `after`, or has not for so long.
fn judge(came: bool, after: Duration) -> Option<Shown> {
    match came {
        true if after < PROBE_EARLIEST => Some(Shown::Overridden("a delayed message came early")),
        true => Some(Shown::Sound),
        false if after >= PROBE_LATEST => {
            Some(Shown::Overridden("a delayed message has not come for 60 s"))
        }
        false => None,
    }
}

/// Sends a probe through the delay levels at the start and each minute, until `stop`.
pub(crate) async fn watch(app: Arc<App>, stop: CancellationToken) {
    let (sink, mut probes) = mpsc::channel(16);
    let (attached, mut is_attached) = watch::channel(false);
    let consuming = app
        .broker
        .consume(Source::Probes, 16, sink, stop.clone(), attached);
    let looking = async {
        let Ok(pool) = PROBE_POOL.parse() else { return };
        let mut last = Shown::Nothing;
        loop {
            let shown = look(&app, &pool, &mut probes, &mut is_attached).await;
            let pause = match &shown {
                Shown::Nothing => PROBE_AGAIN,
                Shown::Sound => PROBE_EVERY,
                Shown::Overridden(_) => PROBE_SOON,
            };
            match &shown {
                Shown::Nothing => {}
                Shown::Sound => {
                    app.metrics.delays_overridden(false);
                    if matches!(last, Shown::Overridden(_)) {
                        info!("delayed messages come when they should");
                    }
                }
                Shown::Overridden(why) => {
                    app.metrics.delays_overridden(true);
                    if shown != last {
                        error!(
                            why,
                            "the delay levels do not work, and accounts may not end without a dispatcher: {WAY_OUT}"
                        );
                    }
                }
            }
            if shown != Shown::Nothing {
                last = shown;
            }
            // Another dispatcher may have died over it.
            if app.leads.load(Ordering::Relaxed) {
                app.see_parked.notify_one();
            }
            tokio::time::sleep(pause).await;
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = consuming => {}
        () = looking => {}
    }
}

/// One look. A probe of before that comes late is none of this one.
async fn look(
    app: &App,
    pool: &PoolName,
    probes: &mut mpsc::Receiver<Incoming>,
    is_attached: &mut watch::Receiver<bool>,
) -> Shown {
    if is_attached.wait_for(|attached| *attached).await.is_err() {
        return Shown::Nothing;
    }
    is_attached.mark_unchanged();
    let name = random_text(20);
    let begun = Instant::now();
    match app.broker.publish(probe(pool, &name)).await {
        Ok(()) => {}
        Err(BrokerError::Unroutable) => {
            mend(app).await;
            return Shown::Nothing;
        }
        Err(_) => return Shown::Nothing,
    }
    loop {
        let came = tokio::select! {
            came = probes.recv() => came,
            // What is on its way finds another connection's queue no more.
            _ = is_attached.changed() => return Shown::Nothing,
            () = app.probe_astray.notified() => {
                return Shown::Overridden("a delayed message was led elsewhere");
            }
            () = tokio::time::sleep_until((begun + PROBE_LATEST).into()) => None,
        };
        let is_this = came
            .as_ref()
            .is_some_and(|came| came.correlation.as_ref() == Some(&name));
        let after = begun.elapsed();
        if let Some(came) = came {
            came.ack().await;
        }
        if let Some(shown) = judge(is_this, after) {
            return shown;
        }
    }
}

/// A probe that found no binding. One of a connection that ended since is nothing.
pub(crate) fn astray(app: &App, probe: &Incoming) {
    if !probe.is_for_probes() {
        app.probe_astray.notify_one();
    }
}

fn probe(pool: &PoolName, name: &str) -> Message {
    Message {
        to: Address::Probe(PROBE_DELAY),
        head: Head {
            kind: Kind::Probe,
            pool: pool.clone(),
            lease: None,
            issued: Timestamp::now(),
            deadline: None,
            attempt: 0,
            settling: false,
            traceparent: String::new(),
        },
        body: Vec::new(),
        reply_as: None,
        answers: Some(name.to_owned()),
        expires: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_has_a_head() {
        assert!(PROBE_POOL.parse::<PoolName>().is_ok());
    }

    #[test]
    fn a_probe_is_judged_by_when_it_comes() {
        let ms = Duration::from_millis;
        assert_eq!(judge(true, ms(760)), Some(Shown::Sound));
        assert_eq!(judge(true, ms(30_000)), Some(Shown::Sound));
        assert!(matches!(judge(true, ms(300)), Some(Shown::Overridden(_))));
        assert_eq!(judge(false, ms(59_000)), None);
        assert!(matches!(
            judge(false, PROBE_LATEST),
            Some(Shown::Overridden(_))
        ));
    }
}
