//! A large bundle of certificate authorities, such as the 200 KB of a managed service, is at the broker once for all
//! messages of a pool. Accounts end with it while no dispatcher lives, and only the dispatcher can decide its
//! content.

#![allow(
    clippy::print_stdout,
    reason = "figures, for who asks for them with --nocapture"
)]

use std::path::Path;
use std::process::Command;

use jiff::Timestamp;
use mayfly_common::broker::{self, Address, Broker, Login, Message, Options};
use mayfly_protocol::authorities::Bundle;
use mayfly_protocol::seal::{EngineKey, KeyPair};
use mayfly_protocol::task::{Head, Kind};
use mayfly_protocol::topology;
use mayfly_tests::pki::Pki;
use mayfly_tests::postgres::{Admin, Server, Site};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::system::System;
use mayfly_tests::users::Part;
use mayfly_tests::{eventually, seconds};
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A bundle of a server's authority and of 300 others, and a server that is verified by it.
pub(crate) async fn verified(system: &System) -> Site {
    let server = Server::own("");
    let site = server.site(Admin::CreateRole).await;
    let pki = Pki::new();
    pki.certificate("server", "server", Some("IP:127.0.0.1"));
    pki.install(&server);
    let superuser = server.superuser("postgres").await;
    superuser
        .batch_execute("SELECT pg_reload_conf()")
        .await
        .unwrap();
    // Managed services' bundles have the same form: one certificate after another.
    pki.certificate("other", "other", Some("DNS:other.example"));
    let bundle = pki.text("other.crt").repeat(350) + &pki.text("root.crt");
    assert!(bundle.len() > 190_000, "{} bytes", bundle.len());
    let mut data = site.data();
    data["sslmode"] = json!("verify-full");
    data["sslrootcert"] = json!(bundle);
    system
        .api
        .create(
            &format!("/v1/secrets/db:{}:root", site.name),
            json!({"attributes": {"type": "postgresql"}, "data": data}),
        )
        .await;
    site
}

/// Bytes of a directory on its disk.
pub(crate) fn disk(directory: &Path) -> u64 {
    let du = Command::new("du")
        .arg("-sb")
        .arg(directory)
        .output()
        .unwrap();
    let text = String::from_utf8(du.stdout).unwrap();
    text.split_whitespace().next().unwrap().parse().unwrap()
}

/// Reads until messages name the bundle, which is so once each engine has reported that it reads the queue.
pub(crate) async fn named(system: &System, path: &str) {
    eventually("the bundle is at the broker", seconds(60), async || {
        let issued = system.issue(path, Some(3600)).await;
        system
            .api
            .delete(&format!("/v1/leases/{}", issued.lease))
            .await;
        (system.rabbit.messages(".=authorities") > 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_bundle_is_at_the_broker_once() {
    let mut system = System::start_on(Rabbit::own()).await;
    let site = verified(&system).await;
    let pool = system.pool().await;
    let engines = [system.engine(&pool).await, system.engine(&pool).await];
    let path = system.secret(&site, &pool, json!({"ttl": 86_400})).await;
    named(&system, &path).await;

    let before = disk(system.rabbit.directory());
    for _ in 0..50 {
        system.issue(&path, None).await;
    }
    let each = (disk(system.rabbit.directory()) - before) / 50;
    println!("{each} bytes of the broker's disk a lease, with a bundle of 200 KB");
    assert!(each < 60_000, "{each} bytes a lease");
    assert_eq!(system.rabbit.messages(".=authorities"), 1);

    // No dispatcher runs any more, and none of the engines that have read the bundle.
    let credential = system.issue(&path, Some(25)).await;
    assert!(credential.login().await.is_ok());
    system.kill_dispatcher();
    for engine in engines {
        engine.process.kill();
    }
    let _engine = system.engine_unready(&pool);
    system.gone(&site, &credential, seconds(60)).await;
}

/// Puts a bundle into a pool's queue, as the broker's operator can.
async fn forge(system: &System, pool: &str, pem: &str) {
    let text = std::fs::read_to_string(system.key_file(pool)).unwrap();
    let key: EngineKey = serde_json::from_str(&text).unwrap();
    let head = Head {
        kind: Kind::Authorities,
        pool: key.pool.clone(),
        lease: None,
        issued: Timestamp::now(),
        deadline: None,
        attempt: 0,
        settling: false,
        traceparent: String::new(),
    };
    let to = KeyPair::from_base64(&key.private_key).unwrap();
    let pem = pem.to_owned();
    let message = Message {
        to: Address::Queue(topology::authorities_queue(&key.pool)),
        body: head
            .seal(&KeyPair::generate(), to.public(), &Bundle { pem })
            .unwrap(),
        head,
        reply_as: None,
        answers: None,
        expires: None,
    };
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    let options = Options {
        login: Login::with_url(&system.rabbit.url_for(&Part::Dispatcher)).unwrap(),
        name: "the operator".to_owned(),
        part: broker::Part::Engine,
    };
    let broker = Broker::start(options, &tasks, stop.clone());
    assert!(broker.up().await);
    broker.publish(message).await.unwrap();
    stop.cancel();
}

/// Deleting the bundle delays nothing, and another text in its place is never used.
#[tokio::test]
async fn a_bundle_that_is_deleted_or_forged() {
    let system = System::start_on(Rabbit::own()).await;
    let site = verified(&system).await;
    let pool = system.pool().await;
    let engine = system.engine(&pool).await;
    let path = system.secret(&site, &pool, json!({"ttl": 3600})).await;
    named(&system, &path).await;
    let parked = system.issue(&path, Some(20)).await;
    let kept = system.issue(&path, Some(3600)).await;

    system.rabbit.delete(".=authorities");
    engine.process.kill();
    let engine = system.engine(&pool).await;
    // The first message names the deleted bundle.
    system.gone(&site, &parked, seconds(60)).await;
    let lease = format!("/v1/leases/{}", kept.lease);
    system.api.delete(&lease).await;
    system.gone(&site, &kept, seconds(30)).await;
    named(&system, &path).await;

    // An attacker replaces the server, and has put his own authority into the queue.
    let his = Pki::new();
    his.certificate("server", "server", Some("IP:127.0.0.1"));
    system.rabbit.delete(".=authorities");
    engine.process.kill();
    let _engine = system.engine(&pool).await;
    eventually("the queue is there", seconds(20), async || {
        system.rabbit.has(".=authorities").then_some(())
    })
    .await;
    forge(&system, &pool, &(his.text("root.crt").repeat(10))).await;
    his.install(&site.server);
    let superuser = site.server.superuser("postgres").await;
    superuser
        .batch_execute("SELECT pg_reload_conf()")
        .await
        .unwrap();
    let refused = eventually("he is refused", seconds(30), async || {
        let (status, body) = system.api.get(&format!("/v1/secrets/{path}")).await;
        (status != 200).then_some((status, body))
    });
    let (status, body) = refused.await;
    assert_eq!(
        (status, body["error"].as_str()),
        (502, Some("database_unreachable")),
        "{body}"
    );
    for _ in 0..3 {
        let (status, body) = system.api.get(&format!("/v1/secrets/{path}")).await;
        assert_eq!(status, 502, "{body}");
        assert!(
            body["message"].as_str().unwrap().contains("certificate"),
            "{body}"
        );
    }
}
