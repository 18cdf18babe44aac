//! The faults.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mayfly_tests::proxy::{Mode, Proxy};
use mayfly_tests::seconds;
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rustix::process::Signal;

use super::places::{Blow, Place};
use super::tally::Wrong;
use super::world::{ENGINES, Store, World};

/// Steps of the engine and of the dispatcher at which a fault can be armed.
pub(crate) const ENGINE_STEPS: &[&str] = &[
    "create.delivered",
    "create.before_commit",
    "create.committed",
    "create.replied",
    "renew.delivered",
    "renew.committed",
    "renew.replied",
    "revoke.delivered",
    "revoke.login_taken",
    "revoke.sessions_ended",
    "revoke.dropped",
    "revoke.outcome_sent",
    "revoke.parked",
];
pub(crate) const DISPATCHER_STEPS: &[&str] = &[
    "issue.recorded",
    "issue.before_parking",
    "issue.parked",
    "issue.sent",
    "issue.answered",
    "issue.decided",
    "renew.answered",
    "outcome.recorded",
    "revoke_below.marked",
];

/// Arms a fault at a step, for one time: `create.committed kill`.
pub(crate) fn arm(file: &std::path::Path, fault: &str) {
    let new = file.with_extension("new");
    std::fs::write(&new, format!("{fault}\n")).unwrap();
    std::fs::rename(&new, file).unwrap();
}

/// The duration of a fault; sometimes longer than the wait for a hung peer.
fn duration(random: &mut StdRng, long: f64) -> Duration {
    let ms = if random.random_bool(long) {
        random.random_range(12_000..25_000)
    } else {
        random.random_range(300..3000)
    };
    Duration::from_millis(ms)
}

impl World {
    /// One fault, until it is over: any fault if `any`, otherwise a fault that never delays an account's end.
    pub(super) async fn strike(self: Arc<Self>, random: &mut StdRng, any: bool) {
        if any && random.random_bool(0.8) {
            self.strike_those_who_end(random).await;
        } else {
            self.strike_those_who_issue(random).await;
        }
    }

    async fn strike_those_who_issue(&self, random: &mut StdRng) {
        let which = random.random_range(0..self.apis.len());
        let place = Place::Dispatcher(which);
        match random.random_range(0..100) {
            0..10 => self.end("dispatcher", place, Blow::Killed).await,
            10..16 => self.end("dispatcher", place, Blow::Terminated).await,
            16..28 => {
                let lasting = duration(random, 0.1);
                self.stop("dispatcher", place, lasting).await;
            }
            28..70 => self.strike_at_step(random, false).await,
            70..79 => {
                let ways = self.ways.dispatchers_to_broker.iter();
                let name = "way of dispatchers to broker";
                self.bar(random, name, &[Place::DispatchersToBroker], ways)
                    .await;
            }
            79..87 => {
                let way = &self.ways.applications_to_dispatcher[which..=which];
                let place = Place::ApplicationsToDispatcher(which);
                let name = "way of applications to dispatcher";
                self.bar(random, name, &[place], way.iter()).await;
            }
            _ => self.strike_store(random, which).await,
        }
    }

    async fn strike_those_who_end(&self, random: &mut StdRng) {
        let which = random.random_range(0..ENGINES);
        let place = Place::Engine(which);
        match random.random_range(0..100) {
            0..12 => self.end("engine", place, Blow::Killed).await,
            12..18 => self.end("engine", place, Blow::Terminated).await,
            18..28 => {
                let lasting = duration(random, 0.3);
                self.stop("engine", place, lasting).await;
            }
            28..64 => self.strike_at_step(random, true).await,
            64..71 => {
                let ways = self.ways.engine_to_broker[which].iter();
                let place = Place::EngineToBroker(which);
                self.bar(random, "way of one engine to broker", &[place], ways)
                    .await;
            }
            71..78 => {
                let way = &self.ways.engine_to_database[which..=which];
                let place = Place::EngineToDatabase(which);
                let name = "way of one engine to database";
                self.bar(random, name, &[place], way.iter()).await;
            }
            78..82 => {
                let places: Vec<_> = (0..ENGINES).map(Place::EngineToBroker).collect();
                let ways = self.ways.engine_to_broker.iter().flatten();
                self.bar(random, "ways of engines to broker", &places, ways)
                    .await;
            }
            82..86 => {
                let places: Vec<_> = (0..ENGINES).map(Place::EngineToDatabase).collect();
                let ways = self.ways.engine_to_database.iter();
                self.bar(random, "ways of engines to database", &places, ways)
                    .await;
            }
            86..93 => self.strike_database(random).await,
            _ => self.strike_broker(random).await,
        }
    }

    /// Ends a process; the supervisor starts it again.
    async fn end(&self, name: &str, place: Place, blow: Blow) {
        let Some(_taken) = self.strike_at(name, blow, Duration::ZERO, &[place]) else {
            return;
        };
        let id = self.id(place).await;
        self.signal(
            place,
            if blow == Blow::Killed {
                Signal::KILL
            } else {
                Signal::TERM
            },
        )
        .await;
        while self.id(place).await == id {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn stop(&self, name: &str, place: Place, lasting: Duration) {
        let Some(_taken) = self.strike_at(name, Blow::Stopped, lasting, &[place]) else {
            return;
        };
        self.signal(place, Signal::STOP).await;
        tokio::time::sleep(lasting).await;
        self.signal(place, Signal::CONT).await;
    }

    /// Cuts paths, or lets them drop all that is sent.
    async fn bar(
        &self,
        random: &mut StdRng,
        name: &str,
        places: &[Place],
        ways: impl Iterator<Item = &Proxy> + Clone,
    ) {
        // A long fault of all engines, or of all callers, leaves little to observe.
        let is_of_one = matches!(
            places,
            [Place::EngineToBroker(_) | Place::EngineToDatabase(_)]
        );
        let lasting = duration(random, if is_of_one { 0.25 } else { 0.06 });
        let (blow, mode) = *[(Blow::Cut, Mode::Cut), (Blow::Swallows, Mode::Hole)]
            .choose(random)
            .unwrap();
        let Some(_taken) = self.strike_at(name, blow, lasting, places) else {
            return;
        };
        ways.clone().for_each(|way| way.set(mode));
        tokio::time::sleep(lasting).await;
        ways.for_each(|way| way.set(Mode::Pass));
    }

    async fn strike_store(&self, random: &mut StdRng, which: usize) {
        match &self.store {
            Store::Disk(_) => self.fill_disk(random).await,
            Store::Server(server) if random.random_bool(0.4) => {
                let lasting = duration(random, 0.0);
                let struck = self.strike_at(
                    "database of the store",
                    Blow::Killed,
                    lasting,
                    &[Place::Store],
                );
                let Some(_taken) = struck else { return };
                let server = server.clone();
                away(lasting, move |is_back| match is_back {
                    false => server.kill(),
                    true => server.start(),
                })
                .await;
            }
            Store::Server(_) => {
                let way = &self.ways.dispatcher_to_store[which..=which];
                let place = Place::DispatcherToStore(which);
                self.bar(
                    random,
                    "way of one dispatcher to store",
                    &[place],
                    way.iter(),
                )
                .await;
            }
        }
    }

    /// Fills the disk of the store until callers get errors, and for a while longer. The dispatcher must survive it.
    async fn fill_disk(&self, random: &mut StdRng) {
        let Store::Disk(disk) = &self.store else {
            return;
        };
        let place = Place::Dispatcher(0);
        // Other faults that would end the dispatcher wait.
        let places = [Place::Store, place, Place::StepOfDispatcher];
        // A dispatcher that was killed a moment ago must run again first.
        let begun = Instant::now();
        while !self.is_ready(0).await {
            if begun.elapsed() > seconds(10) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let struck = self.strike_at("disk of the store", Blow::Full, Duration::ZERO, &places);
        let Some(_taken) = struck else { return };
        let heard = || {
            let tally = self.tally.lock().unwrap();
            tally.refused.get("store_unavailable").copied()
        };
        let (id, before, begun) = (self.id(place).await, heard(), Instant::now());
        disk.fill();
        while heard() == before && begun.elapsed() < seconds(10) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        tokio::time::sleep(duration(random, 0.0)).await;
        let is_same = self.id(place).await == id && self.is_alive(place).await;
        disk.make_room();
        if !is_same {
            let words = "the dispatcher did not live through a full disk".to_owned();
            self.tally.lock().unwrap().wrong(Wrong::Other, words);
        }
    }

    async fn is_ready(&self, dispatcher: usize) -> bool {
        let asking = async { self.dispatchers.lock().await[dispatcher].is_ready().await };
        tokio::time::timeout(seconds(1), asking)
            .await
            .unwrap_or(false)
    }

    async fn strike_database(&self, random: &mut StdRng) {
        let lasting = duration(random, 0.1);
        let blow = *[Blow::Killed, Blow::Stopped].choose(random).unwrap();
        let Some(_taken) = self.strike_at("database", blow, lasting, &[Place::Database]) else {
            return;
        };
        let server = self.site.server.clone();
        if blow == Blow::Killed {
            self.crashes.fetch_add(1, Ordering::Relaxed);
        }
        away(lasting, move |is_back| match (blow, is_back) {
            (Blow::Killed, false) => server.kill(),
            (Blow::Killed, true) => server.start(),
            (_, false) => server.signal_all(Signal::STOP),
            (_, true) => server.signal_all(Signal::CONT),
        })
        .await;
    }

    /// A node of the broker crashes, or sleeps.
    async fn strike_broker(&self, random: &mut StdRng) {
        let rabbit = self.rabbit.handle();
        let node = random.random_range(0..rabbit.nodes());
        let blow = *[Blow::Killed, Blow::Stopped].choose(random).unwrap();
        let lasting = duration(random, 0.1);
        let struck = self.strike_at("node of the broker", blow, lasting, &[Place::Broker]);
        let Some(_taken) = struck else { return };
        away(lasting, move |is_back| match (blow, is_back) {
            (Blow::Killed, false) => rabbit.kill(node),
            (Blow::Killed, true) => rabbit.start(node),
            (_, false) => rabbit.signal(node, Signal::STOP),
            (_, true) => rabbit.signal(node, Signal::CONT),
        })
        .await;
    }

    /// Arms a fault at a named step, and waits for some time until it happens.
    async fn strike_at_step(&self, random: &mut StdRng, of_engine: bool) {
        let (file, steps, place) = if of_engine {
            (&self.engine_fault, ENGINE_STEPS, Place::StepOfEngine)
        } else {
            let file = &self.dispatcher_fault;
            (file, DISPATCHER_STEPS, Place::StepOfDispatcher)
        };
        let Some(armed) = self.take(&[place]) else {
            return;
        };
        let step = *steps.choose(random).unwrap();
        let (fault, blow, lasting) = match random.random_range(0..10) {
            0..4 => ("kill".to_owned(), Blow::Killed, Duration::ZERO),
            4..7 => ("stop".to_owned(), Blow::Stopped, duration(random, 0.2)),
            _ => {
                // Some faults happen so late that a create commits after its revocation.
                let ms = *[200_u64, 1000, 4000, 9000].choose(random).unwrap();
                let lasting = Duration::from_millis(ms);
                (format!("delay {ms}"), Blow::Delayed, lasting)
            }
        };
        arm(file, &format!("{step} {fault}"));
        let begun = Instant::now();
        while file.exists() {
            if begun.elapsed() > seconds(4) && std::fs::remove_file(file).is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.count(&format!("at {step}: {}", blow.word()));
        drop(armed);
        // The tasks of the struck engine wait. A fault in a request delays no revocation, unless the whole engine is
        // suspended.
        let is_in_the_way = of_engine && (blow != Blow::Delayed || step.starts_with("revoke"));
        let _trouble = is_in_the_way.then(|| self.some_engine(blow));
        tokio::time::sleep(lasting).await;
        if blow == Blow::Stopped {
            self.go_on(of_engine).await;
        }
    }

    /// Continues the process that has stopped itself. Another process at another fault may be continued too early by
    /// this: they cannot be distinguished.
    async fn go_on(&self, of_engine: bool) {
        let places: Vec<_> = if of_engine {
            (0..ENGINES).map(Place::Engine).collect()
        } else {
            (0..self.apis.len()).map(Place::Dispatcher).collect()
        };
        let (begun, mut found) = (Instant::now(), false);
        while !found && begun.elapsed() < seconds(2) {
            for place in &places {
                if self.is_stopped(*place).await {
                    self.signal(*place, Signal::CONT).await;
                    found = true;
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Something is unreachable for some time; the servers' scripts block.
async fn away(lasting: Duration, change: impl Fn(bool) + Send + 'static) {
    tokio::task::spawn_blocking(move || {
        change(false);
        std::thread::sleep(lasting);
        change(true);
    })
    .await
    .unwrap();
}
