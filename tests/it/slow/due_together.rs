//! Accounts that are due in the same second end together, none of them early; and a server that hangs with the ends
//! of many more does not hold up those of another.

use std::time::{Duration, Instant};

use mayfly_tests::postgres::{Admin, Server};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::{System, prefix};
use mayfly_tests::{eventually, seconds};
use rustix::process::Signal;
use serde_json::json;
use tokio::task::JoinSet;

/// More accounts than the minimum number for which a dispatcher ends accounts together.
const TOGETHER: usize = 260;
/// More accounts than an engine has in work at a time.
const AT_HUNG_SERVER: usize = 1_700;
const READERS: usize = 8;

/// Issues accounts that end at `end`, rounded up to a second.
async fn issue_until(system: &System, path: &str, number: usize, end: Instant) {
    let mut readers = JoinSet::new();
    for first in 0..READERS {
        let (api, path) = (system.api.clone(), path.to_owned());
        readers.spawn(async move {
            for _ in (first..number).step_by(READERS) {
                let left = end.saturating_duration_since(Instant::now());
                let ttl = left.as_secs_f64().ceil().max(1.0);
                api.ok(&format!("/v1/secrets/{path}?ttl={ttl}")).await;
            }
        });
    }
    readers.join_all().await;
}

/// For each account that ended at the end of its TTL, how late that was, in seconds by the database's clock.
fn late(system: &System) -> Vec<f64> {
    let logged = system.logged();
    let lines = logged
        .lines()
        .filter(|line| line.contains("ended an account"));
    let late = |line: &str| {
        let line: serde_json::Value = serde_json::from_str(line).ok()?;
        line.pointer("/fields/late_seconds")
            .or_else(|| line.get("late_seconds"))?
            .as_f64()
    };
    lines.filter_map(late).collect()
}

#[tokio::test]
async fn accounts_that_are_due_together_end_together() {
    let (system, site, path, _engine) = Scenario::on(Server::pg15())
        .attributes(json!({"scramIterations": 1, "ttl": 600}))
        .start()
        .await;
    let lives = system.issue(&path, Some(600)).await;
    let renewed = system.issue(&path, Some(60)).await;
    let end = Instant::now() + seconds(60);
    issue_until(&system, &path, TOGETHER, end).await;
    let route = format!("/v1/leases/{}/renew", renewed.lease);
    let (status, answer) = system.api.post(&route, json!({"increment": 600})).await;
    assert_eq!(status, 200, "{answer}");
    tokio::time::sleep(end.saturating_duration_since(Instant::now())).await;
    eventually("all but two are gone", seconds(15), async || {
        let roles = site.server.roles(&prefix(&site)).await;
        (roles.len() == 2).then_some(())
    })
    .await;
    assert!(lives.login().await.is_ok() && renewed.login().await.is_ok());
    // The engine logs the last of them after their roles are gone.
    let late = eventually("each end is logged", seconds(15), async || {
        let late = late(&system);
        (late.len() >= TOGETHER).then_some(late)
    })
    .await;
    assert!(late.iter().all(|late| *late >= 0.0), "one died early");
    assert!(
        system
            .logged()
            .contains("sent copies of the ends of accounts that are due together")
    );
    system.leases_left(2).await;
}

/// The revocations of a server that does not answer leave their places to those of other servers.
#[tokio::test]
async fn a_server_that_hangs_with_many_ends_holds_up_no_others() {
    let system = System::start().await;
    let hung = Server::own("");
    let sick = hung.site(Admin::Superuser).await;
    let well = Server::pg18().site(Admin::Superuser).await;
    let pool = system.pool().await;
    let _engine = system.engine(&pool).await;
    let one_round = || json!({"scramIterations": 1, "ttl": 3600});
    let sick_path = system.secret(&sick, &pool, one_round()).await;
    let well_path = system.secret(&well, &pool, one_round()).await;
    issue_until(
        &system,
        &sick_path,
        AT_HUNG_SERVER,
        Instant::now() + seconds(3600),
    )
    .await;
    system.issue(&well_path, Some(1)).await;
    hung.signal_all(Signal::STOP);
    let below = format!("/v1/leases?path={sick_path}");
    let (status, answer) = system.api.delete(&below).await;
    assert_eq!(status, 200, "{answer}");
    let mut latest = Duration::ZERO;
    let begun = Instant::now();
    while begun.elapsed() < seconds(20) {
        let credential = system.issue(&well_path, Some(1)).await;
        let due = Instant::now() + seconds(1);
        eventually(
            "an account of the other server ends",
            seconds(30),
            async || {
                let roles = well.server.roles(&credential.username).await;
                roles.is_empty().then_some(())
            },
        )
        .await;
        latest = latest.max(due.elapsed());
    }
    hung.signal_all(Signal::CONT);
    // Behind the hung server the ends would wait for its limits, one batch after another.
    assert!(latest < seconds(12), "{latest:?}");
    eventually(
        "all accounts of the hung server end",
        seconds(60),
        async || {
            let roles = sick.server.roles(&prefix(&sick)).await;
            roles.is_empty().then_some(())
        },
    )
    .await;
}
