//! Servers of several hosts: failover, read-only hosts, hosts that hang, replicas that lag; and transient conditions
//! of a server.

use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, Instant};

use mayfly_tests::pki::Pki;
use mayfly_tests::postgres::{Admin, Credential, Server, Site, scalar};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::System;
use mayfly_tests::{eventually, seconds};
use serde_json::{Value, json};
use tokio_postgres::NoTls;

/// Stores the base secret of a site, with some fields of its data changed.
async fn base(system: &System, site: &Site, change: Value) {
    let mut data = site.data();
    for (name, value) in change.as_object().unwrap() {
        data[name] = value.clone();
    }
    system
        .api
        .create(
            &format!("/v1/secrets/db:{}:root", site.name),
            json!({"attributes": {"type": "postgresql"}, "data": data}),
        )
        .await;
}

fn here(server: &Server) -> String {
    format!("127.0.0.1:{}", server.port())
}

/// The same database on another server.
fn at(site: &Site, server: &Server) -> Site {
    Site {
        server: server.clone(),
        ..site.clone()
    }
}

/// The credential at one server of several.
fn credential_at(answer: &Value, server: &Server) -> Credential {
    Credential {
        host: "127.0.0.1".to_owned(),
        port: server.port(),
        ..Credential::from_answer(answer)
    }
}

/// Accepts connections by the kernel alone, and never answers.
fn black_hole() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let place = listener.local_addr().unwrap().to_string();
    (listener, place)
}

/// Primary and standby, a live lease, and the primary dies. A read in progress gets its account from the new primary,
/// and the earlier lease ends there.
#[tokio::test]
async fn a_standby_takes_over() {
    let system = System::start().await;
    let primary = Server::own("");
    let site = primary.site(Admin::CreateRole).await;
    let standby = primary.standby();
    let pool = system.pool().await;
    let _engine = system.engine(&pool).await;
    let hosts = format!("{},{}", here(&primary), here(&standby));
    base(&system, &site, json!({"host": hosts})).await;
    let path = system.secret(&site, &pool, json!({})).await;

    let answer = system.api.ok(&format!("/v1/secrets/{path}?ttl=20")).await;
    assert_eq!(answer["data"]["host"], hosts);
    let url = answer["data"]["url"].as_str().unwrap();
    assert!(
        url.contains(&format!("@{hosts}/")) && url.ends_with("?target_session_attrs=read-write"),
        "{url}"
    );
    // The URL works for libpq, and for a driver that does not use libpq.
    let printed = Command::new(primary.program("psql"))
        .args([url, "-AtXqc", "SELECT count(*) FROM items"])
        .output()
        .unwrap();
    assert_eq!(
        String::from_utf8_lossy(&printed.stdout).trim(),
        "2",
        "{printed:?}"
    );
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    assert_eq!(scalar(&client, "SELECT count(*) FROM items").await, "2");
    drop(client);

    let early = credential_at(&answer, &standby);
    let new_site = at(&site, &standby);
    eventually("the standby has the account", seconds(20), async || {
        (standby.roles(&early.username).await.len() == 1).then_some(())
    })
    .await;
    primary.kill();
    let (answer, ()) = tokio::join!(
        async { system.api.ok(&format!("/v1/secrets/{path}?ttl=5")).await },
        async {
            tokio::time::sleep(seconds(1)).await;
            standby.promote().await;
        }
    );
    let meanwhile = credential_at(&answer, &standby);
    assert!(meanwhile.login().await.is_ok());
    let url = answer["data"]["url"].as_str().unwrap();
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    assert_eq!(scalar(&client, "SELECT count(*) FROM items").await, "2");
    drop(client);
    assert!(early.login().await.is_ok(), "the account came along");
    for credential in [&meanwhile, &early] {
        system.gone(&new_site, credential, seconds(40)).await;
        system
            .lease_becomes(&credential.lease, "revoked", seconds(40))
            .await;
    }
}

/// A host that accepts connections and does not answer costs little time, once.
#[tokio::test]
async fn a_host_that_hangs_is_passed_over() {
    let (system, site, pool, _engine) = Scenario::on(Server::pg18()).start_without_secret().await;
    let (hole, nowhere) = black_hole();
    let hosts = json!([nowhere, here(&site.server)]);
    base(&system, &site, json!({"host": hosts})).await;
    let path = system.secret(&site, &pool, json!({})).await;
    let asked = Instant::now();
    let answer = system.api.ok(&format!("/v1/secrets/{path}?ttl=3")).await;
    assert!(asked.elapsed() >= seconds(2), "it was not tried");
    assert!(asked.elapsed() < seconds(20), "{:?}", asked.elapsed());
    // The engine knows now that the first host hangs. After the pause its idle connection is closed, so the next read
    // opens another.
    let tries = || std::iter::from_fn(|| hole.accept().ok()).count();
    assert!(tries() > 0, "it was not tried");
    tokio::time::sleep(Duration::from_millis(1700)).await;
    system.api.ok(&format!("/v1/secrets/{path}?ttl=3")).await;
    assert_eq!(tries(), 0, "it was tried first again");
    let credential = credential_at(&answer, &site.server);
    system.gone(&site, &credential, seconds(20)).await;
}

/// A single host that is a standby is reported as one, without a wait.
#[tokio::test]
async fn a_standby_alone_is_refused() {
    let system = System::start().await;
    let primary = Server::own("");
    let site = primary.site(Admin::CreateRole).await;
    let standby = primary.standby();
    let pool = system.pool().await;
    let _engine = system.engine(&pool).await;
    base(&system, &site, json!({"port": standby.port()})).await;
    let path = system.secret(&site, &pool, json!({})).await;
    let asked = Instant::now();
    let (status, body) = system.api.get(&format!("/v1/secrets/{path}")).await;
    assert!(asked.elapsed() < seconds(10), "{:?}", asked.elapsed());
    assert_eq!(
        (status, body["error"].as_str()),
        (502, Some("database_unreachable")),
        "{body}"
    );
    assert!(
        body["message"].as_str().unwrap().contains("is a standby"),
        "{body}"
    );
}

/// A server whose transactions are read-only by default is no standby: Mayfly's transactions state that they write.
#[tokio::test]
async fn a_default_of_read_only_transactions_is_not_taken() {
    let server = Server::own("");
    let (system, site, path, _engine) = Scenario::on(server.clone()).start().await;
    let hand = server.superuser("postgres").await;
    // This must hold for an open connection and for new connections.
    system.issue(&path, Some(1)).await;
    for statement in [
        "ALTER SYSTEM SET default_transaction_read_only = on",
        "SELECT pg_reload_conf()",
    ] {
        hand.batch_execute(statement).await.unwrap();
    }
    eventually("the default is taken", seconds(10), async || {
        let reads = scalar(&hand, "SHOW default_transaction_read_only").await;
        (reads == "on").then_some(())
    })
    .await;
    let credential = system.issue(&path, Some(2)).await;
    system.gone(&site, &credential, seconds(20)).await;
}

/// Too many connections for a short time: the read waits and succeeds.
#[tokio::test]
async fn too_many_connections_pass() {
    let deadline = ("MAYFLY__CREATE__DEADLINE_SECONDS", "10");
    let (system, site, path, engine) = Scenario::on(Server::pg15())
        .settings(&[deadline])
        .start()
        .await;
    let hand = site.server.superuser("postgres").await;
    let limit = async |n: i32| {
        hand.batch_execute(&format!("ALTER ROLE {} CONNECTION LIMIT {n}", site.name))
            .await
            .unwrap();
    };
    limit(0).await;
    let (credential, ()) = tokio::join!(system.issue(&path, Some(60)), async {
        tokio::time::sleep(seconds(1)).await;
        limit(-1).await;
    });
    assert!(credential.login().await.is_ok());
    let metrics = engine.admin_text("/metrics").await;
    let retried = metrics
        .lines()
        .find(|line| line.contains(r#"reason="connection""#))
        .unwrap();
    assert!(!retried.ends_with(" 0"), "{retried}");
    // If the server stays full, the reason is reported in time.
    limit(0).await;
    tokio::time::sleep(seconds(2)).await;
    let asked = Instant::now();
    let (status, body) = system.api.get(&format!("/v1/secrets/{path}")).await;
    assert_eq!(
        (status, body["error"].as_str()),
        (502, Some("database_unreachable")),
        "{body}"
    );
    assert!(
        body["message"]
            .as_str()
            .unwrap()
            .contains("too many connections"),
        "{body}"
    );
    assert!(asked.elapsed() < seconds(30), "{:?}", asked.elapsed());
    limit(-1).await;
}

/// `waitForReplicas`: the account works on the replica at once. A replica that lags is not waited for longer than
/// requested.
#[tokio::test]
async fn replicas_are_waited_for() {
    let system = System::start().await;
    let primary = Server::own("");
    let site = primary.site(Admin::CreateRole).await;
    let standby = primary.standby();
    let pool = system.pool().await;
    let engine = system.engine(&pool).await;
    let path = system
        .secret(&site, &pool, json!({"waitForReplicas": 4}))
        .await;
    let (status, body) = system.api.get(&format!("/v1/secrets/{path}")).await;
    assert_eq!(
        (status, body["error"].as_str()),
        (422, Some("admin_lacks_rights")),
        "{body}"
    );
    let fix = format!("GRANT pg_monitor TO {}", site.name);
    assert!(body["message"].as_str().unwrap().contains(&fix), "{body}");
    let hand = primary.superuser("postgres").await;
    hand.batch_execute(&fix).await.unwrap();
    eventually("the standby streams", seconds(20), async || {
        let streaming = scalar(
            &hand,
            "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming' AND replay_lsn IS NOT NULL",
        )
        .await;
        (streaming == "1").then_some(())
    })
    .await;
    for _ in 0..10 {
        let answer = system.api.ok(&format!("/v1/secrets/{path}")).await;
        let replica = credential_at(&answer, &standby);
        assert!(replica.login().await.is_ok(), "not on the replica yet");
    }
    let lagged = async || {
        let metrics = engine.admin_text("/metrics").await;
        let line = metrics
            .lines()
            .find(|line| line.contains(r#"reason="replica_lag""#))
            .unwrap()
            .to_owned();
        line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()
    };
    assert_eq!(lagged().await, 0);
    let reader = standby.superuser("postgres").await;
    reader
        .batch_execute("SELECT pg_wal_replay_pause()")
        .await
        .unwrap();
    eventually("replay stands still", seconds(10), async || {
        let state = scalar(&reader, "SELECT pg_get_wal_replay_pause_state()").await;
        (state == "paused").then_some(())
    })
    .await;
    let asked = Instant::now();
    let answer = system.api.ok(&format!("/v1/secrets/{path}")).await;
    assert!(asked.elapsed() >= seconds(4), "{:?}", asked.elapsed());
    assert!(asked.elapsed() < seconds(20), "{:?}", asked.elapsed());
    assert!(Credential::from_answer(&answer).login().await.is_ok());
    assert!(credential_at(&answer, &standby).login().await.is_err());
    assert_eq!(lagged().await, 1);
    reader
        .batch_execute("SELECT pg_wal_replay_resume()")
        .await
        .unwrap();
}

/// A `cert` line in pg_hba.conf: the admin logs in by `sslcert` and `sslkey`, checked by the server
/// against its root, and checks the server's name itself.
#[tokio::test]
async fn the_admin_may_have_a_certificate() {
    let system = System::start().await;
    let server = Server::own("");
    let site = server.site(Admin::CreateRole).await;
    let pki = Pki::new();
    for (name, subject) in [("admin", site.name.as_str()), ("other", "somebody")] {
        pki.certificate(name, subject, None);
    }
    pki.certificate("server", "server", Some("IP:127.0.0.1"));
    let data = server.directory().join("data");
    pki.install(&server);
    let clients = data.join("clients.crt");
    std::fs::copy(pki.file("root.crt"), &clients).unwrap();
    // The server's user must be able to read the file.
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    std::fs::set_permissions(&clients, mode).unwrap();
    let hba = data.join("pg_hba.conf");
    let lines = std::fs::read_to_string(&hba).unwrap();
    let line = format!("hostssl all {} 127.0.0.1/32 cert\n", site.name);
    std::fs::write(&hba, line + &lines).unwrap();
    let hand = server.superuser("postgres").await;
    hand.batch_execute("ALTER SYSTEM SET ssl_ca_file = 'clients.crt'")
        .await
        .unwrap();
    hand.batch_execute("SELECT pg_reload_conf()").await.unwrap();

    let pool = system.pool().await;
    let _engine = system.engine(&pool).await;
    let text = |name: &str| pki.text(name);
    let server_root = text("root.crt");
    let with = |certificate: &str, key: &str| {
        json!({"sslmode": "verify-full", "sslrootcert": server_root,
               "sslcert": text(certificate), "sslkey": text(key), "password": "not needed"})
    };
    base(&system, &site, with("admin.crt", "admin.key")).await;
    let path = system.secret(&site, &pool, json!({})).await;
    let credential = system.issue(&path, Some(2)).await;
    assert!(credential.login().await.is_ok());
    system.gone(&site, &credential, seconds(20)).await;

    let other = async |data: Value| {
        let (status, body) = system
            .api
            .put(
                &format!("/v1/secrets/db:{}:root", site.name),
                json!({"data": data}),
            )
            .await;
        assert_eq!(status, 200, "{body}");
        let (status, body) = system.api.get(&format!("/v1/secrets/{path}")).await;
        assert_eq!(status, 502, "{body}");
        (
            body["error"].as_str().unwrap().to_owned(),
            body["message"].as_str().unwrap().to_owned(),
        )
    };
    for certificate in ["admin.crt", "root.crt"] {
        let (_, said) = other(with(certificate, "other.key")).await;
        assert!(
            said.contains("sslkey is not the key of the first certificate in sslcert"),
            "{said}"
        );
    }
    let (_, said) = other(with("admin.crt", "admin.crt")).await;
    assert!(said.contains("sslkey is not a PEM private key"), "{said}");
    let (_, said) = other(with("root.key", "admin.key")).await;
    assert!(said.contains("sslcert has no PEM certificate"), "{said}");
    // A certificate of another authority: the server refuses it.
    let (code, said) = other(with("other.crt", "other.key")).await;
    assert_eq!(code, "database_refused_login", "{said}");
    // Each host's certificate must have its own name: this one has the address only.
    let mut named = with("admin.crt", "admin.key");
    named["host"] = json!("localhost");
    let (_, said) = other(named.clone()).await;
    assert!(said.contains("not valid for name"), "{said}");
    named["host"] = json!("localhost,127.0.0.1");
    let (status, body) = system
        .api
        .put(
            &format!("/v1/secrets/db:{}:root", site.name),
            json!({"data": named}),
        )
        .await;
    assert_eq!(status, 200, "{body}");
    system.api.ok(&format!("/v1/secrets/{path}?ttl=1")).await;

    let (_, said) = other(json!({"sslcert": null, "sslkey": null})).await;
    assert!(said.contains("certificate"), "{said}");
}
