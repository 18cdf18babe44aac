//! Steps of the user: a requested end, and renewals.

use super::{Mistake, Next, Protocol, settled};
use crate::real::Happened;
use crate::world::{Renewal, Role, State, World};

impl Protocol {
    pub(super) fn user(&self, next: &mut Next<'_>) {
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
            // The login is checked again, in the same transaction.
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
}
