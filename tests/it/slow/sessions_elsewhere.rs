//! Sessions that an end could miss: a login in progress, and sessions on standbys.

use mayfly_tests::postgres::{Admin, Credential, Server, Site, scalar};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::System;
use mayfly_tests::{eventually, seconds};
use serde_json::json;
use tokio_postgres::{Client, NoTls};

/// Logs in so that the server waits for this time after it has checked the password.
async fn slow_login(account: &Credential, seconds: u32) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::Config::new()
        .host(&account.host)
        .port(account.port)
        .user(&account.username)
        .password(&account.password)
        .dbname(&account.database)
        .options(format!("-c post_auth_delay={seconds}"))
        .connect(NoTls)
        .await?;
    tokio::spawn(async move {
        let _ = connection.await;
    });
    Ok(client)
}

async fn a_login_under_way_does_not_outlive_its_account(server: Server, admin: Admin) {
    let (system, site, path, _engine) = Scenario::on(server.clone()).admin(admin).start().await;
    let (account, other) = (
        system.issue(&path, None).await,
        system.issue(&path, None).await,
    );
    let slow = account.clone();
    let login = tokio::spawn(async move { slow_login(&slow, 40).await });
    // A session of another role is not touched.
    let theirs = tokio::spawn(async move { slow_login(&other, 10).await });
    let root = server.superuser(&site.name).await;
    let under_way = "SELECT count(*) FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid \
        WHERE l.locktype = 'virtualxid' AND (a.pid IS NULL OR a.usesysid IS NULL AND a.backend_type = 'client backend')";
    eventually("the logins are in progress", seconds(20), async || {
        let count: u32 = scalar(&root, under_way).await.parse().unwrap();
        (count >= 2).then_some(())
    })
    .await;
    let (status, _) = system
        .api
        .delete(&format!("/v1/leases/{}", account.lease))
        .await;
    assert!(status < 300);
    system.gone(&site, &account, seconds(25)).await;
    if let Ok(client) = login.await.unwrap() {
        let answer = client.simple_query("SELECT count(*) FROM items").await;
        assert!(answer.is_err(), "a session of an account that is gone");
    }
    let theirs = theirs.await.unwrap().unwrap();
    assert_eq!(scalar(&theirs, "SELECT count(*) FROM items").await, "2");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_under_way_does_not_outlive_its_account_on_15() {
    a_login_under_way_does_not_outlive_its_account(Server::pg15(), Admin::Superuser).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_under_way_does_not_outlive_its_account_on_18() {
    a_login_under_way_does_not_outlive_its_account(Server::pg18(), Admin::CreateRole).await;
}

fn at(account: &Credential, server: &Server) -> Credential {
    Credential {
        host: "127.0.0.1".to_owned(),
        port: server.port(),
        ..account.clone()
    }
}

/// Issues an account and logs in with it at the standby, when the standby has it.
async fn session_at(system: &System, path: &str, standby: &Server) -> (Credential, Client) {
    let answer = system.api.ok(&format!("/v1/secrets/{path}")).await;
    let account = at(&Credential::from_answer(&answer), standby);
    let client = eventually("the standby has the account", seconds(20), async || {
        account.login().await.ok()
    })
    .await;
    let open = "BEGIN; DECLARE c CURSOR FOR SELECT n FROM generate_series(1, 1000000) n";
    client.batch_execute(open).await.unwrap();
    (account, client)
}

async fn goes_on(client: &Client) -> bool {
    client.simple_query("FETCH 1 FROM c").await.is_ok()
}

async fn revoke(system: &System, site: &Site, account: &Credential) {
    let (status, _) = system
        .api
        .delete(&format!("/v1/leases/{}", account.lease))
        .await;
    assert!(status < 300);
    eventually("the account is gone", seconds(20), async || {
        let roles = site.server.roles(&account.username).await;
        roles.is_empty().then_some(())
    })
    .await;
}

async fn sessions_on_standbys_end(primary: Server, admin: Admin) {
    let system = System::start().await;
    let site = primary.site(admin).await;
    let standby = primary.standby();
    let pool = system.pool().await;
    let _engine = system.engine(&pool).await;
    let mut data = site.data();
    let (one, other) = (primary.port(), standby.port());
    data["host"] = json!(format!("127.0.0.1:{one},127.0.0.1:{other}"));
    let base = format!("/v1/secrets/db:{}:root", site.name);
    let body = json!({"attributes": {"type": "postgresql"}, "data": data});
    system.api.create(&base, body).await;
    let path = system.secret(&site, &pool, json!({})).await;

    let (account, session) = session_at(&system, &path, &standby).await;
    assert!(goes_on(&session).await);
    revoke(&system, &site, &account).await;
    eventually("its session on the standby ends", seconds(20), async || {
        (!goes_on(&session).await).then_some(())
    })
    .await;
    eventually("it is refused there", seconds(20), async || {
        account.is_refused().await.then_some(())
    })
    .await;
    if admin == Admin::CreateRole {
        return;
    }

    // A standby that lags behind delays nothing, and is looked at again.
    let (account, session) = session_at(&system, &path, &standby).await;
    let there = standby.superuser("postgres").await;
    scalar(&there, "SELECT pg_wal_replay_pause()").await;
    revoke(&system, &site, &account).await;
    eventually("its session ends all the same", seconds(20), async || {
        (!goes_on(&session).await).then_some(())
    })
    .await;
    let late = account.login().await.unwrap();
    scalar(&there, "SELECT pg_wal_replay_resume()").await;
    eventually("the late one ends, too", seconds(40), async || {
        late.simple_query("SELECT 1").await.is_err().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_on_standbys_end_on_15() {
    sessions_on_standbys_end(Server::own(""), Admin::Superuser).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_on_standbys_end_on_18() {
    sessions_on_standbys_end(Server::own_of(Some("18"), ""), Admin::CreateRole).await;
}
