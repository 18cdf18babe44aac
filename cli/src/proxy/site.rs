//! One secret behind one listener: the account that new sessions get, and the accounts that earlier sessions still
//! have.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use super::leaving::Leave;
use super::metrics::{Counted, Metrics, Reason};
use super::scram::Verifier;
use super::startup::Startup;
use super::target::{account, protection};
use super::upstream::{Account, LoggedIn, NoLogin};
use crate::client::Api;
use crate::keeper::{Keeper, Lease};
use crate::proxy::errors::{State, fatal};
use crate::ui;

/// Clients that may be in their start at a time.
const STARTING: usize = 256;
/// Maximum number of sessions that log in with a new account at a time while their clients stay connected. Each needs
/// a second session of the server for a moment.
const SWAPPING: usize = 8;
/// Sessions whose state is read and made again at a time. A hostile server can make each of them use megabytes for 5 s.
const CARRYING: usize = 16;
/// A new session waits this long for an account.
const ACCOUNT_WAIT: Duration = Duration::from_secs(10);
/// No session begins in the last part of an account's life.
const LAST_LOGIN: Duration = Duration::from_secs(2);
/// An account that was never accepted is replaced once in this time.
const REPLACE_UNUSED: Duration = Duration::from_secs(30);
const PROTECTION_AGAIN: Duration = Duration::from_secs(1);

/// The account of a lease, and the sessions that have it.
pub(super) struct Upstream {
    pub(super) lease: Arc<Lease>,
    pub(super) account: Account,
    pub(super) leave: watch::Sender<Option<Leave>>,
    /// The server has accepted it.
    was_accepted: AtomicBool,
    sessions: watch::Sender<usize>,
}

impl Upstream {
    fn new(lease: Arc<Lease>, account: Account) -> Self {
        Self {
            lease,
            account,
            leave: watch::Sender::new(None),
            was_accepted: AtomicBool::new(false),
            sessions: watch::Sender::new(0),
        }
    }

    fn is_usable(&self) -> bool {
        self.lease.end() > Instant::now() + LAST_LOGIN
    }

    /// Makes its sessions leave from now on.
    fn leave(&self, cut_at: Option<Instant>) {
        let now = Instant::now();
        self.leave.send_modify(|leave| {
            let since = leave.map_or(now, |leave| leave.since);
            *leave = Some(Leave {
                // A drain begins a new time in which sessions may become quiet.
                since: if cut_at.is_some() { now } else { since },
                cut_at,
            });
        });
    }
}

/// Counts a session of an account until it is dropped.
pub(super) struct Use(pub(super) Arc<Upstream>);

impl Use {
    fn of(upstream: Arc<Upstream>) -> Self {
        upstream.sessions.send_modify(|sessions| *sessions += 1);
        Self(upstream)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
impl Use {
    /// An account that lives for a minute, for tests.
    pub(super) fn for_tests() -> Self {
        let answer = serde_json::json!({"data": {"leaseId": "l", "ttl": 60, "host": "127.0.0.1", "port": 1,
            "database": "d", "username": "u", "password": "p"}});
        let lease = Arc::new(Lease::of("db:app", answer, None, Instant::now()).unwrap());
        let account = account(&lease, &crate::protection::Protection::default()).unwrap();
        Self::of(Arc::new(Upstream::new(lease, account)))
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        self.0.sessions.send_modify(|sessions| *sessions -= 1);
    }
}

/// A secret and its listener.
pub(super) struct Site {
    /// The listener's address: the label of its metrics.
    pub(super) name: String,
    pub(super) keeper: Keeper,
    /// Clients must know this password.
    pub(super) password: Option<Verifier>,
    /// Sessions get a new account under their clients.
    pub(super) holds: bool,
    /// Places for the logins of sessions that get a new account.
    pub(super) swapping: Semaphore,
    /// Places for sessions whose state is carried over to a new account.
    pub(super) carrying: Semaphore,
    pub(super) counted: Counted,
    /// Places for clients that are not in a session. They have proved nothing yet, so each listener has its own.
    pub(super) starting: Arc<Semaphore>,
    api: Arc<Api>,
    newest: watch::Sender<Option<Arc<Upstream>>>,
    earlier: Mutex<Vec<Arc<Upstream>>>,
    trouble: Mutex<Option<String>>,
    /// When an account was last replaced that the server had never accepted.
    replaced: Mutex<Option<Instant>>,
}

impl Site {
    pub(super) fn new(
        name: String,
        keeper: Keeper,
        api: Arc<Api>,
        password: Option<Verifier>,
        holds: bool,
        metrics: &Metrics,
    ) -> Self {
        Self {
            counted: metrics.of(&name),
            name,
            keeper,
            api,
            password,
            holds,
            swapping: Semaphore::new(SWAPPING),
            carrying: Semaphore::new(CARRYING),
            starting: Arc::new(Semaphore::new(STARTING)),
            newest: watch::Sender::new(None),
            earlier: Mutex::new(Vec::new()),
            trouble: Mutex::new(None),
            replaced: Mutex::new(None),
        }
    }

    /// Follows the leases until it is dropped: new sessions get the newest account, and sessions leave the earlier
    /// accounts.
    pub(super) async fn follow(self: Arc<Self>) {
        let mut newest = self.keeper.newest();
        // The first lease may have come before this call.
        newest.mark_changed();
        let mut retired = JoinSet::new();
        loop {
            tokio::select! {
                changed = newest.changed() => if changed.is_err() { return },
                Some(_) = retired.join_next() => continue,
            }
            let Some(lease) = newest.borrow_and_update().clone() else {
                continue;
            };
            let Some(upstream) = self.upstream(&lease).await else {
                continue;
            };
            self.counted.leases.inc();
            let before = self.newest.send_replace(Some(Arc::new(upstream)));
            let now = self
                .newest
                .borrow()
                .as_ref()
                .map(|it| it.account.user.clone());
            ui::plan(&format!(
                "{}: new sessions log in as {}",
                self.name,
                now.unwrap_or_default()
            ));
            if let Some(before) = before {
                before.leave(None);
                self.earlier().push(before.clone());
                let site = self.clone();
                retired.spawn(async move {
                    unused(&before).await;
                    site.retire(&before).await;
                });
            }
        }
    }

    /// Makes the account of a lease. Tries until the lease ends.
    async fn upstream(&self, lease: &Arc<Lease>) -> Option<Upstream> {
        while lease.end() > Instant::now() {
            let found = match protection(&self.api, self.keeper.path()).await {
                Ok(protection) => account(lease, &protection),
                Err(failure) => Err(failure.to_string()),
            };
            match found {
                Ok(account) => {
                    self.trouble().take();
                    return Some(Upstream::new(lease.clone(), account));
                }
                Err(why) => {
                    let before = self.trouble().replace(why.clone());
                    if before.as_ref() != Some(&why) {
                        ui::warning(&format!("{}: a new lease cannot be used: {why}", self.name));
                    }
                }
            }
            sleep(PROTECTION_AGAIN).await;
        }
        None
    }

    /// Revokes a lease that has no session any more, or forgets one that has ended.
    async fn retire(&self, upstream: &Arc<Upstream>) {
        self.earlier().retain(|it| !Arc::ptr_eq(it, upstream));
        if upstream.lease.end() > Instant::now() {
            self.keeper.end(&upstream.lease).await;
        } else {
            self.keeper.forget_ended();
        }
    }

    fn earlier(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Upstream>>> {
        self.earlier.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn trouble(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Logs in to the server. An error is a message for the client.
    pub(super) async fn log_in(&self, startup: &Startup) -> Result<(Use, LoggedIn), Vec<u8>> {
        let deadline = Instant::now() + ACCOUNT_WAIT;
        let mut refused: Option<Arc<Upstream>> = None;
        loop {
            let usage = self.account_after(refused.as_ref(), deadline).await?;
            startup.check(&usage.0.account.database).inspect_err(|_| {
                self.counted.refused(Reason::Policy);
            })?;
            match usage.0.account.log_in(startup).await {
                Ok(session) => {
                    usage.0.was_accepted.store(true, Ordering::Relaxed);
                    return Ok((usage, session));
                }
                // The account was revoked, or this machine was asleep. A new lease may help, once. An account that
                // was never accepted may have another fault, such as a line of pg_hba.conf. Each new account would
                // have it too.
                Err(error)
                    if error.is_of_the_account()
                        && refused.is_none()
                        && (usage.0.was_accepted.load(Ordering::Relaxed)
                            || self.may_replace_unused(Instant::now())) =>
                {
                    self.keeper.replace(&usage.0.lease);
                    refused = Some(usage.0.clone());
                }
                Err(NoLogin::Refused(body)) => {
                    self.counted.refused(Reason::Server);
                    return Err(super::frames::message(b'E', &body));
                }
                Err(NoLogin::Unreachable(why) | NoLogin::Aborted(why)) => {
                    self.counted.refused(Reason::Unreachable);
                    let text = format!("mayfly proxy cannot log in to the server: {why}");
                    return Err(fatal(State::Unreachable, &text, None));
                }
            }
        }
    }

    /// Whether an account that the server has never accepted may be replaced, which is rare.
    fn may_replace_unused(&self, now: Instant) -> bool {
        let mut last = self.replaced.lock().unwrap_or_else(PoisonError::into_inner);
        let may = last.is_none_or(|last| now.duration_since(last) >= REPLACE_UNUSED);
        if may {
            *last = Some(now);
        }
        may
    }

    /// Waits for a usable account other than `refused`.
    async fn account_after(
        &self,
        refused: Option<&Arc<Upstream>>,
        deadline: Instant,
    ) -> Result<Use, Vec<u8>> {
        let mut newest = self.newest.subscribe();
        let usable = |it: &Option<Arc<Upstream>>| {
            it.as_ref().is_some_and(|it| {
                it.is_usable() && refused.is_none_or(|refused| !Arc::ptr_eq(it, refused))
            })
        };
        let found = timeout_at(deadline, newest.wait_for(usable)).await;
        // The use is counted while the newest account is borrowed. Otherwise the account could be retired in between.
        let found = found.ok().and_then(Result::ok);
        let used = found.and_then(|it| it.clone().map(Use::of));
        used.ok_or_else(|| {
            self.counted.refused(Reason::NoLease);
            let why = match self.not_ready() {
                Err(why) => why,
                Ok(()) => "the server does not accept the account of the lease".to_owned(),
            };
            fatal(
                State::CannotConnectNow,
                &format!("mayfly proxy has no account for a new session at present: {why}"),
                None,
            )
        })
    }

    /// Why no session can begin, if none can.
    pub(super) fn not_ready(&self) -> Result<(), String> {
        let newest = self.newest.borrow();
        let has_ended = match newest.as_ref() {
            Some(upstream) if upstream.is_usable() => return Ok(()),
            Some(_) => "the lease ends",
            None => "there is no lease yet",
        };
        let trouble = self.keeper.trouble().or_else(|| self.trouble().clone());
        Err(match trouble {
            Some(why) => format!("{has_ended}: {why}"),
            None => has_ended.to_owned(),
        })
    }

    /// The database of the newest account.
    pub(super) async fn database(&self) -> String {
        let mut newest = self.newest.subscribe();
        let found = newest.wait_for(Option::is_some).await;
        found
            .ok()
            .and_then(|it| it.as_ref().map(|it| it.account.database.clone()))
            .unwrap_or_default()
    }

    /// Makes all sessions leave. Those that are in use at `cut_at` are cut.
    pub(super) fn drain(&self, cut_at: Instant) {
        let newest = self.newest.borrow().clone();
        for upstream in self.earlier().iter().chain(newest.as_ref()) {
            upstream.leave(Some(cut_at));
        }
    }

    /// Brings the gauges up to date.
    pub(super) fn measure(&self) {
        let newest = self.newest.borrow();
        let current = newest.as_ref().map_or(0, |it| *it.sessions.borrow());
        let earlier = self.earlier().iter().map(|it| *it.sessions.borrow()).sum();
        let left = newest.as_ref().map_or(0.0, |it| {
            it.lease
                .end()
                .saturating_duration_since(Instant::now())
                .as_secs_f64()
        });
        self.counted.measure(current, earlier, left);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
impl Site {
    /// Tests have no dispatcher.
    pub(super) fn for_tests() -> Self {
        let session = crate::session::Session {
            address: "http://127.0.0.1:1".to_owned(),
            token: crate::session::Token::read("t").unwrap(),
            tls: crate::tls::Tls::default(),
        };
        let api = Arc::new(Api::new(&session).unwrap());
        let keeper = Keeper::new(api.clone(), "db:app", None).unwrap();
        let metrics = Metrics::new().unwrap();
        Self::new("l".to_owned(), keeper, api, None, true, &metrics)
    }
}

/// Waits until an account has no session, or has ended.
async fn unused(upstream: &Upstream) {
    let mut sessions = upstream.sessions.subscribe();
    let mut ends = upstream.lease.ends();
    loop {
        let end = *ends.borrow_and_update();
        tokio::select! {
            _ = sessions.wait_for(|sessions| *sessions == 0) => return,
            () = sleep_until(end) => return,
            _ = ends.changed() => {}
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    #[tokio::test]
    async fn an_account_that_was_never_accepted_is_rarely_replaced() {
        let site = Site::for_tests();
        let now = Instant::now();
        assert!(site.may_replace_unused(now));
        assert!(!site.may_replace_unused(now + Duration::from_secs(29)));
        assert!(site.may_replace_unused(now + Duration::from_secs(31)));
    }
}
