//! What a read costs: latency at 1 and 16 in flight, with few and with many live leases, side by
//! side in one run; and how late accounts end when many end at once. `make bench` runs it.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark prints, and panics where it fails"
)]

use std::time::{Duration, Instant};

use mayfly_tests::postgres::{Admin, Server};
use mayfly_tests::system::System;
use mayfly_tests::{eventually, seconds};
use serde_json::json;

const ROUNDS: usize = 3;
const READS: usize = 200;
const LIVE: usize = 2_000;
const ENDING: usize = 500;

#[tokio::main]
async fn main() {
    // `cargo test` builds and runs benchmarks too; there is nothing to check then.
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
    let (_, leases) = read(&system, &path, ENDING, 16, 20).await;
    let mut late = Vec::new();
    for (lease, expiration) in leases {
        let lease = eventually("revoked", seconds(60), async || {
            let lease = system.lease(&lease).await;
            (lease["state"] == "revoked").then_some(lease)
        })
        .await;
        let at: jiff::Timestamp = lease["revokedAt"].as_str().unwrap().parse().unwrap();
        late.push(Duration::try_from(at.duration_since(expiration)).unwrap_or_default());
    }
    late.sort();
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

type Lease = (String, jiff::Timestamp);

async fn read(
    system: &System,
    path: &str,
    count: usize,
    flight: usize,
    ttl: u64,
) -> (Vec<Duration>, Vec<Lease>) {
    let mut readers = tokio::task::JoinSet::new();
    for reader in 0..flight {
        let (api, path) = (system.api.clone(), path.to_owned());
        let mine = count / flight + usize::from(reader < count % flight);
        readers.spawn(async move {
            let mut taken = Vec::with_capacity(mine);
            let mut leases = Vec::with_capacity(mine);
            for _ in 0..mine {
                let started = Instant::now();
                let answer = api.ok(&format!("/v1/secrets/{path}?ttl={ttl}")).await;
                taken.push(started.elapsed());
                let data = &answer["data"];
                leases.push((
                    data["leaseId"].as_str().unwrap().to_owned(),
                    data["expiration"].as_str().unwrap().parse().unwrap(),
                ));
            }
            (taken, leases)
        });
    }
    let started = Instant::now();
    let (mut taken, mut leases) = (Vec::new(), Vec::new());
    while let Some(done) = readers.join_next().await {
        let (some, ids): (Vec<Duration>, Vec<Lease>) = done.unwrap();
        taken.extend(some);
        leases.extend(ids);
    }
    taken.sort();
    taken.push(started.elapsed());
    (taken, leases)
}

fn report(what: &str, (mut taken, _): (Vec<Duration>, Vec<Lease>)) {
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
