//! Promises of the HTTP API: secrets, lists, tokens, what is in use, and which requests never issue.

use mayfly_tests::postgres::Server;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::seconds;
use mayfly_tests::system::System;
use mayfly_tests::windows::SOON_FINAL;
use reqwest::Method;
use serde_json::json;

#[tokio::test]
async fn secrets_live_and_die() {
    let system = System::start().await;
    let api = &system.api;
    let made = api
        .create(
            "/v1/secrets/app/one",
            json!({"description": "first", "attributes": {"team": "x"}, "data": {"a": 1, "b": 2}}),
        )
        .await;
    assert_eq!(
        (made["path"].as_str(), made["version"].as_str()),
        (Some("app:one"), Some("1"))
    );
    assert_eq!(made["createdBy"], "root");
    let (status, body) = api
        .put("/v1/secrets/app:one", json!({"data": {"b": 3, "a": null}}))
        .await;
    assert_eq!(
        (status, body["version"].as_str()),
        (200, Some("2")),
        "{body}"
    );
    let read = api.ok("/v1/secrets/app:one").await;
    assert_eq!(read["data"], json!({"b": 3}));
    assert_eq!(read["attributes"], json!({"team": "x"}));
    let (status, _) = api
        .put(
            "/v1/secrets/app:one",
            json!({"data": {"c": 1}, "overwrite": true}),
        )
        .await;
    assert_eq!(status, 200);
    assert_eq!(api.ok("/v1/secrets/app:one").await["data"], json!({"c": 1}));
    let described = api.ok("/v1/secrets/app:one::description").await;
    assert!(
        described
            .get("data")
            .is_none_or(|data| data.is_null() || data == &json!({})),
        "{described}"
    );
    let response = api.raw(Method::GET, "/v1/secrets/app:one", None).await;
    assert_eq!(response.headers()["cache-control"], "no-store");
    for n in 0..5 {
        api.create(&format!("/v1/secrets/list:{n}"), json!({"data": {}}))
            .await;
    }
    let mut seen = Vec::new();
    let mut cursor = String::new();
    loop {
        let page = api
            .ok(&format!(
                "/v1/secrets?searchTerm=list&limit=2&cursor={cursor}"
            ))
            .await;
        let secrets = page["secrets"].as_array().unwrap();
        assert!(secrets.len() <= 2 && page["length"].as_u64() == Some(secrets.len() as u64));
        seen.extend(
            secrets
                .iter()
                .map(|secret| secret["path"].as_str().unwrap().to_owned()),
        );
        cursor = page["cursor"].as_str().unwrap().to_owned();
        if cursor.is_empty() {
            break;
        }
    }
    seen.sort();
    assert_eq!(seen, ["list:0", "list:1", "list:2", "list:3", "list:4"]);
    assert_eq!(api.delete("/v1/secrets/app:one").await.0, 204);
    assert_eq!(api.get("/v1/secrets/app:one").await.0, 404);
}

#[tokio::test]
async fn what_is_in_use_stays() {
    let (system, site, path, engine) = Scenario::on(Server::pg15())
        .settings(&SOON_FINAL)
        .start()
        .await;
    let (api, pool) = (&system.api, engine.pool.clone());
    let base = format!("/v1/secrets/db:{}:root", site.name);
    let secret = format!("/v1/secrets/{path}");

    // Neither a HEAD nor a description issues a lease.
    assert_eq!(api.raw(Method::HEAD, &secret, None).await.status(), 200);
    api.ok(&format!("{secret}::description")).await;
    assert_eq!(api.ok("/v1/leases").await["length"], 0);

    let credential = system.issue(&path, None).await;
    let in_use = |answer: (u16, serde_json::Value)| {
        assert_eq!(
            (answer.0, answer.1["error"].as_str()),
            (409, Some("in_use")),
            "{}",
            answer.1
        )
    };
    in_use(api.delete(&base).await);
    in_use(api.delete(&secret).await);
    in_use(api.delete(&format!("/v1/pools/{pool}")).await);

    // A changed secret does not change live leases.
    let (status, body) = api.put(&secret, json!({"attributes": {"ttl": 20}})).await;
    assert_eq!(status, 200, "{body}");
    assert!(credential.login().await.is_ok());
    assert_eq!(
        system.lease(&credential.lease).await["expiration"]
            .as_str()
            .unwrap()
            .parse::<jiff::Timestamp>()
            .unwrap(),
        credential.expiration
    );

    let other = system.issue(&path, None).await;
    for filter in [
        format!("path={path}"),
        format!("pool={pool}"),
        format!("role={}", other.username),
        "state=active".to_owned(),
    ] {
        let listed = api.ok(&format!("/v1/leases?{filter}")).await;
        assert!(
            listed["leases"].to_string().contains(&other.lease),
            "{filter}: {listed}"
        );
    }
    let (status, body) = api.delete(&format!("{secret}?leases=revoke")).await;
    assert_eq!(status, 204, "{body}");
    for credential in [&credential, &other] {
        system.gone(&site, credential, seconds(10)).await;
        system
            .lease_becomes(&credential.lease, "revoked", seconds(10))
            .await;
    }
    assert_eq!(api.delete(&base).await.0, 204);
    let engines = api.ok("/v1/engines").await;
    assert_eq!(engines["engines"][0]["name"], engine.name.as_str());
    let (status, pong) = api
        .post(&format!("/v1/engines/{}/ping", engine.name), json!({}))
        .await;
    assert_eq!(status, 200, "{pong}");
    // All accounts are gone. Only the pool must wait until their creates can no longer commit.
    let this = format!("/v1/pools/{pool}");
    let refused = api.raw(Method::DELETE, &this, None).await;
    assert_eq!(refused.status(), 409);
    let wait: u64 = refused.headers()["retry-after"]
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!((1..=60).contains(&wait), "{wait} s");
    let body: serde_json::Value = refused.json().await.unwrap();
    let message = body["message"].as_str().unwrap();
    assert!(message.contains("delete the pool after 2"), "{message}");
    // After that time the engine has looked for the accounts again.
    system.settled().await;
    for credential in [&credential, &other] {
        let lease = system.lease(&credential.lease).await;
        assert_eq!(lease["state"], "revoked");
    }
    engine.process.stop();
    assert_eq!(api.delete(&this).await.0, 204);
}

#[tokio::test]
async fn tokens_reach_what_they_name() {
    let (system, site, path, _engine) = Scenario::on(Server::pg18()).start().await;
    let root_lease = system.issue(&path, None).await;
    system
        .api
        .create("/v1/secrets/other:one", json!({"data": {"a": 1}}))
        .await;
    let made = system
        .api
        .create(
            "/v1/tokens",
            json!({"read": [format!("db:{}:*", site.name)], "ttl": 60}),
        )
        .await;
    let api = system.api.with_token(made["token"].as_str().unwrap());
    let answer = api.ok(&format!("/v1/secrets/{path}")).await;
    let lease = answer["data"]["leaseId"].as_str().unwrap();
    let own = api.ok("/v1/leases").await;
    assert_eq!(
        (own["length"].as_u64(), own["leases"][0]["id"].as_str()),
        (Some(1), Some(lease))
    );
    assert_eq!(own["leases"][0]["createdBy"], made["id"]);
    assert_eq!(
        api.get(&format!("/v1/leases/{}", root_lease.lease)).await.0,
        404
    );
    assert_eq!(
        api.delete(&format!("/v1/leases/{}", root_lease.lease))
            .await
            .0,
        404
    );
    for path in [
        "/v1/secrets/other:one",
        "/v1/secrets/no:such",
        "/v1/pools",
        "/v1/engines",
        "/v1/tokens",
        &format!("/v1/secrets/db:{}:root", site.name),
    ] {
        let (status, body) = api.get(path).await;
        assert_eq!(
            (status, body["error"].as_str()),
            (403, Some("forbidden")),
            "{path}: {body}"
        );
    }
    assert_eq!(
        api.post("/v1/secrets/mine", json!({"data": {}})).await.0,
        403
    );
    assert_eq!(api.delete(&format!("/v1/secrets/{path}")).await.0, 403);
    // A token without the word Bearer is accepted too; a deleted token is not.
    let client = reqwest::Client::new();
    let raw = client
        .get(format!("{}/v1/leases", api.address))
        .header("authorization", &api.token)
        .send()
        .await
        .unwrap();
    assert_eq!(raw.status(), 200);
    assert_eq!(
        system
            .api
            .delete(&format!("/v1/tokens/{}", made["id"].as_str().unwrap()))
            .await
            .0,
        204
    );
    assert_eq!(api.get("/v1/leases").await.0, 401);
    let (status, _) = system
        .api
        .delete(&format!("/v1/leases?path=db:{}", site.name))
        .await;
    assert_eq!(status, 200);
    system.gone(&site, &root_lease, seconds(10)).await;
}
