//! One account that is hard to end: its neighbours end in time, and the obstacle is named.

use std::time::Instant;

use mayfly_tests::postgres::{Admin, Credential, Server, Site, scalar};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::System;
use mayfly_tests::{eventually, run_dir, seconds, word};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::chaos::faults::arm;

/// A database of the site's admin, and the path of a secret whose accounts may make tables there.
async fn beside(system: &System, site: &Site, pool: &str, name: &str) -> (String, String) {
    let database = format!("{name}_{}", word());
    let root = site.server.superuser("postgres").await;
    let create = format!("CREATE DATABASE {database} OWNER {}", site.name);
    root.batch_execute(&create).await.unwrap();
    let attributes = json!({"database": database,
        "grantPermissions": {"what": "CREATE", "where": "schema:public"}});
    let path = system.secret(site, pool, attributes).await;
    (database, path)
}

/// An account that owns a table in that database.
async fn owner(system: &System, path: &str) -> Credential {
    let account = system.issue(path, None).await;
    let client = account.login().await.unwrap();
    client
        .batch_execute("CREATE TABLE public.owned ()")
        .await
        .unwrap();
    account
}

/// A process that is stopped for a while.
struct Stopped(Pid);

impl Stopped {
    fn now(process: Pid) -> Self {
        kill_process(process, Signal::STOP).unwrap();
        Self(process)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::CONT);
    }
}

/// Waits until the role is gone.
async fn ends(site: &Site, account: &Credential, within: u64) {
    let what = format!("role {} is gone", account.username);
    eventually(&what, seconds(within), async || {
        let roles = site.server.roles(&account.username).await;
        roles.is_empty().then_some(())
    })
    .await;
}

async fn neighbours_do_not_wait(server: Server, admin: Admin) {
    let (system, site, pool, _engine) = Scenario::on(server.clone())
        .admin(admin)
        .start_without_secret()
        .await;
    let root = server.superuser("postgres").await;

    // An open transaction holds the row of the first account.
    let path = system.secret(&site, &pool, json!({})).await;
    let locked = system.issue(&path, None).await;
    let holder = server.superuser("postgres").await;
    let hold = format!(
        "BEGIN; ALTER ROLE \"{}\" CONNECTION LIMIT 3",
        locked.username
    );
    holder.batch_execute(&hold).await.unwrap();
    let holder_pid = scalar(&holder, "SELECT pg_backend_pid()").await;
    // A process of the second account does not end.
    let stopped = system.issue(&path, None).await;
    let session = stopped.login().await.unwrap();
    let stopped_pid = scalar(&session, "SELECT pg_backend_pid()").await;
    let process = Pid::from_raw(stopped_pid.parse().unwrap()).unwrap();
    let stop = Stopped::now(process);
    // One database allows no connection, and in another every login waits.
    let (shut, shut_path) = beside(&system, &site, &pool, "shut").await;
    let in_shut = owner(&system, &shut_path).await;
    let (waits, waits_path) = beside(&system, &site, &pool, "waits").await;
    let in_waits = owner(&system, &waits_path).await;
    let close = format!("ALTER DATABASE {shut} ALLOW_CONNECTIONS false");
    root.batch_execute(&close).await.unwrap();
    // The engine may still have a session in that database. The end of the account would use it.
    let sessions =
        format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{shut}'");
    root.batch_execute(&sessions).await.unwrap();
    // From 17 on the owner of the database needs a privilege for this REINDEX.
    let its_owner = match admin {
        Admin::Superuser => site.server.login(&site.name, &site.password, &waits).await,
        Admin::CreateRole => Ok(server.superuser(&waits).await),
    };
    let its_owner = its_owner.unwrap();
    let reindex = "BEGIN; REINDEX TABLE pg_catalog.pg_class";
    its_owner.batch_execute(reindex).await.unwrap();
    let mut neighbours = Vec::new();
    for _ in 0..12 {
        neighbours.push(system.issue(&path, None).await);
    }

    let asked = Instant::now();
    for path in [&waits_path, &shut_path, &path] {
        let (status, answer) = system.api.delete(&format!("/v1/leases?path={path}")).await;
        assert!(status < 300, "{status} {answer}");
    }
    for neighbour in &neighbours {
        // An earlier version took 39 s to 90 s.
        ends(&site, neighbour, 15).await;
    }
    let took = asked.elapsed();
    assert!(took < seconds(35), "{took:?}");
    for (account, named) in [
        (&locked, format!("session {holder_pid} ")),
        (&stopped, format!("process {stopped_pid} ")),
        (&in_shut, shut.clone()),
        (&in_waits, waits.clone()),
    ] {
        let what = format!("{named:?} is named");
        eventually(&what, seconds(40), async || {
            let lease = system.lease(&account.lease).await;
            let error = lease["lastError"].as_str().unwrap_or_default();
            error.contains(&named).then_some(())
        })
        .await;
        assert!(!server.roles(&account.username).await.is_empty());
    }

    assert!(stopped.is_refused().await);
    // The server was never considered unreachable.
    let later = system.issue(&path, None).await;
    let (status, _) = system
        .api
        .delete(&format!("/v1/leases/{}", later.lease))
        .await;
    assert!(status < 300);
    ends(&site, &later, 15).await;

    holder.batch_execute("ROLLBACK").await.unwrap();
    drop(stop);
    its_owner.batch_execute("ROLLBACK").await.unwrap();
    let open = format!("ALTER DATABASE {shut} ALLOW_CONNECTIONS true");
    root.batch_execute(&open).await.unwrap();
    for account in [&locked, &stopped, &in_shut, &in_waits] {
        ends(&site, account, 90).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn neighbours_of_hard_accounts_do_not_wait_on_15() {
    neighbours_do_not_wait(Server::own(""), Admin::Superuser).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn neighbours_of_hard_accounts_do_not_wait_on_18() {
    neighbours_do_not_wait(Server::own_of(Some("18"), ""), Admin::CreateRole).await;
}

/// A mistake in the engine is an outcome: all of a batch are ended, one by one; a read gets an error.
#[tokio::test(flavor = "multi_thread")]
async fn a_panic_takes_nobody_along() {
    let fault = run_dir().join(format!("fault-{}", word()));
    let system = System::start().await;
    let site = Server::pg15().site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let environment = [("MAYFLY_FAULT_FILE", fault.to_str().unwrap())];
    let engine = system.engine_with(&pool, &environment);
    engine.ready().await;
    let path = system.secret(&site, &pool, json!({})).await;
    let mut accounts = Vec::new();
    for _ in 0..6 {
        accounts.push(system.issue(&path, None).await);
    }
    arm(&fault, "revoke.login_taken panic");
    let (status, answer) = system.api.delete(&format!("/v1/leases?path={path}")).await;
    assert!(status < 300, "{status} {answer}");
    for account in &accounts {
        ends(&site, account, 20).await;
    }
    assert!(!fault.exists(), "the panic came");

    arm(&fault, "create.before_commit panic");
    let asked = Instant::now();
    let (status, answer) = system.api.get(&format!("/v1/secrets/{path}")).await;
    assert_eq!(
        (status, answer["error"].as_str()),
        (422, Some("statement_failed")),
        "{answer}"
    );
    // Without the answer the caller waits for 30 s.
    assert!(asked.elapsed() < seconds(28), "{:?}", asked.elapsed());
    let works = system.issue(&path, None).await;
    assert!(works.login().await.is_ok());
    eventually("no place is lost", seconds(20), async || {
        let text = engine.admin_text("/metrics").await;
        let lines = text.lines();
        let mut in_flight = lines.filter(|line| line.starts_with("mayfly_engine_tasks_in_flight{"));
        in_flight.all(|line| line.ends_with(" 0")).then_some(())
    })
    .await;
}
