//! What can happen next. Every step is one that cannot be torn: a commit, a publish, an
//! acknowledgement. A crash is the step that forgets what was in a process; since nothing obliges
//! anybody to move, a slow or stopped process is one whose steps come late.

use crate::explore::{Model, Step};
use crate::real::{DEADLINE, Happened, Look, Real, Tried};
use crate::world::{
    Answer, Bag, Create, End, Issue, Message, Outcome, PAST, Publish, Renewal, Role, Row, State,
    Ticks, Work, World,
};

/// How long after its end an account is swept.
const SWEEP_GRACE: Ticks = 1;

/// How much of the world is explored.
#[derive(Debug, Clone)]
pub struct Bounds {
    /// Length of a tick. Ten seconds keep the order of all that happens; with five, what is
    /// shorter than ten has a length too.
    pub tick_seconds: u8,
    /// Life of the account.
    pub ttl: Ticks,
    /// The database's clock, less the dispatcher's.
    pub skew: Ticks,
    /// Faults in one status of things.
    pub faults: u8,
    /// Renewals, each by `ttl` from then.
    pub renewals: u8,
    /// Messages that the broker's operator has recorded and sends again, at any moment.
    pub replays: u8,
    /// Somebody may ask for its end.
    pub asks: bool,
    /// The broker may lose everything, once.
    pub wipe: bool,
    /// The store may be restored from a backup, once.
    pub restore: bool,
    /// Accounts past their end that no lease wants are swept.
    pub sweep: bool,
    /// The last tick.
    pub last: Ticks,
    /// Something done wrong on purpose.
    pub mistake: Option<Mistake>,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            tick_seconds: 10,
            ttl: 2,
            skew: 0,
            faults: 1,
            renewals: 0,
            replays: 0,
            asks: false,
            wipe: false,
            restore: false,
            sweep: false,
            last: 5,
            mistake: None,
        }
    }
}

/// Mistakes that the model must notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mistake {
    /// The first word that the account is gone settles the lease, and ends its revocation.
    SettleOnFirstGone,
    /// The caller is answered though it is not sure that the end is parked.
    AnswerUnparked,
    /// An engine looks at the date, and takes login and role away later without another look.
    LookThenDrop,
    /// An `expire` does not look at the date.
    ExpireAtSight,
    /// A reconciler's copy is parked as any other message.
    ParkCopies,
    /// Nothing is published again.
    NoReconciler,
    /// A create may commit whenever it gets to it.
    SlowCreate,
    /// A message is acknowledged before its next is parked.
    AckFirst,
    /// A renewal does not ask whether the account may still log in.
    BlindRenewal,
    /// An outcome is judged by when it is heard: whatever was seen is taken for good.
    TrustOldNews,
    /// What bears the name is dropped, though it was made anew.
    DropAnew,
    /// An engine takes a recorded create as long as it likes.
    TakeRecorded,
    /// An engine says that nothing was made while the broker may give the create to another.
    SayNothingUnheard,
}

/// The model of one lease.
#[derive(Debug)]
pub struct Protocol {
    bounds: Bounds,
    real: Real,
}

impl Protocol {
    /// The model in these bounds.
    #[must_use]
    pub fn new(bounds: Bounds) -> Self {
        Self {
            real: Real::new(bounds.tick_seconds, bounds.ttl, bounds.skew),
            bounds,
        }
    }

    /// Most revocations there may be beside copies: the parked end; one each for giving up, for
    /// a user's wish, for an answer that comes too late and for an account found alive too late;
    /// and of these two and a duplicate more for each fault.
    fn most_messages(&self) -> usize {
        5 + 3 * usize::from(self.bounds.faults) + usize::from(self.bounds.replays)
    }

    fn made(&self, mistake: Mistake) -> bool {
        self.bounds.mistake == Some(mistake)
    }

    fn clock(&self, world: &World) -> Ticks {
        world.now + self.bounds.skew
    }

    /// Makes one state of those that differ only in what no step will look at again.
    fn forget(&self, world: &mut World) {
        let (now, clock) = (world.now, self.clock(world));
        let past = |moment: &mut Ticks, now: Ticks| {
            if *moment <= now {
                *moment = PAST;
            }
        };
        // What nobody sends again need not be known.
        world.sent &= world.replays > 0;
        // What an engine was given too late to deliver again is gone.
        if let Create::Ready(until) = world.create
            && until < now
        {
            world.create = Create::Absent;
        }
        if let Some(role) = &mut world.role {
            let grace = if self.bounds.sweep { SWEEP_GRACE } else { 0 };
            past(&mut role.until, clock - grace);
        }
        if let Some(held) = &mut world.held {
            past(held, if world.asked { Ticks::MAX } else { clock });
        }
        world.works = world.works.map(|mut work| {
            past(&mut work.since, now - self.real.budget() - 1);
            if work.answer.is_some() {
                work.since = PAST;
            }
            work
        });
        world.revokes = world.revokes.map(|mut message| {
            message.due = message.due.min(self.bounds.last);
            past(&mut message.due, now);
            message.window = match (message.settling, message.copy) {
                (true, _) => 0,
                (_, true) => message.window.min(1),
                // To the end of time, or nearer.
                _ => message.window.min((self.bounds.last - now).max(1)),
            };
            message
        });
        self.forget_told(world);
    }

    fn forget_told(&self, world: &mut World) {
        let Some(row) = &mut world.row else {
            world.outcomes = Bag::default();
            return;
        };
        if row.state != State::Pending {
            // The reconciler may be asked to look at any time.
            row.look = row.look.map(|_| PAST);
        }
        if row.state != State::Active {
            row.expiration = row.expiration.map(|_| PAST);
        }
        // When it was for good, it matters to nobody when it was.
        let late = self.bounds.last + self.bounds.skew;
        let settles = self.real.settles() + self.bounds.skew;
        world.outcomes = world.outcomes.map(|outcome| match outcome {
            Outcome::Gone {
                at,
                conclusive: true,
            } if at >= settles => Outcome::Gone {
                at: late.max(settles),
                conclusive: true,
            },
            other => other,
        });
        if row.state == State::Pending {
            return;
        }
        let row = *row;
        let ended = row.state != State::Active;
        world.outcomes = world.outcomes.map(|outcome| match outcome {
            Outcome::Gone { at, conclusive } if ended && at < settles => Outcome::Gone {
                at: PAST,
                conclusive,
            },
            Outcome::NotDue(_) if ended => Outcome::NotDue(PAST),
            other => other,
        });
        // What changes nothing even at the end of time.
        world.outcomes = world.outcomes.once(|outcome| match outcome {
            Outcome::Gone { at, conclusive } => {
                let gone = Happened::Gone { at, conclusive };
                let (mut after, send) = self.real.happen(row, gone, self.bounds.last);
                after.look = after.look.map(|_| PAST);
                send || after != row
            }
            Outcome::NotDue(_) | Outcome::Failing => true,
        });
        if world.issue == Issue::Over {
            let until = |answer| match answer {
                Answer::Created(_) => Answer::Created(PAST),
                Answer::Failed | Answer::Nothing => answer,
            };
            world.answers = world.answers.map(until).once(|_| true);
            world.works = world.works.map(|work| Work {
                answer: work.answer.map(until),
                ..work
            });
        }
    }
}

/// Collects what can follow a state.
struct Next<'a> {
    from: World,
    to: &'a mut Vec<Step<World>>,
}

impl Next<'_> {
    fn sure(&mut self, what: &'static str, to: World) {
        self.to.push(Step {
            what,
            optional: false,
            to,
        });
    }

    fn wish(&mut self, what: &'static str, to: World) {
        self.to.push(Step {
            what,
            optional: true,
            to,
        });
    }

    fn fault(&mut self, what: &'static str, mut to: World) {
        // One that changes nothing is not worth its place.
        if self.from.faults > 0 && to != self.from {
            to.faults = self.from.faults - 1;
            self.wish(what, to);
        }
    }
}

impl World {
    fn post(mut self, message: Message) -> Self {
        self.full |= !self.revokes.add(message);
        self
    }

    fn has_copy(&self) -> bool {
        self.revokes.iter().any(|message| message.copy)
    }

    fn take(mut self, message: Message) -> Self {
        self.revokes.remove(message);
        self
    }

    fn tell(mut self, outcome: Outcome) -> Self {
        // That it fails changes only what is shown. One that is taken in may stay and come
        // again, so two equal ones can do no more.
        if outcome != Outcome::Failing && self.outcomes.count(outcome) == 0 {
            self.full |= !self.outcomes.add(outcome);
        }
        self
    }

    fn answer(mut self, answer: Answer) -> Self {
        if self.answers.count(answer) == 0 {
            self.full |= !self.answers.add(answer);
        }
        self
    }

    fn give_back(mut self, work: Work) -> Self {
        self.works.remove(work);
        if let (true, Create::Delivered(until)) = (work.owner, self.create) {
            self.create = Create::Ready(until);
            self.again = true;
        }
        self
    }
}

fn settled(row: Row) -> bool {
    matches!(row.state, State::Revoked | State::Failed)
}

impl Protocol {
    fn revocation(&self, expire: bool, copy: bool, due: Ticks) -> Message {
        Message {
            expire,
            copy,
            settling: false,
            window: if self.made(Mistake::SettleOnFirstGone) {
                0
            } else {
                self.real.window(due, expire && !copy)
            },
            due,
            closed: false,
        }
    }

    /// Lets an event happen to the row, as the store's `apply`. Whether a `now` is to be sent.
    fn happen(&self, world: World, happened: Happened) -> (World, bool) {
        let Some(row) = world.row else {
            return (world, false);
        };
        let now = match happened {
            Happened::Gone { .. } if self.made(Mistake::SettleOnFirstGone) => self.bounds.last,
            _ => world.now,
        };
        let happened = match happened {
            Happened::Gone { conclusive, .. } if self.made(Mistake::TrustOldNews) => {
                let at = self.clock(&world);
                Happened::Gone { at, conclusive }
            }
            other => other,
        };
        let (mut row, send) = self.real.happen(row, happened, now);
        row.look = row.look.map(|look| look.min(self.bounds.last));
        let row = Some(row);
        (World { row, ..world }, send)
    }

    /// `happen`, and then what it calls for is sent, or is not.
    fn happen_and_send(
        &self,
        next: &mut Next<'_>,
        what: &'static str,
        unsent: &'static str,
        world: World,
        happened: Happened,
    ) {
        let (after, send) = self.happen(world, happened);
        if send {
            next.fault(unsent, after);
            next.sure(what, after.post(self.revocation(false, false, world.now)));
        } else {
            next.sure(what, after);
        }
    }

    fn issue(&self, next: &mut Next<'_>) {
        let world = next.from;
        match world.issue {
            Issue::Idle => {
                let issue = Issue::Publishing {
                    park: Publish::Open,
                    create: Publish::Open,
                };
                let row = Some(self.real.begin());
                next.sure(
                    "the row is committed",
                    World {
                        row,
                        issue,
                        ..world
                    },
                );
            }
            Issue::Publishing { park, create } => {
                if park == Publish::Open {
                    let to = |park| World {
                        issue: self.published(park, create),
                        ..world
                    };
                    let message = self.revocation(true, false, world.now + self.bounds.ttl);
                    next.sure("the end is parked", to(Publish::Confirmed).post(message));
                    next.fault(
                        "the end is parked, unconfirmed",
                        to(Publish::Unsure).post(message),
                    );
                    next.fault("the end is not parked", to(Publish::Unsure));
                }
                if create == Publish::Open {
                    let to = |create| World {
                        issue: self.published(park, create),
                        ..world
                    };
                    if world.now <= self.real.publish() {
                        let there = Create::Ready(world.now + DEADLINE);
                        let there = |world: World| World {
                            create: there,
                            sent: true,
                            ..world
                        };
                        next.sure("the create is published", there(to(Publish::Confirmed)));
                        next.fault(
                            "the create is published, unconfirmed",
                            there(to(Publish::Unsure)),
                        );
                        next.fault("the create is not published", to(Publish::Unsure));
                        next.fault("the create cannot be published", to(Publish::Never));
                    } else {
                        next.sure("the create took too long", to(Publish::Unsure));
                    }
                }
            }
            Issue::Waiting => {
                for answer in world.answers.distinct() {
                    let mut to = world;
                    to.answers.remove(answer);
                    to.issue = Issue::Ending(match answer {
                        Answer::Created(until) => End::Made(until),
                        Answer::Failed => End::Unknown,
                        Answer::Nothing => End::Nothing,
                    });
                    next.sure("the answer is in", to);
                }
                let to = World {
                    issue: Issue::Ending(End::Unknown),
                    ..world
                };
                if world.now >= DEADLINE {
                    next.sure("the caller waited long enough", to);
                } else {
                    next.fault("the broker or the engines are gone", to);
                }
            }
            Issue::Ending(end) => self.end(next, end),
            Issue::Over => {}
        }
        if !matches!(world.issue, Issue::Idle | Issue::Over) {
            let to = World {
                issue: Issue::Over,
                answers: Bag::default(),
                ..world
            };
            next.fault("the dispatcher dies", to);
        }
    }

    fn published(&self, park: Publish, create: Publish) -> Issue {
        let park = match park {
            Publish::Unsure if self.made(Mistake::AnswerUnparked) => Publish::Confirmed,
            park => park,
        };
        match (park, create) {
            (Publish::Open, _) | (_, Publish::Open) => Issue::Publishing { park, create },
            (_, Publish::Never) => Issue::Ending(End::Nothing),
            (Publish::Confirmed, Publish::Confirmed) => Issue::Waiting,
            _ => Issue::Ending(End::Unknown),
        }
    }

    fn end(&self, next: &mut Next<'_>, end: End) {
        let over = World {
            issue: Issue::Over,
            ..next.from
        };
        match end {
            End::Nothing => {
                next.sure(
                    "the lease failed",
                    self.happen(over, Happened::NothingMade).0,
                );
            }
            End::Unknown => self.happen_and_send(
                next,
                "the lease is given up",
                "the lease is given up, nothing is sent",
                over,
                Happened::GivenUp,
            ),
            End::Made(until) => {
                let (after, send) = self.happen(over, Happened::Created(until));
                let won = |world: World| world.row.map(|row| row.state);
                if won(over) == Some(State::Pending) && won(after) == Some(State::Active) {
                    let held = Some(until);
                    next.sure("the caller has the credential", World { held, ..after });
                    next.fault("the dispatcher dies before it answers", after);
                } else if send {
                    next.fault("the lease is over already, nothing is sent", after);
                    let message = self.revocation(false, false, over.now);
                    next.sure("the lease is over already", after.post(message));
                } else {
                    next.sure("the lease is over already", after);
                }
            }
        }
    }

    /// What the dispatcher hears, and what it does by itself.
    fn dispatcher(&self, next: &mut Next<'_>) {
        let world = next.from;
        if world.issue == Issue::Over {
            for answer in world.answers.distinct() {
                let mut heard = world;
                heard.answers.remove(answer);
                next.sure("an answer nobody waits for is lost", heard);
                if let (Answer::Created(until), Some(row)) = (answer, world.row)
                    && row.state != State::Pending
                {
                    self.happen_and_send(
                        next,
                        "an answer comes too late",
                        "an answer comes too late, nothing is sent",
                        heard,
                        Happened::Created(until),
                    );
                }
            }
        }
        for outcome in world.outcomes.distinct() {
            let happened = match outcome {
                Outcome::Gone { at, conclusive } => Happened::Gone { at, conclusive },
                Outcome::NotDue(until) => Happened::NotDue(until),
                Outcome::Failing => Happened::Failing,
            };
            let what = match outcome {
                Outcome::Gone { .. } => "the dispatcher hears that it is gone",
                Outcome::NotDue(_) => "the dispatcher hears that it is not due",
                Outcome::Failing => "the dispatcher hears that it fails",
            };
            let (after, send) = self.happen(world, happened);
            let sent = if send {
                after.post(self.revocation(false, false, world.now))
            } else {
                after
            };
            if send {
                next.fault("an outcome is taken in and comes again", sent);
            } else {
                next.wish("an outcome is taken in and comes again", after);
            }
            let done = |mut to: World| {
                to.outcomes.remove(outcome);
                to
            };
            next.sure(what, done(sent));
            if send {
                next.fault("an outcome is taken in, nothing is sent", done(after));
            }
        }
        self.reconcile(next);
        if self.bounds.sweep
            && let Some(role) = world.role
            && role.until + SWEEP_GRACE <= self.clock(&world)
            && world.row.is_none_or(settled)
            && !world.has_copy()
        {
            let copy = self.revocation(true, true, world.now);
            next.sure("a sweep finds it", world.post(copy));
        }
    }

    fn reconcile(&self, next: &mut Next<'_>) {
        let mut world = next.from;
        if self.made(Mistake::NoReconciler) {
            return;
        }
        let due = |row: Row| row.look.is_some_and(|look| look <= world.now);
        // Another would do nothing that the one on its way, or the one after it, does not.
        if !world.row.is_some_and(due) || world.has_copy() {
            return;
        }
        if world.row.is_some_and(|row| row.state == State::Pending) {
            let unanswered = Happened::Unanswered(world.restored);
            world = self.happen(world, unanswered).0;
        }
        let Some(row) = &mut world.row else { return };
        row.look = row.look.map(|_| (world.now + 1).min(self.bounds.last));
        let expire = row.state == State::Active;
        next.fault("the reconciler's copy does not get through", world);
        let copy = self.revocation(expire, true, world.now);
        next.sure("the reconciler sends a copy", world.post(copy));
    }

    fn user(&self, next: &mut Next<'_>) {
        let world = next.from;
        if self.bounds.asks && !world.asked && world.row.is_some_and(|row| !settled(row)) {
            let (after, send) = self.happen(world, Happened::RevokeAsked);
            let after = World {
                asked: true,
                ..after
            };
            if send {
                next.fault("its end is asked for, nothing is sent", after);
                let message = self.revocation(false, false, world.now);
                next.wish("its end is asked for", after.post(message));
            } else {
                next.wish("its end is asked for", after);
            }
        }
        let active = world.row.is_some_and(|row| row.state == State::Active);
        match world.renewal {
            Renewal::Idle => {
                if world.renewals > 0 && world.held.is_some() && active {
                    let to = World {
                        renewal: Renewal::Asked,
                        renewals: world.renewals - 1,
                        ..world
                    };
                    next.wish("a renewal is asked for", to);
                }
            }
            Renewal::Asked | Renewal::Begun(_) => self.renew(next),
            Renewal::Done(until) => {
                let idle = World {
                    renewal: Renewal::Idle,
                    ..world
                };
                next.sure("the renewal's answer is lost", idle);
                let (after, _) = self.happen(idle, Happened::Renewed(until));
                if active {
                    let held = after.held.max(Some(until));
                    next.sure("the renewal is answered", World { held, ..after });
                } else {
                    next.sure("the renewal is refused", after);
                }
            }
        }
    }

    fn renew(&self, next: &mut Next<'_>) {
        let world = next.from;
        let renewal = |renewal| World { renewal, ..world };
        next.sure("the renewal comes to nothing", renewal(Renewal::Idle));
        let now = self.clock(&world);
        let until = now + self.bounds.ttl;
        let Some(role) = world.role else { return };
        let blind = self.made(Mistake::BlindRenewal);
        match world.renewal {
            Renewal::Asked => {
                let may = (role.login && role.until > now) || blind;
                if may && until <= self.bounds.last + self.bounds.skew {
                    next.sure("the renewal is begun", renewal(Renewal::Begun(until)));
                }
            }
            // The login is looked at again, in the same transaction.
            Renewal::Begun(until) if role.login || blind => {
                let until = until.max(role.until);
                let role = Some(Role { until, ..role });
                let again = World {
                    role,
                    ..renewal(Renewal::Asked)
                };
                next.fault("the renewal is done, and comes again", again);
                let done = World {
                    role,
                    ..renewal(Renewal::Done(until))
                };
                next.sure("the renewal is done", done);
            }
            Renewal::Begun(_) | Renewal::Idle | Renewal::Done(_) => {}
        }
    }

    /// A create fails before anything is made. The engine says so only of a message that was given to
    /// nobody before, and once the broker has heard that it is done with. What the broker's operator
    /// sends again may be made all the same; who reads hears nothing of it, and its end is parked.
    fn make_nothing(&self, next: &mut Next<'_>, work: Work) {
        let mut to = next.from;
        let unheard = self.made(Mistake::SayNothingUnheard);
        let Create::Delivered(_) = to.create else {
            return;
        };
        if !work.owner || self.bounds.replays > 0 || (to.again && !unheard) {
            return;
        }
        to.works.remove(work);
        if !unheard {
            to.create = Create::Absent;
        }
        let answer = Some(Answer::Nothing);
        to.full |= !to.works.add(Work { answer, ..work });
        next.sure("the create fails before anything is made", to);
    }

    fn creates(&self, next: &mut Next<'_>) {
        let world = next.from;
        if let Create::Ready(until) = world.create
            && world.works.len() < 2
        {
            let mut to = world;
            to.create = Create::Delivered(until);
            let work = Work {
                since: world.now,
                owner: true,
                answer: None,
            };
            to.full |= !to.works.add(work);
            next.sure("an engine takes the create", to);
        }
        for work in world.works.distinct() {
            let mut without = world;
            without.works.remove(work);
            let with = |world: World, answer| {
                let mut to = world;
                let answer = Some(answer);
                to.full |= !to.works.add(Work { answer, ..work });
                to
            };
            next.fault("an engine dies at the create", world.give_back(work));
            if work.owner && matches!(world.create, Create::Delivered(_)) {
                let mut to = world.give_back(work);
                to.full |= !to.works.add(Work {
                    owner: false,
                    ..work
                });
                next.fault("an engine loses the create and works on", to);
            }
            match work.answer {
                None => {
                    let in_time = world.now <= work.since + self.real.budget();
                    if let (true, Some(role)) = (in_time, world.role) {
                        let to = with(without, Answer::Created(role.until));
                        next.sure("the engine finds the account", to);
                    } else if in_time || self.made(Mistake::SlowCreate) {
                        let until = self.clock(&world) + self.bounds.ttl;
                        let made = World {
                            role: Some(Role { until, login: true }),
                            ..without
                        };
                        next.sure("the account is made", with(made, Answer::Created(until)));
                        next.fault(
                            "the account is made, and the engine does not know",
                            with(made, Answer::Failed),
                        );
                        next.fault("the create fails", with(without, Answer::Failed));
                        self.make_nothing(next, work);
                    }
                    if !in_time {
                        next.sure("the create is too late", with(without, Answer::Failed));
                    }
                }
                Some(answer) => {
                    let mut done = without;
                    if work.owner && matches!(done.create, Create::Delivered(_)) {
                        done.create = Create::Absent;
                    }
                    next.sure("the engine answers", done.answer(answer));
                    next.fault("the engine's answer is lost", done);
                    if work.owner {
                        let to = world.give_back(work).answer(answer);
                        next.fault("the engine answers and dies", to);
                    }
                }
            }
        }
    }

    fn revokes(&self, next: &mut Next<'_>) {
        let world = next.from;
        if world.ghost {
            let to = World {
                role: world.role.filter(|role| !self.may_drop(*role)),
                ghost: false,
                ..world
            };
            next.sure("an engine without its message drops the account", to);
        }
        let clock = self.clock(&world);
        for message in world.revokes.distinct() {
            let ready = Message {
                closed: false,
                ..message
            };
            if message.closed {
                let back = world.take(message).post(ready);
                next.fault("an engine dies at the revocation", back);
                let to = World {
                    ghost: true,
                    ..back
                };
                next.fault("an engine loses the revocation and works on", to);
                if world.role.is_some_and(|role| self.may_drop(role)) {
                    let dropped = World {
                        role: None,
                        ..world
                    };
                    self.finish(
                        next,
                        "the account is dropped",
                        dropped,
                        message,
                        Tried::Dropped,
                    );
                } else {
                    // What is not there, or was made anew, is not dropped; the next try sees.
                    self.finish(next, "the drop fails", world, message, Tried::Failed);
                }
            } else if message.due <= world.now {
                if world.faults > 0 {
                    let mut less = world;
                    less.faults -= 1;
                    let mut to = Vec::new();
                    let mut failing = Next {
                        from: less,
                        to: &mut to,
                    };
                    self.finish(
                        &mut failing,
                        "the database is away",
                        less,
                        message,
                        Tried::Failed,
                    );
                    next.to.extend(to.into_iter().map(|step| Step {
                        optional: true,
                        ..step
                    }));
                }
                let expire = message.expire && !self.made(Mistake::ExpireAtSight);
                match self.real.look(expire, world.role, clock) {
                    Look::Absent => {
                        self.finish(next, "the account is absent", world, message, Tried::Absent);
                    }
                    Look::NotDue { until, left } => {
                        let tried = Tried::NotDue { until, left };
                        self.finish(next, "the account is not due", world, message, tried);
                    }
                    Look::Due => {
                        let mut to = world.take(message).post(Message {
                            closed: true,
                            ..message
                        });
                        if let (Some(role), false) =
                            (&mut to.role, self.made(Mistake::LookThenDrop))
                        {
                            role.login = false;
                        }
                        next.sure("the login is taken away", to);
                    }
                }
            }
        }
    }

    /// A role that may log in was made after somebody took the login away.
    fn may_drop(&self, role: Role) -> bool {
        !role.login || self.made(Mistake::DropAnew) || self.made(Mistake::LookThenDrop)
    }

    /// The outcome is told, the next message parked, this one acknowledged.
    fn finish(
        &self,
        next: &mut Next<'_>,
        what: &'static str,
        world: World,
        message: Message,
        tried: Tried,
    ) {
        let outcome = match tried {
            Tried::Dropped | Tried::Absent => Outcome::Gone {
                at: self.clock(&world),
                conclusive: self.real.is_conclusive(message) || self.made(Mistake::TrustOldNews),
            },
            Tried::NotDue { until, .. } => Outcome::NotDue(until),
            Tried::Failed => Outcome::Failing,
        };
        let original = Message {
            copy: message.copy && !self.made(Mistake::ParkCopies),
            ..message
        };
        let again = self.real.after(original, tried, world.now);
        let park = |world: World| again.map_or(world, |again| world.post(again));
        let ready = Message {
            closed: false,
            ..message
        };
        let told = world.tell(outcome);
        let gone = told.take(message);
        next.sure(what, park(gone));
        next.fault("… and its outcome is lost", park(world.take(message)));
        next.fault(
            "… and the engine dies before it tells",
            world.take(message).post(ready),
        );
        next.fault("… and the engine dies before it parks", gone.post(ready));
        if again.is_some() {
            next.fault(
                "… and the engine dies before it acknowledges",
                park(gone.post(ready)),
            );
        }
        if self.made(Mistake::AckFirst) {
            next.fault("… and the engine dies after it acknowledges", gone);
        }
        // The dispatcher, asked, knows that a failing revocation has nothing left to do.
        let over = |row: Row| settled(row) && row.look.is_none();
        if matches!(tried, Tried::Failed) && world.row.is_some_and(over) {
            next.sure("… and the dispatcher says that it is not needed", gone);
        }
    }

    /// Who operates the broker sends again what came by.
    fn operator(&self, next: &mut Next<'_>) {
        let world = next.from;
        if world.replays == 0 {
            return;
        }
        let mut to = world;
        to.replays -= 1;
        let takes = self.real.takes_recorded(world.now) || self.made(Mistake::TakeRecorded);
        if world.sent && takes && world.works.len() < 2 {
            let mut to = to;
            let owner = false;
            let work = Work {
                since: world.now,
                owner,
                answer: None,
            };
            to.full |= !to.works.add(work);
            next.wish("an engine takes a recorded create", to);
        }
        // Before its time, and as if it came for the second time.
        if world.row.is_some() {
            let bent = Message {
                settling: true,
                ..self.revocation(true, false, world.now)
            };
            next.wish("the end is sent again, bent", to.post(bent));
        }
    }

    fn accidents(&self, next: &mut Next<'_>) {
        let world = next.from;
        if self.bounds.wipe && !world.wiped {
            let mut to = world;
            to.wiped = true;
            to.create = Create::Absent;
            to.works = Bag::default();
            for work in world.works.iter() {
                let owner = false;
                to.full |= !to.works.add(Work { owner, ..work });
            }
            to.ghost |= world.revokes.iter().any(|message| message.closed);
            to.revokes = Bag::default();
            to.outcomes = Bag::default();
            to.answers = Bag::default();
            next.wish("the broker loses everything", to);
        }
        if self.bounds.restore && !world.restored && world.issue != Issue::Idle {
            // Any row it may have had before.
            let begun = self.real.begin();
            let active = world.held.map(|until| Row {
                state: State::Active,
                expiration: Some(until),
                look: Some(PAST),
                made: true,
            });
            for (row, what) in [
                (None, "the store is restored from before the lease"),
                (Some(begun), "the store is restored, and was pending then"),
                (active, "the store is restored, and was active then"),
            ] {
                if row.is_some() || what.ends_with("lease") {
                    let to = World {
                        row,
                        restored: true,
                        issue: Issue::Over,
                        answers: Bag::default(),
                        ..world
                    };
                    next.wish(what, to);
                }
            }
        }
        // A lease begins at tick 0.
        if world.now < self.bounds.last && world.issue != Issue::Idle {
            let mut to = world;
            to.now += 1;
            next.sure("time passes", to);
        }
    }
}

impl Model for Protocol {
    type State = World;

    fn first(&self) -> World {
        World {
            now: 0,
            row: None,
            issue: Issue::Idle,
            create: Create::Absent,
            works: Bag::default(),
            revokes: Bag::default(),
            outcomes: Bag::default(),
            answers: Bag::default(),
            role: None,
            ghost: false,
            held: None,
            asked: false,
            renewal: Renewal::Idle,
            renewals: self.bounds.renewals,
            again: false,
            sent: false,
            replays: self.bounds.replays,
            wiped: false,
            restored: false,
            faults: self.bounds.faults,
            full: false,
        }
    }

    fn steps(&self, world: &World, to: &mut Vec<Step<World>>) {
        let mut next = Next { from: *world, to };
        self.issue(&mut next);
        self.dispatcher(&mut next);
        self.user(&mut next);
        self.creates(&mut next);
        self.revokes(&mut next);
        self.accidents(&mut next);
        self.operator(&mut next);
        for step in next.to.iter_mut() {
            self.forget(&mut step.to);
        }
    }

    fn wrong(&self, world: &World) -> Option<&'static str> {
        let parked = world.revokes.iter().filter(|message| !message.copy).count();
        if world.full {
            return Some("more is under way than was thought possible");
        }
        if parked > self.most_messages() {
            return Some("messages multiply");
        }
        if let Some(promised) = world.held
            && !world.asked
            && self.clock(world) < promised
            && !world
                .role
                .is_some_and(|role| role.login && role.until >= promised)
        {
            return Some("a credential in use died early");
        }
        if world.held.is_some() && world.role.is_some() && !world.wiped && parked == 0 {
            return Some("a credential is out and its end is not parked");
        }
        let over = |row: Row| settled(row) && row.look.is_none();
        let still = world.issue == Issue::Over
            && world.create == Create::Absent
            && world.works.is_empty()
            && world.revokes.is_empty()
            && world.outcomes.is_empty()
            && world.answers.is_empty()
            && !world.ghost;
        if world.role.is_some() && world.row.is_some_and(over) {
            return Some("an account is there whose lease is over");
        }
        if world.role.is_some() && world.row.is_none_or(over) && still && !self.bounds.sweep {
            return Some("an account that nothing ends");
        }
        if world.role.is_some() && world.row.is_none() && !world.restored {
            return Some("an account without a lease");
        }
        None
    }

    fn is_quiet(&self, world: &World) -> bool {
        world.issue == Issue::Over
            && world.create == Create::Absent
            && world.works.is_empty()
            && world.revokes.is_empty()
            && world.outcomes.is_empty()
            && world.answers.is_empty()
            && world.role.is_none()
            && !world.ghost
            && world.renewal == Renewal::Idle
            && world
                .row
                .is_none_or(|row| settled(row) && row.look.is_none())
    }
}
