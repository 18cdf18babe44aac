//! Machines that vanish while they are connected to `mayfly proxy`: they acknowledge nothing, and close nothing. Their
//! sessions end within a minute, and that of a client that is only slow does not.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use mayfly_tests::local_proxy::{LocalProxy, RawClient, startup};
use mayfly_tests::postgres::{Server, scalar};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::{eventually, seconds};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The kernel would end it after a quarter of an hour, or keep it for hours.
const FOUND_WITHIN: Duration = seconds(120);

/// A machine through which connections go to a port.
struct Machine {
    child: Child,
    port: u16,
}

impl Machine {
    fn before(port: u16) -> Self {
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("vanishing.py");
        let child = Command::new("python3")
            .arg(program)
            .arg(port.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut machine = Self { child, port: 0 };
        machine.port = machine.line().parse().unwrap();
        machine
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        let stdout = self.child.stdout.as_mut().unwrap();
        // The machine prints a line after each line that it gets.
        BufReader::new(stdout).read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    /// All that is connected now is gone. New connections go through.
    fn vanish(&mut self) {
        self.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        assert_eq!(self.line(), "gone");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_vanished_holds_no_session() {
    let (system, site, path, _engine) = Scenario::on(Server::pg15())
        .attributes(json!({"ttl": 3600}))
        .start()
        .await;
    let proxy = LocalProxy::start(&system, &path, &[]).await;
    let mut machine = Machine::before(proxy.port);
    // One client is idle, and one waits for an answer, which comes after the client's machine has vanished.
    let _idle = RawClient::at(machine.port, 0x3_0000).await;
    let mut waiting = RawClient::at(machine.port, 0x3_0000).await;
    waiting.query("SELECT pg_sleep(5)").await;
    // This client reads nothing, but its machine acknowledges the probes.
    let slow = TcpStream::connect(("127.0.0.1", proxy.port)).await.unwrap();
    let mut slow = slow;
    slow.write_all(&startup(0x3_0000, &[("user", "slow")]))
        .await
        .unwrap();
    let rows = "SELECT repeat('x', 1000000) FROM generate_series(1, 50)\0";
    let length = u32::try_from(rows.len() + 4).unwrap();
    let query = [&b"Q"[..], &length.to_be_bytes(), rows.as_bytes()].concat();
    slow.write_all(&query).await.unwrap();
    let admin = site.admin().await;
    eventually("they are at work", seconds(30), async || {
        let busy = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'SELECT pg_sleep(5)'";
        (scalar(&admin, busy).await == "1").then_some(())
    })
    .await;
    machine.vanish();

    eventually("only the slow one is left", FOUND_WITHIN, async || {
        (proxy.metric("mayfly_proxy_connections{").await == 1.0).then_some(())
    })
    .await;
    let user = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = '{}' AND query LIKE 'SELECT %' AND usename <> current_user",
        site.name
    );
    eventually("the server's sessions end", seconds(30), async || {
        (scalar(&admin, &user).await == "1").then_some(())
    })
    .await;
    // The slow client has been slow for longer than it took to find the vanished clients, and gets all data.
    let mut read = 0;
    let mut buffer = vec![0; 1 << 20];
    while read < 50_000_000 {
        let n = slow.read(&mut buffer).await.unwrap();
        assert!(n > 0, "it was cut after {read} bytes");
        read += n;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_vanished_leaves_no_client_waiting() {
    let (system, site, path, _engine) = Scenario::on(Server::pg15())
        .attributes(json!({"ttl": 3600}))
        .start()
        .await;
    let mut machine = Machine::before(site.server.port());
    let mut data = site.data();
    data["port"] = machine.port.into();
    let base = format!("/v1/secrets/db:{}:root", site.name);
    let (status, body) = system.api.put(&base, json!({"data": data})).await;
    assert_eq!(status, 200, "{body}");
    let proxy = LocalProxy::start(&system, &path, &[]).await;
    let (idle, asking) = tokio::join!(proxy.client(), proxy.client());
    machine.vanish();
    // The request of this client is never acknowledged.
    let asked = tokio::time::timeout(FOUND_WITHIN, asking.simple_query("SELECT 1")).await;
    assert!(asked.expect("the client waits").is_err());
    eventually("the idle one ends", FOUND_WITHIN, async || {
        idle.is_closed().then_some(())
    })
    .await;
    assert_eq!(scalar(&proxy.client().await, "SELECT 1").await, "1");
}
