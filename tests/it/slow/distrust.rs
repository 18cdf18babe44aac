//! A pool's key is in wrong hands: it is replaced, or the pool is distrusted. And a pool that no secret names any
//! more.

use std::time::Duration;

use mayfly_tests::cli::Cli;
use mayfly_tests::postgres::{Admin, Credential, Server, Site, scalar};
use mayfly_tests::system::{Engine, System};
use mayfly_tests::thief::{Taken, Thief, refused};
use mayfly_tests::{eventually, seconds};
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedReceiver;

/// Two pools with an engine each, and a secret of each pool with the same base secret.
struct Two {
    system: System,
    site: Site,
    pools: [String; 2],
    paths: [String; 2],
    engines: [Option<Engine>; 2],
}

impl Two {
    async fn start() -> Self {
        let system = System::start().await;
        let site = Server::pg15().site(Admin::CreateRole).await;
        let pools = [system.pool().await, system.pool().await];
        let paths = [
            system.secret(&site, &pools[0], json!({})).await,
            system.secret(&site, &pools[1], json!({})).await,
        ];
        let engines = [
            Some(system.engine(&pools[0]).await),
            Some(system.engine(&pools[1]).await),
        ];
        Self {
            system,
            site,
            pools,
            paths,
            engines,
        }
    }

    async fn server_id(&self) -> String {
        let root = self.site.server.superuser("postgres").await;
        let id = scalar(
            &root,
            "SELECT system_identifier::text FROM pg_control_system()",
        )
        .await;
        id.clone()
    }

    async fn change_password(&self) -> String {
        let newer = "a newer password".to_owned();
        let root = self.site.server.superuser("postgres").await;
        let change = format!("ALTER ROLE {} PASSWORD '{newer}'", self.site.name);
        root.batch_execute(&change).await.unwrap();
        let base = format!("/v1/secrets/db:{}:root", self.site.name);
        let (status, answer) = self
            .system
            .api
            .put(&base, json!({"data": {"password": newer}}))
            .await;
        assert_eq!(status, 200, "{answer}");
        newer
    }

    async fn move_secret(&self, n: usize, to: usize) {
        let path = format!("/v1/secrets/{}", self.paths[n]);
        let body = json!({"attributes": {"pool": self.pools[to]}});
        let (status, answer) = self.system.api.put(&path, body).await;
        assert_eq!(status, 200, "{answer}");
    }

    async fn listed(&self, name: &str) -> bool {
        let engines = self.system.api.ok("/v1/engines").await;
        engines["engines"]
            .as_array()
            .unwrap()
            .iter()
            .any(|engine| engine["name"] == name)
    }

    async fn revoke(&self, credential: &Credential) {
        let lease = format!("/v1/leases/{}", credential.lease);
        assert_eq!(self.system.api.delete(&lease).await.0, 200);
    }
}

/// What was taken until now and for a short time from now.
async fn all(taken: &mut UnboundedReceiver<Taken>, within: Duration) -> Vec<Taken> {
    let mut found = Vec::new();
    let end = tokio::time::Instant::now() + within;
    while let Ok(Some(task)) = tokio::time::timeout_at(end, taken.recv()).await {
        found.push(task);
    }
    found
}

fn tells(task: &Taken, secret: &str) -> bool {
    let opened = task.opened.as_ref().map(Value::to_string);
    opened.is_some_and(|text| text.contains(secret))
}

/// After `rotate-key --finish` the old key is of no use in either direction.
#[tokio::test]
async fn a_retired_key_neither_speaks_nor_hears() {
    let mut two = Two::start().await;
    let pool = two.pools[0].clone();
    let held = two.system.issue(&two.paths[0], Some(300)).await;
    let thief = Thief::with(&two.system, &two.system.key_file(&pool)).await;
    thief.lives("thief-before").await;
    eventually("the key is good", seconds(5), async || {
        two.listed("thief-before").await.then_some(())
    })
    .await;

    let rotate = format!("/v1/pools/{pool}/rotate-key");
    let (_, begun) = two.system.api.post(&rotate, json!({})).await;
    let file = two.system.directory.join("new.key");
    std::fs::write(&file, begun["engineKey"].as_str().unwrap()).unwrap();
    two.engines[0].take().unwrap().process.stop();
    let _engine = two.system.engine_with_key(&file).await;
    let finished = eventually("all have the new key", seconds(20), async || {
        let (status, body) = two.system.api.post(&rotate, json!({"finish": true})).await;
        (status == 200).then_some(body)
    })
    .await;
    let base = format!("db:{}:root", two.site.name);
    assert_eq!(finished["baseSecrets"], json!([base]));

    thief.lives("thief-after").await;
    thief.settles(&held.lease, &two.server_id().await).await;
    refused(&two.system, "not_authentic", 2).await;
    assert!(!two.listed("thief-after").await);
    assert_eq!(two.system.lease(&held.lease).await["state"], "active");
    assert!(held.login().await.is_ok());

    // The thief takes any message, and opens none.
    let mut taken = thief.takes();
    two.change_password().await;
    two.revoke(&held).await;
    let taken = all(&mut taken, seconds(4)).await;
    assert!(taken.iter().all(|task| task.opened.is_none()));
    thief.leaves().await;
    two.system.gone(&two.site, &held, seconds(20)).await;
}

/// A distrusted pool is sent nothing, and nothing that it sends counts. Its leases live on, and the other pool ends
/// them in time.
#[tokio::test(flavor = "multi_thread")]
async fn a_distrusted_pool() {
    let mut two = Two::start().await;
    let pool = two.pools[0].clone();
    let path = two.paths[0].clone();
    let short = two.system.issue(&path, Some(25)).await;
    let held = two.system.issue(&path, Some(300)).await;
    two.engines[0].take().unwrap().process.kill();
    let thief = Thief::with(&two.system, &two.system.key_file(&pool)).await;
    let mut taken = thief.takes();

    let cli = Cli {
        system: &two.system,
    };
    let said = cli.ok(&["pool", "distrust", &pool]);
    assert!(
        said.contains(&format!("db:{}:root", two.site.name)),
        "{said}"
    );
    let shown = two.system.api.ok(&format!("/v1/pools/{pool}")).await;
    assert!(shown["distrusted"].is_string(), "{shown}");
    // A sweep may have been sent just before.
    let before = all(&mut taken, seconds(1)).await;
    assert!(
        before.iter().all(|task| task.kind.as_str() == "sweep"),
        "{} messages",
        before.len()
    );

    thief.lives("thief").await;
    thief.settles(&held.lease, &two.server_id().await).await;
    refused(&two.system, "distrusted_pool", 2).await;
    assert!(!two.listed("thief").await);

    let (status, answer) = two.system.api.get(&format!("/v1/secrets/{path}")).await;
    assert_eq!((status, &answer["error"]), (503, &json!("no_engine")));
    assert!(
        answer["message"]
            .as_str()
            .unwrap()
            .contains("is distrusted")
    );
    let newer = two.change_password().await;

    // The account ends on time, although the thief can take the message of its end.
    assert!(short.login().await.is_ok());
    let left = short.expiration.duration_since(jiff::Timestamp::now());
    tokio::time::sleep(left.try_into().unwrap_or_default()).await;
    two.system.gone(&two.site, &short, seconds(5)).await;
    let ended = two
        .system
        .lease_becomes(&short.lease, "revoked", seconds(60))
        .await;
    let other = two.engines[1].as_ref().unwrap();
    assert_eq!(ended["pool"], json!(two.pools[1]));
    assert_eq!(ended["revokedBy"], json!(other.name));
    // The thief cannot end the other lease, but a person still can.
    assert!(held.login().await.is_ok());
    two.revoke(&held).await;
    two.system.gone(&two.site, &held, seconds(10)).await;

    two.move_secret(0, 1).await;
    let moved = two.system.issue(&path, Some(30)).await;
    assert!(moved.login().await.is_ok());
    let taken = all(&mut taken, seconds(1)).await;
    assert!(
        taken.iter().all(|task| !tells(task, &newer)),
        "the thief got the new password"
    );
    let since: Vec<&str> = taken.iter().map(|task| task.kind.as_str()).collect();
    assert_eq!(since, ["revoke"], "only what was parked before it");
    thief.leaves().await;
    let again = two
        .system
        .api
        .post("/v1/pools", json!({"name": pool}))
        .await;
    assert_eq!(again.0, 409);
    assert_eq!(
        two.system.api.delete(&format!("/v1/pools/{pool}")).await.0,
        204
    );
    two.system
        .api
        .create("/v1/pools", json!({"name": pool}))
        .await;
}

/// If no other pool is named, the leases of a distrusted one are stuck, and the message names what helps.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_to_take_over() {
    let mut two = Two::start().await;
    two.move_secret(1, 0).await;
    let held = two.system.issue(&two.paths[0], Some(4)).await;
    two.engines[0].take().unwrap().process.kill();
    let distrust = format!("/v1/pools/{}/distrust", two.pools[0]);
    let (status, said) = two.system.api.post(&distrust, json!({})).await;
    assert_eq!((status, &said["leases"]), (200, &json!(1)), "{said}");
    let stuck = eventually("it is stuck", seconds(10), async || {
        let lease = two.system.lease(&held.lease).await;
        (lease["stuck"] == true).then_some(lease)
    })
    .await;
    let why = stuck["lastError"].as_str().unwrap();
    assert!(
        why.contains("is distrusted") && why.contains("--detach"),
        "{why}"
    );
    two.move_secret(0, 1).await;
    two.system.gone(&two.site, &held, seconds(20)).await;
    let ended = two
        .system
        .lease_becomes(&held.lease, "revoked", seconds(60))
        .await;
    assert_eq!(
        (&ended["pool"], &ended["stuck"]),
        (&json!(two.pools[1]), &json!(false))
    );
}

/// A pool that no secret of the base names any more does not get the admin's new password, although a lease of it
/// lives. The named pool ends that lease.
#[tokio::test]
async fn a_pool_that_is_not_named_any_more() {
    let mut two = Two::start().await;
    let held = two.system.issue(&two.paths[0], Some(300)).await;
    let also = two.system.issue(&two.paths[0], Some(300)).await;
    two.engines[0].take().unwrap().process.kill();
    two.move_secret(0, 1).await;
    let newer = two.change_password().await;
    let thief = Thief::with(&two.system, &two.system.key_file(&two.pools[0])).await;
    let mut taken = thief.takes();
    for lease in [&held, &also] {
        two.revoke(lease).await;
    }
    let until = seconds(9);
    let taken = all(&mut taken, until).await;
    assert!(!taken.is_empty(), "they are the pool's to end");
    assert!(taken.iter().all(|task| task.opened.is_some()));
    assert!(
        taken.iter().all(|task| !tells(task, &newer)),
        "the pool got the new password"
    );
    thief.leaves().await;
    // The engines of the lease's own pool try their credentials without result; then the other pool is asked.
    let _engine = two.system.engine(&two.pools[0]).await;
    for lease in [&held, &also] {
        two.system.gone(&two.site, lease, seconds(40)).await;
        let ended = two
            .system
            .lease_becomes(&lease.lease, "revoked", seconds(60))
            .await;
        assert_eq!(ended["pool"], json!(two.pools[1]));
    }
}
