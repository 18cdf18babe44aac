//! The start of a dispatcher. It serves its admin listener before its store is open. It waits while the store is
//! unreachable or its disk is full. If waiting cannot help, the process ends.

use std::fs::File;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use mayfly_common::serve::Tls;
use tokio::sync::oneshot;
use tracing::{info, warn};

use crate::app::App;
use crate::metrics::Metrics;
use crate::store::{Identity, OpenError, Place, Store};

/// First pause between two tries. Each later pause is twice as long.
const PAUSE: Duration = Duration::from_millis(500);
/// Longest pause between two tries.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// Pause between two log lines with the same reason.
const REPORT_EVERY: Duration = Duration::from_secs(60);

/// The state behind the admin listener, before and after the store is open.
pub(crate) struct Front {
    metrics: Metrics,
    app: OnceLock<Arc<App>>,
    /// What the start waits for.
    waiting: Mutex<String>,
}

impl Front {
    /// A start that is not ready.
    pub(crate) fn new(metrics: Metrics) -> Self {
        Self {
            metrics,
            app: OnceLock::new(),
            waiting: Mutex::new("starting".to_owned()),
        }
    }

    /// Serves the state of this dispatcher from now on.
    pub(crate) fn shows(&self, app: Arc<App>) {
        // Only the start calls this, and once.
        let _ = self.app.set(app);
    }

    /// Whether this dispatcher can serve requests.
    ///
    /// # Errors
    /// The reason why not, as a message for operators.
    pub(crate) fn ready(&self) -> Result<(), String> {
        match self.app.get() {
            Some(app) => app.ready(),
            None => {
                let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
                Err(waiting.clone())
            }
        }
    }

    /// All metrics, in Prometheus' text format.
    pub(crate) fn text(&self, listeners: &[(&str, Option<Tls>)]) -> String {
        self.metrics.tls(listeners);
        if let Some(app) = self.app.get() {
            self.metrics.store_up(app.store.ready().is_ok());
            self.metrics.store_failures(app.store.failures());
        }
        self.metrics.text()
    }

    fn waits_for(&self, reason: String) {
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = reason;
    }
}

/// Opens the store, and waits for it while that may help. A SQLite store comes with its lock.
///
/// # Errors
/// An error that waiting does not correct: a refused login, another master key, another dispatcher with this store.
pub(crate) async fn open(
    place: &Place,
    front: &Front,
) -> Result<(Store, Identity, Option<File>), OpenError> {
    let mut pause = PAUSE;
    let mut reported: Option<(String, Instant)> = None;
    loop {
        let error = match opened(place).await {
            Err(error) if error.may_pass() => error,
            done => {
                if reported.is_some() && done.is_ok() {
                    info!("the lease store can be opened; the dispatcher starts");
                }
                return done;
            }
        };
        let reason = error.to_string();
        front.waits_for(format!("the lease store cannot be opened: {reason}"));
        let is_known = reported
            .as_ref()
            .is_some_and(|(last, at)| *last == reason && at.elapsed() < REPORT_EVERY);
        if !is_known {
            warn!(
                reason,
                "the lease store cannot be opened; the dispatcher waits for it and is not ready"
            );
            reported = Some((reason, Instant::now()));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Tries once to open the store, on a thread of its own: a process that is asked to stop does not wait for it.
async fn opened(place: &Place) -> Result<(Store, Identity, Option<File>), OpenError> {
    let (sender, receiver) = oneshot::channel();
    let place_there = place.clone();
    let begun = std::thread::Builder::new()
        .name("open-store".to_owned())
        .spawn(move || {
            // Nobody waits for the result if the process is ending.
            let _ = sender.send(Store::open(&place_there));
        });
    let ended = |reason: &str| OpenError::Database {
        place: place.backend.to_string(),
        reason: reason.to_owned(),
        cause: None,
    };
    begun.map_err(|error| ended(&error.to_string()))?;
    let done = receiver.await;
    done.unwrap_or_else(|_| {
        Err(ended(
            "opening it failed because of a mistake in this program",
        ))
    })
}
