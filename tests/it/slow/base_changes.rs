//! A base secret changes while leases live: they are ended where they were made, with the credentials that work there
//! now, and no message is left that can never succeed. Likewise a pool's key.

use std::net::SocketAddr;

use mayfly_tests::postgres::{Admin, Credential, Server, Site, scalar};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::{Engine, System, prefix};
use mayfly_tests::windows::SOON_FINAL;
use mayfly_tests::{eventually, seconds};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};

async fn furnished(server: Server) -> (System, Site, String, String, Engine) {
    let (system, site, path, engine) = Scenario::on(server).settings(&SOON_FINAL).start().await;
    let pool = engine.pool.clone();
    (system, site, pool, path, engine)
}

async fn change_base(system: &System, site: &Site, data: Value) {
    let base = format!("/v1/secrets/db:{}:root", site.name);
    let (status, body) = system.api.put(&base, json!({"data": data})).await;
    assert_eq!(status, 200, "{body}");
}

async fn all_quiet(system: &System, credential: &Credential) {
    system
        .lease_becomes(&credential.lease, "revoked", seconds(70))
        .await;
    eventually("no message is left", seconds(150), async || {
        (system.rabbit.messages("mayfly.v1.delay") + system.rabbit.messages("mayfly.v1.pool") == 0)
            .then_some(())
    })
    .await;
}

#[tokio::test]
async fn another_password() {
    let (system, site, _, path, _engine) = furnished(Server::pg18()).await;
    let short = system.issue(&path, Some(4)).await;
    let asked = system.issue(&path, Some(40)).await;
    let root = site.server.superuser("postgres").await;
    root.batch_execute(&format!("ALTER ROLE {} PASSWORD 'another'", site.name))
        .await
        .unwrap();
    change_base(&system, &site, json!({"password": "another"})).await;
    system.gone(&site, &short, seconds(12)).await;
    system
        .api
        .delete(&format!("/v1/leases/{}", asked.lease))
        .await;
    system.gone(&site, &asked, seconds(5)).await;
    // The parked messages keep the old password, so the dispatcher replaces them.
    all_quiet(&system, &short).await;
}

#[tokio::test]
async fn another_user() {
    let (system, site, _, path, _engine) = furnished(Server::pg18()).await;
    let credential = system.issue(&path, Some(4)).await;
    let asked = system.issue(&path, Some(40)).await;
    let root = site.server.superuser("postgres").await;
    // The new admin may not end the old admin's accounts. The old admin still can.
    root.batch_execute(&format!(
        "CREATE ROLE {0}_b LOGIN CREATEROLE PASSWORD 'b'; GRANT CONNECT ON DATABASE {0} TO {0}_b",
        site.name
    ))
    .await
    .unwrap();
    change_base(
        &system,
        &site,
        json!({"username": format!("{}_b", site.name), "password": "b"}),
    )
    .await;
    system.gone(&site, &credential, seconds(15)).await;
    all_quiet(&system, &credential).await;
    // Now the old admin cannot log in any more, and the new admin may end the accounts.
    root.batch_execute(&format!("ALTER ROLE {} NOLOGIN", site.name))
        .await
        .unwrap();
    root.batch_execute(&format!("ALTER ROLE {}_b SUPERUSER", site.name))
        .await
        .unwrap();
    system
        .api
        .delete(&format!("/v1/leases/{}", asked.lease))
        .await;
    system.gone(&site, &asked, seconds(15)).await;
}

/// A path to a server that can be closed.
async fn proxy(to: u16) -> (u16, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)))
        .await
        .unwrap();
    let port = listener.local_addr().unwrap().port();
    let task = tokio::spawn(async move {
        let mut ways = tokio::task::JoinSet::new();
        loop {
            let (mut near, _) = listener.accept().await.unwrap();
            ways.spawn(async move {
                let mut far = TcpStream::connect(("127.0.0.1", to)).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
            });
        }
    });
    (port, task)
}

/// The server is the same by its identity, at another address.
#[tokio::test]
async fn another_address_of_the_same_server() {
    let (system, site, _, path, _engine) = furnished(Server::pg18()).await;
    let (port, way) = proxy(site.server.port()).await;
    let moved = |port: u16| json!({"port": port, "password": site.password});
    change_base(&system, &site, moved(port)).await;
    let short = system.issue(&path, Some(4)).await;
    let renewed = system.issue(&path, Some(20)).await;
    change_base(&system, &site, moved(site.server.port())).await;
    way.abort();
    let _ = way.await;
    // From here on the accounts log in at the server's own address.
    let [short, renewed] = [short, renewed].map(|credential| Credential {
        port: site.server.port(),
        ..credential
    });
    system.gone(&site, &short, seconds(20)).await;
    let renew = format!("/v1/leases/{}/renew", renewed.lease);
    let (status, body) = system.api.post(&renew, json!({"increment": 30})).await;
    assert_eq!(status, 200, "{body}");
    system
        .api
        .delete(&format!("/v1/leases/{}", renewed.lease))
        .await;
    system.gone(&site, &renewed, seconds(20)).await;
    all_quiet(&system, &short).await;
}

/// The base secret names another database of the server. Earlier leases end, with their objects in the old database.
#[tokio::test]
async fn another_database() {
    let (system, site, _, path, _engine) = furnished(Server::pg18()).await;
    let credential = system.issue(&path, Some(5)).await;
    let asked = system.issue(&path, Some(40)).await;
    let hand = site.admin().await;
    hand.batch_execute(&format!(
        "GRANT INSERT ON items TO \"{}\", \"{}\"",
        credential.username, asked.username
    ))
    .await
    .unwrap();
    let other = format!("{}_other", site.name);
    let root = site.server.superuser("postgres").await;
    root.batch_execute(&format!("CREATE DATABASE {other} OWNER {}", site.name))
        .await
        .unwrap();
    let there = site
        .server
        .login(&site.name, &site.password, &other)
        .await
        .unwrap();
    there
        .batch_execute("CREATE TABLE notes (id int); INSERT INTO notes VALUES (1)")
        .await
        .unwrap();
    change_base(&system, &site, json!({"database": other})).await;
    let new = system.issue(&path, Some(60)).await;
    assert_eq!(new.database, other);
    let client = new.login().await.unwrap();
    assert_eq!(scalar(&client, "SELECT count(*) FROM notes").await, "1");
    assert!(credential.login().await.is_ok());
    system.gone(&site, &credential, seconds(12)).await;
    system
        .api
        .delete(&format!("/v1/leases/{}", asked.lease))
        .await;
    system.gone(&site, &asked, seconds(10)).await;
    for old in [&credential, &asked] {
        system
            .lease_becomes(&old.lease, "revoked", seconds(70))
            .await;
    }
    assert_eq!(scalar(&hand, "SELECT count(*) FROM items").await, "2");
    assert!(new.login().await.is_ok());
}

/// The database itself is dropped: accounts end through another one of the server.
#[tokio::test]
async fn the_database_is_dropped() {
    let (system, site, _, path, _engine) = furnished(Server::pg15()).await;
    let credential = system.issue(&path, Some(5)).await;
    let asked = system.issue(&path, Some(40)).await;
    let root = site.server.superuser("postgres").await;
    root.batch_execute(&format!("DROP DATABASE {} WITH (FORCE)", site.name))
        .await
        .unwrap();
    let (status, body) = system.api.get(&format!("/v1/secrets/{path}")).await;
    assert_eq!(
        (status, body["error"].as_str()),
        (422, Some("no_such_object")),
        "{body}"
    );
    system
        .api
        .delete(&format!("/v1/leases/{}", asked.lease))
        .await;
    for old in [&asked, &credential] {
        eventually("its role is gone", seconds(12), async || {
            let roles = site.server.roles(&old.username).await;
            roles.is_empty().then_some(())
        })
        .await;
        system
            .lease_becomes(&old.lease, "revoked", seconds(70))
            .await;
    }
}

/// The base secret names another server now. Earlier leases end on the old server. They never count as gone because
/// the new server does not have them.
#[tokio::test]
async fn another_server() {
    let (system, site, _, path, engine) = furnished(Server::pg18()).await;
    let credential = system.issue(&path, Some(6)).await;
    let other = Server::pg15().site(Admin::CreateRole).await;
    change_base(&system, &site, other.data()).await;
    let there = system.issue(&path, Some(30)).await;
    assert_eq!(there.port, other.server.port());
    assert!(there.login().await.is_ok());
    assert!(credential.login().await.is_ok());
    system.gone(&site, &credential, seconds(15)).await;
    let lease = system
        .lease_becomes(&credential.lease, "revoked", seconds(10))
        .await;
    assert_eq!(lease["revokedBy"], engine.name.as_str());
    assert!(there.login().await.is_ok());
}

/// The server is gone for good: only a person's statement ends the lease.
#[tokio::test]
async fn a_server_gone_for_good() {
    let server = Server::own("");
    let (system, site, pool, path, _engine) = furnished(server).await;
    let first = system.issue(&path, Some(2)).await;
    let _second = system.issue(&path, Some(60)).await;
    site.server.kill();
    let lease = eventually("it is stuck", seconds(60), async || {
        let lease = system.lease(&first.lease).await;
        (lease["stuck"] == true).then_some(lease)
    })
    .await;
    assert_eq!(lease["state"], "active");
    assert!(
        lease["lastError"]
            .as_str()
            .unwrap()
            .starts_with("database_unreachable"),
        "{lease}"
    );
    let next: jiff::Timestamp = lease["nextTry"].as_str().unwrap().parse().unwrap();
    assert!(next > jiff::Timestamp::now() - seconds(5), "{lease}");
    let secret = format!("/v1/secrets/{path}");
    assert_eq!(system.api.delete(&secret).await.0, 409);
    let (status, body) = system.api.delete(&format!("{secret}?leases=detach")).await;
    assert_eq!(status, 204, "{body}");
    for lease in system.api.ok(&format!("/v1/leases?path={path}")).await["leases"]
        .as_array()
        .unwrap()
    {
        assert_eq!(lease["state"], "revoked");
        assert!(
            lease["lastError"]
                .as_str()
                .unwrap()
                .starts_with("detached by root"),
            "{lease}"
        );
    }
    assert_eq!(
        system
            .api
            .delete(&format!("/v1/secrets/db:{}:root", site.name))
            .await
            .0,
        204
    );
    assert_eq!(system.api.delete(&format!("/v1/pools/{pool}")).await.0, 204);
}

/// Something holds a role: it is named, a try by hand is possible, and the end succeeds when the cause is gone.
#[tokio::test]
async fn stuck_and_tried_again() {
    let (system, site, _, path, _engine) = furnished(Server::pg18()).await;
    let credential = system.issue(&path, Some(60)).await;
    let root = site.server.superuser(&site.name).await;
    // A role of which the admin is no member has given a privilege.
    let helper = format!("{}helper", prefix(&site));
    root.batch_execute(&format!(
        "CREATE ROLE {helper}; CREATE TABLE public.theirs (n int); ALTER TABLE public.theirs OWNER TO {helper}; \
         SET ROLE {helper}; GRANT SELECT ON public.theirs TO \"{}\"; RESET ROLE",
        credential.username
    ))
    .await
    .unwrap();
    let one = format!("/v1/leases/{}", credential.lease);
    system.api.delete(&one).await;
    let lease = eventually("it is stuck", seconds(30), async || {
        let lease = system.lease(&credential.lease).await;
        (lease["stuck"] == true).then_some(lease)
    })
    .await;
    assert!(
        lease["lastError"].as_str().unwrap().contains("theirs"),
        "{lease}"
    );
    assert!(credential.is_refused().await, "it has no login any more");
    let listed = system
        .api
        .ok(&format!("/v1/leases?path={path}&state=stuck"))
        .await;
    assert_eq!(listed["length"], 1);
    root.batch_execute(&format!("DROP TABLE public.theirs; DROP ROLE {helper}"))
        .await
        .unwrap();
    let (status, body) = system.api.post(&format!("{one}/retry"), json!({})).await;
    assert_eq!(status, 200, "{body}");
    system.gone(&site, &credential, seconds(5)).await;
    let lease = system
        .lease_becomes(&credential.lease, "revoked", seconds(70))
        .await;
    assert_eq!(
        (&lease["stuck"], &lease["nextTry"]),
        (&json!(false), &Value::Null),
        "{lease}"
    );
    let (status, _) = system.api.post(&format!("{one}/retry"), json!({})).await;
    assert_eq!(status, 409);
}

/// Engines with either of two keys work. At the end the old key cannot be used, and messages sealed to it are not
/// lost.
#[tokio::test]
async fn the_key_of_a_pool_is_rotated() {
    let (system, site, pool, path, old) = furnished(Server::pg18()).await;
    let before = system.issue(&path, Some(12)).await;
    let rotate = format!("/v1/pools/{pool}/rotate-key");
    let (status, begun) = system.api.post(&rotate, json!({})).await;
    assert_eq!(status, 201, "{begun}");
    assert_eq!(system.api.post(&rotate, json!({})).await.0, 409);
    let mut key: Value = serde_json::from_str(begun["engineKey"].as_str().unwrap()).unwrap();
    let newest_only = system.directory.join("newest.key");
    std::fs::write(&newest_only, key.to_string()).unwrap();
    let present: Value =
        serde_json::from_str(&std::fs::read_to_string(system.key_file(&pool)).unwrap()).unwrap();
    key["previousKeys"] = json!([present["privateKey"]]);
    let both = system.directory.join("both.key");
    std::fs::write(&both, key.to_string()).unwrap();
    let new = system.engine_with_key(&both).await;
    for _ in 0..6 {
        assert!(system.issue(&path, Some(30)).await.login().await.is_ok());
    }
    // The rotation cannot be finished before every engine has the new key.
    let (status, body) = system.api.post(&rotate, json!({"finish": true})).await;
    assert_eq!(status, 409);
    assert!(
        body["message"].as_str().unwrap().contains(&old.name),
        "{body}"
    );
    old.process.kill();
    eventually("the old engine is forgotten", seconds(15), async || {
        (system.api.post(&rotate, json!({"finish": true})).await.0 == 200).then_some(())
    })
    .await;
    let after = system.issue(&path, Some(8)).await;
    new.process.kill();
    // This engine cannot open what was sealed to the earlier key. The dispatcher seals it again.
    let _newest = system.engine_with_key(&newest_only).await;
    for credential in [&before, &after] {
        system.gone(&site, credential, seconds(25)).await;
        system
            .lease_becomes(&credential.lease, "revoked", seconds(70))
            .await;
    }
    eventually("no message is left", seconds(150), async || {
        (system.rabbit.messages("mayfly.v1.delay") + system.rabbit.messages("mayfly.v1.pool") == 0)
            .then_some(())
    })
    .await;
}
