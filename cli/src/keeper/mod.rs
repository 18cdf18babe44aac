//! Leases that are kept while they are used: read, renewed up to their maximum, replaced before it, and revoked
//! at the end. `exec` keeps one lease; `proxy` and `agent` replace it by a newer one.
//!
//! Times are those of this process's monotonic clock. They are counted from the time at which a request was sent, so
//! an account never ends before [`Lease::end`], even if the clocks of other machines differ.

mod lease;
mod renewals;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::client::Api;
use crate::failure::Failure;
use crate::route::Route;
use crate::ui;
pub(crate) use lease::Lease;

/// Pause before a failed read is repeated. It doubles up to the longest pause.
const READ_AGAIN_FIRST: Duration = Duration::from_millis(500);
const READ_AGAIN_LAST: Duration = Duration::from_secs(5);

/// Keeps a lease of one secret available. [`Keeper::newest`] is replaced before it reaches its maximum.
pub(crate) struct Keeper {
    api: Arc<Api>,
    path: String,
    route: Route,
    ttl: Option<u64>,
    newest: watch::Sender<Option<Arc<Lease>>>,
    /// Leases that are neither revoked nor shared. They are revoked at the end.
    held: Mutex<Vec<Arc<Lease>>>,
    trouble: Mutex<Option<String>>,
    /// The id of a lease that a server did not accept.
    refused: watch::Sender<String>,
    stopping: watch::Sender<bool>,
}

impl Keeper {
    /// A keeper for the secret's leases with a life of `ttl` seconds. `None`: the secret's TTL. It makes no call
    /// before [`Keeper::run`].
    ///
    /// # Errors
    /// The path is malformed.
    pub(crate) fn new(api: Arc<Api>, path: &str, ttl: Option<u64>) -> Result<Self, Failure> {
        Ok(Self {
            api,
            path: path.to_owned(),
            route: Route::secret(path)?.with("ttl", ttl),
            ttl,
            newest: watch::Sender::new(None),
            held: Mutex::new(Vec::new()),
            trouble: Mutex::new(None),
            refused: watch::Sender::new(String::new()),
            stopping: watch::Sender::new(false),
        })
    }

    /// The secret's path, as it was given.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// The newest lease. It is `None` before the first read has succeeded.
    pub(crate) fn newest(&self) -> watch::Receiver<Option<Arc<Lease>>> {
        self.newest.subscribe()
    }

    /// Why the last read failed; `None` after a read that succeeded.
    pub(crate) fn trouble(&self) -> Option<String> {
        lock(&self.trouble).clone()
    }

    /// Requests a new lease at once, because a server did not accept `lease`.
    pub(crate) fn replace(&self, lease: &Lease) {
        self.refused.send_replace(lease.id.clone());
    }

    /// Reads leases and renews them until [`Keeper::stop`]. It never gives up, with one exception: it returns the
    /// failure of the first read if waiting cannot help.
    ///
    /// # Errors
    /// The failure of the first read: the secret does not exist, may not be read, or is not a dynamic secret.
    pub(crate) async fn run(&self) -> Result<(), Failure> {
        let mut renewals = JoinSet::new();
        let mut stopping = self.stopping.subscribe();
        let mut refused = self.refused.subscribe();
        let mut pause = READ_AGAIN_FIRST;
        while !*stopping.borrow_and_update() {
            // A read is never dropped: its lease would be unknown here.
            match self.read().await {
                Ok(Some(lease)) => {
                    pause = READ_AGAIN_FIRST;
                    let (api, kept) = (self.api.clone(), lease.clone());
                    renewals.spawn(async move {
                        // If this fails, the first renewal shows the maximum.
                        let _ = kept.learn_maximum(&api).await;
                        kept.keep(&api).await;
                    });
                    self.newest.send_replace(Some(lease.clone()));
                    tokio::select! {
                        () = lease.replaceable() => {}
                        _ = refused.wait_for(|id| *id == lease.id) => {}
                        _ = stopping.changed() => {}
                    }
                    continue;
                }
                // The read gave the shared lease that is already in use.
                Ok(None) => {}
                Err(failure) => {
                    let is_first = self.newest.borrow().is_none();
                    if is_first && !passes(&failure) {
                        return Err(failure);
                    }
                    let text = failure.to_string();
                    if lock(&self.trouble).replace(text.clone()).as_ref() != Some(&text) {
                        ui::warning(&format!("{}: no new lease: {text}", self.path));
                    }
                }
            }
            tokio::select! {
                () = sleep(pause) => {}
                _ = stopping.changed() => {}
            }
            pause = (pause * 2).min(READ_AGAIN_LAST);
        }
        Ok(())
    }

    /// Reads a lease. `None`: the answer is the lease in use.
    async fn read(&self) -> Result<Option<Arc<Lease>>, Failure> {
        let begun = Instant::now();
        let answer = self.api.get_long(&self.route).await?;
        ui::warnings(&answer);
        let lease = Arc::new(Lease::of(&self.path, answer, self.ttl, begun)?);
        lock(&self.trouble).take();
        let newest = self.newest.borrow();
        if newest.as_ref().is_some_and(|newest| newest.id == lease.id) {
            return Ok(None);
        }
        if !lease.is_shared {
            lock(&self.held).push(lease.clone());
        }
        Ok(Some(lease))
    }

    /// Ends a lease that nobody uses any more: its renewals stop, and it is revoked.
    pub(crate) async fn end(&self, lease: &Arc<Lease>) {
        lease.stop_renewing();
        lease.revoke(&self.api).await;
        lock(&self.held).retain(|held| held.id != lease.id);
    }

    /// Forgets leases that are past their end, because the dispatcher ends them.
    pub(crate) fn forget_ended(&self) {
        lock(&self.held).retain(|held| held.end() > Instant::now());
    }

    /// Makes [`Keeper::run`] return after the read in progress.
    pub(crate) fn stop(&self) {
        self.stopping.send_replace(true);
    }

    /// Revokes all leases that are not revoked yet, at the same time. Call it after [`Keeper::run`].
    pub(crate) async fn revoke_all(&self) {
        let held = std::mem::take(&mut *lock(&self.held));
        let mut calls = JoinSet::new();
        for lease in held.into_iter().filter(|it| it.end() > Instant::now()) {
            let api = self.api.clone();
            calls.spawn(async move {
                lease.stop_renewing();
                lease.revoke(&api).await;
            });
        }
        calls.join_all().await;
    }
}

/// Whether a read may succeed later by itself.
fn passes(failure: &Failure) -> bool {
    match failure {
        Failure::Usage(_) | Failure::Local(_) | Failure::NoToken(_) => false,
        Failure::Unreachable(_) | Failure::NoAnswer(_) => true,
        Failure::Refused(refusal) => refusal.status >= 500 || refusal.status == 429,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_is_tried_again() {
        for (status, expected) in [
            (401, false),
            (404, false),
            (422, false),
            (429, true),
            (503, true),
        ] {
            let refusal = crate::failure::Refusal::read(status, b"");
            assert_eq!(passes(&Failure::Refused(refusal)), expected, "{status}");
        }
        assert!(passes(&Failure::Unreachable(String::new())));
        assert!(!passes(&Failure::Local(String::new())));
    }
}
