//! Keys that are renewed while the system runs, and what a thief of the store can read afterwards.

use std::path::{Path, PathBuf};

use mayfly_tests::postgres::{Credential, Server, Site};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::{Engine, System};
use mayfly_tests::{eventually, run_dir, seconds, word};
use serde_json::{Value, json};

async fn furnished(system: &System, share: bool) -> (Site, String, Engine) {
    let scenario = Scenario::on(Server::pg15()).attributes(json!({"share": share}));
    scenario.start_in(system).await
}

/// Earlier and later leases live side by side. A shared lease is still given again, by its own key.
async fn derivation_key(systems: &[&System]) {
    let [first, others @ ..] = systems else {
        panic!("there is one at least")
    };
    let (site, path, _engine) = furnished(first, true).await;
    let before = first.issue(&path, Some(40)).await;
    first.rekey(&["derivation"]);
    // The dispatchers use the new key within a second. Until then the earlier key is as good.
    let again = first.issue(&path, Some(40)).await;
    assert_eq!(
        (&again.lease, &again.password),
        (&before.lease, &before.password)
    );
    for other in others {
        let again = other.issue(&path, Some(40)).await;
        assert_eq!(again.password, before.password, "another dispatcher");
    }
    first.rekey(&["derivation"]);
    first
        .api
        .delete(&format!("/v1/leases/{}", before.lease))
        .await;
    for system in systems {
        let after = system.issue(&path, Some(40)).await;
        assert_ne!(after.password, before.password);
        assert!(after.login().await.is_ok());
        let again = system.issue(&path, Some(40)).await;
        assert_eq!(again.password, after.password);
        assert!(again.login().await.is_ok());
    }
    first.gone(&site, &before, seconds(10)).await;
}

#[tokio::test]
async fn the_derivation_key_is_renewed_beside_a_dispatcher() {
    let system = System::start().await;
    derivation_key(&[&system]).await;
}

/// If `--rekey` is killed at any step, the store has the old keys or the new keys, and opens.
#[tokio::test]
async fn a_renewal_of_the_derivation_key_is_killed() {
    let mut system = System::start().await;
    let (_site, path, _engine) = furnished(&system, true).await;
    let fault = run_dir().join(format!("fault-{}", word()));
    let armed = [("MAYFLY_FAULT_FILE", fault.to_str().unwrap())];
    let mut lease = system.issue(&path, Some(200)).await;
    for step in ["rekey.begun", "rekey.written", "rekey.committed"] {
        std::fs::write(&fault, format!("{step} kill")).unwrap();
        assert!(!system.try_rekey(&["derivation"], &armed).status.success());
        assert!(!fault.exists(), "{step} is not reached");
        system.kill_dispatcher();
        system.start_dispatcher().await;
        system.broker_up().await;
        let again = system.issue(&path, Some(200)).await;
        assert_eq!(
            (&again.lease, &again.password),
            (&lease.lease, &lease.password)
        );
        system
            .api
            .delete(&format!("/v1/leases/{}", lease.lease))
            .await;
        lease = system.issue(&path, Some(200)).await;
        assert!(lease.login().await.is_ok(), "{step}");
    }
}

#[tokio::test]
async fn the_derivation_key_is_renewed_beside_two_dispatchers() {
    let file = run_dir().join(format!("store-url-{}", word()));
    std::fs::write(&file, Server::pg15().store().await).unwrap();
    let settings = [("MAYFLY__STORE__URL_FILE", file.to_str().unwrap())];
    let one = System::start_with(Rabbit::shared(), &settings).await;
    let two = one.beside(&[]);
    two.ready().await;
    two.broker_up().await;
    derivation_key(&[&one, &two]).await;
}

/// The engines of a pool get a dispatcher's new key with the pool's next key.
async fn give_to(system: &System, pool: &str, old_file: &Path) -> PathBuf {
    let rotate = format!("/v1/pools/{pool}/rotate-key");
    let (status, begun) = system.api.post(&rotate, json!({})).await;
    assert_eq!(status, 201, "{begun}");
    let mut key: Value = serde_json::from_str(begun["engineKey"].as_str().unwrap()).unwrap();
    let old: Value = serde_json::from_str(&std::fs::read_to_string(old_file).unwrap()).unwrap();
    let older = old["previousKeys"].as_array().cloned().unwrap_or_default();
    let previous: Vec<Value> = [vec![old["privateKey"].clone()], older].concat();
    key["previousKeys"] = json!(previous);
    let file = system.directory.join(format!("{}.key", word()));
    std::fs::write(&file, key.to_string()).unwrap();
    file
}

async fn finish_pool(system: &System, pool: &str) {
    let rotate = format!("/v1/pools/{pool}/rotate-key");
    eventually("all engines have the key", seconds(30), async || {
        let (status, _) = system.api.post(&rotate, json!({"finish": true})).await;
        (status == 200).then_some(())
    })
    .await;
}

fn said(output: &std::process::Output) -> String {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&text).into_owned()
}

/// The dispatcher's key is renewed, step by step, with leases from before, between and after: each
/// lives, and ends in time.
async fn dispatcher_key(systems: &[&System]) {
    let first = systems[0];
    let (site, path, engine) = furnished(first, false).await;
    let pool = engine.pool.clone();
    let mut held = vec![first.issue(&path, Some(300)).await];
    let issue_by_all = async |held: &mut Vec<Credential>| {
        for system in systems {
            let credential = system.issue(&path, Some(300)).await;
            assert!(credential.login().await.is_ok());
            held.push(credential);
        }
    };
    first.rekey(&["dispatcher"]);
    let again = first.try_rekey(&["dispatcher"], &[]);
    assert!(!again.status.success(), "a third");
    let early = first.try_rekey(&["dispatcher", "--finish"], &[]);
    assert!(!early.status.success() && said(&early).contains(&pool));
    issue_by_all(&mut held).await;
    // The end of this lease is parked, sealed with the old key.
    let parked = first.issue(&path, Some(45)).await;

    let both = eventually("the new key is handed out", seconds(10), async || {
        let file = give_to(first, &pool, &first.key_file(&pool)).await;
        let text = std::fs::read_to_string(&file).unwrap();
        if text.contains("previousDispatcherKeys") {
            return Some(file);
        }
        let rotate = format!("/v1/pools/{pool}/rotate-key");
        first.api.post(&rotate, json!({"giveUp": true})).await;
        None
    })
    .await;
    let new = first.engine_with_key(&both).await;
    issue_by_all(&mut held).await;
    engine.process.stop();
    issue_by_all(&mut held).await;
    finish_pool(first, &pool).await;
    issue_by_all(&mut held).await;
    first.rekey(&["dispatcher", "--finish"]);
    issue_by_all(&mut held).await;
    let (status, pong) = first
        .api
        .post(&format!("/v1/engines/{}/ping", new.name), json!({}))
        .await;
    assert_eq!(status, 200, "{pong}");

    // The engines forget the old key. Messages that were sealed with it are sealed again.
    let only = give_to(first, &pool, &both).await;
    let text = std::fs::read_to_string(&only).unwrap();
    assert!(!text.contains("previousDispatcherKeys"), "it is kept");
    new.process.stop();
    let _newest = first.engine_with_key(&only).await;
    finish_pool(first, &pool).await;
    for credential in &held {
        let lease = format!("/v1/leases/{}", credential.lease);
        first.api.delete(&lease).await;
    }
    for credential in held.iter().chain([&parked]) {
        first.gone(&site, credential, seconds(75)).await;
    }
}

#[tokio::test]
async fn the_dispatchers_key_is_renewed_beside_it() {
    let system = System::start().await;
    dispatcher_key(&[&system]).await;
}

#[tokio::test]
async fn the_dispatchers_key_is_renewed_beside_two() {
    let file = run_dir().join(format!("store-url-{}", word()));
    std::fs::write(&file, Server::pg15().store().await).unwrap();
    let settings = [("MAYFLY__STORE__URL_FILE", file.to_str().unwrap())];
    let one = System::start_with(Rabbit::shared(), &settings).await;
    let two = one.beside(&[]);
    two.ready().await;
    two.broker_up().await;
    dispatcher_key(&[&one, &two]).await;
}

/// If either step of `--rekey` is killed, the store has the old keys or the new keys.
#[tokio::test]
async fn a_renewal_of_the_dispatchers_key_is_killed() {
    let mut system = System::start().await;
    let (_site, path, engine) = furnished(&system, false).await;
    let pool = engine.pool.clone();
    let fault = run_dir().join(format!("fault-{}", word()));
    let armed = [("MAYFLY_FAULT_FILE", fault.to_str().unwrap())];
    let steps = ["rekey.begun", "rekey.written", "rekey.committed"];
    for step in steps {
        std::fs::write(&fault, format!("{step} kill")).unwrap();
        let killed = system.try_rekey(&["dispatcher"], &armed);
        assert!(!killed.status.success() && !fault.exists(), "{step}");
        system.kill_dispatcher();
        system.start_dispatcher().await;
        system.broker_up().await;
        assert!(system.issue(&path, Some(60)).await.login().await.is_ok());
    }
    let file = give_to(&system, &pool, &system.key_file(&pool)).await;
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(
        text.contains("previousDispatcherKeys"),
        "the last was committed"
    );
    let _new = system.engine_with_key(&file).await;
    engine.process.stop();
    finish_pool(&system, &pool).await;
    for step in steps {
        std::fs::write(&fault, format!("{step} kill")).unwrap();
        let killed = system.try_rekey(&["dispatcher", "--finish"], &armed);
        assert!(!killed.status.success() && !fault.exists(), "{step}");
        system.kill_dispatcher();
        system.start_dispatcher().await;
        system.broker_up().await;
        assert!(system.issue(&path, Some(60)).await.login().await.is_ok());
    }
    let done = system.try_rekey(&["dispatcher", "--finish"], &[]);
    assert!(
        said(&done).contains("is not being renewed"),
        "{}",
        said(&done)
    );
}
