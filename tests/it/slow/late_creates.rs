//! Creates that commit after their revocation has found nothing: the account appears, and goes again without help.

use mayfly_tests::postgres::{Server, Site};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::{Engine, System};
use mayfly_tests::{eventually, run_dir, seconds, word};
use serde_json::Value;

use crate::chaos::faults::arm;

struct World {
    system: System,
    engine: Engine,
    site: Site,
    path: String,
    fault: std::path::PathBuf,
}

/// A read whose engine waits until after the deadline before it commits; what is known when the
/// revocation has found no account.
async fn begun() -> (World, Value) {
    let fault = run_dir().join(format!("fault-{}", word()));
    let (system, site, path, engine) = Scenario::on(Server::pg18())
        .settings(&[("MAYFLY__CREATE__DEADLINE_SECONDS", "2")])
        .engine(&[("MAYFLY_FAULT_FILE", fault.to_str().unwrap())])
        .start()
        .await;
    system.issue(&path, Some(1)).await;
    arm(&fault, "create.before_commit delay 4000");
    let (status, answer) = system.api.get(&format!("/v1/secrets/{path}")).await;
    assert_eq!(
        (status, answer["error"].as_str()),
        (504, Some("deadline")),
        "{answer}"
    );
    assert!(!fault.exists(), "nobody waited");
    let world = World {
        system,
        engine,
        site,
        path,
        fault,
    };
    let lease = eventually("the revocation finds nothing", seconds(2), async || {
        let failed = world.system.api.ok("/v1/leases?state=failed").await;
        let lease = failed["leases"][0].clone();
        lease["revokedAt"].is_string().then_some(lease)
    })
    .await;
    assert!(world.roles(&lease).await.is_empty(), "it is there already");
    (world, lease)
}

impl World {
    async fn roles(&self, lease: &Value) -> Vec<String> {
        self.site
            .server
            .roles(lease["role"].as_str().unwrap())
            .await
    }

    /// Waits for the account by the engine's log: it may be gone before a look at the server.
    async fn appears(&self, lease: &Value) {
        let made = format!(r#""message":"made an account","role":{}"#, lease["role"]);
        eventually("the account is made", seconds(8), async || {
            let log = std::fs::read_to_string(self.system.log()).unwrap();
            log.contains(&made).then_some(())
        })
        .await;
    }

    async fn goes(&self, lease: &Value, within: u64) {
        self.site.no_accounts(seconds(within)).await;
        assert!(self.roles(lease).await.is_empty());
    }
}

/// The engine's answer, although too late, causes another revocation of the account.
#[tokio::test]
async fn the_late_answer_ends_the_account() {
    let (world, lease) = begun().await;
    world.appears(&lease).await;
    world.goes(&lease, 5).await;
    world.system.settled().await;
    let id = lease["id"].as_str().unwrap();
    assert_eq!(world.system.lease(id).await["state"], "failed");
    world.goes(&lease, 1).await;
    world.system.issue(&world.path, Some(1)).await;
}

/// There is no answer and no dispatcher any more. The revocation that found nothing comes again.
#[tokio::test]
async fn the_revocation_comes_again() {
    let (mut world, lease) = begun().await;
    world.system.kill_dispatcher();
    world.appears(&lease).await;
    world.goes(&lease, 30).await;
    assert!(world.engine.process.is_alive() && !world.fault.exists());
    world.system.start_dispatcher().await;
    world.system.settled().await;
    let id = lease["id"].as_str().unwrap();
    assert_eq!(world.system.lease(id).await["state"], "failed");
    world.goes(&lease, 1).await;
}
