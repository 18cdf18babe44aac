//! The life of a lease as one pure function: what happened to a lease in a state, and so what
//! it is next and what has to be sent. Nothing here reads a clock, a store or a broker.
//!
//! `pending → active → revoked`, with `revoking` between where it was asked for; `failed` where no
//! credential was ever handed out. A settled lease (revoked, failed) never changes again.

use std::time::Duration;

use jiff::Timestamp;
use mayfly_common::grant::OwnedObjects;
use mayfly_common::names::{EngineName, LeaseId, PoolName, RoleName, SecretPath};
use mayfly_common::task::{CREATE_BUDGET, Created, Failure, FailureCode};

/// What the reconciler leaves to the ordinary messages before it steps in.
pub(crate) const GRACE: Duration = Duration::from_secs(5);
/// Longest time a publish is waited for; a create may reach the broker so much after its start.
pub(crate) const PUBLISH_LIMIT: Duration = Duration::from_secs(5);
/// For what the broker and the clocks take.
const MARGIN: Duration = Duration::from_secs(2);
/// A revocation that failed so often is shown as stuck.
const STUCK_ATTEMPTS: u32 = 3;
const RECONCILE_FIRST: Duration = Duration::from_secs(5);
const RECONCILE_LAST: Duration = Duration::from_secs(300);

/// Where in its life a lease is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum State {
    /// Its account is being made.
    Pending,
    /// Somebody holds the credential.
    Active,
    /// It is to end, and is not known to have ended for good.
    Revoking,
    /// The account is gone.
    Revoked,
    /// There never was a credential, and never will be an account.
    Failed,
}

impl State {
    /// All of them.
    pub(crate) const ALL: [Self; 5] = [
        Self::Pending,
        Self::Active,
        Self::Revoking,
        Self::Revoked,
        Self::Failed,
    ];

    /// The word in the API, the store and the metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Active => "active",
            Self::Revoking => "revoking",
            Self::Revoked => "revoked",
            Self::Failed => "failed",
        }
    }

    /// The state with this word.
    pub(crate) fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == word)
    }

    /// Nothing can happen to it any more.
    pub(crate) fn is_settled(self) -> bool {
        matches!(self, Self::Revoked | Self::Failed)
    }
}

/// A version of a base secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BaseRef {
    /// Id of the secret.
    pub(crate) id: String,
    /// Its version.
    pub(crate) version: u64,
}

/// A lease: what it was made with, and its course.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lease {
    /// Its id.
    pub(crate) id: LeaseId,
    /// The dynamic secret it was read from.
    pub(crate) path: SecretPath,
    /// Who makes and ends it.
    pub(crate) pool: PoolName,
    /// Its account.
    pub(crate) role: RoleName,
    /// The admin connection it was made with.
    pub(crate) base: BaseRef,
    /// The database the account is for.
    pub(crate) database: String,
    /// What becomes of what it owns.
    pub(crate) owned_objects: OwnedObjects,
    /// The trace it was asked for in.
    pub(crate) traceparent: String,
    /// When it was recorded, by this dispatcher's clock.
    pub(crate) created: Timestamp,
    /// `root` or a token's id.
    pub(crate) created_by: String,
    /// Life of the account, in seconds.
    pub(crate) ttl_seconds: u64,
    /// When its caller stops waiting, and its create task leaves the queue.
    pub(crate) create_deadline: Timestamp,
    /// What changes.
    pub(crate) course: Course,
}

impl Lease {
    /// After this moment its account can no longer appear: only then is its absence final.
    pub(crate) fn settles_at(&self) -> Timestamp {
        self.create_deadline + CREATE_BUDGET + PUBLISH_LIMIT + MARGIN
    }

    /// Time from `moment` until [`Lease::settles_at`], in milliseconds; 0 when it has passed.
    pub(crate) fn window_ms(&self, moment: Timestamp) -> u64 {
        let left = self.settles_at().as_millisecond() - moment.as_millisecond();
        u64::try_from(left).unwrap_or(0)
    }
}

/// What changes in the life of a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Course {
    /// Where it is.
    pub(crate) state: State,
    /// `VALID UNTIL` of the account, by the database's clock. There since it was active.
    pub(crate) expiration: Option<Timestamp>,
    /// Identity of the server the account was made on.
    pub(crate) server: Option<String>,
    /// The engine that made it.
    pub(crate) engine: Option<EngineName>,
    /// When the account was found gone, by the database's clock.
    pub(crate) revoked_at: Option<Timestamp>,
    /// The engine that found so.
    pub(crate) revoked_by: Option<EngineName>,
    /// How often its revocation failed.
    pub(crate) attempts: u32,
    /// The last failure: code and words.
    pub(crate) last_error: Option<String>,
    /// Its revocation keeps failing.
    pub(crate) stuck: bool,
    /// When the reconciler looks at it; none = never again.
    pub(crate) next_reconcile: Option<Timestamp>,
    /// How often it has.
    pub(crate) reconcile_attempts: u32,
}

impl Course {
    /// The course of a new lease.
    pub(crate) fn begin(create_deadline: Timestamp) -> Self {
        Self {
            state: State::Pending,
            expiration: None,
            server: None,
            engine: None,
            revoked_at: None,
            revoked_by: None,
            attempts: 0,
            last_error: None,
            stuck: false,
            next_reconcile: Some(create_deadline + GRACE),
            reconcile_attempts: 0,
        }
    }

    fn look_again(&mut self, at: Timestamp) {
        self.next_reconcile = Some(at);
        self.reconcile_attempts = 0;
    }

    fn settle(&mut self) {
        // Only who held a credential can have lost it.
        self.state = if self.expiration.is_some() {
            State::Revoked
        } else {
            State::Failed
        };
        self.stuck = false;
        self.next_reconcile = None;
    }
}

/// What happened to a lease.
#[derive(Debug, Clone)]
pub(crate) enum Event {
    /// An engine made the account, and its end is parked at the broker.
    Created(Created, EngineName),
    /// Its create task certainly never reached the broker.
    NeverSent,
    /// Its create failed, or nobody waits for it any more: whether there is an account is unknown.
    GivenUp,
    /// Somebody wants it to end now.
    RevokeAsked,
    /// An engine ended the account, or found none.
    Gone {
        /// When, by the database's clock.
        at: Timestamp,
        /// Where.
        server: String,
        /// Who.
        by: EngineName,
    },
    /// An engine found the account alive, and not yet due.
    NotDue(Timestamp),
    /// An engine could not end the account.
    Failing(Failure, u32),
}

/// What has to be sent after an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Send {
    /// Nothing.
    Nothing,
    /// A `now` revocation.
    RevokeNow,
    /// A copy of the revocation with the admin's present credentials, if they are others.
    WithPresentCredentials,
}

/// What an event makes of a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Change {
    /// The new course.
    pub(crate) course: Course,
    /// What to send once it is stored.
    pub(crate) send: Send,
}

/// What `event` makes of `lease` at `now` (this dispatcher's clock).
pub(crate) fn next(lease: &Lease, event: Event, now: Timestamp) -> Change {
    let mut course = lease.course.clone();
    let final_now = now >= lease.settles_at();
    let mut send = Send::Nothing;
    match (course.state, event) {
        (State::Pending, Event::Created(created, engine)) => {
            course.state = State::Active;
            course.expiration = Some(created.expiration);
            course.server = Some(created.server);
            course.engine = Some(engine);
            course.look_again(created.expiration + GRACE);
        }
        (State::Active, Event::Created(..)) => {}
        // Too late: nobody was or will be handed this account.
        (State::Revoking, Event::Created(created, engine)) => {
            course.server.get_or_insert(created.server);
            course.engine.get_or_insert(engine);
            send = Send::RevokeNow;
        }
        (State::Revoked | State::Failed, Event::Created(..)) => send = Send::RevokeNow,

        (State::Pending, Event::NeverSent) => course.settle(),
        (State::Pending, Event::GivenUp) | (State::Pending | State::Active, Event::RevokeAsked) => {
            course.state = State::Revoking;
            course.look_again(now + GRACE);
            send = Send::RevokeNow;
        }
        (State::Revoking, Event::RevokeAsked) => send = Send::RevokeNow,
        (
            State::Active | State::Revoking | State::Revoked | State::Failed,
            Event::NeverSent | Event::GivenUp,
        )
        | (State::Revoked | State::Failed, Event::RevokeAsked) => {}

        // A short TTL's end may come before its create: it says nothing yet.
        (State::Pending, Event::Gone { .. }) if !final_now => {}
        (State::Pending | State::Active | State::Revoking, Event::Gone { at, server, by }) => {
            if lease
                .course
                .server
                .as_ref()
                .is_some_and(|known| *known != server)
            {
                course.attempts = course.attempts.saturating_add(1);
                course.last_error = Some(format!(
                    "{}: the account was made on another server than the one that answers now",
                    FailureCode::OtherServer.as_str()
                ));
                course.stuck = true;
            } else {
                course.revoked_at.get_or_insert(at);
                course.revoked_by.get_or_insert(by);
                if course.state == State::Revoking && !final_now {
                    course.stuck = false;
                    course.look_again(lease.settles_at() + GRACE);
                } else {
                    course.settle();
                }
            }
        }
        (State::Active, Event::NotDue(until)) => {
            course.expiration = Some(until);
            course.attempts = 0;
            course.last_error = None;
            course.stuck = false;
            course.look_again(until + GRACE);
        }
        (State::Pending | State::Revoking, Event::NotDue(_)) => {}
        // An account nobody has a right to.
        (State::Revoked | State::Failed, Event::NotDue(_)) => send = Send::RevokeNow,

        (State::Active | State::Revoking, Event::Failing(failure, attempts)) => {
            if failure.code == FailureCode::DatabaseRefusedLogin && course.attempts == 0 {
                send = Send::WithPresentCredentials;
            }
            course.attempts = course.attempts.saturating_add(1).max(attempts);
            let hopeless = matches!(
                failure.code,
                FailureCode::OtherServer | FailureCode::ForeignRole
            );
            course.stuck = hopeless || course.attempts >= STUCK_ATTEMPTS;
            course.last_error = Some(format!("{}: {}", failure.code.as_str(), failure.message));
        }
        (State::Pending | State::Revoked | State::Failed, Event::Failing(..))
        | (State::Revoked | State::Failed, Event::Gone { .. }) => {}
    }
    Change { course, send }
}

/// When the reconciler looks again after its `attempts`-th copy: 5 s doubling to 5 min, and up
/// to a fifth more. `chance` is 0 to 1.
pub(crate) fn reconcile_after(attempts: u32, chance: f64) -> Duration {
    let wait = RECONCILE_FIRST
        .saturating_mul(1 << attempts.min(16))
        .min(RECONCILE_LAST);
    wait.mul_f64(1.0 + chance.clamp(0.0, 1.0) / 5.0)
}

#[cfg(test)]
#[path = "lease_tests.rs"]
mod tests;
