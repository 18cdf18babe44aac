//! What a read costs: latency at 1 and 16 in flight, with few and with many live leases, side by
//! side in one run; and how late accounts end when many end at once. `make bench` runs it.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark prints, and panics where it fails"
)]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use mayfly_tests::postgres::{Admin, Server, Site};
use mayfly_tests::system::System;
use mayfly_tests::{eventually, seconds};
use serde_json::json;

const ROUNDS: usize = 3;
const READS: usize = 200;
const LIVE: usize = 2_000;
const ENDING: usize = 500;

#[tokio::main]
async fn main() {
    // `cargo test` builds and runs benchmarks too; they measure only when asked.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let system = System::start_with(
        mayfly_tests::rabbit::Rabbit::shared(),
        &[("MAYFLY__LOG__LEVEL", "warn")],
    )
    .await;
    let site = Server::pg18().site(Admin::Superuser).await;
    let pool = system.pool().await;
    let _engines = [system.engine(&pool).await, system.engine(&pool).await];
    let path = system.secret(&site, &pool, json!({"ttl": 3600})).await;
    println!("read of a dynamic secret, {READS} reads a row, p50 / p99 in ms, reads/s");
    for round in 1..=ROUNDS {
        for flight in [1, 16] {
            report(
                &format!("round {round}, few live leases, {flight:2} in flight"),
                read(&system, &path, READS, flight, 3600).await,
            );
        }
    }
    read(&system, &path, LIVE, 16, 3600).await;
    for round in 1..=ROUNDS {
        for flight in [1, 16] {
            report(
                &format!("round {round}, over {LIVE} live,    {flight:2} in flight"),
                read(&system, &path, READS, flight, 3600).await,
            );
        }
    }
    println!("end of {ENDING} accounts issued with --ttl 20, as the database sees it");
    read(&system, &path, ENDING, 16, 20).await;
    let late = lateness(&site, ENDING).await;
    println!(
        "late: p50 {} ms, p99 {} ms, worst {} ms",
        ms(&late, 50),
        ms(&late, 99),
        late.last().unwrap().as_millis()
    );
    let (status, _) = system.api.delete(&format!("/v1/leases?path={path}")).await;
    assert_eq!(status, 200);
    let started = Instant::now();
    eventually("all are gone", seconds(300), async || {
        site.server
            .roles(&mayfly_tests::system::prefix(&site))
            .await
            .is_empty()
            .then_some(())
    })
    .await;
    println!(
        "revoking all that were left took {:.1} s",
        started.elapsed().as_secs_f64()
    );
}

/// How late the next `count` roles go, sorted, by the database: the API answers in whole seconds.
/// Each was up to one look (20 ms) less late than this.
async fn lateness(site: &Site, count: usize) -> Vec<Duration> {
    let client = site.server.superuser("postgres").await;
    let ending =
        "SELECT rolname::text, (extract(epoch FROM rolvaliduntil) * 1000)::bigint FROM pg_roles
        WHERE starts_with(rolname, $1) AND rolvaliduntil < clock_timestamp() + interval '1 minute'";
    let prefix = mayfly_tests::system::prefix(site);
    let mut late = Vec::new();
    let mut known = BTreeMap::new();
    let started = Instant::now();
    while late.len() < count {
        assert!(started.elapsed() < seconds(90), "{} have ended", late.len());
        tokio::time::sleep(Duration::from_millis(20)).await;
        let rows = client.query(ending, &[&prefix]).await.unwrap();
        let now = jiff::Timestamp::now().as_millisecond();
        let look: BTreeMap<String, i64> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        for (role, until) in std::mem::replace(&mut known, look) {
            if !known.contains_key(&role) {
                late.push(Duration::from_millis(
                    u64::try_from(now - until).unwrap_or(0),
                ));
            }
        }
    }
    late.sort();
    late
}

async fn read(system: &System, path: &str, count: usize, flight: usize, ttl: u64) -> Vec<Duration> {
    let mut readers = tokio::task::JoinSet::new();
    for reader in 0..flight {
        let (api, path) = (system.api.clone(), path.to_owned());
        let mine = count / flight + usize::from(reader < count % flight);
        readers.spawn(async move {
            let mut taken = Vec::with_capacity(mine);
            for _ in 0..mine {
                let started = Instant::now();
                api.ok(&format!("/v1/secrets/{path}?ttl={ttl}")).await;
                taken.push(started.elapsed());
            }
            taken
        });
    }
    let started = Instant::now();
    let mut taken = Vec::new();
    while let Some(done) = readers.join_next().await {
        taken.extend(done.unwrap());
    }
    taken.sort();
    taken.push(started.elapsed());
    taken
}

fn report(what: &str, mut taken: Vec<Duration>) {
    let whole = taken.pop().unwrap();
    println!(
        "{what}: {:>4} / {:>4}   {:.0}/s",
        ms(&taken, 50),
        ms(&taken, 99),
        taken.len() as f64 / whole.as_secs_f64()
    );
}

fn ms(sorted: &[Duration], percent: usize) -> u128 {
    sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)].as_millis()
}
