//! Delay levels that somebody deletes. An end counts as parked only when a level has it; ends that were lost with a
//! level are parked again. The proof is that accounts end when no dispatcher runs any more.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mayfly_protocol::topology::LEVELS;
use mayfly_tests::postgres::{Admin, Credential, Server, Site};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::{Engine, System};
use mayfly_tests::users::Part;
use mayfly_tests::{eventually, seconds};
use serde_json::json;

async fn furnished(rabbit: Rabbit) -> (System, Site, String, Engine) {
    let (system, site, path, engine) = Scenario::on(Server::pg15()).broker(rabbit).start().await;
    (system, site, path, engine)
}

async fn count(system: &System, metric: &str) -> u64 {
    let text = system.admin_text("/metrics").await;
    let line = text.lines().find_map(|line| line.strip_prefix(metric));
    line.map_or(0, |count| count.trim().parse().unwrap())
}

/// Waits until the deleted levels are declared again and the ends are parked in them. The deletion takes
/// 11 s, so a repair may begin before its end: a later repair must follow, and be over.
async fn are_mended(system: &System) {
    eventually(
        "all levels are there and hold the ends",
        seconds(90),
        async || {
            let is_whole = system.rabbit.number(".delay.L") == LEVELS as usize;
            let log = system.logged();
            let (lost, parked) = (
                log.rfind("delay levels had no queue"),
                log.rfind("the ends of leases are parked again"),
            );
            if !is_whole || lost.is_none() || parked < lost {
                return None;
            }
            // The dispatcher may be about to park all ends a second time. A probe, which is no end, has left the
            // levels by then.
            tokio::time::sleep(seconds(2)).await;
            (system.rabbit.messages(".delay.L") > 0).then_some(())
        },
    )
    .await;
}

/// The level of the read's end is gone when the end comes; the dispatcher dies as soon as it has answered. If a
/// message in `unroutable` counted as confirmed, the end would be lost.
async fn a_read_without_levels(rabbit: Rabbit) {
    let (mut system, site, path, _engine) = furnished(rabbit).await;
    // 16.5 s are 66 ticks, which are levels 6 and 1.
    system.rabbit.delete(".delay.L06");
    let credential = system.issue(&path, Some(16)).await;
    system.kill_dispatcher();
    assert!(credential.login().await.is_ok());
    system.gone(&site, &credential, seconds(60)).await;
}

#[tokio::test]
async fn an_end_is_parked_only_in_a_level() {
    a_read_without_levels(Rabbit::shared()).await;
}

#[tokio::test]
async fn an_end_is_parked_only_in_a_level_on_release_4() {
    a_read_without_levels(Rabbit::of_release("4")).await;
}

/// Reads continue while the levels are deleted, three times. Some ends are lost with a level, and some are on their
/// way into it, although RabbitMQ confirms them. All of them are parked again.
#[tokio::test(flavor = "multi_thread")]
async fn ends_lost_with_a_level_are_parked_again() {
    let (mut system, site, path, _engine) = furnished(Rabbit::shared()).await;
    let path = format!("/v1/secrets/{path}?ttl=60");
    let over = Arc::new(AtomicBool::new(false));
    let reading = tokio::spawn({
        let (api, over) = (system.api.clone(), over.clone());
        async move {
            let mut issued = Vec::new();
            while !over.load(Ordering::Relaxed) {
                let (status, answer) = api.get(&path).await;
                if status == 200 {
                    issued.push(Credential::from_answer(&answer));
                }
                tokio::time::sleep(std::time::Duration::from_millis(300)).await;
            }
            issued
        }
    });
    let deleting = system.rabbit.handle();
    let deleted = tokio::task::spawn_blocking(move || {
        for _ in 0..3 {
            deleting.delete(".delay.L");
        }
    });
    deleted.await.unwrap();
    over.store(true, Ordering::Relaxed);
    let issued = reading.await.unwrap();
    assert!(issued.len() > 2, "{} reads were answered", issued.len());
    are_mended(&system).await;
    assert!(count(&system, "mayfly_dispatcher_delay_levels_absent_total ").await > 0);
    system.kill_dispatcher();
    for credential in &issued {
        system.gone(&site, credential, seconds(100)).await;
    }
}

/// Levels that are deleted while nothing is read are noticed too.
#[tokio::test]
async fn a_missing_level_is_seen_by_itself() {
    let (mut system, site, path, _engine) = furnished(Rabbit::shared()).await;
    let credential = system.issue(&path, Some(40)).await;
    system.rabbit.delete(".delay.L");
    are_mended(&system).await;
    system.kill_dispatcher();
    system.gone(&site, &credential, seconds(100)).await;
}

/// An engine whose user lacks the right to the new entry exchange parks through the old exchange, and reports that.
#[tokio::test]
async fn an_engine_with_the_rights_of_before_parks_all_the_same() {
    let system = System::start().await;
    let site = Server::pg15().site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let part = Part::Engine(pool.clone());
    system.rabbit.set_write(
        &part,
        &format!(r"^mayfly\.v1\.engine\.{pool}\..*$"),
        r"^mayfly\.v1\.(answers|engines|park)$",
        &format!(r"^mayfly\.v1\.(engine\.{pool}\..*|pool\.{pool}\.(create|revoke))$"),
    );
    let _engine = system.engine(&pool).await;
    let path = system.secret(&site, &pool, json!({})).await;
    let credential = system.issue(&path, Some(5)).await;
    let renew = format!("/v1/leases/{}/renew", credential.lease);
    let (status, body) = system.api.post(&renew, json!({"increment": 15})).await;
    assert_eq!(status, 200, "{body}");
    system.gone(&site, &credential, seconds(60)).await;
    assert!(
        system
            .logged()
            .contains("may not write to mayfly.v1.delay.L24")
    );
}
