//! Steps of engines: creates and revocations.

use super::{Mistake, Next, Protocol, settled};
use crate::explore::Step;
use crate::real::{Look, Tried};
use crate::world::{Answer, Create, Message, Outcome, Role, Row, Work, World};

impl Protocol {
    /// A create fails before anything is made. The engine says so only of a message that was delivered for
    /// the first time, and only after the broker has taken its acknowledgement. A recorded create that is
    /// sent again may make the account nevertheless. Then no caller gets it, and its end is parked.
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

    pub(super) fn creates(&self, next: &mut Next<'_>) {
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

    pub(super) fn revokes(&self, next: &mut Next<'_>) {
        let world = next.from;
        if world.ghost {
            let to = World {
                role: world.role.filter(|role| !self.may_drop(*role)),
                ghost: false,
                ..world
            };
            next.sure("an engine without its message drops the account", to);
        }
        for message in world.revokes.distinct() {
            if message.closed {
                self.drop_account(next, message);
            } else if message.due <= world.now {
                self.begin_revocation(next, message);
            }
        }
    }

    /// The login has been taken away.
    fn drop_account(&self, next: &mut Next<'_>, message: Message) {
        let world = next.from;
        let ready = Message {
            closed: false,
            ..message
        };
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
            let what = "the account is dropped";
            self.finish(next, what, dropped, message, Tried::Dropped);
        } else {
            // A role that is absent, or was made again, is not dropped. The next try finds that.
            self.finish(next, "the drop fails", world, message, Tried::Failed);
        }
    }

    /// The message is due.
    fn begin_revocation(&self, next: &mut Next<'_>, message: Message) {
        let world = next.from;
        if world.faults > 0 {
            let mut less = world;
            less.faults -= 1;
            let mut to = Vec::new();
            let mut failing = Next {
                from: less,
                to: &mut to,
            };
            let what = "the database is unreachable";
            self.finish(&mut failing, what, less, message, Tried::Failed);
            next.to.extend(to.into_iter().map(|step| Step {
                optional: true,
                ..step
            }));
        }
        let expire = message.expire && !self.made(Mistake::ExpireAtSight);
        match self.real.look(expire, world.role, self.clock(&world)) {
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
                let may_log_in = self.made(Mistake::LookThenDrop);
                if let (Some(role), false) = (&mut to.role, may_log_in) {
                    role.login = false;
                }
                next.sure("the login is taken away", to);
            }
        }
    }

    /// A role with login was made after the login was taken away.
    fn may_drop(&self, role: Role) -> bool {
        !role.login || self.made(Mistake::DropAnew) || self.made(Mistake::LookThenDrop)
    }

    /// The outcome is sent, the next message is parked, and this message is acknowledged.
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
        // The dispatcher's verdict: a failing revocation has nothing left to do.
        let over = |row: Row| settled(row) && row.look.is_none();
        if matches!(tried, Tried::Failed) && world.row.is_some_and(over) {
            next.sure("… and the dispatcher says that it is not needed", gone);
        }
    }
}
