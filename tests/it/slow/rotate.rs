//! The rotation of an admin's password, with a fault at each step. Which password is in force is always proved from
//! outside: by a login, and by accounts that can still be made and ended.

use mayfly_tests::postgres::{Admin, Server, Site, scalar};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::System;
use mayfly_tests::windows::SHORT_WINDOWS;
use mayfly_tests::{eventually, seconds};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_postgres::Client;

/// Longest time until it is known that a failed change did not happen: the time in which a request may reach the
/// broker, leave its queue, and be committed.
const SETTLED: std::time::Duration = seconds(60);

fn base(site: &Site) -> String {
    format!("/v1/secrets/db:{}:root", site.name)
}

async fn rotate(system: &System, site: &Site) -> (u16, Value) {
    system
        .api
        .post(&format!("{}::rotate", base(site)), json!({}))
        .await
}

/// A rotation that another task waits for. It may fail.
pub(super) fn rotating(system: &System, site: &Site) -> JoinHandle<(u16, Value)> {
    let (api, path) = (system.api.clone(), format!("{}::rotate", base(site)));
    tokio::spawn(async move { api.post(&path, json!({})).await })
}

async fn version(system: &System, site: &Site) -> u64 {
    let described = system.api.ok(&format!("{}::description", base(site))).await;
    described["version"].as_str().unwrap().parse().unwrap()
}

pub(super) async fn old_password_works(site: &Site) -> bool {
    let login = site
        .server
        .login(&site.name, &site.password, &site.name)
        .await;
    match login {
        Ok(_) => true,
        Err(error) => {
            let code = error.code().map(|code| code.code().to_owned());
            assert_eq!(code.as_deref(), Some("28P01"), "{error:?}");
            false
        }
    }
}

/// Whether a change is in progress: then not even a description is changed.
async fn is_open(system: &System, site: &Site) -> bool {
    let (status, answer) = system
        .api
        .put(&base(site), json!({"description": "looked at"}))
        .await;
    assert!(status == 200 || status == 409, "{answer}");
    status == 409
}

pub(super) async fn comes_to_its_end(system: &System, site: &Site) {
    eventually("the rotation comes to its end", SETTLED, async || {
        (!is_open(system, site).await).then_some(())
    })
    .await;
}

/// An account can be made, works, and can be ended: the stored password is in force.
pub(super) async fn still_works(system: &System, site: &Site, path: &str) {
    let credential = system.issue(path, None).await;
    let client = credential.login().await.unwrap();
    assert_eq!(scalar(&client, "SELECT count(*) FROM items").await, "2");
    drop(client);
    system
        .api
        .delete(&format!("/v1/leases/{}", credential.lease))
        .await;
    system.gone(site, &credential, seconds(20)).await;
}

/// Locks the admin's row, so that a change of its password waits.
async fn hold(site: &Site) -> Client {
    let root = site.server.superuser("postgres").await;
    root.batch_execute(&format!(
        "BEGIN; ALTER ROLE {} CONNECTION LIMIT 60",
        site.name
    ))
    .await
    .unwrap();
    root
}

async fn waits_for_the_row(site: &Site) {
    let root = site.server.superuser("postgres").await;
    let waiting = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE usename = '{}' AND wait_event_type = 'Lock'",
        site.name
    );
    eventually("the change waits", seconds(20), async || {
        (scalar(&root, &waiting).await != "0").then_some(())
    })
    .await;
}

async fn rotation_and_leases(server: Server, admin: Admin) {
    let (system, site, path, pool) = Scenario::on(server.clone())
        .admin(admin)
        .start_without_engine()
        .await;
    let (status, answer) = rotate(&system, &site).await;
    assert_eq!((status, &answer["error"]), (503, &json!("no_engine")));
    let _engine = system.engine(&pool).await;
    let (soon, later) = (
        system.issue(&path, Some(12)).await,
        system.issue(&path, None).await,
    );

    let (status, answer) = rotate(&system, &site).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["version"], "2");
    assert!(answer.get("data").is_none());
    assert!(!old_password_works(&site).await);
    let root = server.superuser("postgres").await;
    let stored = format!(
        "SELECT rolpassword FROM pg_authid WHERE rolname = '{}'",
        site.name
    );
    let first = scalar(&root, &stored).await;
    assert!(first.starts_with("SCRAM-SHA-256$"), "{first}");
    assert!(!is_open(&system, &site).await);

    // A second rotation. Earlier leases live on and end, on time and on request.
    let (status, answer) = rotate(&system, &site).await;
    assert_eq!(status, 200, "{answer}");
    assert_ne!(scalar(&root, &stored).await, first);
    assert!(later.login().await.is_ok());
    still_works(&system, &site, &path).await;
    system.gone(&site, &soon, seconds(40)).await;
    assert!(later.login().await.is_ok());
    system
        .api
        .delete(&format!("/v1/leases/{}", later.lease))
        .await;
    system.gone(&site, &later, seconds(20)).await;
    system
        .lease_becomes(&soon.lease, "revoked", seconds(60))
        .await;
}

#[tokio::test]
async fn rotate_on_15_as_superuser() {
    rotation_and_leases(Server::pg15(), Admin::Superuser).await;
}

#[tokio::test]
async fn rotate_on_15_as_createrole() {
    rotation_and_leases(Server::pg15(), Admin::CreateRole).await;
}

#[tokio::test]
async fn rotate_on_18_as_superuser() {
    rotation_and_leases(Server::pg18(), Admin::Superuser).await;
}

#[tokio::test]
async fn rotate_on_18_as_createrole() {
    rotation_and_leases(Server::pg18(), Admin::CreateRole).await;
}

/// The dispatcher dies while the database changes the password, and the change happens. At its next start it finds
/// the new password in force.
#[tokio::test]
async fn rotate_and_the_dispatcher_dies_before_the_change() {
    let (mut system, site, path, _engine) = Scenario::on(Server::pg18()).start().await;
    let live = system.issue(&path, None).await;
    let holder = hold(&site).await;
    let rotation = rotating(&system, &site);
    waits_for_the_row(&site).await;
    system.kill_dispatcher();
    holder.batch_execute("ROLLBACK").await.unwrap();
    let _ = rotation.await;
    eventually("the password is another", seconds(20), async || {
        (!old_password_works(&site).await).then_some(())
    })
    .await;
    system.start_dispatcher().await;
    system.broker_up().await;
    eventually("the new password is known", seconds(40), async || {
        (version(&system, &site).await == 2).then_some(())
    })
    .await;
    assert!(!is_open(&system, &site).await);
    still_works(&system, &site, &path).await;
    system
        .api
        .delete(&format!("/v1/leases/{}", live.lease))
        .await;
    system.gone(&site, &live, seconds(20)).await;
}

/// The dispatcher dies, and the change does not happen: the old password stays, which is certain when the change can
/// no longer happen.
#[tokio::test]
async fn rotate_and_the_dispatcher_dies_and_nothing_changes() {
    let (mut system, site, path, _engine) = Scenario::on(Server::pg15())
        .settings(&[SHORT_WINDOWS])
        .start()
        .await;
    let holder = hold(&site).await;
    let rotation = rotating(&system, &site);
    waits_for_the_row(&site).await;
    system.kill_dispatcher();
    let _ = rotation.await;
    system.start_dispatcher().await;
    system.broker_up().await;
    assert!(is_open(&system, &site).await, "the record was committed");
    let (status, answer) = rotate(&system, &site).await;
    assert_eq!((status, &answer["error"]), (409, &json!("in_use")));
    let (status, _) = system.api.delete(&base(&site)).await;
    assert_eq!(status, 409);
    comes_to_its_end(&system, &site).await;
    holder.batch_execute("ROLLBACK").await.unwrap();
    assert!(old_password_works(&site).await);
    still_works(&system, &site, &path).await;
    let (status, answer) = rotate(&system, &site).await;
    assert_eq!(status, 200, "{answer}");
    assert!(!old_password_works(&site).await);
}

/// The engine dies while the database changes the password. In the end the stored password is the one in force.
#[tokio::test]
async fn rotate_and_the_engine_dies() {
    let (system, site, path, engine) = Scenario::on(Server::pg18())
        .admin(Admin::Superuser)
        .settings(&[SHORT_WINDOWS])
        .start()
        .await;
    let pool = engine.pool.clone();
    let holder = hold(&site).await;
    let rotation = rotating(&system, &site);
    waits_for_the_row(&site).await;
    engine.process.kill();
    // The engine's statement still runs, and now continues without a client.
    holder.batch_execute("ROLLBACK").await.unwrap();
    let (status, answer) = rotation.await.unwrap();
    assert!(status >= 500, "{status} {answer}");
    assert!(is_open(&system, &site).await);
    let _other = system.engine(&pool).await;
    comes_to_its_end(&system, &site).await;
    still_works(&system, &site, &path).await;
}

/// An engine stops in the middle: the caller gets an answer by its deadline, and another engine finds out. The
/// stopped one continues later, and changes nothing any more.
#[tokio::test]
async fn rotate_and_the_engine_hangs() {
    let (system, site, path, engine) = Scenario::on(Server::pg15()).start().await;
    let pool = engine.pool.clone();
    let holder = hold(&site).await;
    let rotation = rotating(&system, &site);
    waits_for_the_row(&site).await;
    engine.process.signal(rustix::process::Signal::STOP);
    // The lock time-out ends the statement, and nobody reads the result.
    let (status, answer) = rotation.await.unwrap();
    assert!(status >= 500, "{status} {answer}");
    let _other = system.engine(&pool).await;
    comes_to_its_end(&system, &site).await;
    holder.batch_execute("ROLLBACK").await.unwrap();
    still_works(&system, &site, &path).await;
    let (before, worked) = (
        version(&system, &site).await,
        old_password_works(&site).await,
    );
    engine.process.signal(rustix::process::Signal::CONT);
    still_works(&system, &site, &path).await;
    assert_eq!(
        (before, worked),
        (
            version(&system, &site).await,
            old_password_works(&site).await
        )
    );
}

/// The database dies with the change uncommitted.
#[tokio::test]
async fn rotate_and_the_database_dies() {
    let server = Server::own("");
    let (system, site, path, _engine) = Scenario::on(server.clone())
        .settings(&[SHORT_WINDOWS])
        .start()
        .await;
    let _holder = hold(&site).await;
    let rotation = rotating(&system, &site);
    waits_for_the_row(&site).await;
    server.kill();
    let (status, answer) = rotation.await.unwrap();
    assert!(status >= 500, "{status} {answer}");
    assert!(is_open(&system, &site).await);
    server.start();
    comes_to_its_end(&system, &site).await;
    assert!(old_password_works(&site).await);
    still_works(&system, &site, &path).await;
    let (status, answer) = rotate(&system, &site).await;
    assert_eq!(status, 200, "{answer}");
}

/// PostgreSQL does not do it in time: the caller gets the obstacle, and that nothing changed.
#[tokio::test]
async fn rotate_is_refused_by_the_server() {
    // With short windows the statement's time-out comes before the lock's, with another answer.
    let (system, site, path, _engine) = Scenario::on(Server::pg18()).start().await;
    let holder = hold(&site).await;
    let (status, answer) = rotate(&system, &site).await;
    let said = answer["message"].as_str().unwrap();
    assert!(
        status == 502 && said.contains("unchanged") && said.contains("55P03"),
        "{answer}"
    );
    holder.batch_execute("ROLLBACK").await.unwrap();
    assert!(old_password_works(&site).await);
    comes_to_its_end(&system, &site).await;
    assert!(old_password_works(&site).await);
    still_works(&system, &site, &path).await;
    let (status, answer) = rotate(&system, &site).await;
    assert_eq!(status, 200, "{answer}");
}

/// Somebody changes the password by hand while it is not known which password is in force: neither works. An update
/// with the right password ends the rotation, but not before the change can no longer happen.
#[tokio::test]
async fn rotate_and_somebody_else_does_too() {
    let (mut system, mut site, path, engine) = Scenario::on(Server::pg18())
        .settings(&[SHORT_WINDOWS])
        .start()
        .await;
    let pool = engine.pool.clone();
    let holder = hold(&site).await;
    let rotation = rotating(&system, &site);
    waits_for_the_row(&site).await;
    system.kill_dispatcher();
    engine.process.kill();
    let _ = rotation.await;
    holder
        .batch_execute(&format!(
            "ALTER ROLE {} PASSWORD 'by hand'; COMMIT",
            site.name
        ))
        .await
        .unwrap();
    site.password = "by hand".to_owned();
    system.start_dispatcher().await;
    system.broker_up().await;
    let _other = system.engine(&pool).await;
    let right = json!({"data": {"password": "by hand"}});
    let (status, answer) = system.api.put(&base(&site), right.clone()).await;
    assert_eq!(status, 409, "{answer}");
    eventually("the right password is taken", SETTLED, async || {
        let (status, _) = system.api.put(&base(&site), right.clone()).await;
        (status == 200).then_some(())
    })
    .await;
    assert!(!is_open(&system, &site).await);
    assert!(old_password_works(&site).await);
    still_works(&system, &site, &path).await;
}

#[tokio::test]
async fn rotate_twice_at_once() {
    let system = System::start().await;
    let site = Server::pg15().site(Admin::Superuser).await;
    let pool = system.pool().await;
    let _engines = [system.engine(&pool).await, system.engine(&pool).await];
    let path = system.secret(&site, &pool, json!({})).await;
    let both = [rotating(&system, &site), rotating(&system, &site)];
    let mut statuses = Vec::new();
    for one in both {
        statuses.push(one.await.unwrap().0);
    }
    statuses.sort_unstable();
    assert!(statuses[0] == 200, "{statuses:?}");
    assert!([200, 409].contains(&statuses[1]), "{statuses:?}");
    comes_to_its_end(&system, &site).await;
    still_works(&system, &site, &path).await;
}
