//! `mayfly proxy`: programs that know nothing of Mayfly use the account of a lease.

use std::io::Cursor;
use std::process::Command;

use futures_util::{SinkExt, StreamExt, pin_mut};
use mayfly_tests::cli::Cli;
use mayfly_tests::local_proxy::{LocalProxy, RawClient, connect, startup};
use mayfly_tests::postgres::{Server, scalar, sqlstate};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::prefix;
use mayfly_tests::{eventually, run_dir, seconds, word};
use rustix::process::Signal;
use serde_json::json;
use tokio_postgres::{AsyncMessage, NoTls};

fn has(answer: &[u8], state: &str) -> bool {
    answer.first() == Some(&b'E') && String::from_utf8_lossy(answer).contains(state)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_knows_nothing() {
    let (system, site, path, _engine) = Scenario::on(Server::pg18())
        .attributes(json!({"grantPermissions": [{"what": "ALL", "where": "*.*"}]}))
        .start()
        .await;
    let root = site.server.superuser(&site.name).await;
    let admin = site.admin().await;
    admin
        .batch_execute("CREATE TABLE things (n int); INSERT INTO things VALUES (1)")
        .await
        .unwrap();
    let proxy = LocalProxy::start(&system, &path, &[]).await;
    let client = proxy.client().await;
    let user = scalar(&client, "SELECT current_user").await;
    assert!(user.starts_with(&prefix(&site)), "{user}");
    assert_eq!(
        scalar(&client, "SELECT current_database()").await,
        site.name
    );

    // This covers the extended protocol, COPY both ways, and rows that are larger than a chunk.
    let rows = client
        .query(
            "SELECT repeat('x', 1000000) FROM generate_series(1, $1)",
            &[&3_i32],
        )
        .await
        .unwrap();
    assert_eq!(rows[2].get::<_, String>(0).len(), 1_000_000);
    let sink = client
        .copy_in::<_, Cursor<Vec<u8>>>("COPY things FROM STDIN")
        .await
        .unwrap();
    pin_mut!(sink);
    for _ in 0..50 {
        sink.send(Cursor::new(b"7\n".repeat(1000))).await.unwrap();
    }
    assert_eq!(sink.finish().await.unwrap(), 50_000);
    let out = client.copy_out("COPY things TO STDOUT").await.unwrap();
    let bytes: Vec<_> = out.map(|chunk| chunk.unwrap().len()).collect().await;
    assert_eq!(bytes.iter().sum::<usize>(), 2 + 2 * 50_000);
    // Requests of a pipeline are answered in order.
    let pipelined = (0..200_i32).map(|n| {
        let client = &client;
        async move { client.query_one("SELECT $1::int4", &[&n]).await }
    });
    let pipelined = futures_util::future::join_all(pipelined);
    let pipelined = pipelined
        .await
        .into_iter()
        .map(|row| row.unwrap().get::<_, i32>(0));
    assert!(pipelined.eq(0..200_i32));

    // The request is cancelled, and no other request.
    let cancel = client.cancel_token();
    let (state, ()) = tokio::join!(sqlstate(&client, "SELECT pg_sleep(60)"), async {
        eventually("it sleeps", seconds(10), async || {
            let busy = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(60)' AND state = 'active' AND datname = current_database() AND usename = ";
            (scalar(&root, &format!("{busy}'{user}'")).await == "1").then_some(())
        })
        .await;
        cancel.cancel_query(NoTls).await.unwrap();
    });
    assert_eq!(state, "57014");
    assert_eq!(scalar(&client, "SELECT 1").await, "1");

    // A notification is a message that is no answer.
    let (listener, mut connection) = proxy.config().connect(NoTls).await.unwrap();
    let (sender, mut heard) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut messages = futures_util::stream::poll_fn(move |cx| connection.poll_message(cx));
        while let Some(Ok(message)) = messages.next().await {
            let _ = sender.send(message);
        }
    });
    listener.batch_execute("LISTEN news").await.unwrap();
    client.batch_execute("NOTIFY news, 'hello'").await.unwrap();
    let message = tokio::time::timeout(seconds(30), heard.recv())
        .await
        .unwrap();
    let Some(AsyncMessage::Notification(note)) = message else {
        panic!("{message:?}");
    };
    assert_eq!(note.payload(), "hello");
    assert!(proxy.metric("mayfly_proxy_connections{").await >= 2.0);

    // After SIGTERM the idle sessions end, then the account, and the process ends with 0.
    proxy.process.signal(Signal::TERM);
    eventually("the proxy ends", seconds(15), async || {
        (!proxy.process.is_alive()).then_some(())
    })
    .await;
    site.no_accounts(seconds(15)).await;
    assert!(client.is_closed());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_says_why() {
    let (mut system, site, path, _engine) = Scenario::on(Server::pg15()).start().await;
    let cli = Cli { system: &system };
    let said = cli.fails(2, &["proxy", &path, "--listen", "0.0.0.0:0"]);
    assert!(said.contains("--client-password-file"), "{said}");
    cli.fails(3, &["proxy", "no:such", "--listen", "127.0.0.1:0"]);

    let password = run_dir().join(format!("password-{}", word()));
    std::fs::write(&password, "correct-horse-battery\n").unwrap();
    let file = password.to_str().unwrap();
    let arguments = ["--listen", "0.0.0.0:0", "--client-password-file", file];
    let guarded = LocalProxy::start(&system, &path, &arguments).await;
    for (password, state) in [
        ("", Some("28P01")),
        ("wrong", Some("28P01")),
        ("correct-horse-battery", None),
    ] {
        let result = connect(guarded.config().password(password)).await;
        let found = result.as_ref().err().map(|error| {
            let code = error.code().map(|code| code.code().to_owned());
            // A driver that sends no password is refused.
            code.unwrap_or_else(|| "28P01".to_owned())
        });
        assert_eq!(found.as_deref(), state, "{password}: {:?}", result.err());
    }

    let proxy = LocalProxy::start(&system, &path, &[]).await;
    let soon = seconds(60);
    for (packet, state) in [
        (
            startup(0x3_0000, &[("user", "u"), ("replication", "database")]),
            "0A000",
        ),
        (
            startup(0x3_0000, &[("user", "u"), ("database", "postgres")]),
            "3D000",
        ),
        (startup(0x2_0000, &[]), "0A000"),
    ] {
        let answer = proxy.says_to(&packet, soon).await;
        assert!(has(&answer, state), "{state}: {answer:?}");
    }
    // Requests for TLS and GSSAPI are answered with N. Then a malformed length and an unknown key follow.
    let ssl = [0, 0, 0, 8, 4, 210, 22, 47];
    let gss = [0, 0, 0, 8, 4, 210, 22, 48];
    let unknown = [0, 0, 0, 16, 4, 210, 22, 46, 1, 2, 3, 4, 5, 6, 7, 8];
    assert_eq!(
        proxy.says_to(&[ssl, gss, [255; 8]].concat(), soon).await,
        b"NN"
    );
    assert_eq!(proxy.says_to(&unknown, soon).await, b"");
    assert_eq!(proxy.says_to(b"GET / HTTP/1.1\r\n\r\n", soon).await, b"");
    // A client that sends nothing, or half of a packet, is closed.
    let half = &startup(0x3_0000, &[("user", "u")])[..9];
    let (silent, slow) = tokio::join!(proxy.says_to(b"", soon), proxy.says_to(half, soon));
    assert!(silent.is_empty() && slow.is_empty());
    assert!(proxy.client().await.simple_query("SELECT 1").await.is_ok());

    // The dispatcher is unreachable. New sessions begin, because the lease lives. A new proxy has no lease, and
    // reports that.
    system.kill_dispatcher();
    assert_eq!(scalar(&proxy.client().await, "SELECT 1").await, "1");
    let late = LocalProxy::unready(&system, &path, &[]).await;
    assert!(late.page("/readyz").await.unwrap().contains("no lease"));
    let refused = late.try_client().await.err().unwrap();
    assert_eq!(refused.code().unwrap().code(), "57P03", "{refused:?}");
    system.start_dispatcher().await;
    late.ready().await;
    assert_eq!(scalar(&late.client().await, "SELECT 1").await, "1");
    drop(site);
}

/// The login is bound to TLS if the base secret says so, and a client of protocol 3.2 gets its long key.
#[tokio::test(flavor = "multi_thread")]
async fn the_server_is_reached_as_the_secret_says() {
    let (system, site, path, _engine) = Scenario::on(Server::pg18()).start().await;
    let mut data = site.data();
    data["sslmode"] = "require".into();
    let base = format!("/v1/secrets/db:{}:root", site.name);
    let (status, body) = system.api.put(&base, json!({"data": data})).await;
    assert_eq!(status, 200, "{body}");
    let shown = system
        .api
        .ok(&format!("/v1/secrets/{path}::connection"))
        .await;
    assert_eq!(shown["sslmode"], "require");
    assert!(shown.get("password").is_none() && !shown.to_string().contains(&site.name));
    let (status, _) = system.api.get(&format!("{base}::connection")).await;
    assert_eq!(status, 400);
    system.leases_left(0).await;

    let proxy = LocalProxy::start(&system, &path, &[]).await;
    let client = proxy.client().await;
    let tls = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    assert_eq!(scalar(&client, tls).await, "t");

    let mut session = RawClient::new(&proxy, 0x3_0002).await;
    assert_eq!(session.key.len(), 4 + 32, "the key of protocol 3.2");
    session.query("SELECT pg_sleep(120)").await;
    let root = site.server.superuser(&site.name).await;
    eventually("it sleeps", seconds(10), async || {
        let busy = "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(120)' AND state = 'active' AND wait_event = 'PgSleep' AND datname = current_database()";
        (scalar(&root, busy).await == "1").then_some(())
    })
    .await;
    let mut cancel = vec![4, 210, 22, 46];
    cancel.extend_from_slice(&session.key);
    let length = u32::try_from(cancel.len() + 4).unwrap();
    let cancel = [&length.to_be_bytes()[..], &cancel].concat();
    assert_eq!(proxy.says_to(&cancel, seconds(60)).await, b"");
    assert!(session.until(b'E').await.contains("57014"));
}

/// The sidecar of a job: the command's variables, its exit status, and the end of its account.
#[tokio::test(flavor = "multi_thread")]
async fn a_command_gets_its_server() {
    let (system, site, path, _engine) = Scenario::on(Server::pg18()).start().await;
    let cli = Cli { system: &system };
    let directory = run_dir().join(format!("s{}", word()));
    let listen = format!("unix:{}", directory.display());
    let psql = site.server.program("psql");
    let run = |script: &str| {
        let script = script.replace("PSQL", psql.to_str().unwrap());
        let mut command: Command = cli.command(&["proxy", &path, "--listen", &listen, "--"]);
        command.args(["sh", "-c", &script]);
        command.output().unwrap()
    };
    let output = run(
        "echo $PGHOST:$PGPORT/$PGDATABASE; PSQL -XAtc 'SELECT current_user'; PSQL -XAt \"$DATABASE_URL\" -c 'SELECT 1'; exit 7",
    );
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    let mut lines = said.lines();
    let expected = format!("{}:5432/{}", directory.display(), site.name);
    assert_eq!(lines.next(), Some(expected.as_str()));
    let user = lines.next().unwrap();
    assert!(user.starts_with(&prefix(&site)), "{said}");
    assert_eq!(lines.next(), Some("1"), "{output:?}");
    site.no_accounts(seconds(15)).await;
    assert!(!directory.join(".s.PGSQL.5432").exists());
    let output = run("test -z \"$MAYFLY_TOKEN\" && kill -9 $$");
    assert_eq!(output.status.code(), Some(137), "{output:?}");
}
