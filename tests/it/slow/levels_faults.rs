//! Faults while ends that were lost with a delay level are parked again. Proof is that the accounts end
//! when no dispatcher runs any more.

use std::path::PathBuf;

use mayfly_tests::postgres::{Credential, Server, Site};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::{Engine, System};
use mayfly_tests::{eventually, run_dir, seconds, word};
use reqwest::Method;
use serde_json::json;

use crate::chaos::faults::arm;

async fn furnished(rabbit: Rabbit) -> (System, Site, String, Engine, PathBuf) {
    let fault = run_dir().join(format!("fault-{}", word()));
    let environment = [("MAYFLY_FAULT_FILE", fault.to_str().unwrap())];
    let (system, site, path, engine) = Scenario::on(Server::pg15())
        .broker(rabbit)
        .settings(&environment)
        .attributes(json!({"ttl": 60}))
        .start()
        .await;
    (system, site, path, engine, fault)
}

async fn struck(fault: &std::path::Path) {
    eventually("the fault strikes", seconds(90), async || {
        (!fault.exists()).then_some(())
    })
    .await;
}

/// Waits until all ends were parked again `count` times.
async fn parked_again(system: &System, count: usize) {
    eventually("the ends are parked again", seconds(60), async || {
        let log = system.logged();
        (log.matches("the ends of leases are parked again").count() >= count).then_some(())
    })
    .await;
}

/// The level exists again, so nothing at the broker except the mark shows that its ends are missing.
#[tokio::test]
async fn a_dispatcher_that_is_killed_before_it_parks_again() {
    let (mut system, site, path, _engine, fault) = furnished(Rabbit::shared()).await;
    parked_again(&system, 1).await;
    let credential = system.issue(&path, None).await;
    arm(&fault, "levels.declared kill");
    // 60.5 s are 242 ticks: first the level of 32 s.
    system.rabbit.delete(".delay.L07");
    // The dispatcher finds the level missing, and declares it again. No answer comes.
    let read = format!("/v1/secrets/{path}");
    let _ = system.api.try_call(Method::GET, &read, None).await;
    struck(&fault).await;
    system.kill_dispatcher();
    system.start_dispatcher().await;
    parked_again(&system, 2).await;
    system.kill_dispatcher();
    assert!(credential.login().await.is_ok());
    system.gone(&site, &credential, seconds(120)).await;
}

/// One end is parked again before the broker is stopped, the others after it has started again.
#[tokio::test]
async fn a_broker_that_goes_while_ends_are_parked_again() {
    let (mut system, site, path, _engine, fault) = furnished(Rabbit::own()).await;
    parked_again(&system, 1).await;
    let mut issued = Vec::new();
    for _ in 0..5 {
        issued.push(system.issue(&path, None).await);
    }
    arm(&fault, "levels.parking delay 1000");
    system.rabbit.delete(".delay.L07");
    // The dispatcher finds the level missing.
    let read = format!("/v1/secrets/{path}");
    let _ = system.api.try_call(Method::GET, &read, None).await;
    struck(&fault).await;
    arm(&fault, "levels.parking delay 2000");
    struck(&fault).await;
    system.rabbit.kill(0);
    system.rabbit.start(0);
    parked_again(&system, 2).await;
    system.kill_dispatcher();
    for credential in &issued {
        system.gone(&site, credential, seconds(120)).await;
    }
}

/// The level is deleted during a read: its account is made, and its lease is still pending.
#[tokio::test]
async fn the_end_of_an_account_that_nobody_holds_yet() {
    let (mut system, site, path, _engine, fault) = furnished(Rabbit::shared()).await;
    parked_again(&system, 1).await;
    arm(&fault, "issue.answered delay 20000");
    let read = tokio::spawn({
        let (api, path) = (system.api.clone(), format!("/v1/secrets/{path}"));
        async move { api.ok(&path).await }
    });
    struck(&fault).await;
    system.rabbit.delete(".delay.L07");
    // The dispatcher finds the level missing.
    system.issue(&path, None).await;
    parked_again(&system, 2).await;
    let pending = system.api.ok("/v1/leases?state=pending").await;
    assert_eq!(
        pending["length"], 1,
        "the read is over too early: {pending}"
    );
    let credential = Credential::from_answer(&read.await.unwrap());
    system.kill_dispatcher();
    assert!(credential.login().await.is_ok());
    system.gone(&site, &credential, seconds(120)).await;
}
