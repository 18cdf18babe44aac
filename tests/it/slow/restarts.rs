//! A PostgreSQL server goes down several times, in different ways, while callers use it. Each caller gets the error
//! that the server is unreachable, at any interrupted statement, and never that the request is impossible.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mayfly_tests::postgres::Server;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::{eventually, seconds};
use tokio::task::JoinSet;

const CALLERS: usize = 6;
const ROUNDS: usize = 15;

/// Sends the postmaster a signal that ends the server, and starts it again when it is gone.
async fn shut_down(server: &Server, signal: &str) {
    let file = server.directory().join("data/postmaster.pid");
    let text = std::fs::read_to_string(&file).unwrap();
    kill(signal, text.lines().next().unwrap());
    eventually("the server is down", seconds(20), async || {
        (!file.exists()).then_some(())
    })
    .await;
    server.start();
}

fn kill(signal: &str, pid: &str) {
    // The process may have ended by itself meanwhile.
    let _ = Command::new("kill").args([signal, pid.trim()]).status();
}

#[tokio::test]
async fn a_server_that_goes_down_is_never_called_a_failed_statement() {
    let server = Server::own("fsync = off");
    let (system, site, path, _engine) = Scenario::on(server.clone()).start().await;
    system.issue(&path, Some(1)).await;
    let over = Arc::new(AtomicBool::new(false));
    let mut callers = JoinSet::new();
    for _ in 0..CALLERS {
        let (api, path, over) = (system.api.clone(), path.clone(), over.clone());
        callers.spawn(async move {
            let mut answers: BTreeMap<String, usize> = BTreeMap::new();
            while !over.load(Ordering::Relaxed) {
                let (status, body) = api.get(&format!("/v1/secrets/{path}?ttl=3")).await;
                let answer = match status {
                    200 => "200".to_owned(),
                    502 | 504 => format!("{status} {}", body["error"].as_str().unwrap()),
                    _ => format!("{status} {body}"),
                };
                *answers.entry(answer).or_default() += 1;
            }
            answers
        });
    }
    for round in 0..ROUNDS {
        // The pause is long enough for the breaker to allow connections again, and callers are in the middle of
        // requests.
        tokio::time::sleep(Duration::from_millis(600 + 37 * round as u64)).await;
        match round % 5 {
            // One backend is killed: the server ends all the others and recovers.
            0 => {
                let root = server.superuser("postgres").await;
                let backend = "SELECT pid::text FROM pg_stat_activity WHERE application_name = 'mayfly-engine' LIMIT 1";
                if let Ok(Some(row)) = root.query_opt(backend, &[]).await {
                    kill("-KILL", row.get(0));
                }
            }
            1 => shut_down(&server, "-INT").await,
            2 => shut_down(&server, "-QUIT").await,
            3 => {
                server.kill();
                server.start();
            }
            _ => {
                let root = server.superuser("postgres").await;
                let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'mayfly-engine'";
                let _ = root.batch_execute(end).await;
            }
        }
        eventually("the server is up", seconds(30), async || {
            let mut watch = server.watch("nobody");
            watch.look().await.map(|_| ())
        })
        .await;
    }
    over.store(true, Ordering::Relaxed);
    let mut answers: BTreeMap<String, usize> = BTreeMap::new();
    for (answer, n) in callers.join_all().await.into_iter().flatten() {
        *answers.entry(answer).or_default() += n;
    }
    let odd: Vec<&String> = answers
        .keys()
        .filter(|answer| {
            !matches!(
                answer.as_str(),
                "200" | "502 database_unreachable" | "504 deadline"
            )
        })
        .collect();
    assert!(odd.is_empty(), "{answers:#?}");
    assert!(answers["200"] > 20, "{answers:#?}");
    site.no_accounts(seconds(60)).await;
}
