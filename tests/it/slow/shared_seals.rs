//! Messages that share an encapsulation: which messages have one, how many messages a lease costs, and what the
//! operator of the broker can do with the parts of two envelopes.

use std::collections::BTreeSet;

use lapin::message::Delivery;
use mayfly_tests::amqp::{Recorded, Recorder, Tap};
use mayfly_tests::postgres::{Credential, Server};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::System;
use mayfly_tests::{eventually, seconds};

/// The first byte of an envelope with an encapsulation of its own, and of one that shares it.
const ALONE: u8 = 1;
const SHARED: u8 = 2;
/// Suite byte, recipient's key id, encapsulated key.
const HEAD: usize = 1 + 8 + 32;

/// Issues until the dispatcher has the engine's heartbeat, and seals to it in the shared form.
pub(crate) async fn wait_until_shared(system: &System, path: &str) {
    eventually("messages share an encapsulation", seconds(30), async || {
        let recorder = Recorder::on(&system.rabbit).await;
        system.issue(path, Some(300)).await;
        let all = recorder.stop().await;
        let create = all.iter().find(|message| message.kind() == "create")?;
        (create.body[0] == SHARED).then_some(())
    })
    .await;
}

fn of_kind<'r>(all: &'r [Recorded], kind: &'r str) -> impl Iterator<Item = &'r [u8]> {
    let found = all.iter().filter(move |message| message.kind() == kind);
    found.map(|message| message.body.as_slice())
}

/// A lease costs three messages: its end, its create and the answer. All but the first of a minute share
/// their encapsulations: one of the dispatcher, one of the engine.
#[tokio::test]
async fn the_messages_of_an_issue() {
    let (system, _site, path, _engine) = Scenario::on(Server::pg18()).start().await;
    wait_until_shared(&system, &path).await;
    // Shared seals need fresh heartbeats of all engines, which a busy machine may delay.
    let all = eventually("five issues in this form", seconds(60), async || {
        let recorder = Recorder::on(&system.rabbit).await;
        for _ in 0..5 {
            system.issue(&path, Some(300)).await;
        }
        let all = recorder.stop().await;
        let is_shared = |body: &[u8]| body[0] == SHARED;
        let all_shared = ["create", "revoke"].map(|kind| of_kind(&all, kind).all(is_shared));
        // A dispatcher that has just connected may park the ends of all leases again.
        let is_usual = of_kind(&all, "revoke").count() <= 5;
        (is_usual && all_shared == [true; 2]).then_some(all)
    })
    .await;
    for kind in ["create", "revoke", "reply"] {
        let envelopes: Vec<&[u8]> = of_kind(&all, kind).collect();
        // An engine also answers requests of the dispatcher itself, for example whether it lives.
        let most = if kind == "reply" { 7 } else { 5 };
        assert!(
            (5..=most).contains(&envelopes.len()),
            "{kind}: {}",
            envelopes.len()
        );
        let shared = envelopes.iter().filter(|body| body[0] == SHARED);
        assert!(shared.count() >= 5, "{kind}");
        let heads: BTreeSet<&[u8]> = envelopes.iter().map(|body| &body[..HEAD]).collect();
        // The next minute may have begun.
        assert!(
            heads.len() <= 2 + envelopes.len() - 5,
            "{kind}: {} encapsulations",
            heads.len()
        );
        let rest: BTreeSet<&[u8]> = envelopes
            .iter()
            .map(|body| &body[HEAD..HEAD + 16])
            .collect();
        assert_eq!(
            rest.len(),
            envelopes.len(),
            "{kind}: each has a salt of its own"
        );
    }
    // A heartbeat goes to every dispatcher, also to one of an earlier version.
    assert!(of_kind(&all, "heartbeat").all(|body| body[0] == ALONE));
}

/// A revocation with the ciphertext of another under the same encapsulation, and one under the encapsulation of
/// its own form: neither is opened, and both accounts end at their time.
#[tokio::test]
async fn parts_of_two_envelopes() {
    let (system, site, path, engine) = Scenario::on(Server::pg15()).start().await;
    wait_until_shared(&system, &path).await;
    let credentials = [
        system.issue(&path, Some(4)).await,
        system.issue(&path, Some(4)).await,
    ];
    let pool = engine.pool.clone();
    engine.process.stop();
    let queue = format!("mayfly.v1.pool.{pool}.revoke");
    let mut tap = Tap::on(&system.rabbit.url(), &queue).await;
    let ends = [tap.take().await, tap.take().await];
    assert!(ends.iter().all(|end| end.data[0] == SHARED));
    let mixed = |head: &Delivery, salt: &Delivery, text: &Delivery| {
        let parts = [
            &head.data[..HEAD],
            &salt.data[HEAD..HEAD + 16],
            &text.data[HEAD + 16..],
        ];
        parts.concat()
    };
    let [one, other] = &ends;
    tap.put(one, |body| *body = mixed(one, other, one)).await;
    tap.put(other, |body| *body = mixed(other, other, one))
        .await;
    tap.put(other, |body| body[0] = ALONE).await;
    for end in &ends {
        tap.ack(end).await;
    }
    tap.leave().await;
    let engine = system.engine(&pool).await;
    for credential in &credentials {
        system.gone(&site, credential, seconds(40)).await;
    }
    let refused =
        format!(r#"mayfly_engine_tasks_refused_total{{pool="{pool}",reason="not_authentic"}} "#);
    let metrics = engine.admin_text("/metrics").await;
    let line = metrics.lines().find_map(|line| line.strip_prefix(&refused));
    let count: u64 = line.expect("not counted").parse().unwrap();
    assert!(count >= 3, "{count} were refused");
    revoked(&system, &credentials).await;
}

async fn revoked(system: &System, credentials: &[Credential]) {
    for credential in credentials {
        system
            .lease_becomes(&credential.lease, "revoked", seconds(60))
            .await;
    }
}
