//! Many accounts that end together: their cost in messages and round trips; and what an engine that lies, a changed
//! row of the store, and a process that dies in between do to the others of the same message.

use std::path::{Path, PathBuf};

use futures_util::StreamExt;
use jiff::Timestamp;
use mayfly_tests::amqp::Recorder;
use mayfly_tests::liar::Liar;
use mayfly_tests::postgres::{Admin, Credential, Server, scalar};
use mayfly_tests::proxy::Proxy;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::System;
use mayfly_tests::windows::SOON_FINAL;
use mayfly_tests::{eventually, run_dir, seconds, word};
use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};

use super::shared_seals::wait_until_shared;
use crate::chaos::faults::arm;

async fn issued(system: &System, path: &str, count: usize) -> Vec<Credential> {
    futures_util::stream::iter(0..count)
        .map(async |_| system.issue(path, Some(300)).await)
        .buffer_unordered(8)
        .collect()
        .await
}

fn below(path: &str) -> String {
    format!("/v1/leases?path={path}")
}

fn fault_file() -> PathBuf {
    run_dir().join(format!("fault-{}", word()))
}

fn fault(file: &Path) -> [(&str, &str); 1] {
    [("MAYFLY_FAULT_FILE", file.to_str().unwrap())]
}

/// Forty accounts cost one revocation, one outcome, and the round trips of one batch.
#[tokio::test]
async fn a_batch_costs_as_much_as_one_account() {
    let server = Server::pg15();
    let (system, site) = tokio::join!(System::start(), server.site(Admin::Superuser));
    let proxy = Proxy::to(site.server.port()).await;
    let pool = system.pool().await;
    let _engine = system.engine(&pool).await;
    let mut data = site.data();
    data["port"] = proxy.port.into();
    let base = json!({"attributes": {"type": "postgresql"}, "data": data});
    let root = format!("/v1/secrets/db:{}:root", site.name);
    system.api.create(&root, base).await;
    let path = system
        .secret(&site, &pool, json!({"scramIterations": 1}))
        .await;
    wait_until_shared(&system, &path).await;
    system.api.delete(&below(&path)).await;
    site.no_accounts(seconds(60)).await;
    // On a busy machine a try may also include the looks after the window, and heartbeats may be late.
    eventually("forty end together", seconds(180), async || {
        issued(&system, &path, 40).await;
        let recorder = Recorder::on(&system.rabbit).await;
        let before = proxy.rounds();
        let (status, answer) = system.api.delete(&below(&path)).await;
        assert_eq!(
            (status, answer),
            (200, json!({"revoking": 40, "more": false}))
        );
        site.no_accounts(seconds(60)).await;
        let rounds = proxy.rounds() - before;
        let all = recorder.stop().await;
        let count = |kind| all.iter().filter(|message| message.kind() == kind).count();
        let messages = [count("revoke"), count("outcome")];
        (messages == [1, 1] && rounds <= 16).then_some(())
    })
    .await;
}

/// An engine of another pool puts a lease of a different pool, and a role of a different lease, between leases of its
/// own: only its own count.
#[tokio::test]
async fn an_engine_that_lies_in_a_batch_ends_only_leases_of_its_pool() {
    let (system, site, path, _engine) = Scenario::on(Server::pg18())
        .settings(&SOON_FINAL)
        .start()
        .await;
    let others = system.pool().await;
    let honest = system.engine(&others).await;
    let own_site = Server::pg18().site(Admin::CreateRole).await;
    let own_path = system.secret(&own_site, &others, json!({})).await;
    let victim = system.issue(&path, Some(300)).await;
    let own = issued(&system, &own_path, 3).await;
    honest.process.stop();
    let rogue = Liar::new(system.rabbit.url(), &system.key_file(&others));
    let root = site.server.superuser("postgres").await;
    let server = scalar(&root, "SELECT system_identifier FROM pg_control_system()").await;
    // The reported time is after the end of each lease, so that an account that was just made counts as gone.
    let at = Timestamp::now() + seconds(3600);
    let gone = json!({"dropped": {"at": at, "server": server, "conclusive": true}});
    rogue
        .outcomes(&[
            (&own[0].lease, &own[0].username, gone.clone()),
            (&victim.lease, &victim.username, gone.clone()),
            (&own[1].lease, "mayfly_of_nobody", gone.clone()),
            (&own[2].lease, &own[2].username, gone),
        ])
        .await;
    for settled in [&own[0], &own[2]] {
        system
            .lease_becomes(&settled.lease, "revoked", seconds(30))
            .await;
    }
    for untouched in [&victim, &own[1]] {
        let lease = system.lease(&untouched.lease).await;
        let state = (&lease["state"], &lease["revokedAt"]);
        assert_eq!(state, (&json!("active"), &Value::Null), "{lease}");
        assert!(untouched.login().await.is_ok());
    }
    let metrics = system.admin_text("/metrics").await;
    for reason in ["other_pool", "other_role"] {
        let line = format!(r#"reason="{reason}"}} 1"#);
        assert!(metrics.contains(&line), "{reason}: {metrics}");
    }
    let _honest = system.engine(&others).await;
    for path in [&path, &own_path] {
        system.api.delete(&below(path)).await;
    }
    site.no_accounts(seconds(60)).await;
    // Accounts that were reported as gone are looked for once more after the window.
    own_site.no_accounts(seconds(60)).await;
}

/// An engine dies at each step of a batch of which it has one message: another engine does all of it.
#[tokio::test]
async fn an_engine_dies_between_the_parts_of_a_batch() {
    let file = fault_file();
    let (system, site, path, engine) = Scenario::on(Server::pg15())
        .attributes(json!({"scramIterations": 1}))
        .start()
        .await;
    let pool = engine.pool.clone();
    drop(engine);
    let mut engine = system.engine_with(&pool, &fault(&file));
    engine.ready().await;
    for step in [
        "revoke.login_taken",
        "revoke.dropped",
        "revoke.outcome_sent",
    ] {
        wait_until_shared(&system, &path).await;
        let held = issued(&system, &path, 20).await;
        arm(&file, &format!("{step} kill"));
        system.api.delete(&below(&path)).await;
        eventually(&format!("killed at {step}"), seconds(30), async || {
            (!engine.process.is_alive()).then_some(())
        })
        .await;
        engine = system.engine_with(&pool, &fault(&file));
        engine.ready().await;
        site.no_accounts(seconds(60)).await;
        for one in &held {
            system
                .lease_becomes(&one.lease, "revoked", seconds(60))
                .await;
        }
    }
}

/// A dispatcher dies after the first step of a long revocation, before it has sent anything. The revocation continues
/// after the next start. A lease that was issued after the request lives.
#[tokio::test]
async fn a_revocation_below_a_path_goes_on_after_a_crash() {
    let file = fault_file();
    let (mut system, site, path, _engine) = Scenario::on(Server::pg15())
        .settings(&fault(&file))
        .attributes(json!({"scramIterations": 1}))
        .start()
        .await;
    issued(&system, &path, 450).await;
    arm(&file, "revoke_below.marked kill");
    let call = below(&path);
    let asked = system.api.try_call(Method::DELETE, &call, None);
    assert!(
        asked.await.is_none(),
        "it was killed before it could answer"
    );
    system.start_dispatcher().await;
    system.broker_up().await;
    let later = system.issue(&path, Some(300)).await;
    eventually(
        "all but the new account are gone",
        seconds(90),
        async || {
            let roles = site.accounts().await;
            (roles == [later.username.clone()]).then_some(())
        },
    )
    .await;
    assert!(later.login().await.is_ok());
    let active = system.api.ok("/v1/leases?state=active").await;
    assert_eq!(active["leases"].as_array().unwrap().len(), 1, "{active}");
}

/// Somebody changes the row of one lease in the store while its end is reported with others: only that lease is not
/// recorded.
#[tokio::test]
async fn a_changed_row_holds_up_no_other_of_its_batch() {
    let server = Server::pg15();
    let url = server.store().await;
    let url_file = run_dir().join(format!("store-url-{}", word()));
    std::fs::write(&url_file, &url).unwrap();
    let settings = [("MAYFLY__STORE__URL_FILE", url_file.to_str().unwrap())];
    let (system, site, path, engine) = Scenario::on(server.clone())
        .settings(&settings)
        .start()
        .await;
    wait_until_shared(&system, &path).await;
    let held = issued(&system, &path, 6).await;
    engine.process.signal(Signal::STOP);
    system.api.delete(&below(&path)).await;
    let name = url.rsplit('/').next().unwrap().split('?').next().unwrap();
    let store = server.superuser(name).await;
    let change = |text: &str| {
        format!(
            "UPDATE leases SET database = '{text}' WHERE id = '{}'",
            held[2].lease
        )
    };
    let before = scalar(
        &store,
        &format!("SELECT database FROM leases WHERE id = '{}'", held[2].lease),
    )
    .await;
    store.batch_execute(&change("another")).await.unwrap();
    engine.process.signal(Signal::CONT);
    site.no_accounts(seconds(60)).await;
    // The engine reports before it is stopped. After that nobody can repeat a report that was not recorded.
    engine.process.stop();
    for one in held.iter().filter(|one| one.lease != held[2].lease) {
        system
            .lease_becomes(&one.lease, "revoked", seconds(60))
            .await;
    }
    let refused = system
        .api
        .get(&format!("/v1/leases/{}", held[2].lease))
        .await;
    assert_eq!(refused.0, 503, "{}", refused.1);
    // When the row is repaired, its outcome is recorded too.
    store.batch_execute(&change(&before)).await.unwrap();
    system
        .lease_becomes(&held[2].lease, "revoked", seconds(60))
        .await;
}
