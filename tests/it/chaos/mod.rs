//! The fault suite: real processes, a broker and a database of its own, and random faults from a printed seed.
//! Processes are killed, stopped and asked to end, at random and at every named step of an issue, a renewal and a
//! revocation. The paths between them are cut or drop everything. Broker, database and store go away for some time.
//! The promises are checked from outside. The short forms (`short_…`) run with `make test`; `make chaos` runs the
//! others: ten minutes each, and the outages with their figures.

#![allow(clippy::print_stdout, reason = "its figures")]

mod applications;
pub(crate) mod faults;
mod outages;
mod places;
mod sessions;
mod tally;
mod watch;
mod world;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::seconds;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tally::{Lateness, SLOW, Tally, Wrong};
use tokio::task::JoinSet;
use world::{Plan, World};

/// In each round the first faults never delay an account's end, so that the test can see that ends are in time. Later
/// faults can be any.
const ROUND: Duration = Duration::from_secs(60);
const FREE_PART: Duration = Duration::from_secs(24);
/// Number of faults at the same time.
const AT_ONCE: usize = 3;
const AT_ONCE_IN_FREE_PART: usize = 2;
/// Maximum lateness without any fault. The two short runs have the same time and start many processes, so an end also
/// waits for the processor. It is still sooner than an end by a sweep (every 10 s).
const LATE: Duration = Duration::from_secs(3);
const LATE_BESIDE: Duration = Duration::from_secs(8);
/// A wait that is longer than this is for something that never happens.
const LONGEST_FAULT: Duration = Duration::from_secs(180);

/// The plan of a run, and the numbers that it must reach.
struct Run {
    plan: Plan,
    lasting: Duration,
    /// Pause between two faults, in milliseconds.
    pause: std::ops::Range<u64>,
    applications: u64,
    faults: u32,
    leases: usize,
}

async fn chaos(run: Run) {
    let seed: u64 =
        std::env::var("CHAOS_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    println!("seed {seed}");
    let world = World::new(run.plan).await;
    let (begun, began) = (Instant::now(), Timestamp::now());
    let until = begun + run.lasting;
    let mut guards = JoinSet::new();
    let guarded = world.clone();
    guards.spawn(async move { guarded.supervise().await });
    let guarded = world.clone();
    guards.spawn(async move { guarded.check_ends().await });
    for n in 0..2 {
        let guarded = world.clone();
        guards.spawn(async move { guarded.check_logins(seed.wrapping_add(1000 + n)).await });
    }
    let mut applications = JoinSet::new();
    for n in 0..run.applications {
        applications.spawn(world.clone().apply(until, seed.wrapping_add(n)));
    }
    let mut faults = JoinSet::new();
    let mut random = StdRng::seed_from_u64(seed);
    while Instant::now() < until {
        let any = begun.elapsed().as_secs() % ROUND.as_secs() >= FREE_PART.as_secs();
        let (world, mut random_of_one) = (world.clone(), StdRng::seed_from_u64(random.random()));
        faults.spawn(async move { world.strike(&mut random_of_one, any).await });
        if faults.len() >= if any { AT_ONCE } else { AT_ONCE_IN_FREE_PART } {
            let over = tokio::time::timeout(LONGEST_FAULT, faults.join_next()).await;
            over.expect("no fault comes to its end").unwrap().unwrap();
        }
        let pause = random.random_range(run.pause.clone());
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
    let over = tokio::time::timeout(LONGEST_FAULT, faults.join_all()).await;
    over.expect("a fault does not come to its end");
    let (struck, ceased) = (begun.elapsed(), Timestamp::now());
    println!(
        "faults end after {:.0} s; the rest runs out",
        struck.as_secs_f64()
    );
    applications.join_all().await;
    let drained = world.nothing_is_left(seconds(240)).await;
    world.all_are_accounted_for().await;
    world.calm.store(true, Ordering::Relaxed);
    guards.abort_all();

    let memory = memory(&world).await;
    let mut tally = world.tally.lock().unwrap();
    let excused = tally.trouble_in(began, ceased).as_secs_f64() / struck.as_secs_f64();
    show(&mut tally);
    println!("faults in the way  {:.0} % of their time", excused * 100.0);
    println!(
        "all gone           {:.0} s after the last fault",
        drained.as_secs_f64()
    );
    println!("memory in MiB      {memory:.0?}");
    let worst = tally.roles.free.iter().chain(&tally.sessions.free).max();
    if !tally.wrong.is_empty() || worst.is_some_and(|worst| *worst > SLOW) {
        for (at, words) in &tally.story {
            println!("{at:.3} {words}");
        }
    }
    assert!(
        tally.wrong.is_empty(),
        "{} things are wrong",
        tally.wrong.len()
    );
    // An account that existed too late is wrong, and was counted above. In a short run a fault may prevent every end.
    let is_seen = worst.is_some() || run.lasting <= ROUND;
    assert!(
        is_seen && excused < 0.8,
        "too little went on with nothing in the way"
    );
    let faults: u32 = tally.faults.values().sum();
    assert!(faults >= run.faults, "only {faults} faults");
    let leases = tally.issued.len();
    assert!(leases >= run.leases, "only {leases} leases");
    assert!(memory.iter().all(|mib| *mib < 250.0), "memory grows");
}

/// Memory of dispatchers and engines, in MiB.
async fn memory(world: &World) -> Vec<f64> {
    let dispatchers = world.dispatchers.lock().await;
    let engines = world.engines.lock().await;
    let dispatchers = dispatchers.iter().map(|system| system.dispatcher());
    let engines = engines.iter().map(|engine| &engine.process);
    dispatchers
        .chain(engines)
        .map(|process| process.resident_mib())
        .collect()
}

fn show(tally: &mut Tally) {
    let table = |counts: &std::collections::BTreeMap<String, u32>| {
        for (what, count) in counts {
            println!("  {count:5}  {what}");
        }
        counts.values().sum::<u32>()
    };
    println!("faults caused");
    println!("  {:5}  in all", table(&tally.faults));
    println!("requests refused");
    println!("  {:5}  in all", table(&tally.refused));
    println!("requests abandoned {}", tally.abandoned);
    println!("leases issued      {}", tally.issued.len());
    println!("  renewed          {}", tally.renewed);
    println!("  revoked early    {}", tally.revoked);
    println!("made after their revocation and ended {}", tally.made_late);
    println!("logins tried       {}", tally.logins);
    println!("  refused after the end {}", tally.logins_refused);
    println!("orphans            {}", tally.count(Wrong::Left));
    println!("early deaths       {}", tally.count(Wrong::EarlyDeath));
    println!(
        "too late           logins {}, sessions {}, roles {}",
        tally.count(Wrong::LateLogin),
        tally.count(Wrong::LateSession),
        tally.count(Wrong::LateRole)
    );
    let Tally {
        roles, sessions, ..
    } = tally;
    println!(
        "lateness in s, roles     {}",
        Lateness::words(&mut roles.all)
    );
    println!(
        "  with nothing in the way {}",
        Lateness::words(&mut roles.free)
    );
    println!(
        "lateness in s, sessions  {}",
        Lateness::words(&mut sessions.all)
    );
    println!(
        "  with nothing in the way {}",
        Lateness::words(&mut sessions.free)
    );
}

fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).map_or(otherwise, |text| text.parse().unwrap())
}

fn plan(rabbit: Rabbit, dispatchers: usize, late: Duration) -> Plan {
    Plan {
        rabbit,
        dispatchers,
        late,
        // The deadline is short, so that a create can commit after it.
        create_deadline_seconds: 3,
    }
}

async fn short(plan: Plan) {
    chaos(Run {
        plan,
        lasting: seconds(number("CHAOS_SECONDS", 45)),
        pause: 100..1000,
        applications: 8,
        faults: 10,
        leases: 15,
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn short_chaos_of_one_node() {
    short(plan(Rabbit::own(), 1, LATE_BESIDE)).await;
}

/// The run with a cluster of three nodes, and a store in PostgreSQL.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn short_chaos_of_two_dispatchers() {
    short(plan(Rabbit::cluster(""), 2, LATE_BESIDE)).await;
}

/// `make chaos`. In 600 s at least 200 faults and 200 leases; in less time proportionally fewer.
async fn long(plan: Plan, leases: u64) {
    let lasting = number("CHAOS_SECONDS", 600);
    let pause = number("CHAOS_PAUSE_MS", 2500);
    chaos(Run {
        plan,
        lasting: seconds(lasting),
        pause: pause / 10..pause,
        applications: number("CHAOS_APPLICATIONS", 40),
        faults: u32::try_from(200 * lasting / 600).unwrap(),
        leases: usize::try_from(leases * lasting / 600).unwrap(),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_chaos_of_one_node() {
    long(plan(Rabbit::own(), 1, LATE), 10_000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_chaos_of_a_cluster() {
    long(plan(Rabbit::cluster("4"), 1, LATE), 6_000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_chaos_of_two_dispatchers() {
    long(plan(Rabbit::own(), 2, LATE), 3_000).await;
}
