//! Health, metrics, configuration, size.

use std::process::Command;

use mayfly_tests::postgres::Server;
use mayfly_tests::process::binary;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::seconds;

#[tokio::test]
async fn metrics_and_logs_follow_a_lease() {
    let (system, _site, path, engine) = Scenario::on(Server::pg15()).start().await;
    let pool = engine.pool.clone();
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let response = reqwest::Client::new()
        .get(format!("{}/v1/secrets/{path}?ttl=1", system.api.address))
        .bearer_auth(&system.api.token)
        .header("traceparent", format!("00-{trace}-b7ad6b7169203331-01"))
        .send()
        .await
        .unwrap();
    let lease = response.json::<serde_json::Value>().await.unwrap()["data"]["leaseId"]
        .as_str()
        .unwrap()
        .to_owned();
    system.lease_becomes(&lease, "revoked", seconds(10)).await;
    let finished = [
        format!(r#"mayfly_engine_tasks_total{{kind="create",outcome="ok",pool="{pool}"}} 1"#),
        format!(r#"mayfly_engine_tasks_total{{kind="revoke",outcome="ok",pool="{pool}"}} 1"#),
        format!(r#"mayfly_engine_revoke_lateness_seconds_count{{pool="{pool}"}} 1"#),
    ];
    // The engine settles the message after its outcome is known.
    let engine_metrics =
        mayfly_tests::eventually("the tasks are counted", seconds(10), async || {
            let metrics = engine.admin_text("/metrics").await;
            let has_all = finished.iter().all(|line| metrics.contains(line));
            has_all.then_some(metrics)
        })
        .await;
    for name in [
        "mayfly_engine_tasks_total",
        "mayfly_engine_task_duration_seconds",
        "mayfly_engine_tasks_in_flight",
        "mayfly_engine_revoke_lateness_seconds",
        "mayfly_engine_revoke_batch_size",
        "mayfly_engine_retries_total",
        "mayfly_engine_tasks_refused_total",
        "mayfly_engine_grants_skipped",
        "mayfly_engine_grants_waiting",
        "mayfly_engine_left_objects_total",
        "mayfly_clock_skew_seconds",
        "mayfly_build_info",
    ] {
        assert!(
            engine_metrics.contains(&format!("# TYPE {name} ")),
            "{name}"
        );
    }
    let counted = format!(r#"mayfly_dispatcher_leases{{pool="{pool}",state="revoked"}} 1"#);
    let dispatcher_metrics =
        mayfly_tests::eventually("the lease is counted", seconds(10), async || {
            let metrics = system.admin_text("/metrics").await;
            metrics.contains(&counted).then_some(metrics)
        })
        .await;
    for name in [
        "mayfly_dispatcher_issues_total",
        "mayfly_dispatcher_issue_duration_seconds",
        "mayfly_dispatcher_leases",
        "mayfly_dispatcher_leases_overdue",
        "mayfly_dispatcher_engines",
        "mayfly_dispatcher_unroutable_total",
        "mayfly_dispatcher_broker_up",
        "mayfly_build_info",
    ] {
        assert!(
            dispatcher_metrics.contains(&format!("# TYPE {name} ")),
            "{name} is not in\n{dispatcher_metrics}"
        );
    }
    assert!(
        dispatcher_metrics.contains(&format!(r#"mayfly_dispatcher_engines{{pool="{pool}"}} 1"#)),
        "{dispatcher_metrics}"
    );
    let log = std::fs::read_to_string(system.log()).unwrap();
    for line in log.lines().filter(|line| line.starts_with('{')) {
        serde_json::from_str::<serde_json::Value>(line).unwrap();
    }
    let both = |target: &str| {
        log.lines()
            .any(|line| line.contains(target) && line.contains(&lease) && line.contains(trace))
    };
    assert!(
        both("mayfly_dispatcher") && both("mayfly_engine"),
        "the lease cannot be followed by its id and trace"
    );
}

#[tokio::test]
async fn small_at_rest() {
    let (system, site, path, engine) = Scenario::on(Server::pg18()).start().await;
    for _ in 0..5 {
        let credential = system.issue(&path, Some(1)).await;
        system.gone(&site, &credential, seconds(10)).await;
    }
    let (engine, dispatcher) = (
        engine.process.allocated_mib(),
        system.dispatcher().allocated_mib(),
    );
    assert!(
        engine < 20.0 && dispatcher < 35.0,
        "engine {engine:.1} MiB, dispatcher {dispatcher:.1} MiB"
    );
}

#[test]
fn bad_configuration_is_refused_before_anything_is_opened() {
    let directory = mayfly_tests::run_dir().join(format!("config-{}", mayfly_tests::word()));
    std::fs::create_dir_all(&directory).unwrap();
    let run = |program: &str, environment: &[(&str, &str)], arguments: &[&str]| {
        let output = Command::new(binary(program))
            .args(arguments)
            .env("MAYFLY__AMQP__URL", "amqp://u:hunter2@127.0.0.1:1/%2f")
            .envs(environment.iter().copied())
            .current_dir(&directory)
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap(),
        )
    };
    for program in ["mayfly-dispatcher", "mayfly-engine"] {
        let (code, text) = run(program, &[("MAYFLY__AMPQ__URL", "x")], &[]);
        assert!(
            code == Some(64) && text.contains("ampq"),
            "{program}: {code:?} {text}"
        );
        let (code, text) = run(program, &[("MAYFLY__ADMIN__LISTEN", "nowhere")], &[]);
        assert!(
            code == Some(64) && text.contains("admin"),
            "{program}: {code:?} {text}"
        );
        assert!(!text.contains("hunter2"));
    }
    let (code, text) = run("mayfly-dispatcher", &[], &["--check-config"]);
    assert!(code == Some(0) && !text.contains("hunter2"), "{text}");
    let endpoint = [("MAYFLY__TRACES__ENDPOINT", "collector:4318")];
    let (code, text) = run("mayfly-dispatcher", &endpoint, &[]);
    assert!(
        code == Some(64) && text.contains("traces.endpoint"),
        "{text}"
    );
    let (code, text) = run("mayfly-engine", &[], &[]);
    assert!(code == Some(64) && text.contains("pool.key_file"), "{text}");
    assert_eq!(
        std::fs::read_dir(&directory).unwrap().count(),
        0,
        "something was written"
    );
}
