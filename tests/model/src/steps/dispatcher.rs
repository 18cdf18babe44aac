//! Steps of the dispatcher: an issue, received messages, the reconciler, the sweep.

use super::{Mistake, Next, Protocol, SWEEP_GRACE, settled};
use crate::real::{DEADLINE, Happened};
use crate::world::{Answer, Bag, Create, End, Issue, Outcome, Publish, Row, State, World};

impl Protocol {
    pub(super) fn issue(&self, next: &mut Next<'_>) {
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
                    self.park_the_end(next, create);
                }
                if create == Publish::Open {
                    self.publish_the_create(next, park);
                }
            }
            Issue::Waiting => wait(next),
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

    fn park_the_end(&self, next: &mut Next<'_>, create: Publish) {
        let world = next.from;
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

    fn publish_the_create(&self, next: &mut Next<'_>, park: Publish) {
        let world = next.from;
        let to = |create| World {
            issue: self.published(park, create),
            ..world
        };
        if world.now > self.real.publish() {
            next.sure("the create took too long", to(Publish::Unsure));
            return;
        }
        let there = |world: World| World {
            create: Create::Ready(world.now + DEADLINE),
            sent: true,
            ..world
        };
        let (confirmed, unsure) = (there(to(Publish::Confirmed)), there(to(Publish::Unsure)));
        next.sure("the create is published", confirmed);
        next.fault("the create is published, unconfirmed", unsure);
        next.fault("the create is not published", to(Publish::Unsure));
        next.fault("the create cannot be published", to(Publish::Never));
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

    /// What the dispatcher receives, and what it does by itself.
    pub(super) fn dispatcher(&self, next: &mut Next<'_>) {
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
        // A second copy would do nothing more than the one in progress, or the next one.
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
}

/// The caller waits for the answer of an engine.
fn wait(next: &mut Next<'_>) {
    let world = next.from;
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
