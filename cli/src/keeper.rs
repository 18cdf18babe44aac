//! Leases that are kept while they are used: read, renewed up to their maximum, replaced before it, and revoked
//! at the end. `exec` keeps one lease; `proxy` and `agent` replace it by a newer one.
//!
//! Times are those of this process's monotonic clock. They are counted from the moment at which a request was
//! sent, so an account never ends before [`Lease::end`], even if the clocks of other machines differ.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::client::Api;
use crate::failure::Failure;
use crate::route::Route;
use crate::ui;

/// The revocation of a lease may delay the end by this time.
const REVOKE_SECONDS: u64 = 10;
/// A failed renewal is tried again within this time.
const AGAIN: Duration = Duration::from_secs(5);
/// Pauses between reads that fail: the first, doubled up to the last.
const READ_AGAIN_FIRST: Duration = Duration::from_millis(500);
const READ_AGAIN_LAST: Duration = Duration::from_secs(5);
/// A request for a renewal takes up to this time: none asks for the last part of a lease's maximum.
const CALL_MARGIN: Duration = Duration::from_secs(2);
/// Where nothing else bounds a time.
const FAR: Duration = Duration::from_secs(10 * 365 * 86_400);

/// A lease, with the credential that the dispatcher answered.
#[derive(Debug)]
pub(crate) struct Lease {
    /// The dispatcher's id of it.
    pub(crate) id: String,
    /// The answer to the read. `data` has the credential.
    pub(crate) answer: Value,
    /// Other callers use it too: it is never revoked here.
    pub(crate) is_shared: bool,
    /// Seconds by which it is renewed: the requested life, or else the secret's TTL.
    life: u64,
    /// When the request for it was sent.
    begun: Instant,
    end: watch::Sender<Instant>,
    /// The end beyond which it cannot be renewed, if known.
    pub(crate) most: OnceLock<Instant>,
    /// The dispatcher does not renew it, although its maximum is not reached.
    is_lost: OnceLock<()>,
    left_alone: Notify,
    is_left_alone: OnceLock<()>,
}

impl Lease {
    /// The lease of an answer to a read that was sent at `begun`, with this requested life in seconds.
    ///
    /// # Errors
    /// The secret is not a dynamic one.
    pub(crate) fn of(
        path: &str,
        answer: Value,
        life: Option<u64>,
        begun: Instant,
    ) -> Result<Self, Failure> {
        let Some(id) = answer.pointer("/data/leaseId").and_then(Value::as_str) else {
            return Err(Failure::Local(format!(
                "{path} is not a dynamic secret: it has no lease"
            )));
        };
        let id = id.to_owned();
        let is_shared = answer.pointer("/attributes/share") == Some(&Value::Bool(true));
        let whole = answer.pointer("/data/ttl").and_then(Value::as_u64);
        let life = life.or(whole).unwrap_or(0).min(FAR.as_secs());
        let mut left = whole.map_or(FAR, |whole| Duration::from_secs(whole).min(FAR));
        if is_shared && let Some(end) = date(&answer["data"], "expiration") {
            // An earlier read may have made it. Its first renewal, at once, replaces this estimate.
            let by_clock = end.duration_since(Timestamp::now()).as_secs();
            left = left.min(Duration::from_secs(u64::try_from(by_clock).unwrap_or(0)));
        }
        Ok(Self {
            id,
            answer,
            is_shared,
            life,
            begun,
            end: watch::Sender::new(begun + left),
            most: OnceLock::new(),
            is_lost: OnceLock::new(),
            left_alone: Notify::new(),
            is_left_alone: OnceLock::new(),
        })
    }

    /// The moment up to which the account certainly lives, unless somebody revokes it. Renewals move it.
    pub(crate) fn end(&self) -> Instant {
        *self.end.borrow()
    }

    /// Changes when the end moves.
    pub(crate) fn ends(&self) -> watch::Receiver<Instant> {
        self.end.subscribe()
    }

    /// When the next lease should be read: a third of the maximum is left, or renewals have failed until a third
    /// of the life was left, or the dispatcher has refused one.
    pub(crate) fn replace_at(&self) -> Instant {
        if self.is_lost.get().is_some() {
            return self.begun;
        }
        let end = self.end();
        let by_life = end - (Duration::from_secs(self.life) / 3).min(end - self.begun);
        match self.most.get() {
            Some(most) => by_life.min(*most - most.duration_since(self.begun) / 3),
            None => by_life,
        }
    }

    /// Waits until [`Lease::replace_at`].
    async fn replaceable(&self) {
        let mut ends = self.ends();
        loop {
            tokio::select! {
                () = sleep_until(self.replace_at()) => return,
                _ = ends.changed() => {}
            }
        }
    }

    /// Renewals end; the account stays until its end.
    pub(crate) fn stop_renewing(&self) {
        let _ = self.is_left_alone.set(());
        self.left_alone.notify_one();
    }

    /// Renews the lease at each half of its life, and near its maximum up to the maximum. Returns when it cannot
    /// be renewed any more, or after [`Lease::stop_renewing`].
    pub(crate) async fn keep(&self, api: &Api) {
        if self.life == 0 || self.is_left_alone.get().is_some() {
            return;
        }
        tokio::select! {
            () = self.left_alone.notified() => {}
            () = self.renew_on(api) => {}
        }
    }

    async fn renew_on(&self, api: &Api) {
        let mut wait = match self.is_shared {
            // Other users of a shared lease may have renewed it.
            true => Duration::ZERO,
            false => Duration::from_secs(self.life) / 2,
        };
        let mut is_last = false;
        loop {
            sleep(wait).await;
            let Some(increment) = self.increment(is_last) else {
                return self.is_final();
            };
            match self.renew(api, increment).await {
                Ok(()) if is_last => return self.is_final(),
                Ok(()) => wait = Duration::from_secs(increment) / 2,
                Err(Failure::Refused(refusal)) if refusal.status == 400 && !is_last => {
                    is_last = true;
                    wait = Duration::ZERO;
                    if let Ok(most) = self.learn_maximum(api).await {
                        ui::note(&format!(
                            "the lease reaches its maximum at {most:.0} and cannot be renewed beyond it"
                        ));
                    }
                }
                Err(Failure::Refused(refusal)) if refusal.status < 500 => {
                    ui::warning(&format!(
                        "lease {} is not renewed: {}",
                        self.id, refusal.message
                    ));
                    let _ = self.is_lost.set(());
                    return self.is_final();
                }
                // It is tried again: half of its life is left.
                Err(_) => {
                    wait = AGAIN
                        .min(Duration::from_secs(self.life) / 20)
                        .max(Duration::from_secs(1));
                }
            }
        }
    }

    /// Seconds to renew by; `None` if the maximum does not allow a later end. The last renewal asks for what the
    /// maximum allows.
    fn increment(&self, is_last: bool) -> Option<u64> {
        let allowed = self.most.get().map(|most| {
            let left = most.saturating_duration_since(Instant::now());
            left.saturating_sub(CALL_MARGIN).as_secs()
        });
        match (allowed, is_last) {
            (Some(left), true) => (left > 0).then_some(left.min(self.life)),
            (None, true) => None,
            // The dispatcher knows the maximum better.
            (_, false) => Some(self.life),
        }
    }

    /// The end will not move any more.
    fn is_final(&self) {
        let _ = self.most.set(self.end());
        self.end.send_modify(|_| {});
    }

    pub(crate) async fn renew(&self, api: &Api, increment: u64) -> Result<(), Failure> {
        let route = Route::item("leases", &self.id)?.then("/renew");
        let sent = Instant::now();
        let lease = api
            .post(&route, Some(&json!({ "increment": increment })))
            .await?;
        let end = sent + Duration::from_secs(increment);
        self.end.send_if_modified(|known| {
            let is_later = end > *known;
            *known = end.max(*known);
            is_later
        });
        self.note_maximum(&lease);
        Ok(())
    }

    /// Asks the dispatcher for the lease's maximum.
    async fn learn_maximum(&self, api: &Api) -> Result<Timestamp, Failure> {
        let lease = api.get(&Route::item("leases", &self.id)?).await?;
        self.note_maximum(&lease);
        date(&lease, "maxExpiration")
            .ok_or_else(|| Failure::Local("the lease has no maxExpiration".to_owned()))
    }

    /// Notes the maximum of a lease that the dispatcher shows: it is as far from the known end as
    /// the two dates are from each other.
    fn note_maximum(&self, lease: &Value) {
        if let (Some(end), Some(most)) = (date(lease, "expiration"), date(lease, "maxExpiration")) {
            let further = u64::try_from(most.duration_since(end).as_secs()).unwrap_or(0);
            if self
                .most
                .set(self.end() + Duration::from_secs(further))
                .is_ok()
            {
                self.end.send_modify(|_| {});
            }
        }
    }

    /// Revokes the lease, unless others use it too. A failure is a warning: the lease ends by itself.
    pub(crate) async fn revoke(&self, api: &Api) {
        if self.is_shared {
            return;
        }
        let call = async {
            let route = Route::item("leases", &self.id)?;
            api.delete(&route).await
        };
        let why = match timeout(Duration::from_secs(REVOKE_SECONDS), call).await {
            Ok(Ok(_)) => return,
            Ok(Err(failure)) => failure.to_string(),
            Err(_) => format!("no answer within {REVOKE_SECONDS} s"),
        };
        let end = self
            .answer
            .pointer("/data/expiration")
            .and_then(Value::as_str)
            .unwrap_or("its expiration");
        ui::warning(&format!(
            "lease {} is not revoked: {why}; it ends by itself at {end}",
            self.id
        ));
    }
}

fn date(of: &Value, member: &str) -> Option<Timestamp> {
    of.get(member)?.as_str()?.parse().ok()
}

/// Keeps a lease of one secret at hand: [`Keeper::newest`] is replaced before its maximum.
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
    /// A keeper of the secret's leases with a life of `ttl` seconds; `None` is the secret's TTL. It calls nobody
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

    /// Asks for a new lease at once, in place of `lease`, which a server did not accept.
    pub(crate) fn replace(&self, lease: &Lease) {
        self.refused.send_replace(lease.id.clone());
    }

    /// Reads leases and renews them until [`Keeper::stop`]. It never gives up; but if the first read is refused
    /// for a reason that does not pass, it returns it.
    ///
    /// # Errors
    /// The first read's: no such secret, no right to read it, not a dynamic secret.
    pub(crate) async fn run(&self) -> Result<(), Failure> {
        let mut renewals = JoinSet::new();
        let mut stopping = self.stopping.subscribe();
        let mut refused = self.refused.subscribe();
        let mut pause = READ_AGAIN_FIRST;
        while !*stopping.borrow_and_update() {
            // A read is never given up: its lease would be unknown here.
            match self.read().await {
                Ok(Some(lease)) => {
                    pause = READ_AGAIN_FIRST;
                    let (api, kept) = (self.api.clone(), lease.clone());
                    renewals.spawn(async move {
                        // Without an answer the maximum comes with the first renewal.
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
                // A shared lease that is still in use.
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

    /// A lease; `None` if it is the one that is in use.
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

    /// Ends a lease that nobody uses any more: it is not renewed, and revoked.
    pub(crate) async fn end(&self, lease: &Arc<Lease>) {
        lease.stop_renewing();
        lease.revoke(&self.api).await;
        lock(&self.held).retain(|held| held.id != lease.id);
    }

    /// Drops the record of leases whose end is past: the dispatcher ends them.
    pub(crate) fn forget_ended(&self) {
        lock(&self.held).retain(|held| held.end() > Instant::now());
    }

    /// Makes [`Keeper::run`] return, after a read that is under way.
    pub(crate) fn stop(&self) {
        self.stopping.send_replace(true);
    }

    /// Revokes all leases that were not revoked, at the same time. To be called after [`Keeper::run`].
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
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::session::{Session, Token};
    use crate::tls::Tls;

    fn lease(ttl: u64) -> Lease {
        let answer = json!({"data": {"leaseId": "l1", "ttl": ttl}, "attributes": {}});
        Lease::of("db:app", answer, None, Instant::now()).unwrap()
    }

    fn shown(end: &str, most: &str) -> Value {
        json!({"expiration": end, "maxExpiration": most})
    }

    #[tokio::test]
    async fn a_third_of_the_maximum_is_left_for_the_next_one() {
        let lease = lease(60);
        let begun = lease.begun;
        assert_eq!(lease.end(), begun + Duration::from_secs(60));
        // The maximum is not known yet: a third of the life.
        assert_eq!(lease.replace_at(), begun + Duration::from_secs(40));
        lease.note_maximum(&shown("2026-01-01T00:01:00Z", "2026-01-01T00:03:00Z"));
        assert_eq!(lease.replace_at(), begun + Duration::from_secs(40));
        // After renewals only the maximum counts.
        lease.end.send_replace(begun + Duration::from_secs(180));
        assert_eq!(lease.replace_at(), begun + Duration::from_secs(120));
    }

    #[tokio::test]
    async fn a_lease_that_cannot_be_renewed_is_replaced_in_time() {
        let lease = lease(30);
        lease.is_final();
        assert_eq!(lease.replace_at(), lease.begun + Duration::from_secs(20));
        assert_eq!(lease.increment(false), Some(30));
        lease.is_lost.set(()).unwrap();
        assert!(lease.replace_at() <= Instant::now());
    }

    #[tokio::test]
    async fn a_huge_life_is_no_overflow() {
        let lease = lease(u64::MAX);
        assert_eq!(lease.end(), lease.begun + FAR);
        assert!(lease.replace_at() < lease.end());
        assert_eq!(lease.increment(false), Some(FAR.as_secs()));
    }

    #[tokio::test]
    async fn the_last_renewal_asks_for_what_is_allowed() {
        let lease = lease(60);
        assert_eq!(lease.increment(true), None);
        lease.note_maximum(&shown("2026-01-01T00:01:00Z", "2026-01-01T00:01:00Z"));
        let increment = lease.increment(true).unwrap();
        assert!((56..=58).contains(&increment), "{increment}");
    }

    #[tokio::test]
    async fn a_lease_that_is_left_alone_is_not_renewed() {
        let lease = lease(3600);
        let session = Session {
            address: "http://127.0.0.1:1".to_owned(),
            token: Token::read("t").unwrap(),
            tls: Tls::default(),
        };
        let api = Api::new(&session).unwrap();
        lease.stop_renewing();
        // It would wait for half an hour.
        timeout(Duration::from_secs(20), lease.keep(&api))
            .await
            .unwrap();
    }

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

    #[test]
    fn only_dynamic_secrets_have_leases() {
        let answer = json!({"data": {"password": "p"}});
        let refused = Lease::of("db:x", answer, None, Instant::now()).unwrap_err();
        assert!(refused.to_string().contains("not a dynamic secret"));
    }
}
