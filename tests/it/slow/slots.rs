//! Connection slots: an account that takes every slot it can get is ended, and meanwhile no other server is affected.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mayfly_tests::postgres::{Admin, Credential, Server, Site, scalar};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::System;
use mayfly_tests::{eventually, seconds};
use serde_json::json;
use tokio::task::JoinHandle;

/// 22 of them are for roles that are no superusers.
const SMALL: &str = "max_connections = 25\nfsync = off";

/// Opens sessions, keeps them, and takes each slot that becomes free.
struct Hoarder {
    stop: Arc<AtomicBool>,
    hoarding: JoinHandle<()>,
}

impl Hoarder {
    fn start(credential: &Credential) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (credential, until) = (credential.clone(), stop.clone());
        let hoarding = tokio::spawn(async move {
            let mut sessions = Vec::new();
            while !until.load(Ordering::Relaxed) {
                match credential.login().await {
                    Ok(session) => sessions.push(session),
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                }
                sessions.retain(|session| !session.is_closed());
            }
        });
        Self { stop, hoarding }
    }

    async fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.hoarding.await.unwrap();
    }
}

async fn count(root: &tokio_postgres::Client, condition: &str) -> usize {
    let query = format!("SELECT count(*) FROM pg_stat_activity WHERE {condition}");
    scalar(root, &query).await.parse().unwrap()
}

async fn is_full(site: &Site) -> bool {
    let login = site.server.login(&site.name, &site.password, &site.name);
    match login.await {
        Ok(_) => false,
        Err(error) => error.code().is_some_and(|code| code.code() == "53300"),
    }
}

/// Accounts of this number of leases take all slots of a small server; of several engines one has made them.
async fn every_slot(
    version: Option<&str>,
    attributes: serde_json::Value,
    accounts: usize,
    engines: usize,
) {
    // A read that waits for a slot must end before the accounts do.
    let deadline = ("MAYFLY__CREATE__DEADLINE_SECONDS", "6");
    let system = System::start_with(Rabbit::shared(), &[deadline]).await;
    let server = Server::own_of(version, SMALL);
    let site = server.site(Admin::CreateRole).await;
    let elsewhere = Server::pg15().site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let mut working = vec![system.engine(&pool).await];
    let path = system.secret(&site, &pool, attributes).await;
    let other = system.secret(&elsewhere, &pool, json!({})).await;
    let root = server.superuser("postgres").await;

    let mut credentials = Vec::new();
    for _ in 0..accounts {
        credentials.push(system.issue(&path, Some(25)).await);
    }
    for _ in 1..engines {
        working.push(system.engine(&pool).await);
    }
    let hoarders: Vec<Hoarder> = credentials.iter().map(Hoarder::start).collect();
    eventually("no slot is left", seconds(10), async || {
        // A connection that the engine keeps for a short time after its work takes a slot, too.
        let engines = count(&root, "application_name = 'mayfly-engine'").await;
        (engines <= 1 && is_full(&site).await).then_some(())
    })
    .await;

    // Callers get the reason, and other servers are as fast as before.
    let read = format!("/v1/secrets/{path}");
    let reading = (0..16).map(|_| system.api.get(&read));
    let refused = futures_util::future::join_all(reading);
    let beside = async {
        let mut slowest = Duration::ZERO;
        for _ in 0..5 {
            let started = Instant::now();
            system.issue(&other, None).await;
            slowest = slowest.max(started.elapsed());
        }
        slowest
    };
    let (refused, slowest) = tokio::join!(refused, beside);
    for (status, answer) in refused {
        let message = answer["message"].as_str().unwrap();
        assert!(
            status == 502
                && answer["error"] == "database_unreachable"
                && message.contains("no connection slot is free"),
            "{answer}"
        );
    }
    // Otherwise the requests would wait for 10 s and more.
    assert!(slowest < seconds(9), "{slowest:?}");

    let last = credentials.iter().map(|one| one.expiration).max().unwrap();
    assert!(
        is_full(&site).await && jiff::Timestamp::now() < last,
        "it is full until the end"
    );
    let until_end = last.duration_since(jiff::Timestamp::now());
    tokio::time::sleep(until_end.unsigned_abs()).await;
    for credential in &credentials {
        let name = &credential.username;
        eventually(
            "the account and its sessions are gone",
            seconds(5),
            async || {
                let role = scalar(
                    &root,
                    &format!("SELECT count(*) FROM pg_roles WHERE rolname = '{name}'"),
                )
                .await;
                let sessions = count(&root, &format!("usename = '{name}'")).await;
                (role == "0" && sessions == 0).then_some(())
            },
        )
        .await;
    }
    for hoarder in hoarders {
        hoarder.end().await;
    }
    assert_eq!(count(&root, &format!("backend_type = 'client backend' AND usename IS DISTINCT FROM 'postgres' AND usename IS DISTINCT FROM '{}'", site.name)).await, 0);

    // One connection is kept while an account exists, and none after that.
    let next = system.issue(&path, Some(300)).await;
    let kept = "application_name = 'mayfly-engine'";
    tokio::time::sleep(seconds(2)).await;
    assert!(count(&root, &format!("{kept} AND datname = 'postgres'")).await >= 1);
    assert_eq!(
        count(&root, &format!("{kept} AND datname <> 'postgres'")).await,
        0
    );
    system
        .api
        .delete(&format!("/v1/leases/{}", next.lease))
        .await;
    system.gone(&site, &next, seconds(10)).await;
    eventually(
        "no connection could be kept for revocations",
        seconds(40),
        async || (count(&root, kept).await == 0).then_some(()),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_with_every_slot_is_ended_on_15() {
    every_slot(None, json!({"connectionLimit": "unlimited"}), 1, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_with_every_slot_is_ended_on_18() {
    every_slot(Some("18"), json!({"connectionLimit": "unlimited"}), 1, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_accounts_with_every_slot_are_ended() {
    every_slot(None, json!({}), 2, 1).await;
}

/// If the secret sets no limit, one account gets 20 sessions at most.
#[tokio::test]
async fn an_account_has_twenty_sessions() {
    let (system, _site, path, _engine) = Scenario::on(Server::pg18()).start().await;
    let credential = system.issue(&path, None).await;
    let mut sessions = Vec::new();
    let refused = loop {
        match credential.login().await {
            Ok(session) => sessions.push(session),
            Err(error) => break error,
        }
    };
    assert_eq!(
        (sessions.len(), refused.code().unwrap().code()),
        (20, "53300")
    );
}

/// The finding about connections.
async fn compared(system: &System, path: &str) -> serde_json::Value {
    let path = format!("/v1/secrets/{path}::check");
    let (status, answer) = system.api.post(&path, json!({})).await;
    assert_eq!(status, 200, "{answer}");
    let findings = answer["findings"].as_array().unwrap();
    let found = findings.iter().find(|one| one["check"] == "connections");
    found.unwrap().clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn check_compares_limits_with_max_connections() {
    let system = System::start().await;
    let pool = system.pool().await;
    let _engine = system.engine(&pool).await;
    let old = Server::own_of(None, SMALL).site(Admin::CreateRole).await;
    let path = system.secret(&old, &pool, json!({})).await;
    let finding = compared(&system, &path).await;
    let message = finding["message"].as_str().unwrap();
    assert!(
        finding["ok"] == true && message.contains("2 accounts may take all"),
        "{finding}"
    );
    let unlimited = json!({"connectionLimit": "unlimited"});
    let path = system.secret(&old, &pool, unlimited).await;
    let finding = compared(&system, &path).await;
    assert_eq!(finding["ok"], false, "{finding}");

    // 19 connections are for every role.
    let options = format!("{SMALL}\nreserved_connections = 3");
    let new = Server::own_of(Some("18"), &options);
    let site = new.site(Admin::CreateRole).await;
    let path = system.secret(&site, &pool, json!({})).await;
    let finding = compared(&system, &path).await;
    let fix = finding["fix"][0].as_str().unwrap();
    assert!(
        finding["ok"] == false && fix.contains("pg_use_reserved_connections"),
        "{finding}"
    );
    let root = new.superuser("postgres").await;
    root.batch_execute(fix).await.unwrap();
    let finding = compared(&system, &path).await;
    assert_eq!(finding["ok"], true, "{finding}");
}
