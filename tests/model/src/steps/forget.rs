//! Merges all states that differ only in what no later step reads.

use super::{Protocol, SWEEP_GRACE};
use crate::real::Happened;
use crate::world::{Answer, Bag, Create, Issue, Outcome, PAST, State, Ticks, Work, World};

impl Protocol {
    /// Merges states that differ only in what no later step reads.
    pub(super) fn forget(&self, world: &mut World) {
        let (now, clock) = (world.now, self.clock(world));
        let past = |moment: &mut Ticks, now: Ticks| {
            if *moment <= now {
                *moment = PAST;
            }
        };
        // A message that cannot be sent again need not be recorded.
        world.sent &= world.replays > 0;
        // A message that an engine got too late for another delivery is removed.
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
                // The window ends at the last tick, or before.
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
        // After a final look the time of the end does not matter.
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
        // These steps change nothing even at the last tick.
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
