//! The possible next steps. Each step is atomic: a commit, a publish, an acknowledgement. A crash is the step that
//! forgets the content of a process. A process may take its step late, because it is slow or stopped.

mod bounds;
mod dispatcher;
mod engine;
mod forget;
mod outside;
mod user;

pub use bounds::{Bounds, Mistake};

use crate::explore::{Model, Step};
use crate::real::{Happened, Real};
use crate::world::{
    Answer, Bag, Create, Issue, Message, Outcome, Renewal, Row, State, Ticks, Work, World,
};

/// An account is swept this long after its end.
const SWEEP_GRACE: Ticks = 1;

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

    /// Maximum number of revocations, without copies. Five without a fault: the parked end, and one each for a lease
    /// that is given up, a requested end, an answer that comes too late and an account that is found alive too late.
    /// Each fault adds three, each replay one.
    fn most_messages(&self) -> usize {
        5 + 3 * usize::from(self.bounds.faults) + usize::from(self.bounds.replays)
    }

    fn made(&self, mistake: Mistake) -> bool {
        self.bounds.mistake == Some(mistake)
    }

    fn clock(&self, world: &World) -> Ticks {
        world.now + self.bounds.skew
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
        // A step that changes nothing is left out.
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
        // A failure changes only what is shown. A revocation that is accepted may stay and come again, so a second
        // equal outcome changes nothing.
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

    /// Applies an event to the row, as the store's `apply`. Returns whether a `now` must be sent.
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

    /// `happen`, and then its message is sent, or is not.
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
            return Some("more is in progress than was thought possible");
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
