//! `mayfly proxy --hold`: a session gets the next account under its client. One with something that cannot be made
//! again keeps its account, and is cut at the end of it.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::future::join_all;
use mayfly_tests::local_proxy::{LocalProxy, RawClient, connect};
use mayfly_tests::postgres::{Server, scalar, sqlstate};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::{eventually, seconds, word};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tokio_postgres::NoTls;

/// A message that comes at the end of a lease.
const UP_TO_THE_END: Duration = seconds(120);

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_cannot_connect_again_lives_over_leases() {
    let (system, site, path, _engine) = Scenario::on(Server::pg18())
        .attributes(json!({"ttl": 12, "maxTtl": 12}))
        .start()
        .await;
    let proxy = LocalProxy::start(&system, &path, &["--hold"]).await;
    let client = proxy.client().await;
    let statement = client
        .prepare("SELECT current_user::text, $1::int4 + 1")
        .await
        .unwrap();
    // This session has a setting, which the server lists, and a statement without a name.
    let mut raw = RawClient::new(&proxy, 0x3_0002).await;
    raw.query("SELECT set_config('work_mem', '77kB', false)")
        .await;
    raw.until(b'Z').await;
    // The session's cancel key is the proxy's own. A key of the server is for a session with one account.
    raw.query("SELECT pg_backend_pid()").await;
    let at_server = raw.until(b'D').await;
    raw.until(b'Z').await;
    let known = u32::from_be_bytes(raw.key[..4].try_into().unwrap());
    assert!(!at_server.contains(&known.to_string()), "{known}");
    raw.prepare_unnamed("SELECT current_user || ' has ' || current_setting('work_mem')")
        .await;
    let first = raw.execute_unnamed().await;
    assert!(first.contains(" has 77kB"), "{first}");

    // Requests follow each other, inside of transactions and outside.
    let mut users = BTreeSet::new();
    let mut turn = 0;
    eventually(
        "the session has had four accounts",
        seconds(40),
        async || {
            turn += 1;
            if turn % 2 == 0 {
                client.batch_execute("BEGIN").await.unwrap();
            }
            let row = client.query_one(&statement, &[&turn]).await.unwrap();
            assert_eq!(row.get::<_, i32>(1), turn + 1);
            if turn % 2 == 0 {
                client.batch_execute("COMMIT").await.unwrap();
            }
            users.insert(row.get::<_, String>(0));
            (users.len() >= 4).then_some(())
        },
    )
    .await;

    // The session that was idle all the time has another account too. It learns that with its next answer.
    raw.send(b'B', &[0; 8]).await;
    raw.send(b'E', &[0; 5]).await;
    raw.send(b'S', b"").await;
    let parameter = raw.until(b'S').await;
    let answer = raw.until(b'D').await;
    raw.until(b'Z').await;
    let (name, user) = parameter.trim_end_matches('\0').split_once('\0').unwrap();
    assert_eq!(name, "session_authorization");
    assert!(
        answer.contains(&format!("{user} has 77kB")),
        "{answer} {user}"
    );
    assert!(!first.contains(user), "{first}");

    // A cancel request with the key of the start ends the request of this session only.
    let bystander = proxy.client().await;
    let sleeping = async |number: &str| {
        // The admin does not see what sessions of accounts do.
        let root = site.server.superuser(&site.name).await;
        let busy = "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(300)' AND state = 'active' AND datname = current_database()";
        eventually("they sleep", seconds(10), async || {
            (scalar(&root, busy).await == number).then_some(())
        })
        .await;
    };
    let cancel = client.cancel_token();
    let slept = bystander.simple_query("SELECT pg_sleep(300)");
    let slept = std::pin::pin!(slept);
    let cancelled = async {
        let (state, ()) = tokio::join!(sqlstate(&client, "SELECT pg_sleep(300)"), async {
            sleeping("2").await;
            cancel.cancel_query(NoTls).await.unwrap();
        });
        state
    };
    let state = tokio::select! {
        state = cancelled => state,
        _ = slept => panic!("another session was cancelled"),
    };
    assert_eq!(state, "57014");
    sleeping("1").await;
    assert_eq!(scalar(&client, "SELECT 1").await, "1");
    for metric in ["mayfly_proxy_moved_total", "mayfly_proxy_cut_total"] {
        assert_eq!(proxy.metric(metric).await, 0.0, "{metric}");
    }
    assert!(proxy.metric("mayfly_proxy_swapped_total").await >= 6.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_made_again_keeps_its_account_to_the_end() {
    let (system, _site, path, _engine) = Scenario::on(Server::pg15())
        .attributes(json!({"ttl": 30, "maxTtl": 30}))
        .start()
        .await;
    let proxy = LocalProxy::start(&system, &path, &["--hold"]).await;
    let mut kept = Vec::new();
    for (sql, what) in [
        ("SET app.tenant = '5'", "used SET"),
        ("CREATE TEMP TABLE mine (n int)", "had a temporary table"),
        (
            "CREATE TYPE pg_temp.mine AS ENUM ('a')",
            "had a temporary type",
        ),
        (
            "CREATE FUNCTION pg_temp.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
            "had a temporary function",
        ),
        ("SELECT pg_advisory_lock(1)", "had an advisory lock"),
        ("PREPARE mine AS SELECT 1", "had a statement of PREPARE"),
        (
            "BEGIN; DECLARE mine CURSOR WITH HOLD FOR SELECT 1; COMMIT",
            "had a cursor",
        ),
        ("LISTEN news", "had a LISTEN"),
        // By its command tags alone the session would have no LISTEN.
        ("LISTEN news; UNLISTEN others", "had a LISTEN"),
        ("BEGIN", "a transaction was open"),
    ] {
        let mut client = RawClient::new(&proxy, 0x3_0000).await;
        client.query(sql).await;
        client.until(b'Z').await;
        kept.push((client, what));
    }
    // By its command tags alone this session has no cursor: it closes a portal of the protocol.
    let mut cursor = RawClient::new(&proxy, 0x3_0000).await;
    cursor
        .query("BEGIN; DECLARE mine CURSOR WITH HOLD FOR SELECT 1")
        .await;
    cursor.until(b'Z').await;
    cursor.prepare_unnamed("SELECT 2").await;
    cursor.send(b'B', b"other\0\0\0\0\0\0\0\0").await;
    cursor.send(b'S', b"").await;
    cursor.until(b'Z').await;
    cursor.query("CLOSE other; COMMIT").await;
    cursor.until(b'Z').await;
    kept.push((cursor, "had a cursor"));
    let mut long = RawClient::new(&proxy, 0x3_0000).await;
    long.prepare_unnamed(&format!("SELECT '{}'", "x".repeat(20_000)))
        .await;
    kept.push((long, "had a long unnamed prepared statement"));
    // The following sessions end their state before the end of the lease.
    let locked = proxy.client().await;
    let user = scalar(&locked, "SELECT current_user").await;
    scalar(&locked, "SELECT pg_advisory_lock(2)").await;
    let set = proxy.client().await;
    set.batch_execute("SET app.tenant = '5'").await.unwrap();

    eventually("there is a second account", seconds(60), async || {
        (proxy.metric("mayfly_proxy_leases_total").await >= 2.0).then_some(())
    })
    .await;
    assert_eq!(scalar(&locked, "SELECT pg_advisory_unlock(2)").await, "t");
    set.batch_execute("DISCARD ALL").await.unwrap();
    for free in [&locked, &set] {
        eventually("it has the second account", seconds(10), async || {
            (scalar(free, "SELECT current_user").await != user).then_some(())
        })
        .await;
    }
    let count = kept.len();
    let cut = kept.into_iter().map(async |(mut client, what)| {
        let said = tokio::time::timeout(UP_TO_THE_END, client.until(b'E')).await;
        let said = said.unwrap_or_else(|_| "nothing".to_owned());
        let is_right = said.contains("57P01")
            && said.contains(what)
            && said.contains("the lease of its account ends in 1 s");
        (!is_right).then(|| format!("the session that {what} was sent {said}"))
    });
    let wrong: Vec<_> = join_all(cut).await.into_iter().flatten().collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // A session is counted after its client was sent the reason.
    eventually("all are counted", seconds(10), async || {
        let cut = proxy.metric("mayfly_proxy_cut_total").await as usize;
        (cut == count).then_some(())
    })
    .await;
    assert!(proxy.metric("mayfly_proxy_swapped_total").await >= 2.0);
}

/// A program gives privileges up for its session, by a function, without the tag of SET. Its next account must not give
/// them back.
#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_a_function_has_set_stays() {
    let (system, site, path, _engine) = Scenario::on(Server::pg15())
        .attributes(json!({"ttl": 12, "maxTtl": 12}))
        .start()
        .await;
    let proxy = LocalProxy::start(&system, &path, &["--hold"]).await;
    let client = proxy.client().await;
    let account = scalar(&client, "SELECT session_user").await;
    let root = site.server.superuser(&site.name).await;
    // A role that every account of the secret may set, as a member of the same grant role.
    let low = format!("low_{}", word());
    let shared = scalar(
        &root,
        &format!(
            "SELECT m.roleid::regrole FROM pg_auth_members m WHERE m.member = '{account}'::regrole"
        ),
    )
    .await;
    root.batch_execute(&format!("CREATE ROLE {low}; GRANT {low} TO {shared}"))
        .await
        .unwrap();
    let by_function = [
        format!("SELECT set_config('role', '{low}', false)"),
        format!("DO $$ BEGIN EXECUTE 'SET ROLE {low}'; END $$"),
    ];
    let mut held = Vec::new();
    for sql in by_function {
        let client = proxy.client().await;
        client.batch_execute(&sql).await.unwrap();
        held.push(client);
    }
    // This session has the role of its own account. A session with the next account could not set that role.
    let own = proxy.client().await;
    own.batch_execute("SELECT set_config('role', session_user::text, false)")
        .await
        .unwrap();
    held.push(client);
    for (n, client) in held.iter().chain([&own]).enumerate() {
        eventually("it has another account", seconds(60), async || {
            (scalar(client, "SELECT session_user").await != account).then_some(())
        })
        .await;
        let user = scalar(client, "SELECT current_user").await;
        match n {
            0 | 1 => assert_eq!(user, low, "{n}"),
            _ => assert_eq!(user, scalar(client, "SELECT session_user").await),
        }
    }
    root.batch_execute(&format!("DROP ROLE {low}"))
        .await
        .unwrap();
}

/// A user may delay the logins of sessions of its own, also those with the next account. The sessions of others do not
/// wait for them.
#[tokio::test(flavor = "multi_thread")]
async fn slow_logins_keep_nobody_from_the_next_account() {
    let (system, _site, path, _engine) = Scenario::on(Server::pg15())
        .attributes(json!({"ttl": 36, "maxTtl": 36}))
        .start()
        .await;
    let proxy = LocalProxy::start(&system, &path, &["--hold"]).await;
    let mut config = proxy.config();
    config.options("-c post_auth_delay=13");
    let client = proxy.client().await;
    let account = scalar(&client, "SELECT session_user").await;
    // This is the number of logins that may be in progress with the next account.
    let slow = join_all((0..8).map(|_| connect(&config))).await;
    assert!(slow.iter().all(Result::is_ok));
    // The session becomes idle when the others are in their logins.
    client.batch_execute("BEGIN").await.unwrap();
    eventually("there is a second account", seconds(60), async || {
        (proxy.metric("mayfly_proxy_leases_total").await >= 2.0).then_some(())
    })
    .await;
    tokio::time::sleep(seconds(1)).await;
    client.batch_execute("COMMIT").await.unwrap();
    eventually("it has the second account", seconds(20), async || {
        (scalar(&client, "SELECT session_user").await != account).then_some(())
    })
    .await;
}

/// The server of the present account is asked what the session has. If it does not answer, the client learns why its
/// session ends, and connects again.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_whose_server_does_not_answer_is_asked_to_connect_again() {
    // Other tests must not wait for a process that is stopped.
    let (system, _site, path, _engine) = Scenario::on(Server::own(""))
        .attributes(json!({"ttl": 30, "maxTtl": 30}))
        .start()
        .await;
    let proxy = LocalProxy::start(&system, &path, &["--hold"]).await;
    let mut client = RawClient::new(&proxy, 0x3_0000).await;
    client.query("SELECT pg_backend_pid()").await;
    let row = client.until(b'D').await;
    client.until(b'Z').await;
    let pid: i32 = row
        .trim_matches(|character: char| !character.is_ascii_digit())
        .parse()
        .unwrap();
    let pid = Pid::from_raw(pid).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    let said = tokio::time::timeout(UP_TO_THE_END, client.until(b'E')).await;
    kill_process(pid, Signal::CONT).unwrap();
    let said = said.unwrap();
    let expected = "the server of the earlier account did not answer in time";
    assert!(said.contains("57P01") && said.contains(expected), "{said}");
    assert_eq!(scalar(&proxy.client().await, "SELECT 1").await, "1");
}
