//! Where faults strike, and for how long each is in the way of an account's end.

use std::time::Duration;

use super::tally::Trouble;
use super::world::World;

/// Where a fault strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    Dispatcher(usize),
    Engine(usize),
    Broker,
    Database,
    Store,
    DispatchersToBroker,
    EngineToBroker(usize),
    EngineToDatabase(usize),
    ApplicationsToDispatcher(usize),
    DispatcherToStore(usize),
    /// The file in which a step is named.
    StepOfDispatcher,
    StepOfEngine,
}

/// What a fault does there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Blow {
    /// SIGKILL; at a broker or a database a crash.
    Killed,
    /// SIGSTOP, and after a while SIGCONT.
    Stopped,
    /// SIGTERM.
    Terminated,
    /// At a named step.
    Delayed,
    /// A way ends what goes by it, and takes nothing.
    Cut,
    /// A way takes everything, and nothing arrives.
    Swallows,
    /// A disk.
    Full,
}

impl Blow {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Killed => "killed",
            Self::Stopped => "stopped",
            Self::Terminated => "terminated",
            Self::Delayed => "delayed",
            Self::Cut => "cut",
            Self::Swallows => "swallows",
            Self::Full => "full",
        }
    }
}

/// How long after its own end a fault is still in the way of the end of an account that somebody
/// holds; `None` if it never is. The message that ends the account is parked at the broker, and
/// engines and database do the rest: what befalls dispatchers, their store and who asks them excuses
/// nothing.
pub(super) fn aftermath(blow: Blow, place: Place) -> Option<Duration> {
    let seconds = match (place, blow) {
        (
            Place::Dispatcher(_)
            | Place::Store
            | Place::DispatchersToBroker
            | Place::ApplicationsToDispatcher(_)
            | Place::DispatcherToStore(_)
            | Place::StepOfDispatcher
            | Place::StepOfEngine,
            _,
        ) => return None,
        // It finishes what it was given, and others get the rest.
        (Place::Engine(_), Blow::Terminated) => return None,
        // What a dead one had is another's at once, if another one lives; a hung one wakes with it,
        // or loses it by the heartbeat meanwhile. One that was killed is started again within this.
        (Place::Engine(_), _) => 3,
        // A connection is tried every half second; one that hangs in it is given up after 5 s.
        (Place::EngineToBroker(_), _) => 6,
        // A revocation that found it away waits at most 4 s ± 20 %, and then for the breaker: 1 s,
        // or 2 of an absence of 25; and a connect that hangs is given up after 5 s.
        (Place::Database | Place::EngineToDatabase(_), _) => 10,
        // Queues elect leaders, dead-lettering goes on 5 s after a confirm that never came, and
        // both sides connect again.
        (Place::Broker, _) => 10,
    };
    Some(Duration::from_secs(seconds))
}

/// Places that a fault has for itself, until it is over.
pub(super) struct Taken<'w> {
    world: &'w World,
    places: Vec<Place>,
    trouble: Option<(Trouble, Duration)>,
}

impl World {
    /// Takes these places for one fault, unless another one is at any of them.
    pub(super) fn take(&self, places: &[Place]) -> Option<Taken<'_>> {
        let mut taken = self.taken.lock().unwrap();
        if places.iter().any(|place| taken.contains(place)) {
            return None;
        }
        taken.extend(places);
        Some(Taken {
            world: self,
            places: places.to_vec(),
            trouble: None,
        })
    }

    /// The same, and counts the fault, which begins now.
    pub(super) fn strike_at(
        &self,
        name: &str,
        blow: Blow,
        lasting: Duration,
        places: &[Place],
    ) -> Option<Taken<'_>> {
        let mut taken = self.take(places)?;
        let long = if lasting > LONG { ", long" } else { "" };
        self.count(&format!("{name} {}{long}", blow.word()));
        taken.begins(blow, places);
        Some(taken)
    }

    /// A fault of some engine, whichever, begins now.
    pub(super) fn some_engine(&self, blow: Blow) -> Taken<'_> {
        let mut taken = Taken {
            world: self,
            places: Vec::new(),
            trouble: None,
        };
        taken.begins(blow, &[Place::Engine(0)]);
        taken
    }

    pub(super) fn count(&self, fault: &str) {
        let mut tally = self.tally.lock().unwrap();
        tally.tell(fault.to_owned());
        *tally.faults.entry(fault.to_owned()).or_default() += 1;
    }
}

/// Longer than this, a peer may have given the other up.
const LONG: Duration = Duration::from_secs(10);

impl Taken<'_> {
    /// What is done to the places begins now, and is in the way as far as it goes.
    fn begins(&mut self, blow: Blow, places: &[Place]) {
        let aftermaths = places.iter().map(|place| aftermath(blow, *place));
        let longest = aftermaths.flatten().max();
        let is_of_broker = places.contains(&Place::Broker);
        let begin = |longest| {
            (
                self.world.tally.lock().unwrap().begins(is_of_broker),
                longest,
            )
        };
        self.trouble = longest.map(begin);
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if let Some((trouble, aftermath)) = self.trouble.take() {
            let mut tally = self.world.tally.lock().unwrap();
            tally.tell(format!("over at {:?}", self.places));
            tally.ends(trouble, aftermath);
        }
        let mut taken = self.world.taken.lock().unwrap();
        taken.retain(|place| !self.places.contains(place));
    }
}
