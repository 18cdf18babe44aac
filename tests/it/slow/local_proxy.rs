//! `mayfly proxy` over the ends of leases: applications that connect again when an idle connection is lost do not fail,
//! and no session outlives its lease.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use mayfly_tests::local_proxy::{LocalProxy, RawClient};
use mayfly_tests::postgres::{Server, scalar};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::prefix;
use mayfly_tests::{eventually, run_dir, seconds, word};
use serde_json::json;
use tokio_postgres::Client;

/// A worker of an application with a connection pool: short transactions with pauses. Like every pool it tests a
/// connection by its first statement and connects again if it was lost meanwhile.
struct Worker {
    client: Client,
    users: BTreeSet<String>,
    done: usize,
    reconnected: usize,
}

impl Worker {
    async fn work(mut self, proxy: Arc<LocalProxy>, number: u64, stop: Arc<AtomicBool>) -> Self {
        let mut turn = number;
        while !stop.load(Ordering::Relaxed) {
            turn += 1;
            while self.client.simple_query("BEGIN").await.is_err() {
                assert!(
                    self.client.is_closed(),
                    "BEGIN failed in a session that lives"
                );
                self.reconnected += 1;
                self.client = proxy.client().await;
            }
            // From here on a failure would be a failed transaction.
            let user = scalar(&self.client, "SELECT current_user").await;
            let query = self
                .client
                .query_one("SELECT count(*) FROM things WHERE n > $1", &[&0_i32]);
            assert_eq!(
                query.await.expect("a transaction failed").get::<_, i64>(0),
                1
            );
            if turn.is_multiple_of(3) {
                scalar(&self.client, "SELECT pg_sleep(0.03)").await;
            }
            self.client
                .batch_execute("COMMIT")
                .await
                .expect("a COMMIT failed");
            self.users.insert(user);
            self.done += 1;
            // Some connections rest for long, others never.
            tokio::time::sleep(Duration::from_millis(number * 40)).await;
        }
        self
    }
}

/// pgbench with a new connection for each transaction, over the rotations.
fn pgbench(
    server: &Server,
    proxy: &LocalProxy,
    database: &str,
    length: u64,
) -> std::process::Command {
    let script = run_dir().join(format!("pgbench-{}.sql", word()));
    std::fs::write(&script, "SELECT count(*) FROM things;\n").unwrap();
    let mut command = std::process::Command::new(server.program("pgbench"));
    command
        .args([
            "-n",
            "-C",
            "-c",
            "2",
            "-M",
            "prepared",
            "-T",
            &length.to_string(),
            "-f",
        ])
        .arg(script)
        .args([
            "-h",
            "127.0.0.1",
            "-U",
            "app",
            "-p",
            &proxy.port.to_string(),
            database,
        ])
        .env("PGSSLMODE", "prefer")
        .env_remove("PGPASSWORD");
    command
}

/// 0 failed transactions over several leases, while an engine is killed and the dispatcher is away for some time.
#[tokio::test(flavor = "multi_thread")]
async fn an_application_lives_over_many_leases() {
    const LENGTH: u64 = 62;
    let (mut system, site, path, engine) = Scenario::on(Server::pg15())
        .attributes(json!({"ttl": 10, "maxTtl": 15}))
        .start()
        .await;
    let admin = site.admin().await;
    let things = "CREATE TABLE things (n int); INSERT INTO things VALUES (1)";
    admin.batch_execute(things).await.unwrap();
    let other = system.engine(&engine.pool).await;
    let proxy = Arc::new(LocalProxy::start(&system, &path, &[]).await);
    let stop = Arc::new(AtomicBool::new(false));
    let mut workers = Vec::new();
    for number in 0..5 {
        let worker = Worker {
            client: proxy.client().await,
            users: BTreeSet::new(),
            done: 0,
            reconnected: 0,
        };
        workers.push(tokio::spawn(worker.work(
            proxy.clone(),
            number,
            stop.clone(),
        )));
    }
    let mut bench = pgbench(&site.server, &proxy, &site.name, LENGTH);
    let bench = tokio::task::spawn_blocking(move || bench.output().unwrap());
    let started = Instant::now();
    tokio::time::sleep(seconds(12)).await;
    drop(engine);
    tokio::time::sleep(seconds(8)).await;
    system.kill_dispatcher();
    tokio::time::sleep(seconds(2)).await;
    system.start_dispatcher().await;
    let rest = seconds(LENGTH).saturating_sub(started.elapsed());
    tokio::time::sleep(rest).await;
    let bench = bench.await.unwrap();
    stop.store(true, Ordering::Relaxed);
    let mut users = BTreeSet::new();
    let mut reconnected = 0;
    for worker in workers {
        let worker = worker.await.expect("a transaction failed");
        assert!(worker.done > 20, "{}", worker.done);
        reconnected += worker.reconnected;
        users.extend(worker.users);
    }
    assert!(users.len() >= 4, "{users:?}");
    assert!(reconnected >= users.len(), "{reconnected}");
    let said = String::from_utf8_lossy(&bench.stdout).into_owned();
    assert!(
        bench.status.success(),
        "{said} {}",
        String::from_utf8_lossy(&bench.stderr)
    );
    assert!(
        said.contains("number of failed transactions: 0 ("),
        "{said}"
    );
    assert!(proxy.metric("mayfly_proxy_moved_total").await > 0.0);
    assert_eq!(
        proxy.metric("mayfly_proxy_cut_total").await,
        0.0,
        "{}",
        proxy.logged()
    );
    assert_eq!(
        proxy.metric("mayfly_proxy_logins_refused_total").await,
        0.0,
        "{}",
        proxy.logged()
    );

    // The accounts of earlier leases are gone.
    eventually(
        "one account is left, or two in the change",
        seconds(20),
        async || (site.server.roles(&prefix(&site)).await.len() <= 2).then_some(()),
    )
    .await;
    let proxy = Arc::into_inner(proxy).unwrap();
    proxy.process.stop();
    eventually("no account is left", seconds(20), async || {
        site.server
            .roles(&prefix(&site))
            .await
            .is_empty()
            .then_some(())
    })
    .await;
    drop(other);
}

/// What is in use at the end of its lease is cut before it, and hears why. What cannot be moved is not moved.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_transaction_is_cut_before_its_account_ends() {
    let (system, site, path, _engine) = Scenario::on(Server::pg18())
        .attributes(json!({"ttl": 20, "maxTtl": 20}))
        .start()
        .await;
    let proxy = LocalProxy::start(&system, &path, &[]).await;
    let listener = proxy.client().await;
    listener.batch_execute("LISTEN news").await.unwrap();
    let idle = proxy.client().await;
    let user = scalar(&idle, "SELECT current_user").await;
    let end = site.server.valid_until(&user).await;
    let psql = |script: &str| {
        let mut command = std::process::Command::new(site.server.program("psql"));
        command
            .args(["-XAt", "-v", "VERBOSITY=verbose", "-h", "127.0.0.1", "-p"])
            .args([
                &proxy.port.to_string(),
                "-U",
                "app",
                "-d",
                &site.name,
                "-c",
                script,
            ])
            .env_remove("PGPASSWORD");
        tokio::task::spawn_blocking(move || command.output().unwrap())
    };
    // In a transaction, and in one statement, which the server works on.
    let busy = psql("BEGIN; SELECT current_user; SELECT pg_sleep(300); COMMIT");
    let statement = psql("SELECT pg_sleep(300)");
    // The idle one is moved by the new lease, at two thirds of the old one.
    eventually("the idle session is moved", seconds(20), async || {
        idle.is_closed().then_some(())
    })
    .await;
    assert!(
        jiff::Timestamp::now() < end,
        "it was moved by the end of its account"
    );
    assert!(!listener.is_closed(), "a session with a LISTEN was moved");
    let moved = proxy.client().await;
    assert_ne!(scalar(&moved, "SELECT current_user").await, user);
    for (cut, open) in [
        (busy, "a request was being worked on"),
        (statement, "a request was being worked on"),
    ] {
        let cut = cut.await.unwrap();
        let said = String::from_utf8_lossy(&cut.stderr).into_owned();
        assert_eq!(cut.status.code(), Some(2), "{said}");
        assert!(
            said.contains("FATAL:  57P01") && said.contains(open),
            "{said}"
        );
        assert!(
            said.contains("the lease of its account ends in 1 s"),
            "{said}"
        );
    }
    eventually("the listener is cut", seconds(20), async || {
        listener.is_closed().then_some(())
    })
    .await;
    assert!(proxy.metric("mayfly_proxy_cut_total").await >= 3.0);
    // Nothing of the old account works on.
    eventually("the old account is gone", seconds(10), async || {
        site.server.roles(&user).await.is_empty().then_some(())
    })
    .await;
}

/// A session costs at most 64 KB; so does one that a client does not read.
#[tokio::test(flavor = "multi_thread")]
async fn many_sessions_are_cheap_and_a_slow_reader_holds_nothing() {
    const SESSIONS: usize = 300;
    let server = Server::own("max_connections = 400");
    let (system, _site, path, _engine) = Scenario::on(server)
        .attributes(json!({"connectionLimit": 390}))
        .start()
        .await;
    let proxy = LocalProxy::start(&system, &path, &[]).await;
    // The first ones pay for what all share.
    let mut clients = Vec::new();
    for _ in 0..20 {
        clients.push(proxy.client().await);
    }
    let before = proxy.process.allocated_mib();
    let opened = AtomicUsize::new(0);
    for _ in 0..SESSIONS / 20 {
        let some = (0..20).map(|_| proxy.client());
        for client in futures_util::future::join_all(some).await {
            client.batch_execute("SELECT 1").await.unwrap();
            opened.fetch_add(1, Ordering::Relaxed);
            clients.push(client);
        }
    }
    let each = (proxy.process.allocated_mib() - before) * 1024.0
        / f64::from(u32::try_from(SESSIONS).unwrap());
    assert!(each <= 64.0, "{each} KiB for each session");

    // 500 MB that nobody reads: the server waits, and the proxy keeps one chunk of it.
    let mut slow = RawClient::new(&proxy, 0x3_0000).await;
    slow.query("SELECT repeat('x', 1000000) FROM generate_series(1, 500)")
        .await;
    tokio::time::sleep(seconds(3)).await;
    let grown = proxy.process.allocated_mib() - before;
    assert!(grown < 64.0, "{grown} MiB");
    assert_eq!(
        proxy.metric("mayfly_proxy_connections{").await as usize,
        SESSIONS + 21
    );
}
