//! What the programs measure: the HTTP API and the work beside reads, with labels that no caller chooses;
//! and themselves, also where a service manager hides most of `/proc`. And a machine without IPv6.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use mayfly_tests::postgres::Server;
use mayfly_tests::process::binary;
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::System;
use mayfly_tests::{eventually, run_dir, seconds, word};
use reqwest::Method;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A number of a scrape; `None` if the series is absent.
fn number(scrape: &str, series: &str) -> Option<f64> {
    let line = scrape
        .lines()
        .find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.map(|value| value.parse().unwrap())
}

/// Sends bytes to the API, and returns the answer up to the end of the connection.
async fn said_to(system: &System, bytes: &[u8]) -> String {
    let address = system.api.address.trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).await.unwrap();
    // The connection may be closed before all of it is sent.
    let _ = stream.write_all(bytes).await;
    let mut said = Vec::new();
    let _ = tokio::time::timeout(seconds(30), stream.read_to_end(&mut said)).await;
    String::from_utf8_lossy(&said).into_owned()
}

#[tokio::test]
async fn requests_and_work_are_counted() {
    let often = [("MAYFLY__LEASE__SWEEP_SECONDS", "1")];
    let (system, _site, path, engine) = Scenario::on(Server::pg15()).settings(&often).start().await;
    let pool = engine.pool.clone();
    let credential = system.issue(&path, Some(200)).await;
    let renew = format!("/v1/leases/{}/renew", credential.lease);
    let (status, answer) = system.api.post(&renew, json!({"increment": 250})).await;
    assert_eq!(status, 200, "{answer}");
    let (status, _) = system
        .api
        .post(&renew, json!({"increment": 1_000_000}))
        .await;
    assert_eq!(status, 400);

    // These requests have a caller's own text in any part. It must not become a label.
    let mine = format!("x{}", word());
    let nobody = system.api.with_token(&mine);
    assert_eq!(nobody.get(&format!("/v1/secrets/{mine}")).await.0, 401);
    assert_eq!(system.api.get(&format!("/v1/{mine}/{mine}")).await.0, 404);
    let own = Method::from_bytes(mine.to_uppercase().as_bytes()).unwrap();
    let answer = system.api.raw(own, "/v1/status", None).await;
    assert_eq!(answer.status(), 405);
    let large = json!({"attributes": {}, "data": {"text": "x".repeat(1024 * 1024)}});
    let large = system
        .api
        .raw(Method::PUT, "/v1/secrets/db:x", Some(large.to_string()));
    assert_eq!(large.await.status(), 400);
    let head = format!(
        "GET / HTTP/1.1\r\nhost: x\r\n{mine}: {}\r\n\r\n",
        "y".repeat(40_000)
    );
    let said = said_to(&system, head.as_bytes()).await;
    assert!(said.is_empty() || said.contains(" 431 "), "{said}");
    said_to(&system, b"\x16\x03\x01 is no HTTP\r\n\r\n").await;

    system.rabbit.close_connections();
    let of_pool = |name: &str, outcome: &str| {
        format!("mayfly_dispatcher_{name}_total{{outcome=\"{outcome}\",pool=\"{pool}\"}}")
    };
    let refused =
        |reason: &str| format!("mayfly_dispatcher_http_refused_total{{reason=\"{reason}\"}}");
    let requests = |method: &str, route: &str, status: u16| {
        format!(
            "mayfly_dispatcher_http_requests_total{{method=\"{method}\",route=\"{route}\",status=\"{status}\"}}"
        )
    };
    // Each metric has its minimum value.
    let wanted = [
        (of_pool("renewals", "ok"), 1.0),
        (of_pool("renewals", "refused"), 1.0),
        (of_pool("sweeps", "ok"), 1.0),
        (requests("GET", "/v1/secrets/{*path}", 200), 1.0),
        (requests("GET", "/v1/secrets/{*path}", 401), 1.0),
        (requests("POST", "/v1/leases/{id}/renew", 200), 1.0),
        (requests("GET", "none", 404), 1.0),
        (requests("other", "/v1/status", 405), 1.0),
        (requests("PUT", "/v1/secrets/{*path}", 400), 1.0),
        (refused("unauthenticated"), 1.0),
        (refused("method_not_allowed"), 1.0),
        (refused("body_too_large"), 1.0),
        (refused("head_too_large"), 1.0),
        (refused("not_http"), 1.0),
        (
            "mayfly_dispatcher_http_request_duration_seconds_count{route=\"/v1/leases/{id}/renew\"}".to_owned(),
            2.0,
        ),
        ("mayfly_dispatcher_store_commit_duration_seconds_count".to_owned(), 5.0),
        ("mayfly_dispatcher_broker_reconnects_total".to_owned(), 1.0),
        (
            format!("mayfly_engine_broker_reconnects_total{{pool=\"{pool}\"}}"),
            1.0,
        ),
    ];
    eventually("everything is counted", seconds(60), async || {
        let both = system.admin_text("/metrics").await + &engine.admin_text("/metrics").await;
        let missing: Vec<_> = wanted
            .iter()
            .filter(|(series, most)| number(&both, series).unwrap_or(0.0) < *most)
            .collect();
        if !missing.is_empty() {
            eprintln!("not yet: {missing:?}");
        }
        missing.is_empty().then_some(())
    })
    .await;
    let scrape = system.admin_text("/metrics").await;
    assert!(
        !scrape.to_lowercase().contains(&mine),
        "a caller's text in\n{scrape}"
    );
    assert_eq!(number(&scrape, &of_pool("renewals", "failed")), Some(0.0));
}

/// Programs that are started by a script: with the path of the real one as `$PROGRAM`.
fn started_by(script: &str) -> PathBuf {
    let programs = run_dir().join(format!("started-{}", word()));
    std::fs::create_dir_all(&programs).unwrap();
    for name in ["mayfly-dispatcher", "mayfly-engine"] {
        let real = binary(name);
        let script = format!(
            "#!/bin/bash\nset -eu\nPROGRAM={}\n{script}\n",
            real.display()
        );
        let program = programs.join(name);
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    programs
}

/// The mount of `/proc` that systemd gives a unit with `ProtectProc=invisible` and `ProcSubset=pid`
/// (systemd.exec(5)), for a program without capabilities.
const HIDDEN_PROC: &str = r#"
exec unshare --mount --propagation private bash -euc '
  mount -t proc -o hidepid=invisible,subset=pid proc /proc
  ! test -e /proc/stat
  exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs "$@"' bash "$PROGRAM" "$@"
"#;

#[tokio::test]
async fn processes_are_measured_where_proc_is_hidden() {
    let begun = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs_f64();
    let programs = Some(started_by(HIDDEN_PROC));
    let system = System::start_from(programs, Rabbit::shared(), &[]).await;
    let pool = system.pool().await;
    let engine = system.engine(&pool).await;
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs_f64();
    for (id, scrape) in [
        (
            system.dispatcher().id(),
            system.admin_text("/metrics").await,
        ),
        (engine.process.id(), engine.admin_text("/metrics").await),
    ] {
        let value =
            |name: &str| number(&scrape, name).unwrap_or_else(|| panic!("{name} in\n{scrape}"));
        let started = value("process_start_time_seconds");
        // The clock of the kernel's ticks and the test's clock are read one after the other.
        assert!(
            started > begun - 5.0 && started < now + 5.0,
            "{begun} {started} {now}"
        );
        let files = std::fs::read_dir(format!("/proc/{id}/fd")).unwrap().count();
        let open = value("process_open_fds");
        assert!(
            open > 5.0 && (open - files as f64).abs() < 30.0,
            "{open} of {files}"
        );
        assert!(value("process_max_fds") >= open);
        assert!(value("process_cpu_seconds_total") > 0.0);
        let resident = value("process_resident_memory_bytes");
        assert!(
            resident > 3e6 && resident < value("process_virtual_memory_bytes"),
            "{resident}"
        );
        assert!(value("process_threads") > 1.0);
    }
}

/// Both programs have the address `[::]`, as in the chart, on a machine without IPv6.
#[tokio::test]
async fn a_machine_without_ipv6_is_served_by_ipv4() {
    let without = Path::new(env!("CARGO_MANIFEST_DIR")).join("without_ipv6.py");
    let script = format!(
        r#"
for name in MAYFLY__HTTP__LISTEN MAYFLY__ADMIN__LISTEN; do
  if [ -n "${{!name-}}" ]; then export "$name=[::]:${{!name##*:}}" "${{name/LISTEN/ALLOW_PLAINTEXT}}=true"; fi
done
exec python3 {} "$PROGRAM" "$@""#,
        without.display()
    );
    let system = System::start_from(Some(started_by(&script)), Rabbit::shared(), &[]).await;
    let pool = system.pool().await;
    let _engine = system.engine(&pool).await;
    let logged = system.logged();
    for key in ["http.listen", "admin.listen"] {
        let is_said = |line: &str| line.contains("this machine has no IPv6") && line.contains(key);
        assert!(logged.lines().any(is_said), "{key} in\n{logged}");
    }
}
