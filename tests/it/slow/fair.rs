//! Callers side by side: one with many reads at a time, and one with wrong tokens, take nothing from the others.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mayfly_tests::api::Api;
use mayfly_tests::postgres::{Admin, Server};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::seconds;
use mayfly_tests::system::System;
use reqwest::Method;
use serde_json::json;
use tokio::task::JoinSet;

async fn token(system: &System) -> Api {
    let asked = json!({"read": ["db:*"], "ttl": 600});
    let token = system.api.create("/v1/tokens", asked).await;
    system.api.with_token(token["token"].as_str().unwrap())
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// A caller with many reads at a time waits for its own reads, and gets an error if too many wait.
#[tokio::test(flavor = "multi_thread")]
async fn a_greedy_caller_waits_for_itself() {
    let limits = [
        ("MAYFLY__LIMITS__READS_PER_SERVER", "2"),
        ("MAYFLY__LIMITS__READS_PER_CALLER", "1"),
        ("MAYFLY__LIMITS__WAITING_READS_PER_CALLER", "12"),
    ];
    let (system, _site, path, _engine) = Scenario::on(Server::pg15())
        .admin(Admin::Superuser)
        .settings(&limits)
        .start()
        .await;
    let (greedy, modest) = (token(&system).await, token(&system).await);
    let read = format!("/v1/secrets/{path}?ttl=60");
    modest.ok(&read).await;

    let done = AtomicBool::new(false);
    let many = (0..12).map(|_| async {
        let mut times = Vec::new();
        while !done.load(Ordering::Relaxed) {
            let begun = Instant::now();
            greedy.ok(&read).await;
            times.push(begun.elapsed());
        }
        times
    });
    let one = async {
        let mut times = Vec::new();
        for _ in 0..15 {
            let begun = Instant::now();
            modest.ok(&read).await;
            times.push(begun.elapsed());
        }
        done.store(true, Ordering::Relaxed);
        times
    };
    let (many, one) = tokio::join!(futures_util::future::join_all(many), one);
    let (many, one) = (median(many.concat()), median(one));
    assert!(
        one * 3 < many,
        "the greedy one {many:?}, the modest one {one:?}"
    );

    let mut burst = JoinSet::new();
    for _ in 0..40 {
        let (greedy, read) = (greedy.clone(), read.clone());
        burst.spawn(async move { greedy.raw(Method::GET, &read, None).await });
    }
    let mut refused = 0;
    while let Some(answer) = burst.join_next().await {
        let answer = answer.unwrap();
        match answer.status().as_u16() {
            200 => {}
            429 => {
                refused += 1;
                assert_eq!(answer.headers()["retry-after"], "1");
                let body: serde_json::Value = answer.json().await.unwrap();
                assert_eq!(body["error"], "quota");
            }
            other => panic!("{other}"),
        }
    }
    assert!(refused > 0, "40 at a time, of which 13 have a place");
    modest.ok(&read).await;
}

async fn lookups(system: &System) -> u64 {
    let metrics = system.admin_text("/metrics").await;
    let line = metrics
        .lines()
        .find(|line| line.starts_with("mayfly_dispatcher_token_lookups_total"))
        .unwrap();
    line.split_whitespace().last().unwrap().parse().unwrap()
}

/// A flood of wrong tokens costs few jobs of the store's thread. Right tokens continue to work, also a token that was
/// made during the flood.
#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_wrong_tokens() {
    let system = System::start().await;
    let known = token(&system).await;
    known.ok("/v1/secrets").await;
    let before = lookups(&system).await;
    let begun = Instant::now();
    let (done, asked) = (AtomicBool::new(false), AtomicU64::new(0));
    let flood = (0..64).map(|n: u32| {
        let (system, done, asked) = (&system, &done, &asked);
        async move {
            let mut round = 0;
            while !done.load(Ordering::Relaxed) {
                round += 1;
                let wrong = system.api.with_token(&format!("wrong-{n}-{round}"));
                let (status, body) = wrong.get("/v1/secrets").await;
                assert!(status == 401 || status == 429, "{status} {body}");
                asked.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    let right = async {
        let mut calls = 0;
        let mut times = Vec::new();
        while begun.elapsed() < seconds(4) {
            let one = Instant::now();
            known.ok("/v1/secrets").await;
            times.push(one.elapsed());
            calls += 1;
        }
        let new = token(&system).await;
        for _ in 0..3 {
            new.ok("/v1/secrets").await;
        }
        done.store(true, Ordering::Relaxed);
        // Each of these calls is a job of its own.
        (calls + 4, median(times))
    };
    let (_, (calls, time)) = tokio::join!(futures_util::future::join_all(flood), right);
    let (asked, took) = (asked.load(Ordering::Relaxed), begun.elapsed());
    let cost = lookups(&system).await - before - calls;
    // In 10 s at most 50 tokens are looked up one by one, some of them at the same time, and ten jobs a second
    // follow.
    let most = (50 + 64) * (1 + took.as_secs() / 10) + 10 * (took.as_secs() + 1);
    assert!(
        cost <= most,
        "{asked} wrong tokens in {took:?} cost {cost} jobs; a right one took {time:?}"
    );
    assert!(asked > 2 * most, "{asked} wrong tokens are no flood");
    let (status, _) = system.api.with_token("wrong").get("/v1/secrets").await;
    assert_eq!(status, 401);
}
