//! The main job: a read gives an account that works, and at the TTL it is gone; on both servers,
//! with both kinds of admin.

use mayfly_tests::postgres::{Admin, Server, scalar, sqlstate};
use mayfly_tests::seconds;
use mayfly_tests::system::{System, prefix};
use serde_json::json;

async fn main_job(server: Server, admin: Admin) {
    let system = System::start().await;
    let site = server.site(admin).await;
    let pool = system.pool().await;
    let engines = [system.engine(&pool).await, system.engine(&pool).await];
    let path = system.secret(&site, &pool, json!({})).await;

    let answer = system.api.ok(&format!("/v1/secrets/{path}?ttl=4")).await;
    assert_eq!(answer["path"], path.as_str());
    assert_eq!(answer["data"]["ttl"], 4);
    assert!(answer["created"].as_str().unwrap().ends_with('Z'));
    let credential = mayfly_tests::postgres::Credential::from_answer(&answer);
    assert!(credential.username.starts_with(&prefix(&site)));
    let url = answer["data"]["url"].as_str().unwrap();
    assert!(
        url.starts_with("postgresql://") && url.contains(&credential.lease[24..].to_string()),
        "{url}"
    );

    let client = credential.login().await.expect("the credential works");
    assert_eq!(
        scalar(&client, "SELECT count(*) FROM public.items").await,
        "2"
    );
    assert_eq!(
        scalar(&client, "SELECT count(*) FROM app.orders").await,
        "2"
    );
    assert_eq!(
        sqlstate(&client, "INSERT INTO public.items (note) VALUES ('x')").await,
        "42501"
    );
    let lease = system.lease(&credential.lease).await;
    assert_eq!(lease["state"], "active");
    assert!(
        engines
            .iter()
            .any(|engine| lease["engine"] == engine.name.as_str()),
        "{lease}"
    );

    let revoked = system
        .lease_becomes(&credential.lease, "revoked", seconds(10))
        .await;
    assert!(credential.is_refused().await, "the login still works");
    assert_eq!(site.accounts().await, Vec::<String>::new());
    assert!(
        client.simple_query("SELECT 1").await.is_err(),
        "the open session was not ended"
    );
    let (end, at): (jiff::Timestamp, jiff::Timestamp) = (
        credential.expiration,
        revoked["revokedAt"].as_str().unwrap().parse().unwrap(),
    );
    let late = at.duration_since(end).as_secs_f64();
    // Both timestamps are whole seconds. An end takes up to a second, and more on a busy machine.
    assert!((0.0..10.0).contains(&late), "{late} s late");
    assert!(
        engines
            .iter()
            .any(|engine| revoked["revokedBy"] == engine.name.as_str()),
        "{revoked}"
    );
}

#[tokio::test]
async fn on_15_as_superuser() {
    main_job(Server::pg15(), Admin::Superuser).await;
}

#[tokio::test]
async fn on_15_as_createrole() {
    main_job(Server::pg15(), Admin::CreateRole).await;
}

#[tokio::test]
async fn on_18_as_superuser() {
    main_job(Server::pg18(), Admin::Superuser).await;
}

#[tokio::test]
async fn on_18_as_createrole() {
    main_job(Server::pg18(), Admin::CreateRole).await;
}

/// Many at once: all get accounts, spread over the engines, and all end.
#[tokio::test]
async fn many_at_once() {
    let system = System::start().await;
    let site = Server::pg18().site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let _engines = [
        system.engine(&pool).await,
        system.engine(&pool).await,
        system.engine(&pool).await,
    ];
    let path = system.secret(&site, &pool, json!({})).await;
    let mut reads = tokio::task::JoinSet::new();
    for _ in 0..60 {
        let (api, path) = (system.api.clone(), path.clone());
        reads.spawn(async move { api.ok(&format!("/v1/secrets/{path}?ttl=5")).await });
    }
    let answers = reads.join_all().await;
    let mut makers = std::collections::BTreeSet::new();
    for answer in &answers {
        let lease = answer["data"]["leaseId"].as_str().unwrap();
        makers.insert(
            system.lease(lease).await["engine"]
                .as_str()
                .unwrap()
                .to_owned(),
        );
    }
    assert!(makers.len() > 1, "one engine made all of them");
    site.no_accounts(seconds(15)).await;
    let listed = system
        .api
        .ok(&format!("/v1/leases?path={path}&state=active"))
        .await;
    mayfly_tests::eventually("all leases are revoked", seconds(10), async || {
        let active = system
            .api
            .ok(&format!("/v1/leases?path={path}&state=active"))
            .await;
        (active["length"] == 0).then_some(())
    })
    .await;
    drop(listed);
}
