//! Metrics as Prometheus gets them: a real one scrapes a running system, with the shipped rules.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use mayfly_tests::api::Api;
use mayfly_tests::postgres::Server;
use mayfly_tests::process::{Process, free_port, prometheus};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::{Engine, System};
use mayfly_tests::{eventually, run_dir, seconds, word};
use serde_json::{Value, json};

/// A file of the chart.
fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../helm/mayfly/files")
        .join(name)
}

/// The label of an engine's group, as the chart's PodMonitor gives it.
const GROUP: &str = "mayfly_group";

/// The metrics a text names; those of a histogram by the histogram's name.
fn named(text: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_lowercase() || c == '_';
    text.match_indices("mayfly_")
        .filter(|(at, _)| !text[..*at].ends_with(is_part))
        .map(|(at, _)| {
            let rest = &text[at..];
            rest[..rest.find(|c| !is_part(c)).unwrap_or(rest.len())].to_owned()
        })
        .filter(|name| name != GROUP)
        .collect()
}

/// The families of a scrape that have samples.
fn families(scrape: &str) -> BTreeSet<String> {
    scrape
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .map(|line| line.split(' ').next().unwrap().to_owned())
        .collect()
}

async fn scrapes(system: &System, engine: &Engine) -> [String; 2] {
    [
        system.admin_text("/metrics").await,
        engine.admin_text("/metrics").await,
    ]
}

#[tokio::test]
async fn rules_and_dashboards_name_metrics_that_exist() {
    let (system, site, path, pool) = Scenario::on(Server::pg15()).start_without_engine().await;
    let (status, _) = system.api.get(&format!("/v1/secrets/{path}")).await;
    assert_eq!(status, 503, "an error is counted");
    let engine = system.engine(&pool).await;
    let credential = system.issue(&path, Some(1)).await;
    system.gone(&site, &credential, seconds(10)).await;

    let mut wanted = BTreeSet::new();
    for file in [
        "rules.yml",
        "dashboards/mayfly.json",
        "dashboards/engines.json",
    ] {
        wanted.extend(named(&std::fs::read_to_string(shipped(file)).unwrap()));
    }
    assert!(wanted.len() > 15, "{wanted:?}");
    eventually("every metric is there", seconds(20), async || {
        let [dispatcher, engine] = scrapes(&system, &engine).await;
        let there: BTreeSet<_> = families(&dispatcher)
            .into_iter()
            .chain(families(&engine))
            .collect();
        let missing: Vec<_> = wanted
            .iter()
            .filter(|name| {
                let part = ["_bucket", "_sum", "_count"]
                    .iter()
                    .find_map(|part| name.strip_suffix(part));
                !there.contains(*name) && !part.is_some_and(|whole| there.contains(whole))
            })
            .collect();
        // The queue of messages without a route: queues are counted every few seconds.
        if !missing.is_empty() {
            eprintln!("not yet there: {missing:?}");
        }
        missing.is_empty().then_some(())
    })
    .await;

    for scrape in scrapes(&system, &engine).await {
        let mut promtool = Command::new(prometheus("promtool"))
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = promtool.stdin.take().unwrap();
        stdin.write_all(scrape.as_bytes()).unwrap();
        drop(stdin);
        let output = promtool.wait_with_output().unwrap();
        let told =
            String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success() && told.is_empty(), "{told}");
    }
}

/// A Prometheus with the shipped rules, that scrapes these.
struct Prometheus {
    _process: Process,
    api: Api,
}

impl Prometheus {
    async fn start(system: &System, engine: &Engine) -> Self {
        let directory = run_dir().join(format!("prometheus-{}", word()));
        std::fs::create_dir_all(&directory).unwrap();
        let targets = [
            json!({"targets": [format!("127.0.0.1:{}", system.admin_port())]}),
            json!({
                "targets": [format!("127.0.0.1:{}", engine.admin_port())],
                "labels": {(GROUP): "any"},
            }),
        ];
        // JSON is YAML.
        let configuration = json!({
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [shipped("rules.yml").canonicalize().unwrap()],
            "scrape_configs": [{"job_name": "mayfly", "static_configs": targets}],
        });
        let file = directory.join("prometheus.yml");
        std::fs::write(&file, configuration.to_string()).unwrap();
        let port = free_port();
        let mut command = Command::new(prometheus("prometheus"));
        command
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", directory.display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .arg("--log.level=warn");
        let process = Process::start(&command, &directory.join("log"));
        let started = Self {
            _process: process,
            api: Api::new(format!("http://127.0.0.1:{port}"), String::new()),
        };
        eventually("Prometheus is ready", seconds(60), async || {
            let open = tokio::net::TcpStream::connect(("127.0.0.1", port)).await;
            open.ok()?;
            let answer = started
                .api
                .raw(reqwest::Method::GET, "/-/ready", None)
                .await;
            answer.status().is_success().then_some(())
        })
        .await;
        started
    }

    /// Names of the alerts that fire for a pool, or for no pool in particular.
    async fn firing(&self, pool: &str) -> Vec<String> {
        let (_, answer) = self.api.get("/api/v1/alerts").await;
        let of_pool = |alert: &Value| {
            let label = &alert["labels"]["pool"];
            label.is_null() || label == pool
        };
        answer["data"]["alerts"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|alert| alert["state"] == "firing" && of_pool(alert))
            .map(|alert| alert["labels"]["alertname"].as_str().unwrap().to_owned())
            .collect()
    }
}

/// The queries of the dashboards, with their variables filled in, and the results of the recording rules.
fn questions(pool: &str) -> BTreeSet<String> {
    fn collect(value: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(members) => {
                found.extend(
                    members
                        .get("expr")
                        .and_then(Value::as_str)
                        .map(str::to_owned),
                );
                members.values().for_each(|value| collect(value, found));
            }
            Value::Array(values) => values.iter().for_each(|value| collect(value, found)),
            _ => {}
        }
    }
    let mut found = BTreeSet::new();
    for board in ["dashboards/mayfly.json", "dashboards/engines.json"] {
        let text = std::fs::read_to_string(shipped(board)).unwrap();
        let text = text
            .replace("$__rate_interval", "10s")
            .replace("$namespace", ".*")
            .replace("$pool", pool)
            .replace("$group", "any");
        collect(&serde_json::from_str(&text).unwrap(), &mut found);
    }
    let rules = std::fs::read_to_string(shipped("rules.yml")).unwrap();
    let records = rules
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- record: "));
    let before = found.len();
    found.extend(records.map(str::to_owned));
    assert!(before > 10 && found.len() > before);
    found
}

#[tokio::test]
async fn dashboards_have_something_to_show() {
    let (system, site, path, pool) = Scenario::on(Server::pg15()).start_without_engine().await;
    assert_eq!(system.api.get(&format!("/v1/secrets/{path}")).await.0, 503);
    let engine = system.engine(&pool).await;
    let prometheus = Prometheus::start(&system, &engine).await;
    let questions = questions(&pool);
    eventually(
        "every panel and record has something to show",
        seconds(60),
        async || {
            let credential = system.issue(&path, Some(1)).await;
            system.gone(&site, &credential, seconds(10)).await;
            let nobody = system.api.with_token("wrong");
            assert_eq!(nobody.get("/v1/status").await.0, 401);
            let mut empty = Vec::new();
            for question in &questions {
                let encoded: String = question.bytes().map(|b| format!("%{b:02X}")).collect();
                let asked = format!("/api/v1/query?query={encoded}");
                let (_, answer) = prometheus.api.get(&asked).await;
                assert_eq!(answer["status"], "success", "{question}: {answer}");
                if answer["data"]["result"].as_array().unwrap().is_empty() {
                    empty.push(question);
                }
            }
            if !empty.is_empty() {
                eprintln!("nothing yet for {empty:#?}");
            }
            empty.is_empty().then_some(())
        },
    )
    .await;
}

#[tokio::test]
async fn an_alert_fires_when_the_last_engine_dies_and_clears_when_one_returns() {
    let (system, _site, path, engine) = Scenario::on(Server::pg15()).start().await;
    let pool = engine.pool.clone();
    let credential = system.issue(&path, Some(300)).await;
    let prometheus = Prometheus::start(&system, &engine).await;
    assert_eq!(prometheus.firing(&pool).await, [""; 0]);

    engine.process.kill();
    eventually("MayflyNoEngine fires", seconds(150), async || {
        let firing = prometheus.firing(&pool).await;
        firing.contains(&"MayflyNoEngine".to_owned()).then_some(())
    })
    .await;
    assert!(credential.login().await.is_ok());

    let _engine = system.engine(&pool).await;
    eventually("no alert fires", seconds(60), async || {
        prometheus.firing(&pool).await.is_empty().then_some(())
    })
    .await;
}
