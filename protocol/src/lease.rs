//! The life of a lease as one pure function. From a lease and an event it decides the next status and the
//! messages to send. It reads no clock, store or broker.
//!
//! The states are `pending → active → revoked`, with `revoking` before `revoked` if somebody asked for the
//! end, and `failed` if no caller ever got the credential. A settled lease (revoked, failed) does not change
//! again. At most its account is looked for once more, when its create can no longer commit.

mod next;

use std::time::Duration;

use crate::grant::OwnedObjects;
use crate::names::{EngineName, LeaseId, PoolName, RoleName, SecretPath};
use crate::task::{Created, Failure, RevokeMode};
use crate::timing::timing;
use jiff::Timestamp;

pub use next::{may_work_otherwise, next};

/// [`Lease::secret_version`] of a lease that is never shared; secrets' versions begin with 1.
pub const NOBODYS_VERSION: u64 = 0;
/// Added to the secret's version in [`Lease::secret_version`] if the password is derived from a nonce. A
/// dispatcher of the earlier version would derive a wrong password, so it must not share such a lease.
pub const WITH_NONCE: u64 = 1 << 40;

/// Timestamps are clamped to this range, in milliseconds since 1970: the years 1970 to 9000. Others may send
/// any value, and an overflow would end the process.
const MOMENTS_MS: std::ops::RangeInclusive<i64> = 0..=221_845_392_000_000;

/// A timestamp plus milliseconds, clamped to [`MOMENTS_MS`].
fn moved(at: Timestamp, ms: i64) -> Timestamp {
    let ms = at.as_millisecond().saturating_add(ms);
    let ms = ms.clamp(*MOMENTS_MS.start(), *MOMENTS_MS.end());
    Timestamp::from_millisecond(ms).unwrap_or(Timestamp::UNIX_EPOCH)
}

fn later(at: Timestamp, by: Duration) -> Timestamp {
    moved(at, i64::try_from(by.as_millis()).unwrap_or(i64::MAX))
}

fn earlier(at: Timestamp, by: Duration) -> Timestamp {
    moved(at, i64::try_from(by.as_millis()).map_or(i64::MIN, |ms| -ms))
}

/// The state of a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// The account is being made.
    Pending,
    /// Somebody holds the credential.
    Active,
    /// The end was requested, and the account is not yet known to be gone for good.
    Revoking,
    /// The account is gone.
    Revoked,
    /// Nobody ever got the credential, and no account will exist.
    Failed,
}

impl State {
    /// All states, in the order of a life.
    pub const ALL: [Self; 5] = [
        Self::Pending,
        Self::Active,
        Self::Revoking,
        Self::Revoked,
        Self::Failed,
    ];

    /// The word in the API, the store and the metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Active => "active",
            Self::Revoking => "revoking",
            Self::Revoked => "revoked",
            Self::Failed => "failed",
        }
    }

    /// The state with this word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == word)
    }

    /// Whether no event changes it any more.
    pub fn is_settled(self) -> bool {
        matches!(self, Self::Revoked | Self::Failed)
    }
}

/// A version of a base secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseRef {
    /// Id of the secret.
    pub id: String,
    /// Version of the secret.
    pub version: u64,
}

/// A lease: the values it was made with, and its status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Id of the lease.
    pub id: LeaseId,
    /// The dynamic secret it was read from.
    pub path: SecretPath,
    /// The pool whose engines make and end the account.
    pub pool: PoolName,
    /// Role of its account.
    pub role: RoleName,
    /// The admin connection it was made with.
    pub base: BaseRef,
    /// The database the account is for.
    pub database: String,
    /// What happens to objects that the account owns.
    pub owned_objects: OwnedObjects,
    /// The trace of the request.
    pub traceparent: String,
    /// When it was recorded, by this dispatcher's clock.
    pub created: Timestamp,
    /// `root` or a token's id.
    pub created_by: String,
    /// Version of the dynamic secret it was read from, and [`WITH_NONCE`]; or [`NOBODYS_VERSION`].
    pub secret_version: u64,
    /// TTL of the account, in seconds.
    pub ttl_seconds: u64,
    /// Longest life with renewals, in seconds.
    pub max_ttl_seconds: u64,
    /// When its caller stops waiting, and its create task leaves the queue.
    pub create_deadline: Timestamp,
    /// What changes during its life.
    pub status: Status,
}

impl Lease {
    /// From this timestamp on the lease's account can no longer appear, so its absence is final. No engine begins the
    /// create later, see [`crate::timing`].
    pub fn settles_at(&self) -> Timestamp {
        later(self.create_deadline, timing().over_after())
    }

    /// The event at `now` for a lease if nobody waits for its create any more. `restored`: the store is a copy from
    /// a backup.
    pub fn unanswered(&self, restored: bool, now: Timestamp) -> Event {
        if restored || now >= later(self.create_deadline, timing().doubtful_after) {
            Event::MaybeHeld
        } else {
            Event::GivenUp
        }
    }

    /// The mode of the revocation in this state: at the lease's end while somebody holds the lease or may get it,
    /// else at once.
    pub fn revoke_mode(&self) -> RevokeMode {
        match self.status.state {
            // A lease that is being made may still be handed out.
            State::Pending | State::Active => RevokeMode::Expire,
            State::Revoking | State::Revoked | State::Failed => RevokeMode::Now,
        }
    }

    /// The latest end that a renewal can reach, by the database's clock.
    pub fn renewable_until(&self) -> Timestamp {
        let longest = Duration::from_secs(self.max_ttl_seconds);
        self.status
            .renewable_until
            .unwrap_or_else(|| later(self.created, longest))
    }

    /// Time from `at` to [`Lease::settles_at`], in milliseconds; 0 if it has passed.
    pub fn window_ms(&self, at: Timestamp) -> u64 {
        let left = self.settles_at().as_millisecond() - at.as_millisecond();
        u64::try_from(left).unwrap_or(0)
    }
}

/// What changes in the life of a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// State of the lease.
    pub state: State,
    /// `VALID UNTIL` of the account, by the database's clock. `Some` since the lease was active.
    pub expiration: Option<Timestamp>,
    /// No renewal goes beyond this, by the database's clock. `Some` since an engine reported that it made the
    /// account.
    pub renewable_until: Option<Timestamp>,
    /// Identity of the server the account was made on.
    pub server: Option<String>,
    /// The engine that made it.
    pub engine: Option<EngineName>,
    /// The database's clock minus the store's, in milliseconds, by the last answer of its engine.
    pub skew_ms: i64,
    /// When the account was found gone, by the database's clock.
    pub revoked_at: Option<Timestamp>,
    /// The engine that found the account gone.
    pub revoked_by: Option<EngineName>,
    /// How many times its revocation has failed.
    pub attempts: u32,
    /// The last failure: code and message.
    pub last_error: Option<String>,
    /// The objects that the last failure named.
    pub objects: Vec<String>,
    /// When the engines try again.
    pub next_try: Option<Timestamp>,
    /// The revocation keeps failing.
    pub stuck: bool,
    /// When the reconciler looks at it next. `None`: never again, because its account is gone for good.
    pub next_reconcile: Option<Timestamp>,
    /// How many times the reconciler has looked at it.
    pub reconcile_attempts: u32,
}

impl Status {
    /// The status of a new lease.
    pub fn begin(create_deadline: Timestamp) -> Self {
        Self {
            state: State::Pending,
            expiration: None,
            renewable_until: None,
            skew_ms: 0,
            server: None,
            engine: None,
            revoked_at: None,
            revoked_by: None,
            attempts: 0,
            last_error: None,
            objects: Vec::new(),
            next_try: None,
            stuck: false,
            next_reconcile: Some(later(create_deadline, timing().reconcile_grace)),
            reconcile_attempts: 0,
        }
    }

    /// Converts a timestamp of the database's clock to the store's clock.
    pub fn to_store_clock(&self, there: Timestamp) -> Timestamp {
        moved(there, self.skew_ms.saturating_neg())
    }

    /// Sets the next look of the reconciler to shortly after this end by the database's clock.
    fn look_after(&mut self, end: Timestamp) {
        self.look_again(later(self.to_store_clock(end), timing().reconcile_grace));
    }

    fn look_again(&mut self, at: Timestamp) {
        self.next_reconcile = Some(at);
        self.reconcile_attempts = 0;
    }

    fn settle(&mut self) {
        // A credential can be lost only if somebody held it.
        self.state = if self.expiration.is_some() {
            State::Revoked
        } else {
            State::Failed
        };
        self.stuck = false;
        self.next_try = None;
        self.next_reconcile = None;
    }

    /// Another pool ends it from now on.
    pub fn taken_over(&mut self, now: Timestamp) {
        self.clear_failure();
        let end = self.expiration.filter(|_| self.state == State::Active);
        let from = end.map_or(now, |end| self.to_store_clock(end).max(now));
        self.look_again(later(from, timing().reconcile_grace));
    }

    /// An operator states that the account is on this server.
    pub fn bound_to(&mut self, server: String, now: Timestamp) {
        self.server = Some(server);
        self.taken_over(now);
    }

    /// No pool can end it: an operator must act.
    pub fn abandoned(&mut self, why: String) {
        if !self.state.is_settled() {
            self.stuck = true;
            self.last_error = Some(why);
            self.next_try = None;
        }
    }

    /// The earlier failure is over.
    fn clear_failure(&mut self) {
        self.attempts = 0;
        self.last_error = None;
        self.objects.clear();
        self.next_try = None;
        self.stuck = false;
    }

    /// Records the server of an answer, and until when the account may be renewed.
    fn made(&mut self, created: &Created, engine: EngineName, lease: &Lease) {
        let begun = earlier(created.expiration, Duration::from_secs(lease.ttl_seconds));
        self.renewable_until
            .get_or_insert(later(begun, Duration::from_secs(lease.max_ttl_seconds)));
        self.server.get_or_insert_with(|| created.server.clone());
        self.engine.get_or_insert(engine);
    }
}

/// What happened to a lease.
#[derive(Debug, Clone)]
pub enum Event {
    /// An engine made the account, and its end is parked at the broker.
    Created(Created, EngineName),
    /// The create task certainly never reached the broker, or an engine reports that it failed before anything was
    /// made.
    NothingMade,
    /// The create failed, or nobody waits for it any more. It is unknown whether an account exists.
    GivenUp,
    /// Nobody waits for its create, but somebody may hold its credential, because the store is a copy from a backup.
    /// The account lives until its `VALID UNTIL`.
    MaybeHeld,
    /// An engine moved its end to this timestamp of the database's clock.
    Renewed(Timestamp),
    /// Somebody requested the end of the lease.
    RevokeAsked,
    /// An engine ended the account, or found none.
    Gone {
        /// When, by the database's clock.
        at: Timestamp,
        /// Identity of the server.
        server: String,
        /// The engine that found the account gone.
        by: EngineName,
        /// The engine looked for it when its create could no longer commit.
        conclusive: bool,
        /// When the engine reported it, by its clock. The report is final only from
        /// [`Lease::settles_at`] on, whenever it arrives: the operator of the broker can deliver
        /// a revocation early and hold its outcome back.
        seen: Timestamp,
    },
    /// An engine found the account and is about to end it.
    Found,
    /// An engine found the account alive, and not yet due.
    NotDue {
        /// The account's end, by the database's clock.
        until: Timestamp,
        /// The time it had left by the same clock, if the engine reports it.
        left: Option<Duration>,
    },
    /// An engine could not end the account.
    Failing {
        /// Why it could not.
        failure: Failure,
        /// The number of tries.
        attempts: u32,
        /// When it tries again.
        again: Option<Duration>,
    },
    /// Somebody requested a try of the revocation.
    RetryAsked,
    /// Somebody detached the lease: Mayfly no longer ends its account.
    Detached {
        /// `root` or a token's id.
        by: String,
    },
}

/// What has to be sent after an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToSend {
    /// Nothing has to be sent.
    Nothing,
    /// A `now` revocation, which is due at once.
    RevokeNow,
    /// A copy of the revocation with other credentials or at another address, because the base secret has changed.
    OtherCredentials,
    /// A copy of the revocation, which no engine parks again.
    Copy,
    /// Copies of the revocation, one for each credential candidate, because a person waits.
    Retry,
}

/// The result of an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The status after the event.
    pub status: Status,
    /// The messages to send when the status is stored.
    pub send: ToSend,
}

/// The pause of the reconciler after its copy number `attempts`: 5 s, doubling to 5 min, minus up to 20 %.
/// `chance` is from 0 to 1.
pub fn reconcile_after(attempts: u32, chance: f64) -> Duration {
    let wait = timing()
        .reconcile_first
        .saturating_mul(1 << attempts.min(16))
        .min(timing().reconcile_last);
    wait.mul_f64(1.0 - chance.clamp(0.0, 1.0) / 5.0)
}

#[cfg(test)]
mod boundary_tests;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod end_tests;
#[cfg(test)]
mod tests;
