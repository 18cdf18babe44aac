//! Programs of two versions together, as in the middle of an upgrade. Run by `make skew REV=…`, which builds the
//! programs of another revision and names their directory in MAYFLY_OTHER_PROGRAMS.

#![allow(
    clippy::print_stdout,
    reason = "figures, for who asks for them with --nocapture"
)]

use std::path::PathBuf;

use mayfly_tests::postgres::{Admin, Credential, Server, Site};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::system::System;
use mayfly_tests::{run_dir, seconds, word};
use serde_json::json;

use crate::slow::authorities::{disk, named, verified};
use crate::slow::shared_seals::wait_until_shared;

fn other() -> PathBuf {
    let directory = std::env::var_os("MAYFLY_OTHER_PROGRAMS");
    directory.expect("run this by `make skew REV=…`").into()
}

/// Accounts of 5 s, which work, and are gone in time.
async fn lives(system: &System, site: &Site, path: &str, count: usize) {
    let mut issued: Vec<Credential> = Vec::new();
    for _ in 0..count {
        let credential = system.issue(path, Some(5)).await;
        assert!(credential.login().await.is_ok());
        issued.push(credential);
    }
    for credential in &issued {
        system.gone(site, credential, seconds(12)).await;
        system
            .lease_becomes(&credential.lease, "revoked", seconds(15))
            .await;
    }
}

/// Several accounts that end by one call.
async fn below(system: &System, site: &Site, path: &str) {
    let mut held = Vec::new();
    for _ in 0..5 {
        held.push(system.issue(path, Some(60)).await);
    }
    let (status, answer) = system.api.delete(&format!("/v1/leases?path={path}")).await;
    assert_eq!((status, &answer["revoking"]), (200, &json!(5)));
    for credential in &held {
        system.gone(site, credential, seconds(30)).await;
        system
            .lease_becomes(&credential.lease, "revoked", seconds(30))
            .await;
    }
}

#[tokio::test]
async fn engines_of_both_in_a_pool() {
    let mut system = System::start().await;
    let site = Server::pg15().site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let path = system.secret(&site, &pool, json!({})).await;
    system.programs = Some(other());
    let older = system.engine(&pool).await;
    lives(&system, &site, &path, 4).await;
    let by_hand = system.issue(&path, Some(60)).await;
    let lease = format!("/v1/leases/{}", by_hand.lease);
    system.api.delete(&lease).await;
    system.gone(&site, &by_hand, seconds(12)).await;
    below(&system, &site, &path).await;

    // A request that the older engine does not know is not done, and the answer reports that.
    let renewed = system.issue(&path, Some(60)).await;
    let renew = format!("/v1/leases/{}/renew", renewed.lease);
    let (status, answer) = system.api.post(&renew, json!({"increment": 100})).await;
    assert!(status == 200 || status >= 500, "{status} {answer}");

    system.programs = None;
    let newer = system.engine(&pool).await;
    lives(&system, &site, &path, 12).await;
    assert!(renewed.login().await.is_ok());
    drop(older);
    let (status, answer) = system.api.post(&renew, json!({"increment": 110})).await;
    assert_eq!(status, 200, "{answer}");
    lives(&system, &site, &path, 2).await;
    system.programs = Some(other());
    let _older = system.engine(&pool).await;
    drop(newer);
    lives(&system, &site, &path, 2).await;
    assert!(renewed.login().await.is_ok());
}

/// What a lease costs the broker's disk with a bundle of 200 KB, by the programs of the other version.
#[tokio::test]
async fn a_large_bundle_before() {
    let mut system = System::start_from(Some(other()), Rabbit::own(), &[]).await;
    let site = verified(&system).await;
    let pool = system.pool().await;
    system.programs = Some(other());
    let _engine = system.engine(&pool).await;
    let path = system.secret(&site, &pool, json!({"ttl": 86_400})).await;
    system.issue(&path, None).await;
    let before = disk(system.rabbit.directory());
    for _ in 0..50 {
        system.issue(&path, None).await;
    }
    let each = (disk(system.rabbit.directory()) - before) / 50;
    println!("{each} bytes of the broker's disk a lease before, with a bundle of 200 KB");
}

/// An older engine cannot read the name of a bundle: if one is in the pool, messages contain the bundle.
#[tokio::test]
async fn a_large_bundle_for_engines_of_both() {
    let mut system = System::start_on(Rabbit::own()).await;
    let site = verified(&system).await;
    let pool = system.pool().await;
    let path = system.secret(&site, &pool, json!({"ttl": 3600})).await;
    let newer = system.engine(&pool).await;
    named(&system, &path).await;
    let parked = system.issue(&path, Some(40)).await;
    system.programs = Some(other());
    let older = system.engine(&pool).await;
    lives(&system, &site, &path, 6).await;
    drop(newer);
    lives(&system, &site, &path, 2).await;
    // The message of this lease's end names the bundle. The dispatcher sends it again in a form that the older engine
    // can read.
    system.gone(&site, &parked, seconds(90)).await;
    system.programs = None;
    let _newer = system.engine(&pool).await;
    drop(older);
    lives(&system, &site, &path, 2).await;
}

/// Ends were parked in a form that an older engine does not know, and only such an engine is left: it reports that,
/// and the dispatcher sends them in the known form.
#[tokio::test]
async fn an_older_engine_meets_ends_that_share_an_encapsulation() {
    let mut system = System::start().await;
    let site = Server::pg15().site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let path = system.secret(&site, &pool, json!({})).await;
    let newer = system.engine(&pool).await;
    wait_until_shared(&system, &path).await;
    let parked = system.issue(&path, Some(15)).await;
    let by_hand = system.issue(&path, Some(200)).await;
    drop(newer);
    system.programs = Some(other());
    let _older = system.engine(&pool).await;
    lives(&system, &site, &path, 2).await;
    let revoke = format!("/v1/leases/{}", by_hand.lease);
    system.api.delete(&revoke).await;
    for credential in [&parked, &by_hand] {
        system.gone(&site, credential, seconds(40)).await;
        system
            .lease_becomes(&credential.lease, "revoked", seconds(60))
            .await;
    }
}

#[tokio::test]
async fn a_dispatcher_of_the_other_version() {
    let mut system = System::start_from(Some(other()), Rabbit::shared(), &[]).await;
    let site = Server::pg15().site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let path = system.secret(&site, &pool, json!({})).await;
    system.programs = None;
    let _newer = system.engine(&pool).await;
    lives(&system, &site, &path, 4).await;
}

#[tokio::test]
async fn an_upgrade_with_leases_out() {
    let mut system = System::start_from(Some(other()), Rabbit::shared(), &[]).await;
    let site = Server::pg15().site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let path = system.secret(&site, &pool, json!({})).await;
    let older = system.engine(&pool).await;
    let soon = system.issue(&path, Some(15)).await;
    let by_hand = system.issue(&path, Some(100)).await;

    system.stop_dispatcher();
    system.programs = None;
    system.start_dispatcher().await;
    system.broker_up().await;
    let _newer = system.engine(&pool).await;
    drop(older);
    assert!(by_hand.login().await.is_ok());
    let revoke = format!("/v1/leases/{}", by_hand.lease);
    system.api.delete(&revoke).await;
    system.gone(&site, &by_hand, seconds(12)).await;
    system.gone(&site, &soon, seconds(25)).await;
    lives(&system, &site, &path, 2).await;
}

/// Two dispatchers of both versions on one store in PostgreSQL: each renews and revokes what the other issues, and
/// either can continue alone.
#[tokio::test]
async fn dispatchers_of_both_on_one_store() {
    let file = run_dir().join(format!("store-url-{}", word()));
    std::fs::write(&file, Server::pg15().store().await).unwrap();
    let settings = [("MAYFLY__STORE__URL_FILE", file.to_str().unwrap())];
    let mut older = System::start_from(Some(other()), Rabbit::shared(), &settings).await;
    older.programs = None;
    let mut newer = older.beside(&[]);
    newer.ready().await;
    newer.broker_up().await;
    let site = Server::pg15().site(Admin::CreateRole).await;
    let pool = older.pool().await;
    let _engine = older.engine(&pool).await;
    let path = older.secret(&site, &pool, json!({})).await;
    for (one, other) in [(&older, &newer), (&newer, &older)] {
        lives(one, &site, &path, 2).await;
        let credential = one.issue(&path, Some(60)).await;
        let lease = format!("/v1/leases/{}", credential.lease);
        let renew = format!("{lease}/renew");
        let (status, answer) = other.api.post(&renew, json!({"increment": 120})).await;
        assert_eq!(status, 200, "{answer}");
        assert!(credential.login().await.is_ok());
        other.api.delete(&lease).await;
        one.gone(&site, &credential, seconds(12)).await;
    }
    let kept = older.issue(&path, Some(100)).await;
    older.stop_dispatcher();
    lives(&newer, &site, &path, 2).await;
    // The system goes back to the older version, as after an upgrade that is undone.
    older.programs = Some(other());
    older.start_dispatcher().await;
    older.broker_up().await;
    newer.stop_dispatcher();
    lives(&older, &site, &path, 2).await;
    assert!(kept.login().await.is_ok());
}
