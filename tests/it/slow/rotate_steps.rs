//! The rotation of an admin's password, with a fault at each of its named steps. In the end exactly one password
//! works, and it is the base secret's.

use std::path::{Path, PathBuf};

use mayfly_tests::postgres::{Admin, Server, Site};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::system::System;
use mayfly_tests::windows::SHORT_WINDOWS;
use mayfly_tests::{eventually, run_dir, seconds, word};
use serde_json::json;

use super::rotate::{comes_to_its_end, old_password_works, rotating, still_works};

fn fault_file() -> PathBuf {
    run_dir().join(format!("fault-{}", word()))
}

/// Waits until the armed fault has happened.
async fn struck(fault: &Path, step: &str) {
    eventually(
        &format!("{step}: the step is reached"),
        seconds(20),
        async || (!fault.exists()).then_some(()),
    )
    .await;
}

/// The base secret's password is in force. Returns whether it has changed.
async fn is_changed(system: &System, site: &Site, path: &str) -> bool {
    comes_to_its_end(system, site).await;
    still_works(system, site, path).await;
    !old_password_works(site).await
}

#[tokio::test]
async fn rotate_and_the_dispatcher_is_struck() {
    let fault = fault_file();
    let armed = [
        ("MAYFLY_FAULT_FILE", fault.to_str().unwrap()),
        SHORT_WINDOWS,
    ];
    let mut system = System::start_with(Rabbit::shared(), &armed).await;
    let pool = system.pool().await;
    let _engine = system.engine(&pool).await;
    for (step, expected) in [
        // The engine has got no request yet.
        ("rotate.journaled", false),
        ("rotate.answered", true),
        ("rotate.recorded", true),
    ] {
        let site = Server::pg18().site(Admin::CreateRole).await;
        let path = system.secret(&site, &pool, json!({})).await;
        std::fs::write(&fault, format!("{step} kill")).unwrap();
        let rotation = rotating(&system, &site);
        struck(&fault, step).await;
        assert!(rotation.await.is_err(), "{step}: it was to be killed");
        system.start_dispatcher().await;
        system.broker_up().await;
        let changed = is_changed(&system, &site, &path).await;
        assert_eq!(changed, expected, "{step}");
    }
}

#[tokio::test]
async fn rotate_and_the_engine_is_struck() {
    let (fault, pause) = (fault_file(), fault_file());
    let paused = [
        ("MAYFLY_FAULT_FILE", pause.to_str().unwrap()),
        SHORT_WINDOWS,
    ];
    let system = System::start_with(Rabbit::shared(), &paused).await;
    let pool = system.pool().await;
    let armed = [("MAYFLY_FAULT_FILE", fault.to_str().unwrap())];
    let mut engine = system.engine_with(&pool, &armed);
    for (step, changes) in [
        ("rotate.delivered", false),
        ("rotate.before_commit", false),
        ("rotate.committed", true),
        ("rotate.replied", true),
    ] {
        engine.ready().await;
        let site = Server::pg15().site(Admin::CreateRole).await;
        let path = system.secret(&site, &pool, json!({})).await;
        // Engines are asked twice, the first time only to look.
        std::fs::write(&pause, "rotate.journaled delay 2000").unwrap();
        let rotation = rotating(&system, &site);
        struck(&pause, "rotate.journaled").await;
        std::fs::write(&fault, format!("{step} kill")).unwrap();
        struck(&fault, step).await;
        eventually(&format!("{step}: it is dead"), seconds(5), async || {
            (!engine.process.is_alive()).then_some(())
        })
        .await;
        // The task is not acknowledged: the next engine gets it.
        engine = system.engine_with(&pool, &armed);
        engine.ready().await;
        let (status, answer) = rotation.await.unwrap();
        let changed = is_changed(&system, &site, &path).await;
        assert!(changed || status != 200, "{step}: {answer}");
        assert!(changed || !changes, "{step}: the change is lost");
    }
}
