//! Bad days, by causing them: engines, broker, database and dispatcher killed, stopped or absent,
//! before, during and after a task.

use std::time::{Duration, Instant};

use mayfly_tests::postgres::{Admin, Credential, Server};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::System;
use mayfly_tests::{eventually, seconds};
use rustix::process::Signal;
use serde_json::json;

#[tokio::test]
async fn no_engine_is_said_at_once() {
    let (system, site, path, pool) = Scenario::on(Server::pg15())
        .admin(Admin::Superuser)
        .start_without_engine()
        .await;
    let ask = async || {
        let asked = Instant::now();
        let (status, body) = system.api.get(&format!("/v1/secrets/{path}")).await;
        assert_eq!(
            (status, body["error"].as_str()),
            (503, Some("no_engine")),
            "{body}"
        );
        asked.elapsed()
    };
    // Otherwise the read would wait for its deadline, 30 s.
    assert!(ask().await < seconds(8));
    // An engine has run and was killed.
    let engine = system.engine(&pool).await;
    system.issue(&path, Some(1)).await;
    engine.process.kill();
    assert!(ask().await < seconds(8));
    // An engine dies while it has the task.
    let engine = system.engine(&pool).await;
    engine.process.signal(Signal::STOP);
    let asked = Instant::now();
    let (answer, ()) = tokio::join!(
        async { system.api.get(&format!("/v1/secrets/{path}")).await },
        async {
            tokio::time::sleep(seconds(1)).await;
            engine.process.signal(Signal::KILL);
        }
    );
    assert_eq!(answer.1["error"], "no_engine", "{answer:?}");
    assert!(
        asked.elapsed() < seconds(15),
        "answered only after {:?}",
        asked.elapsed()
    );
    let _engine = system.engine(&pool).await;
    site.no_accounts(seconds(60)).await;
}

/// The engine that made an account dies, and another engine ends the account. The engine that holds a create dies,
/// and another engine makes the account.
#[tokio::test]
async fn engines_die() {
    let (system, site, path, first) = Scenario::on(Server::pg18()).start().await;
    let pool = first.pool.clone();
    let credential = system.issue(&path, Some(5)).await;
    assert_eq!(
        system.lease(&credential.lease).await["engine"],
        first.name.as_str()
    );
    // A stopped engine holds the tasks that it gets until it is dead.
    first.process.signal(Signal::STOP);
    let second = async {
        tokio::time::sleep(seconds(1)).await;
        let second = system.engine(&pool).await;
        first.process.signal(Signal::KILL);
        second
    };
    let (other, second) = tokio::join!(system.issue(&path, Some(5)), second);
    assert!(other.login().await.is_ok());
    for credential in [&credential, &other] {
        system.gone(&site, credential, seconds(15)).await;
        let lease = system
            .lease_becomes(&credential.lease, "revoked", seconds(60))
            .await;
        assert_eq!(lease["revokedBy"], second.name.as_str());
    }
}

/// An engine hangs during a revocation: the broker gives it to another engine after the promised time of silence. The
/// first engine continues when it wakes.
#[tokio::test]
async fn an_engine_hangs() {
    let (system, site, path, hung) = Scenario::on(Server::pg15()).start().await;
    let pool = hung.pool.clone();
    let credential = system.issue(&path, Some(2)).await;
    hung.process.signal(Signal::STOP);
    let stopped = Instant::now();
    let revoke = format!("mayfly.v1.pool.{pool}.revoke");
    eventually("it is given the revocation", seconds(10), async || {
        (system.rabbit.in_hand(&revoke) == 1).then_some(())
    })
    .await;
    let _other = system.engine(&pool).await;
    system.gone(&site, &credential, seconds(30)).await;
    let held = stopped.elapsed();
    // RabbitMQ ends a silent connection after 10 to 15 s; the rest of the time is for a busy machine. Otherwise the
    // engine would keep its task until it wakes.
    assert!(held < seconds(60), "it held its task for {held:?}");
    hung.process.signal(Signal::CONT);
    hung.ready().await;
    system
        .lease_becomes(&credential.lease, "revoked", seconds(20))
        .await;
    let again = system.issue(&path, Some(1)).await;
    system.gone(&site, &again, seconds(10)).await;
}

/// All engines are dead when leases end. The first engine that starts ends them all.
#[tokio::test]
async fn all_engines_dead_past_the_end() {
    let (system, site, path, engine) = Scenario::on(Server::pg15()).start().await;
    let pool = engine.pool.clone();
    let mut credentials = Vec::new();
    for _ in 0..10 {
        credentials.push(system.issue(&path, Some(2)).await);
    }
    engine.process.kill();
    tokio::time::sleep(seconds(4)).await;
    assert_eq!(site.accounts().await.len(), 10);
    // VALID UNTIL refuses the login meanwhile.
    for credential in &credentials {
        assert!(credential.is_refused().await);
    }
    let _back = system.engine(&pool).await;
    site.no_accounts(seconds(10)).await;
}

/// The dispatcher is gone for good before the TTL.
#[tokio::test]
async fn the_dispatcher_is_gone_for_good() {
    let (mut system, site, path, _engine) = Scenario::on(Server::pg18()).start().await;
    let credential = system.issue(&path, Some(3)).await;
    system.kill_dispatcher();
    assert!(credential.login().await.is_ok());
    system.gone(&site, &credential, seconds(8)).await;
    // A dispatcher that starts again learns that the account has ended.
    system.start_dispatcher().await;
    system
        .lease_becomes(&credential.lease, "revoked", seconds(20))
        .await;
}

/// The broker crashes with leases outstanding: nothing is lost, and every process survives it.
#[tokio::test]
async fn the_broker_crashes() {
    let (system, site, path, engine) = Scenario::on(Server::pg15())
        .broker(Rabbit::own())
        .start()
        .await;
    let short = system.issue(&path, Some(3)).await;
    let long = system.issue(&path, Some(25)).await;
    system.rabbit.write_down();
    system.rabbit.kill(0);
    let asked = Instant::now();
    let (status, body) = system.api.get(&format!("/v1/secrets/{path}")).await;
    assert_eq!(
        (status, body["error"].as_str()),
        (503, Some("broker_unavailable")),
        "{body}"
    );
    assert!(
        asked.elapsed() < seconds(18),
        "a read hung for {:?}",
        asked.elapsed()
    );
    assert_eq!(
        system.admin_text("/readyz").await.trim(),
        "ok",
        "the broker's absence is no reason to go"
    );
    // A revocation that was requested meanwhile is remembered, and done later.
    let (status, _) = system
        .api
        .delete(&format!("/v1/leases/{}", long.lease))
        .await;
    assert_eq!(status, 200);
    tokio::time::sleep(seconds(4)).await;
    system.rabbit.start(0);
    for credential in [&short, &long] {
        system.gone(&site, credential, seconds(20)).await;
    }
    assert!(engine.process.is_alive() && system.dispatcher().is_alive());
    eventually("a read works again", seconds(20), async || {
        (system.api.get(&format!("/v1/secrets/{path}?ttl=1")).await.0 == 200).then_some(())
    })
    .await;
    site.no_accounts(seconds(20)).await;
}

/// Every queue is wiped: the lease store knows what is due.
#[tokio::test]
async fn every_queue_is_wiped() {
    let (system, site, path, _engine) = Scenario::on(Server::pg18()).start().await;
    let credential = system.issue(&path, Some(6)).await;
    system.rabbit.wipe();
    system.gone(&site, &credential, seconds(30)).await;
    system
        .lease_becomes(&credential.lease, "revoked", seconds(20))
        .await;
    eventually("a read works again", seconds(45), async || {
        (system.api.get(&format!("/v1/secrets/{path}?ttl=1")).await.0 == 200).then_some(())
    })
    .await;
}

/// A pool's queues are deleted while the broker is busy and reads continue, and once also declared again at once,
/// which RabbitMQ before 4.0 reports to no consumer.
async fn queues_are_deleted(rabbit: Rabbit) {
    let (system, site, path, _engine) = Scenario::on(Server::pg18()).broker(rabbit).start().await;
    let read = format!("/v1/secrets/{path}?ttl=1");
    let works_again = async || {
        // The dispatcher declares the queues again 5 to 10 s after they were deleted.
        eventually("a read works again", seconds(75), async || {
            let answer = tokio::time::timeout(seconds(4), system.api.get(&read)).await;
            answer.is_ok_and(|(status, _)| status == 200).then_some(())
        })
        .await;
    };
    works_again().await;
    let deleting = async {
        let rabbit = system.rabbit.handle();
        tokio::task::spawn_blocking(move || rabbit.delete(".create"))
            .await
            .unwrap();
    };
    let reading = async {
        let mut often = tokio::time::interval(Duration::from_millis(50));
        loop {
            often.tick().await;
            system.api.get(&read).await;
        }
    };
    tokio::select! {
        () = deleting => {}
        () = reading => {}
    }
    works_again().await;
    system.rabbit.replace(".create");
    system.rabbit.delete(".revoke");
    works_again().await;
    site.no_accounts(seconds(30)).await;
}

#[tokio::test]
async fn queues_are_deleted_on_debians_release() {
    queues_are_deleted(Rabbit::shared()).await;
}

#[tokio::test]
async fn queues_are_deleted_on_release_4() {
    queues_are_deleted(Rabbit::of_release("4")).await;
}

/// A pool's queues are deleted while there is no engine: they are declared again before one starts.
#[tokio::test]
async fn queues_are_deleted_without_an_engine() {
    let system = System::start().await;
    let pool = system.pool().await;
    system.rabbit.delete(".pool.");
    // On a busy machine the queues may exist again before a query finds them absent. The log is the proof.
    eventually("the dispatcher misses them", seconds(30), async || {
        let log = std::fs::read_to_string(system.log()).unwrap_or_default();
        log.contains("queues are absent").then_some(())
    })
    .await;
    eventually("the queues are back", seconds(30), async || {
        (system.rabbit.has(&format!("{pool}.create"))
            && system.rabbit.has(&format!("{pool}.revoke")))
        .then_some(())
    })
    .await;
}

/// The database is unreachable past the TTL, and comes back: the lease is shown as stuck, then ends without help.
#[tokio::test]
async fn the_database_is_unreachable() {
    let server = Server::own("");
    let (system, site, path, _engine) = Scenario::on(server.clone())
        .admin(Admin::Superuser)
        .start()
        .await;
    let credential = system.issue(&path, Some(3)).await;
    server.kill();
    let (status, body) = system.api.get(&format!("/v1/secrets/{path}")).await;
    assert_eq!(
        (status, body["error"].as_str()),
        (502, Some("database_unreachable")),
        "{body}"
    );
    eventually("the lease is stuck", seconds(40), async || {
        let lease = system.lease(&credential.lease).await;
        (lease["stuck"] == true && lease["lastError"].as_str().is_some_and(|e| !e.is_empty()))
            .then_some(())
    })
    .await;
    server.start();
    system.gone(&site, &credential, seconds(40)).await;
    system
        .lease_becomes(&credential.lease, "revoked", seconds(10))
        .await;
    site.no_accounts(seconds(60)).await;
}

/// A create that hangs on a lock until after its time-out: the caller gets an error, and no account stays.
#[tokio::test]
async fn a_create_that_is_slow_until_after_its_time_out() {
    let server = Server::own("");
    let (system, site, path, _engine) = Scenario::on(server.clone())
        .admin(Admin::Superuser)
        .settings(&[("MAYFLY__CREATE__DEADLINE_SECONDS", "2")])
        .start()
        .await;
    system.issue(&path, Some(1)).await;
    let blocker = server.superuser("postgres").await;
    blocker
        .batch_execute("BEGIN; LOCK TABLE pg_catalog.pg_authid IN SHARE ROW EXCLUSIVE MODE")
        .await
        .unwrap();
    let asked = Instant::now();
    let (status, body) = system.api.get(&format!("/v1/secrets/{path}")).await;
    assert_eq!(
        (status, body["error"].as_str()),
        (504, Some("deadline")),
        "{body}"
    );
    assert!(asked.elapsed() < seconds(12), "{:?}", asked.elapsed());
    tokio::time::sleep(seconds(1)).await;
    blocker.batch_execute("ROLLBACK").await.unwrap();
    // The create may commit now, after its revocation: only the final absence settles the lease.
    eventually(
        "no account stays and the lease is settled",
        seconds(60),
        async || {
            let failed = system.api.ok("/v1/leases?state=failed").await;
            (failed["length"] == 1).then_some(())
        },
    )
    .await;
    site.no_accounts(seconds(10)).await;
}

/// The dispatcher dies while it issues: no role stays without a holder of its credential.
#[tokio::test]
async fn the_dispatcher_dies_while_it_issues() {
    let mut system = System::start_with(
        Rabbit::shared(),
        &[("MAYFLY__CREATE__DEADLINE_SECONDS", "2")],
    )
    .await;
    let site = Server::pg18().site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let _engines = [system.engine(&pool).await, system.engine(&pool).await];
    let path = system.secret(&site, &pool, json!({})).await;
    system.issue(&path, Some(1)).await;
    let mut reads = tokio::task::JoinSet::new();
    let (given, answers) = std::sync::mpsc::channel();
    for _ in 0..30 {
        let (address, token, path, given) = (
            system.api.address.clone(),
            system.api.token.clone(),
            path.clone(),
            given.clone(),
        );
        reads.spawn(async move {
            let client = reqwest::Client::new();
            let answer = client
                .get(format!("{address}/v1/secrets/{path}"))
                .bearer_auth(token)
                .send()
                .await;
            if let Ok(answer) = answer
                && answer.status().is_success()
                && let Ok(body) = answer.json().await
            {
                let _ = given.send(Credential::from_answer(&body));
            }
        });
    }
    let _ = tokio::time::timeout(std::time::Duration::from_millis(60), async {
        reads.join_next().await
    })
    .await;
    system.kill_dispatcher();
    reads.join_all().await;
    drop(given);
    let in_hand: Vec<Credential> = answers.iter().collect();
    system.start_dispatcher().await;
    system.broker_up().await;
    eventually(
        "every lease is settled or active",
        seconds(60),
        async || {
            for state in ["pending", "revoking"] {
                if system.api.ok(&format!("/v1/leases?state={state}")).await["length"] != 0 {
                    return None;
                }
            }
            Some(())
        },
    )
    .await;
    for credential in &in_hand {
        assert!(
            credential.login().await.is_ok(),
            "a credential that was handed out died early"
        );
    }
    // Each active lease has its end. They are revoked now, to check what is left.
    let (status, _) = system.api.delete(&format!("/v1/leases?path={path}")).await;
    assert_eq!(status, 200);
    site.no_accounts(seconds(30)).await;
}

/// The dispatcher starts without a broker, reports that, and works when there is one.
#[tokio::test]
async fn the_broker_is_unreachable_at_the_start() {
    let rabbit = Rabbit::own();
    rabbit.kill(0);
    let system = System::start_on(rabbit).await;
    assert_eq!(system.api.ok("/v1/status").await["broker"], "down");
    system.rabbit.start(0);
    system.broker_up().await;
    system.pool().await;
}
