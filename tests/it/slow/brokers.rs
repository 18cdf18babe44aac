//! Other brokers than the one node of Debian's release that the other tests use: release 4, and
//! clusters of three nodes of either.

#![allow(
    clippy::print_stdout,
    reason = "figures, for who asks for them with --nocapture"
)]

use std::time::Instant;

use mayfly_tests::postgres::{Admin, Credential, Server, Site};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::system::{Engine, System};
use mayfly_tests::{eventually, seconds};
use rustix::process::Signal;
use serde_json::json;

async fn furnished(rabbit: Rabbit) -> (System, Site, String, Vec<Engine>) {
    let system = System::start_on(rabbit).await;
    let site = Server::pg15().site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let engines = vec![system.engine(&pool).await, system.engine(&pool).await];
    let path = system.secret(&site, &pool, json!({"maxTtl": 900})).await;
    (system, site, path, engines)
}

/// Issues an account, as soon as that is possible.
async fn issued(system: &System, path: &str, ttl: u64, within: u64) -> Credential {
    let read = format!("/v1/secrets/{path}?ttl={ttl}");
    let answer = eventually("an account is issued", seconds(within), async || {
        let (status, answer) = system.api.get(&read).await;
        (status == 200).then_some(answer)
    })
    .await;
    Credential::from_answer(&answer)
}

/// Issued, renewed, revoked, expired; a restart of the broker in between.
#[tokio::test]
async fn release_4() {
    let (system, site, path, _engines) = furnished(Rabbit::of_release("4")).await;
    let short = system.issue(&path, Some(3)).await;
    let long = system.issue(&path, Some(60)).await;
    assert!(short.login().await.is_ok());
    let lease = format!("/v1/leases/{}", long.lease);
    let (status, body) = system
        .api
        .post(&format!("{lease}/renew"), json!({"increment": 300}))
        .await;
    assert_eq!(status, 200, "{body}");
    system.gone(&site, &short, seconds(10)).await;

    let across = system.issue(&path, Some(12)).await;
    system.rabbit.kill(0);
    assert!(across.login().await.is_ok(), "no broker is needed for that");
    system.rabbit.start(0);
    let after = issued(&system, &path, 4, 60).await;
    system.gone(&site, &after, seconds(15)).await;
    system.gone(&site, &across, seconds(30)).await;
    assert!(long.login().await.is_ok());
    system.api.delete(&lease).await;
    system.gone(&site, &long, seconds(15)).await;
    eventually("nothing is parked", seconds(90), async || {
        (system.rabbit.messages("mayfly.v1.delay") == 0).then_some(())
    })
    .await;
}

/// Each node of three crashes, or sleeps, in turn; then two at the same time, so that no queue has a majority.
/// Accounts end in time, or when the broker is back. No process of Mayfly is restarted.
async fn a_cluster(release: &str) {
    let (system, site, path, _engines) = furnished(Rabbit::cluster(release)).await;
    for node in 0..3 {
        let before = system.issue(&path, Some(8)).await;
        system.rabbit.write_down();
        if node == 1 {
            system.rabbit.signal(node, Signal::STOP);
        } else {
            system.rabbit.kill(node);
        }
        let begun = Instant::now();
        let during = issued(&system, &path, 6, 60).await;
        println!(
            "node {node} is unreachable: issued again after {:?}",
            begun.elapsed()
        );
        assert!(during.login().await.is_ok());
        system.gone(&site, &before, seconds(30)).await;
        system.gone(&site, &during, seconds(30)).await;
        if node == 1 {
            // A node that was suspended for longer than net_ticktime does not work when it wakes up.
            system.rabbit.kill(node);
        }
        system.rabbit.start(node);
        let after = issued(&system, &path, 2, 60).await;
        system.gone(&site, &after, seconds(30)).await;
        let mut lacking = Vec::new();
        eventually("the node is back", seconds(60), async || {
            let now = system.rabbit.incomplete();
            if now != lacking {
                println!("node {node}: these lack a member: {now:#?}");
                lacking = now;
            }
            lacking.is_empty().then_some(())
        })
        .await;
    }

    let before = system.issue(&path, Some(5)).await;
    let kept = system.issue(&path, Some(300)).await;
    system.rabbit.write_down();
    system.rabbit.kill(1);
    system.rabbit.kill(2);
    let (status, answer) = system.api.get(&format!("/v1/secrets/{path}")).await;
    assert!(status == 503 || status == 504, "{status} {answer}");
    tokio::time::sleep(seconds(5)).await;
    assert!(before.is_refused().await, "its date has passed");
    system.rabbit.start(1);
    system.rabbit.start(2);
    let begun = Instant::now();
    system.gone(&site, &before, seconds(60)).await;
    println!(
        "two are back: what was due is gone after {:?}",
        begun.elapsed()
    );
    let after = issued(&system, &path, 2, 60).await;
    system.gone(&site, &after, seconds(30)).await;
    assert!(kept.login().await.is_ok(), "not before its time");
    system
        .api
        .delete(&format!("/v1/leases/{}", kept.lease))
        .await;
    system.gone(&site, &kept, seconds(30)).await;
    system.settled().await;
}

#[tokio::test]
async fn a_cluster_of_debians_release() {
    a_cluster("").await;
}

#[tokio::test]
async fn a_cluster_of_release_4() {
    a_cluster("4").await;
}
