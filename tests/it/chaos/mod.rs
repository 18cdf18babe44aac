//! The fault suite. Real processes, a broker and a database of their own, and faults at random from
//! a seed that is printed: processes killed and stopped, at random and at every named step of an
//! issue, a renewal and a revocation; the ways between them cut and swallowing; broker, database
//! and disk gone for a while. What must hold is looked at from outside. A short form runs with
//! `make test`; `make chaos` runs ten minutes, and the outages with their figures.

#![allow(clippy::print_stdout, reason = "its figures")]

mod applications;
mod faults;
mod outages;
mod tally;
mod watch;
mod world;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::seconds;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use world::World;

fn percentile(sorted: &[Duration], percent: usize) -> f64 {
    let at = sorted.len().saturating_sub(1) * percent / 100;
    sorted.get(at).map_or(0.0, Duration::as_secs_f64)
}

async fn chaos(
    rabbit: Rabbit,
    lasting: Duration,
    pause_ms: std::ops::Range<u64>,
    applications: u64,
) {
    let seed: u64 =
        std::env::var("CHAOS_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    println!("seed {seed}");
    let world = World::new(rabbit).await;
    let begun = Instant::now();
    let until = begun + lasting;
    let guards = [
        tokio::spawn({
            let world = world.clone();
            async move { world.supervise().await }
        }),
        tokio::spawn({
            let world = world.clone();
            async move { world.check_ends().await }
        }),
    ];
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..applications {
        let world = world.clone();
        tasks.spawn(async move { world.apply(until, seed.wrapping_add(n)).await });
    }
    for n in 0..2 {
        let world = world.clone();
        tokio::spawn(async move { world.check_logins(seed.wrapping_add(1000 + n)).await });
    }
    let mut random = StdRng::seed_from_u64(seed);
    while Instant::now() < until {
        world.strike(&mut random).await;
        let pause = random.random_range(pause_ms.clone());
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
    tasks.join_all().await;
    for file in [&world.engine_fault, &world.dispatcher_fault] {
        let _ = std::fs::remove_file(file);
    }
    println!(
        "faults end after {:.0} s; the rest runs out",
        begun.elapsed().as_secs_f64()
    );
    let drained = world.nothing_is_left(seconds(240)).await;
    world.calm.store(true, Ordering::Relaxed);
    for guard in guards {
        guard.abort();
    }
    let mut memory = Vec::new();
    for engine in world.engines.lock().await.iter() {
        memory.push(engine.process.resident_mib());
    }
    let dispatcher = world.system.lock().await.dispatcher().resident_mib();
    let mut tally = world.tally.lock().unwrap();
    tally.late.sort();
    println!("faults caused      {}", tally.faults.values().sum::<u32>());
    for (kind, count) in &tally.faults {
        println!("  {count:5}  {kind}");
    }
    println!("leases issued      {}", tally.issued);
    println!("  renewed          {}", tally.renewed);
    println!("  revoked early    {}", tally.revoked);
    println!("requests abandoned {}", tally.abandoned);
    println!("requests refused   {}", tally.refused.values().sum::<u32>());
    for (code, count) in &tally.refused {
        println!("  {count:5}  {code}");
    }
    println!("logins tried       {}", tally.logins);
    let of = |word: &str| {
        tally
            .violations
            .iter()
            .filter(|v| v.starts_with(word))
            .count()
    };
    println!("early deaths       {}", of("early death"));
    println!("too late           {}", of("too late"));
    println!("left at the end    {}", of("left after"));
    println!(
        "lateness in s      p50 {:.2}, p99 {:.2}, worst {:.2} (faults in the way included)",
        percentile(&tally.late, 50),
        percentile(&tally.late, 99),
        percentile(&tally.late, 100),
    );
    println!(
        "all gone           {:.0} s after the last fault",
        drained.as_secs_f64()
    );
    println!("memory in MiB      dispatcher {dispatcher:.0}, engines {memory:.0?}");
    for violation in &tally.violations {
        println!("VIOLATION {violation}");
    }
    assert!(
        tally.violations.is_empty(),
        "{} violations",
        tally.violations.len()
    );
    assert!(tally.issued > 0 && !tally.faults.is_empty());
    assert!(
        dispatcher < 250.0 && memory.iter().all(|mib| *mib < 150.0),
        "memory grows"
    );
}

fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).map_or(otherwise, |text| text.parse().unwrap())
}

/// The short form.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn short_chaos() {
    let lasting = seconds(number("CHAOS_SECONDS", 40));
    chaos(Rabbit::own(), lasting, 200..1200, 3).await;
}

/// The short form, with a cluster of three nodes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn short_chaos_of_a_cluster() {
    let lasting = seconds(number("CHAOS_SECONDS", 40));
    chaos(Rabbit::cluster(""), lasting, 200..1200, 3).await;
}

/// `make chaos`.
async fn long(rabbit: Rabbit) {
    let pause = number("CHAOS_PAUSE_MS", 2000);
    chaos(
        rabbit,
        seconds(number("CHAOS_SECONDS", 600)),
        pause / 10..pause,
        number("CHAOS_APPLICATIONS", 40),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "ten minutes; `make chaos`"]
async fn long_chaos() {
    long(Rabbit::own()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "ten minutes; `make chaos`"]
async fn long_chaos_of_a_cluster() {
    long(Rabbit::cluster("4")).await;
}
