//! Conversion between the model's values and the programs': here the model runs their code.

use std::cell::RefCell;
use std::collections::HashMap;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use mayfly_protocol::grant::OwnedObjects;
use mayfly_protocol::lease::{self, BaseRef, Event, Lease, Status, ToSend};
use mayfly_protocol::names::{EngineName, InstallationId, LeaseId};
use mayfly_protocol::revocation::{self, Ended, Found, Next, Verdict};
use mayfly_protocol::secret::Secret;
use mayfly_protocol::target::{SslMode, Target};
use mayfly_protocol::task::{Created, Failure, FailureCode, Revoke, RevokeMode};
use mayfly_protocol::timing::{Freshness, freshness, timing};

use crate::world::{Message, Role, Row, State, Ticks};

/// When the caller stops waiting.
pub(crate) const DEADLINE: Ticks = 1;

/// The model's event of a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Happened {
    Created(Ticks),
    NothingMade,
    /// No caller waits for its create. The flag: the store was restored.
    Unanswered(bool),
    GivenUp,
    Renewed(Ticks),
    RevokeAsked,
    Gone {
        at: Ticks,
        conclusive: bool,
    },
    NotDue(Ticks),
    Failing,
}

/// The result of one try of a revocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Tried {
    Dropped,
    Absent,
    NotDue { until: Ticks, left: Ticks },
    Failed,
}

/// The action of an engine on the role that it found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Look {
    Due,
    Absent,
    NotDue { until: Ticks, left: Ticks },
}

/// The binaries' decisions, on a lease and a task of their types.
#[derive(Debug)]
pub(crate) struct Real {
    lease: Lease,
    task: Revoke,
    engine: EngineName,
    tick_seconds: u8,
    skew: Ticks,
    /// Earlier queries; the answers to equal queries are equal.
    happened: Answers<(Row, Happened, Ticks), (Row, bool)>,
    after: Answers<(Message, Tried, Ticks), Option<Message>>,
    conclusive: Answers<(Ticks, bool), bool>,
}

type Answers<Q, A> = RefCell<HashMap<Q, A>>;

impl Real {
    /// The windows of the real code, with ticks of this length in seconds, and a database's clock that is `skew`
    /// ticks ahead.
    pub(crate) fn new(tick_seconds: u8, ttl: Ticks, skew: Ticks) -> Self {
        let at = |tick: Ticks| moment(tick, tick_seconds);
        let id = LeaseId::random();
        let name = |text: &str| format!("the model's own {text}");
        let lease = Lease {
            id,
            path: "db:dyn".parse().expect("a path"),
            pool: "pool1".parse().expect("a pool"),
            role: "mayfly_x".parse().expect("a role"),
            base: BaseRef {
                id: name("base"),
                version: 1,
            },
            database: "app".to_owned(),
            owned_objects: OwnedObjects::Reassign,
            traceparent: String::new(),
            created: at(0),
            created_by: "root".to_owned(),
            secret_version: 1,
            ttl_seconds: u64::from(tick_seconds) * u64::try_from(ttl).unwrap_or(0),
            max_ttl_seconds: 1000,
            create_deadline: at(DEADLINE),
            status: Status::begin(at(DEADLINE)),
        };
        let task = Revoke {
            lease: id,
            installation: InstallationId::random(),
            target: Target {
                host: "h".to_owned(),
                port: 1,
                database: "d".to_owned(),
                username: "u".to_owned(),
                password: Secret::new("p"),
                sslmode: SslMode::Disable,
                auth: Default::default(),
                channel_binding: None,
                sslrootcert: None,
                sslcert: None,
                sslkey: None,
            },
            role: lease.role.clone(),
            mode: RevokeMode::Expire,
            owned_objects: OwnedObjects::Reassign,
            server: None,
            place: None,
            window_ms: 0,
            copy: false,
            asked: false,
            reads_batches: true,
            others: vec![],
        };
        let engine = "e1".parse().expect("an engine");
        Self {
            lease,
            task,
            engine,
            tick_seconds,
            skew,
            happened: RefCell::default(),
            after: RefCell::default(),
            conclusive: RefCell::default(),
        }
    }

    /// Time from the delivery of a create to its last commit.
    pub(crate) fn budget(&self) -> Ticks {
        self.ticks(timing().create_budget)
    }

    /// The longest time of a publish.
    pub(crate) fn publish(&self) -> Ticks {
        self.ticks(timing().publish_limit)
    }

    /// Whether an engine takes a recorded create: an engine whose clock is behind by the whole allowance.
    pub(crate) fn takes_recorded(&self, now: Ticks) -> bool {
        let engine = self.at(now) - timing().clock_allowance;
        let judged = freshness(self.at(0), Some(self.lease.create_deadline), engine);
        judged == Freshness::Fresh
    }

    /// The first tick at which absence is final.
    pub(crate) fn settles(&self) -> Ticks {
        self.tick(self.lease.settles_at())
    }

    fn at(&self, tick: Ticks) -> Timestamp {
        moment(tick, self.tick_seconds)
    }

    fn tick_ms(&self) -> u64 {
        u64::from(self.tick_seconds) * 1000
    }

    /// The first tick at or after a timestamp.
    fn tick(&self, moment: Timestamp) -> Ticks {
        let past = moment.duration_since(self.at(0)).as_millis();
        let ms = i128::from(self.tick_ms());
        let ticks = past.div_euclid(ms) + i128::from(past.rem_euclid(ms) > 0);
        Ticks::try_from(ticks).unwrap_or(Ticks::MAX)
    }

    /// Whole ticks in a time, so without the margins of parking.
    fn ticks(&self, time: Duration) -> Ticks {
        Ticks::try_from(time.as_millis() / u128::from(self.tick_ms())).unwrap_or(Ticks::MAX)
    }

    /// The row of a new lease.
    pub(crate) fn begin(&self) -> Row {
        self.row(&Status::begin(self.lease.create_deadline))
    }

    /// The window of a revocation that is to arrive at `arrival`.
    pub(crate) fn window(&self, arrival: Ticks, parked: bool) -> Ticks {
        let margin = if parked {
            timing().park_margin
        } else {
            Duration::ZERO
        };
        let left = Duration::from_millis(self.lease.window_ms(self.at(arrival) + margin));
        // The window is rounded up to the next tick: a message may always come later.
        self.ticks(left + Duration::from_millis(self.tick_ms() - 1))
    }

    fn row(&self, status: &Status) -> Row {
        Row {
            state: match status.state {
                lease::State::Pending => State::Pending,
                lease::State::Active => State::Active,
                lease::State::Revoking => State::Revoking,
                lease::State::Revoked => State::Revoked,
                lease::State::Failed => State::Failed,
            },
            expiration: status.expiration.map(|end| self.tick(end)),
            made: status.engine.is_some(),
            look: status.next_reconcile.map(|look| self.tick(look)),
        }
    }

    /// `lease::next`. Whether to publish a `now` revocation.
    pub(crate) fn happen(&self, before: Row, happened: Happened, now: Ticks) -> (Row, bool) {
        let mut known = self.happened.borrow_mut();
        *known
            .entry((before, happened, now))
            .or_insert_with(|| self.decide_event(before, happened, now))
    }

    fn decide_event(&self, before: Row, happened: Happened, now: Ticks) -> (Row, bool) {
        let mut lease = self.lease.clone();
        lease.status.state = state(before.state);
        lease.status.expiration = before.expiration.map(|end| self.at(end));
        lease.status.server = before.made.then(|| "here".to_owned());
        lease.status.engine = before.made.then(|| self.engine.clone());
        lease.status.next_reconcile = before.look.map(|look| self.at(look));
        let event = match happened {
            Happened::Created(until) => Event::Created(
                Created {
                    expiration: self.at(until),
                    server: "here".to_owned(),
                    warnings: vec![],
                },
                self.engine.clone(),
            ),
            Happened::NothingMade => Event::NothingMade,
            Happened::GivenUp => Event::GivenUp,
            Happened::Unanswered(restored) => lease.unanswered(restored, self.at(now)),
            Happened::Renewed(until) => Event::Renewed(self.at(until)),
            Happened::RevokeAsked => Event::RevokeAsked,
            Happened::Gone { at, conclusive } => Event::Gone {
                at: self.at(at),
                server: "here".to_owned(),
                by: self.engine.clone(),
                conclusive,
                // The engine's clock is ahead by the whole allowance.
                seen: self.at(at - self.skew) + timing().clock_allowance,
            },
            Happened::NotDue(until) => Event::NotDue {
                until: self.at(until),
                left: None,
            },
            Happened::Failing => Event::Failing {
                failure: failure(),
                attempts: 1,
                again: None,
            },
        };
        let change = lease::next(&lease, event, self.at(now));
        (self.row(&change.status), change.send == ToSend::RevokeNow)
    }

    /// The engine's `decide`, on the role at `now` by the database's clock.
    pub(crate) fn look(&self, expire: bool, role: Option<Role>, now: Ticks) -> Look {
        let found = role.map(|role| Found {
            oid: 1,
            ours: true,
            until: Some(self.at(role.until)),
            left: Some(f64::from(role.until - now) * f64::from(self.tick_seconds)),
            now: self.at(now),
        });
        match revocation::verdict(mode(expire), found.as_ref()) {
            Verdict::Due => Look::Due,
            Verdict::Absent => Look::Absent,
            Verdict::NotDue { until, left } => Look::NotDue {
                until: self.tick(until),
                left: self.ticks(left),
            },
            Verdict::Foreign => unreachable!("the role is the lease's"),
        }
    }

    /// The engine's `is_conclusive`.
    pub(crate) fn is_conclusive(&self, message: Message) -> bool {
        let message = (message.window, message.settling);
        let mut known = self.conclusive.borrow_mut();
        *known.entry(message).or_insert_with(|| {
            let (window, settling) = message;
            let mut task = self.task.clone();
            task.window_ms = self.window_ms(window);
            revocation::is_conclusive(&task, settling)
        })
    }

    fn window_ms(&self, window: Ticks) -> u64 {
        u64::try_from(window).unwrap_or(0) * self.tick_ms()
    }

    fn task(&self, message: Message) -> Revoke {
        Revoke {
            mode: mode(message.expire),
            copy: message.copy,
            window_ms: self.window_ms(message.window),
            ..self.task.clone()
        }
    }

    /// The engine's `next`: the message that takes the place of this message, if one does. A message that failed may
    /// come again at once, because the shortest pause is less than a tick.
    pub(crate) fn after(&self, message: Message, tried: Tried, now: Ticks) -> Option<Message> {
        let mut known = self.after.borrow_mut();
        *known
            .entry((message, tried, now))
            .or_insert_with(|| self.decide_next(message, tried, now))
    }

    fn decide_next(&self, message: Message, tried: Tried, now: Ticks) -> Option<Message> {
        let task = self.task(message);
        let here = || "here".to_owned();
        let result = match tried {
            Tried::Dropped => Ok(Ended::Dropped {
                at: self.at(now),
                server: here(),
                late_seconds: 0.0,
            }),
            Tried::Absent => Ok(Ended::Absent {
                at: self.at(now),
                server: here(),
            }),
            Tried::NotDue { until, left } => Ok(Ended::NotDue {
                until: self.at(until),
                left: Duration::from_millis(self.tick_ms()) * u32::try_from(left).unwrap_or(0),
            }),
            Tried::Failed => Err(failure()),
        };
        // The looks before the window are left out: a reconciler's copy comes at any time as well.
        let attempt = if tried == Tried::Absent { u32::MAX } else { 0 };
        match revocation::next(&task, attempt, message.settling, &result) {
            Next::Done => None,
            Next::Park {
                after, settling, ..
            } => Some(Message {
                settling,
                due: now + self.ticks(after),
                closed: false,
                ..message
            }),
        }
    }
}

fn failure() -> Failure {
    Failure::new(FailureCode::DatabaseUnreachable, "away")
}

fn mode(expire: bool) -> RevokeMode {
    if expire {
        RevokeMode::Expire
    } else {
        RevokeMode::Now
    }
}

fn state(state: State) -> lease::State {
    match state {
        State::Pending => lease::State::Pending,
        State::Active => lease::State::Active,
        State::Revoking => lease::State::Revoking,
        State::Revoked => lease::State::Revoked,
        State::Failed => lease::State::Failed,
    }
}

fn moment(tick: Ticks, seconds: u8) -> Timestamp {
    let past = SignedDuration::from_secs(i64::from(tick) * i64::from(seconds));
    Timestamp::UNIX_EPOCH + SignedDuration::from_hours(1) + past
}
