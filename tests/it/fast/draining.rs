//! SIGTERM to an engine, as in a rollout: it finishes its tasks, and other engines take the rest.

#![allow(
    clippy::print_stdout,
    reason = "figures, for who asks for them with --nocapture"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use mayfly_tests::postgres::{Admin, Credential, Server, Site, scalar};
use mayfly_tests::system::{Engine, System, prefix};
use mayfly_tests::{eventually, run_dir, seconds, word};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::task::JoinSet;

/// Number of engines.
const ENGINES: usize = 5;
/// Applications that read one account after another.
const APPLICATIONS: usize = 8;
/// Reads that are answered before each engine leaves.
const READS_EACH: usize = 10;
/// Maximum lateness of an end while engines come and go, in seconds. If an engine that left had kept a message, it
/// would come back to another engine only after 30 s.
const LATE: f64 = 15.0;

async fn stop(engine: Engine) -> Duration {
    tokio::task::spawn_blocking(move || {
        let asked = Instant::now();
        engine.process.stop();
        asked.elapsed()
    })
    .await
    .unwrap()
}

/// The largest lateness seen, in seconds, until `done` and nothing is left.
async fn worst_lateness(site: &Site, done: &AtomicBool) -> f64 {
    let client = site.server.superuser("postgres").await;
    let query = format!(
        "SELECT count(*) || ' ' || coalesce(max(extract(epoch FROM now() - rolvaliduntil)), 0)
         FROM pg_roles WHERE rolname LIKE '{}%'",
        prefix(site)
    );
    let mut worst = 0_f64;
    loop {
        let found = scalar(&client, &query).await;
        let (count, late) = found.split_once(' ').unwrap();
        worst = worst.max(late.parse().unwrap());
        if done.load(Ordering::Relaxed) && count == "0" {
            return worst;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_of_five_rolls_under_load() {
    let system = System::start().await;
    let site = Server::pg15().site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let mut engines = Vec::new();
    for _ in 0..ENGINES {
        engines.push(system.engine(&pool).await);
    }
    let path = system.secret(&site, &pool, json!({})).await;
    let (done, rolled) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicBool::new(false)),
    );
    let mut applications = JoinSet::new();
    let answered = Arc::new(AtomicUsize::new(0));
    for n in 0..APPLICATIONS {
        let (api, rolled, answered) = (system.api.clone(), rolled.clone(), answered.clone());
        let read = format!("/v1/secrets/{path}?ttl={}", 2 + n % 3);
        applications.spawn(async move {
            let mut answers = Vec::new();
            while !rolled.load(Ordering::Relaxed) {
                answers.push(api.get(&read).await);
                answered.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            answers
        });
    }
    let watching = {
        let done = done.clone();
        tokio::spawn(async move { worst_lateness(&site, &done).await })
    };

    // Engines are replaced as by a Deployment with maxSurge 1 and maxUnavailable 0.
    let mut slowest = Duration::ZERO;
    for leaving in std::mem::take(&mut engines) {
        engines.push(system.engine(&pool).await);
        // Each engine leaves under load, also on a machine that is slow.
        let before = answered.load(Ordering::Relaxed);
        eventually("reads go on", seconds(20), async || {
            (answered.load(Ordering::Relaxed) >= before + READS_EACH).then_some(())
        })
        .await;
        slowest = slowest.max(stop(leaving).await);
    }
    rolled.store(true, Ordering::Relaxed);
    let answers: Vec<(u16, Value)> = applications
        .join_all()
        .await
        .into_iter()
        .flatten()
        .collect();
    done.store(true, Ordering::Relaxed);
    let worst = tokio::time::timeout(seconds(60), watching)
        .await
        .expect("accounts are left")
        .unwrap();
    println!(
        "{} accounts issued while {ENGINES} engines were replaced; the slowest stopped in {slowest:?}; \
         the latest end {worst:.2} s after its time",
        answers.len()
    );
    let lost: Vec<_> = answers
        .iter()
        .filter(|(status, _)| *status != 200)
        .collect();
    assert!(lost.is_empty(), "{lost:?}");
    assert!(worst < LATE, "an account ended {worst:.2} s late");
    // Of the five engines that left, none was removed because of its heartbeat.
    let (_, shown) = system.api.get("/v1/engines").await;
    assert_eq!(shown["engines"].as_array().unwrap().len(), ENGINES);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_begun_is_finished() {
    let system = System::start().await;
    let site = Server::pg15().site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let fault = run_dir().join(format!("fault-{}", word()));
    let leaving = system.engine_with(&pool, &[("MAYFLY_FAULT_FILE", fault.to_str().unwrap())]);
    let path = system.secret(&site, &pool, json!({})).await;
    let read = format!("/v1/secrets/{path}?ttl=60");
    eventually("the engine works", seconds(20), async || {
        (system.api.get(&read).await.0 == 200).then_some(())
    })
    .await;

    std::fs::write(&fault, "create.before_commit delay 4000").unwrap();
    let (api, asked) = (system.api.clone(), read.clone());
    let reading = tokio::spawn(async move { api.get(&asked).await });
    eventually("the create is in progress", seconds(10), async || {
        (!fault.exists()).then_some(())
    })
    .await;
    leaving.process.signal(Signal::TERM);
    eventually("it says that it drains", seconds(10), async || {
        (leaving.admin_text("/readyz").await.trim() == "draining").then_some(())
    })
    .await;
    assert!(leaving.process.is_alive());
    // A request that was delivered before the engine stopped consuming is done. Any other request is refused, at the
    // latest when the engine has finished: until then RabbitMQ counts it as a consumer. No request waits for its
    // deadline.
    let reads: Vec<_> = (0..20)
        .map(|_| {
            let (api, read) = (system.api.clone(), read.clone());
            tokio::spawn(async move {
                let asked = Instant::now();
                let (status, answer) = api.get(&read).await;
                (status, answer, asked.elapsed())
            })
        })
        .collect();
    for read in reads {
        let (status, answer, took) = read.await.unwrap();
        let told = (status, answer["error"].as_str());
        assert!(
            matches!(told, (200, _) | (503, Some("no_engine"))),
            "{told:?}"
        );
        assert!(took < seconds(25), "{told:?} after {took:?}");
    }
    let (status, answer) = reading.await.unwrap();
    assert_eq!(status, 200, "{answer}");
    let credential = Credential::from_answer(&answer);
    assert!(credential.login().await.is_ok());
    eventually("it ends by itself", seconds(10), async || {
        (!leaving.process.is_alive()).then_some(())
    })
    .await;
}
