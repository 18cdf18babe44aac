//! Steps from outside of Mayfly: the broker's operator, accidents, and time.

use super::{Mistake, Next, Protocol};
use crate::world::{Bag, Create, Issue, Message, PAST, Row, State, Work, World};

impl Protocol {
    /// The broker's operator sends a recorded message again.
    pub(super) fn operator(&self, next: &mut Next<'_>) {
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
        // The operator of the broker sends the end before its time, marked as its second delivery.
        if world.row.is_some() {
            let bent = Message {
                settling: true,
                ..self.revocation(true, false, world.now)
            };
            next.wish("the end is sent again, bent", to.post(bent));
        }
    }

    pub(super) fn accidents(&self, next: &mut Next<'_>) {
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
            // The restored row can be any earlier row.
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
