//! Keys that are renewed while the system runs, and what a look at the store gives afterwards.

use mayfly_tests::postgres::{Admin, Server, Site};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::system::{Engine, System};
use mayfly_tests::{run_dir, seconds, word};
use serde_json::json;

async fn furnished(system: &System) -> (Site, String, String, Engine) {
    let site = Server::pg15().site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let engine = system.engine(&pool).await;
    let path = system.secret(&site, &pool, json!({"share": true})).await;
    (site, pool, path, engine)
}

/// Leases of before and after live side by side; a shared one is still given again, by its own key.
async fn derivation_key(systems: &[&System]) {
    let [first, others @ ..] = systems else {
        panic!("there is one at least")
    };
    let (site, _, path, _engine) = furnished(first).await;
    let before = first.issue(&path, Some(40)).await;
    first.rekey(&["derivation"]);
    // They take it up within a second; until then the one before is as good.
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

/// Killed at any step, the store has the keys of before or those after, and opens.
#[tokio::test]
async fn a_renewal_of_the_derivation_key_is_killed() {
    let mut system = System::start().await;
    let (_site, _, path, _engine) = furnished(&system).await;
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
