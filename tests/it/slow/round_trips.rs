//! How often an engine waits for PostgreSQL. It is counted at a proxy, so no clock is involved.

use mayfly_tests::postgres::{Admin, Server};
use mayfly_tests::proxy::Proxy;
use mayfly_tests::system::System;
use mayfly_tests::{eventually, seconds};
use serde_json::json;

/// An account costs one round trip, which makes it and looks for it after the commit. Other work of the engine may
/// happen at the same time, so the least number counts.
async fn a_create_has_one(server: Server, admin: Admin) {
    let (system, site) = tokio::join!(System::start(), server.site(admin));
    let proxy = Proxy::to(site.server.port()).await;
    let pool = system.pool().await;
    let _engine = system.engine(&pool).await;
    let mut data = site.data();
    data["port"] = proxy.port.into();
    let base = json!({"attributes": {"type": "postgresql"}, "data": data});
    let root = format!("/v1/secrets/db:{}:root", site.name);
    system.api.create(&root, base).await;
    let path = system.secret(&site, &pool, json!({})).await;
    let mut fewest = usize::MAX;
    eventually("a create in one round trip", seconds(60), async || {
        let before = proxy.rounds();
        let credential = system.issue(&path, Some(300)).await;
        fewest = fewest.min(proxy.rounds() - before);
        assert!(
            fewest >= 1,
            "{fewest} is not possible: {}",
            credential.lease
        );
        (fewest == 1).then_some(())
    })
    .await;
    assert!(system.issue(&path, Some(300)).await.login().await.is_ok());
}

#[tokio::test]
async fn of_a_create_by_a_superuser() {
    a_create_has_one(Server::pg15(), Admin::Superuser).await;
}

#[tokio::test]
async fn of_a_create_by_an_admin_with_createrole() {
    a_create_has_one(Server::pg18(), Admin::CreateRole).await;
}
