//! The places where faults happen, and how long each fault delays an account's end.

use std::time::Duration;

use super::tally::Trouble;
use super::world::World;

/// A part of the system that a fault can strike.
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

/// The kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Blow {
    /// SIGKILL; at a broker or a database a crash.
    Killed,
    /// SIGSTOP, and later SIGCONT.
    Stopped,
    /// SIGTERM.
    Terminated,
    /// The process is delayed at a named step.
    Delayed,
    /// A path closes its connections and accepts none.
    Cut,
    /// A path accepts everything, and nothing arrives.
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

/// How long after its own end a fault still delays the end of an account that somebody holds; `None` if it never
/// does. The message that ends the account is parked at the broker, and engines and database do the rest. So a fault
/// of dispatchers, their store or callers excuses nothing.
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
        // The engine finishes the tasks that it has, and other engines get the rest.
        (Place::Engine(_), Blow::Terminated) => return None,
        // If another engine lives, it gets the tasks of a dead engine at once. A suspended engine continues its tasks
        // when it wakes, or loses them by the AMQP heartbeat. A killed engine is started again within this time.
        (Place::Engine(_), _) => 3,
        // A connection is tried every 0.5 s; a try that hangs is given up after 5 s.
        (Place::EngineToBroker(_), _) => 6,
        // A revocation that found the database unreachable waits at most 4 s ± 20 %, and then for the breaker: 1 s,
        // or 2 s after an absence of 25 s. A connect that hangs is given up after 5 s.
        (Place::Database | Place::EngineToDatabase(_), _) => 10,
        // Queues elect leaders, dead-lettering continues 5 s after a confirm that never came, and both sides connect
        // again.
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
    /// Takes these places for one fault, unless another fault is at any of them.
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

    /// Notes that a fault of an unknown engine begins now.
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

/// A fault that lasts longer than this may make a peer close the connection.
const LONG: Duration = Duration::from_secs(10);

impl Taken<'_> {
    /// Notes that the fault at these places begins now.
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
