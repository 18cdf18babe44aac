//! One database of a pool hangs or is unreachable: the others do not notice it, and it recovers without help.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mayfly_tests::postgres::{Admin, Credential, Server};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::System;
use mayfly_tests::{eventually, seconds};
use serde_json::json;
use tokio::task::JoinSet;

/// Leases of the database that hangs.
const LEASES: usize = 300;

/// One engine, two databases. One accepts connections and never answers, with 300 due leases and callers who repeat
/// their requests. On the other, accounts are made and ended as fast as before.
#[tokio::test]
#[allow(
    clippy::print_stdout,
    reason = "figures, for who asks for them with --nocapture"
)]
async fn a_database_that_hangs_does_not_slow_the_others() {
    let system = System::start().await;
    let sick_server = Server::own("");
    let sick = sick_server.site(Admin::CreateRole).await;
    let well = Server::pg18().site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let engine = system.engine(&pool).await;
    let sick_path = system.secret(&sick, &pool, json!({})).await;
    let well_path = system.secret(&well, &pool, json!({})).await;
    // All accounts end at about the same time, for any duration of the reads.
    let end = Instant::now() + seconds(40);
    let mut issuers = JoinSet::new();
    for n in 0..6 {
        let (api, path) = (system.api.clone(), sick_path.clone());
        issuers.spawn(async move {
            for _ in (n..LEASES).step_by(6) {
                let left = end.duration_since(Instant::now()).as_secs().max(1);
                api.ok(&format!("/v1/secrets/{path}?ttl={left}")).await;
            }
        });
    }
    issuers.join_all().await;
    println!(
        "{LEASES} leases with {:?} left",
        end.duration_since(Instant::now())
    );
    system.issue(&well_path, Some(1)).await;

    sick_server.hang(true);
    tokio::time::sleep(end.saturating_duration_since(Instant::now())).await;
    let over = Arc::new(AtomicBool::new(false));
    let mut callers = JoinSet::new();
    for _ in 0..12 {
        let (api, path, over) = (system.api.clone(), sick_path.clone(), over.clone());
        callers.spawn(async move {
            let mut slowest = Duration::ZERO;
            let mut refused = 0;
            while !over.load(Ordering::Relaxed) {
                let asked = Instant::now();
                let (status, body) = api.get(&format!("/v1/secrets/{path}")).await;
                assert_eq!(status, 502, "{body}");
                assert_eq!(body["error"], "database_unreachable", "{body}");
                slowest = slowest.max(asked.elapsed());
                refused += 1;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            (slowest, refused)
        });
    }
    let (mut slowest_create, mut latest_end) = (Duration::ZERO, Duration::ZERO);
    let measured = Instant::now();
    while measured.elapsed() < seconds(20) {
        let asked = Instant::now();
        let credential = system.issue(&well_path, Some(1)).await;
        slowest_create = slowest_create.max(asked.elapsed());
        let due = Instant::now() + seconds(1);
        eventually(
            "an account of the well database ends",
            seconds(15),
            async || {
                well.server
                    .roles(&credential.username)
                    .await
                    .is_empty()
                    .then_some(())
            },
        )
        .await;
        latest_end = latest_end.max(due.elapsed());
    }
    over.store(true, Ordering::Relaxed);
    let asked = callers.join_all().await;
    let refused: u32 = asked.iter().map(|(_, refused)| refused).sum();
    let slowest_refusal = asked.iter().map(|(slowest, _)| *slowest).max().unwrap();
    println!(
        "well: slowest create {slowest_create:?}, latest end {latest_end:?}; sick: {refused} refused, slowest {slowest_refusal:?}"
    );
    // Otherwise these would wait for the time-outs of the sick server, 10 s and more.
    assert!(slowest_create < seconds(9), "{slowest_create:?}");
    assert!(latest_end < seconds(9), "{latest_end:?}");
    assert!(slowest_refusal < seconds(20), "{slowest_refusal:?}");
    // Twelve callers ask for 20 s. If each waited for its own time-out, there would be far fewer refusals.
    assert!(refused > 40, "{refused}");
    eventually("a revocation says why", seconds(30), async || {
        let metrics = engine.admin_text("/metrics").await;
        metrics
            .contains(r#"reason="database_unreachable""#)
            .then_some(())
    })
    .await;

    sick_server.hang(false);
    let back = Instant::now();
    sick.no_accounts(seconds(30)).await;
    println!("all gone {:?} after its return", back.elapsed());
    // The kept connection ended the accounts. The breaker tries the server again within 3 s.
    let answer = eventually("accounts are made there again", seconds(10), async || {
        let read = format!("/v1/secrets/{sick_path}?ttl=60");
        let (status, answer) = system.api.get(&read).await;
        (status == 200).then_some(answer)
    })
    .await;
    assert!(Credential::from_answer(&answer).login().await.is_ok());
}

/// A server that is unreachable: after some tries in a row a caller gets an error at once, with the time since when and the
/// time of the next try. When the server is back, that is noticed without help.
#[tokio::test]
async fn an_unreachable_database_is_not_tried_all_the_time() {
    let server = Server::own("");
    let (system, site, path, _engine) = Scenario::on(server.clone())
        .admin(Admin::Superuser)
        .start()
        .await;
    let credential = system.issue(&path, Some(4)).await;
    server.kill();
    let told = eventually("the breaker is open", seconds(20), async || {
        let (status, body) = system.api.get(&format!("/v1/secrets/{path}")).await;
        assert_eq!(
            (status, body["error"].as_str()),
            (502, Some("database_unreachable")),
            "{body}"
        );
        let said = body["message"].as_str().unwrap().to_owned();
        said.contains("has been unreachable for").then_some(said)
    })
    .await;
    assert!(
        told.contains("tried") && told.contains("refused"),
        "since when, when next and why: {told}"
    );
    eventually("the lease says so", seconds(30), async || {
        let lease = system.lease(&credential.lease).await;
        lease["lastError"]
            .as_str()
            .is_some_and(|error| error.contains("has been unreachable for"))
            .then_some(())
    })
    .await;
    server.start();
    system.gone(&site, &credential, seconds(20)).await;
    system
        .lease_becomes(&credential.lease, "revoked", seconds(20))
        .await;
    eventually("a read works again", seconds(10), async || {
        (system.api.get(&format!("/v1/secrets/{path}?ttl=1")).await.0 == 200).then_some(())
    })
    .await;
}
