//! Watches the delay levels: parked messages must arrive on time. Deleted levels are declared again, and the
//! ends of all leases are parked again. A probe through short levels detects whether something overrides the
//! levels' arguments, such as a policy for all queues.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use mayfly_common::broker::{Address, BrokerError, Incoming, Message, Source};
use mayfly_protocol::names::{PoolName, random_text};
use mayfly_protocol::task::{Head, Kind};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use super::declare::mend;
use crate::app::App;

/// The delay of a probe. It passes two levels, of 500 and 250 ms, so it also tests that a message keeps its key.
const PROBE_DELAY: Duration = Duration::from_millis(750);
/// A probe cannot arrive sooner than this unless the levels' TTL is overridden.
const PROBE_EARLIEST: Duration = Duration::from_millis(700);
/// A busy or restarted broker may be late. After this time a probe counts as lost.
const PROBE_LATEST: Duration = Duration::from_secs(60);
const PROBE_EVERY: Duration = Duration::from_secs(60);
/// Pause between probes while the levels are overridden, so that a repair is noticed sooner.
const PROBE_SOON: Duration = Duration::from_secs(10);
/// Pause after a probe without a result, for example because there was no broker.
const PROBE_AGAIN: Duration = Duration::from_secs(2);
/// A head must name a pool, but probes belong to none.
const PROBE_POOL: &str = "probe";

/// What an operator can do about overridden levels.
const WAY_OUT: &str = "a policy or operator policy of RabbitMQ applies to the queues `mayfly.v1.…`; `mayfly init --broker` sets one of a higher priority, see docs/runbook.md";

/// The result of a probe.
#[derive(Debug, PartialEq, Eq)]
enum Shown {
    /// The probe came in time.
    Sound,
    /// The probe did not arrive in time, for this reason.
    Overridden(&'static str),
    /// There is no result: the broker was not connected, or the connection changed meanwhile.
    Nothing,
}

/// Judges a probe that has come back, or has not, at the time `after` its publish.
fn judge(came: bool, after: Duration) -> Option<Shown> {
    match came {
        true if after < PROBE_EARLIEST => {
            Some(Shown::Overridden("a delayed message arrived early"))
        }
        true => Some(Shown::Sound),
        false if after >= PROBE_LATEST => Some(Shown::Overridden(
            "a delayed message has not arrived for 60 s",
        )),
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
                        info!("delayed messages arrive on time");
                    }
                }
                Shown::Overridden(why) => {
                    app.metrics.delays_overridden(true);
                    if shown != last {
                        error!(
                            why,
                            "the delay levels do not work: without a running dispatcher, accounts may live too long; {WAY_OUT}"
                        );
                    }
                }
            }
            if shown != Shown::Nothing {
                last = shown;
            }
            // Another dispatcher may have died while it parked ends again.
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

/// Sends one probe and waits for it. An earlier probe that comes late does not count.
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
            // A probe in the levels no longer finds the queue of an earlier connection.
            _ = is_attached.changed() => return Shown::Nothing,
            () = app.probe_astray.notified() => {
                return Shown::Overridden("a delayed message arrived at another queue");
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

/// Reports a probe that RabbitMQ could not route. A probe of an earlier connection does not count.
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
