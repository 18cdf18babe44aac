//! A server gets another identity while leases live: by pg_upgrade, or by a restore from a dump. Roles, comments and
//! `VALID UNTIL` are kept, so the accounts are ended there. An account that is absent on another server does not
//! count as gone, and a copy does not settle the leases of the original server.

use mayfly_tests::cli::Cli;
use mayfly_tests::postgres::{Admin, Credential, Server, Site, scalar};
use mayfly_tests::proxy::Proxy;
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::system::{Engine, System};
use mayfly_tests::windows::SOON_FINAL;
use mayfly_tests::{eventually, seconds};
use serde_json::{Value, json};

struct House {
    system: System,
    _engine: Engine,
    path: String,
}

/// A base secret for a site at this port, and a dynamic one.
async fn house(site: &Site, port: u16) -> House {
    let system = System::start_with(Rabbit::shared(), &SOON_FINAL).await;
    let pool = system.pool().await;
    let engine = system.engine(&pool).await;
    let mut data = site.data();
    data["port"] = port.into();
    let base = json!({"attributes": {"type": "postgresql"}, "data": data});
    system.api.create(&base_of(site), base).await;
    let path = system.secret(site, &pool, json!({})).await;
    House {
        system,
        _engine: engine,
        path,
    }
}

fn base_of(site: &Site) -> String {
    format!("/v1/secrets/db:{}:root", site.name)
}

impl House {
    async fn revoke(&self, credential: &Credential) {
        let lease = format!("/v1/leases/{}", credential.lease);
        let (status, body) = self.system.api.delete(&lease).await;
        assert!(status < 300, "{body}");
    }

    async fn is_revoked(&self, credential: &Credential) {
        let lease = &credential.lease;
        self.system
            .lease_becomes(lease, "revoked", seconds(60))
            .await;
    }

    async fn last_error(&self, credential: &Credential, says: &str) -> Value {
        eventually(&format!("it says {says}"), seconds(60), async || {
            let lease = self.system.lease(&credential.lease).await;
            let said = lease["lastError"].as_str().unwrap_or_default();
            said.contains(says).then_some(lease)
        })
        .await
    }
}

async fn is_gone(server: &Server, credential: &Credential) {
    eventually("the role is gone", seconds(40), async || {
        server
            .roles(&credential.username)
            .await
            .is_empty()
            .then_some(())
    })
    .await;
}

async fn identity(server: &Server) -> String {
    let root = server.superuser("postgres").await;
    scalar(&root, "SELECT system_identifier FROM pg_control_system()").await
}

/// Another server is behind the secret's address now, with the roles of the earlier server.
async fn the_accounts_are_ended_where_they_are(
    house: &House,
    before: &str,
    site: &Site,
    [soon, asked, renewed, absent]: [Credential; 4],
) {
    let House { system, path, .. } = house;
    let server = &site.server;
    assert_ne!(before, identity(server).await);
    // The move itself ended no account.
    let session = asked.login().await.unwrap();
    assert_eq!(scalar(&session, "SELECT count(*) FROM items").await, "2");
    house.revoke(&asked).await;
    is_gone(server, &asked).await;
    house.is_revoked(&asked).await;
    assert!(asked.is_refused().await);
    assert!(
        session.simple_query("SELECT 1").await.is_err(),
        "its session goes on"
    );

    let renew = format!("/v1/leases/{}/renew", renewed.lease);
    let (status, body) = system.api.post(&renew, json!({"increment": 600})).await;
    assert_eq!(status, 200, "{body}");
    let end: jiff::Timestamp = body["expiration"].as_str().unwrap().parse().unwrap();
    assert!(end > renewed.expiration && server.valid_until(&renewed.username).await >= end);

    // The message that was parked before the move ends the account on time.
    is_gone(server, &soon).await;
    house.is_revoked(&soon).await;

    // An account that is absent here may be on another server, until a person states that it is the same server.
    let root = server.superuser("postgres").await;
    root.batch_execute(&format!("DROP ROLE \"{}\"", absent.username))
        .await
        .unwrap();
    house.revoke(&absent).await;
    let lease = house.last_error(&absent, "--same-server").await;
    assert_eq!(
        (&lease["state"], &lease["stuck"]),
        (&json!("revoking"), &json!(true)),
        "{lease}"
    );
    assert!(
        lease["lastError"]
            .as_str()
            .unwrap()
            .starts_with("other_server"),
        "{lease}"
    );
    assert!(lease["revokedAt"].is_null(), "{lease}");
    let cli = Cli { system };
    let base = format!("db:{}:root", site.name);
    let said = cli.ok(&["secret", "update", &base, "--same-server", "-e", "json"]);
    let said: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(
        said["version"], "1",
        "nothing else of it has changed: {said}"
    );
    assert!(said["leasesBound"].as_u64().unwrap() >= 2, "{said}");
    house.is_revoked(&absent).await;
    let (status, body) = system
        .api
        .put(&format!("/v1/secrets/{path}"), json!({"sameServer": true}))
        .await;
    assert!(
        status == 400 && body["errors"]["sameServer"].is_array(),
        "{body}"
    );
    assert!(renewed.login().await.is_ok(), "it lives on");
    house.revoke(&renewed).await;
    is_gone(server, &renewed).await;
    house.is_revoked(&renewed).await;
}

async fn four(house: &House, ttl: u64) -> [Credential; 4] {
    let issue = async |ttl| house.system.issue(&house.path, Some(ttl)).await;
    [
        issue(ttl).await,
        issue(300).await,
        issue(300).await,
        issue(300).await,
    ]
}

#[tokio::test]
async fn moved_by_pg_upgrade_from_15_to_18() {
    let site = Server::own("").site(Admin::Superuser).await;
    let house = house(&site, site.server.port()).await;
    let four = four(&house, 45).await;
    let before = identity(&site.server).await;
    site.server.upgrade("18");
    the_accounts_are_ended_where_they_are(&house, &before, &site, four).await;
}

async fn moved_by_a_dump(into: Server, admin: Admin) {
    let old = Server::own("").site(admin).await;
    let proxy = Proxy::to(old.server.port()).await;
    let house = house(&old, proxy.port).await;
    let four = four(&house, 45).await;
    let before = identity(&old.server).await;
    old.server.restore_into(&into);
    old.server.kill();
    proxy.turn_to(into.port());
    let site = Site {
        server: into,
        ..old
    };
    the_accounts_are_ended_where_they_are(&house, &before, &site, four).await;
}

// The command line blocks a thread, and the proxy needs another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn moved_by_a_dump_from_15_to_15() {
    moved_by_a_dump(Server::own(""), Admin::CreateRole).await;
}

// The command line blocks a thread, and the proxy needs another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn moved_by_a_dump_from_15_to_18() {
    moved_by_a_dump(Server::of_version("18"), Admin::Superuser).await;
}

/// An engine dies when it has dropped a role on the new server, before it reports that: the next engine finds the
/// role absent there, and that counts.
#[tokio::test]
async fn moved_and_the_engine_dies_in_between() {
    let site = Server::own("").site(Admin::Superuser).await;
    let House {
        system,
        _engine,
        path,
    } = house(&site, site.server.port()).await;
    let credential = system.issue(&path, Some(300)).await;
    site.server.upgrade("18");
    drop(_engine);
    let pool = system.lease(&credential.lease).await["pool"]
        .as_str()
        .unwrap()
        .to_owned();
    let fault = mayfly_tests::run_dir().join(format!("fault-{}", mayfly_tests::word()));
    std::fs::write(&fault, "revoke.dropped kill").unwrap();
    let engine = system.engine_with(&pool, &[("MAYFLY_FAULT_FILE", fault.to_str().unwrap())]);
    engine.ready().await;
    system
        .api
        .delete(&format!("/v1/leases/{}", credential.lease))
        .await;
    eventually("the engine is dead", seconds(40), async || {
        (!engine.process.is_alive()).then_some(())
    })
    .await;
    is_gone(&site.server, &credential).await;
    let _other = system.engine(&pool).await;
    system
        .lease_becomes(&credential.lease, "revoked", seconds(90))
        .await;
}

/// A copy at another address has the role too, and ends it on request. The lease is settled only by its own server,
/// or when a person states that the copy is that server.
#[tokio::test]
async fn a_copy_settles_nothing() {
    let site = Server::own("").site(Admin::Superuser).await;
    let house = house(&site, site.server.port()).await;
    let [_, asked, given_up, _] = four(&house, 300).await;
    let copy = Server::of_version("18");
    site.server.restore_into(&copy);
    // The server shuts down, so that only the copy answers.
    site.server.kill();
    let data = json!({"port": copy.port(), "password": site.password});
    let (status, body) = house
        .system
        .api
        .put(&base_of(&site), json!({"data": data}))
        .await;
    assert_eq!(status, 200, "{body}");
    house.revoke(&asked).await;
    is_gone(&copy, &asked).await;
    house.last_error(&asked, "proves nothing").await;
    let lease = house.system.lease(&asked.lease).await;
    assert_eq!(lease["state"], "revoking", "{lease}");
    assert!(lease["revokedAt"].is_null(), "{lease}");
    // The original server runs again, and the account still existed there.
    site.server.start();
    is_gone(&site.server, &asked).await;
    house.is_revoked(&asked).await;

    // The server is gone for good, and the copy takes its place.
    site.server.kill();
    let said = json!({"sameServer": true});
    let (status, body) = house.system.api.put(&base_of(&site), said).await;
    assert!(
        status == 200 && body["leasesBound"].as_u64().unwrap() >= 2,
        "{body}"
    );
    house.revoke(&given_up).await;
    is_gone(&copy, &given_up).await;
    house.is_revoked(&given_up).await;
}
