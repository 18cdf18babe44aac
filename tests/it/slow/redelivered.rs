//! A request that was delivered to an engine that died, and fails at the next engine.

use mayfly_tests::postgres::Server;
use mayfly_tests::process::Process;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::{eventually, run_dir, seconds, word};
use serde_json::json;

use crate::chaos::faults::arm;

/// A request that is never acknowledged holds one of the engine's 32 places for requests as long as its connection
/// lives. An engine without places takes no creates.
#[tokio::test(flavor = "multi_thread")]
async fn a_redelivered_request_that_fails_is_acknowledged() {
    let (system, _site, path, pool) = Scenario::on(Server::pg15())
        .attributes(json!({"database": "absent"}))
        .start_without_engine()
        .await;
    let fault = run_dir().join(format!("fault-{}", word()));
    arm(&fault, "create.delivered kill");
    let first = system.engine_with(&pool, &[("MAYFLY_FAULT_FILE", fault.to_str().unwrap())]);
    first.ready().await;
    let read = format!("/v1/secrets/{path}");
    let next = async {
        eventually("the first engine dies", seconds(20), async || {
            (!Process::is_alive(&first.process)).then_some(())
        })
        .await;
        system.engine(&pool).await
    };
    let ((status, answer), _engine) = tokio::join!(system.api.get(&read), next);
    assert_eq!(answer["error"], "no_such_object", "{status} {answer}");
    // The broker counts every 5 s.
    tokio::time::sleep(seconds(6)).await;
    let rabbit = &system.rabbit;
    eventually("no engine has a request", seconds(20), async || {
        (rabbit.in_hand(&format!("pool.{pool}.create")) == 0).then_some(())
    })
    .await;
}
