//! `mayfly proxy` at the end of a lease, and what its sessions cost.

use std::sync::atomic::{AtomicUsize, Ordering};

use mayfly_tests::local_proxy::{LocalProxy, RawClient};
use mayfly_tests::postgres::{Server, scalar};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::{eventually, seconds};
use serde_json::json;

/// A session in use at the end of its lease is cut before it, with an error that names why. A session that cannot be
/// moved is not moved.
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
    // One session is in a transaction, and one is in a statement that the server works on.
    let busy = psql("BEGIN; SELECT current_user; SELECT pg_sleep(300); COMMIT");
    let statement = psql("SELECT pg_sleep(300)");
    // The new lease moves the idle session, when two thirds of the old lease have passed.
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
    // A session is counted after its client was sent the reason.
    eventually("all are counted", seconds(10), async || {
        (proxy.metric("mayfly_proxy_cut_total").await >= 3.0).then_some(())
    })
    .await;
    // Nothing works with the old account any more.
    eventually("the old account is gone", seconds(10), async || {
        site.server.roles(&user).await.is_empty().then_some(())
    })
    .await;
}

/// A session costs at most 64 KB, also if its client does not read.
#[tokio::test(flavor = "multi_thread")]
async fn many_sessions_are_cheap_and_a_slow_reader_holds_nothing() {
    const SESSIONS: usize = 300;
    let server = Server::own("max_connections = 400");
    let (system, _site, path, _engine) = Scenario::on(server)
        .attributes(json!({"connectionLimit": 390}))
        .start()
        .await;
    let proxy = LocalProxy::start(&system, &path, &[]).await;
    // The first clients cause the cost that all clients share.
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
