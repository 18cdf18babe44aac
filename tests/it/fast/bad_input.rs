//! Bad input: each gets a clear error with a stable code and the name of the field, and nothing is half made.

use mayfly_tests::postgres::{Admin, Server};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::seconds;
use mayfly_tests::system::System;
use reqwest::Method;
use serde_json::{Value, json};

#[tokio::test]
async fn fields_are_named() {
    let system = System::start().await;
    let pool = system.pool().await;
    let api = &system.api;
    let base = |change: Value| {
        let mut data = json!({"host": "h", "port": 5432, "username": "u", "password": "p"});
        merge(&mut data, change);
        json!({"attributes": {"type": "postgresql"}, "data": data})
    };
    let (status, _) = api.post("/v1/secrets/db:root", base(json!({}))).await;
    assert_eq!(status, 201);
    assert_eq!(
        api.post("/v1/secrets/static:one", json!({"data": {"a": 1}}))
            .await
            .0,
        201
    );
    let dynamic = |change: Value| {
        let mut attributes = json!({"grantPermissions": {"what": "SELECT", "where": "*.*"},
            "linkConfig": {"linkType": "dynamic", "linkedSecret": "db:root"}, "pool": pool, "ttl": 100});
        merge(&mut attributes, change);
        json!({"attributes": attributes, "data": {}})
    };
    assert_eq!(
        api.post("/v1/secrets/db/dyn", dynamic(json!({}))).await.0,
        201,
        "slashes are separators, too"
    );

    for (change, field) in [
        (json!({"host": null}), "data.host"),
        (json!({"port": 0}), "data.port"),
        (json!({"port": 70000}), "data.port"),
        (json!({"port": "5432"}), "data.port"),
        (json!({"password": ""}), "data.password"),
        (json!({"username": 7}), "data.username"),
        (json!({"sslmode": "maybe"}), "data.sslmode"),
        (json!({"auth": "gss"}), "data.auth"),
        (json!({"channelBinding": "yes"}), "data.channelBinding"),
        (json!({"databse": "x"}), "data.databse"),
    ] {
        invalid(api.post("/v1/secrets/db:other", base(change)).await, field);
    }
    for (change, field) in [
        (json!({"ttl": 0}), "attributes.ttl"),
        (json!({"ttl": -5}), "attributes.ttl"),
        (json!({"ttl": 1.5}), "attributes.ttl"),
        (json!({"ttl": "100"}), "attributes.ttl"),
        (json!({"ttl": 31_536_001}), "attributes.ttl"),
        (json!({"ttl": null}), "attributes.ttl"),
        (json!({"maxTtl": 99}), "attributes.maxTtl"),
        (json!({"pool": "nowhere"}), "attributes.pool"),
        (json!({"pool": null}), "attributes.pool"),
        (
            json!({"userPrefix": "x".repeat(31)}),
            "attributes.userPrefix",
        ),
        (json!({"userPrefix": "pg_x"}), "attributes.userPrefix"),
        (json!({"userPrefx": "x"}), "attributes.userPrefx"),
        (json!({"linkConfig": null}), "attributes.linkConfig"),
        (
            json!({"linkConfig": {"linkType": "dynamic", "linkedSecret": "db:absent"}}),
            "attributes.linkConfig.linkedSecret",
        ),
        (
            json!({"linkConfig": {"linkType": "dynamic", "linkedSecret": "static:one"}}),
            "attributes.linkConfig.linkedSecret",
        ),
        (
            json!({"linkConfig": {"linkType": "dynamic", "linkedSecret": "db:dyn"}}),
            "attributes.linkConfig.linkedSecret",
        ),
        (
            json!({"linkConfig": {"linkType": "static", "linkedSecret": "db:root"}}),
            "attributes.linkConfig.linkType",
        ),
        (
            json!({"grantPermissions": {"what": "SELEC", "where": "*.*"}}),
            "attributes.grantPermissions.what",
        ),
        (
            json!({"grantPermissions": {"what": "SELECT", "where": "a.b.c"}}),
            "attributes.grantPermissions.where",
        ),
        (
            json!({"grantPermissions": {"what": "SELECT", "where": "schema:x"}}),
            "attributes.grantPermissions.what",
        ),
        (
            json!({"grantPermissions": {"what": "SELECT"}}),
            "attributes.grantPermissions.where",
        ),
        (
            json!({"grantPermissions": []}),
            "attributes.grantPermissions",
        ),
        (json!({"connectionLimit": 0}), "attributes.connectionLimit"),
        (json!({"scramIterations": 0}), "attributes.scramIterations"),
        (json!({"ownedObjects": "burn"}), "attributes.ownedObjects"),
    ] {
        invalid(
            api.post("/v1/secrets/db:other", dynamic(change)).await,
            field,
        );
    }
    let mut full = dynamic(json!({}));
    full["data"] = json!({"x": 1});
    invalid(api.post("/v1/secrets/db:other", full).await, "data");
    let mut unknown = dynamic(json!({}));
    unknown["descripton"] = json!("x");
    invalid(
        api.post("/v1/secrets/db:other", unknown).await,
        "descripton",
    );
    assert_eq!(
        api.get("/v1/secrets/db:other::description").await.0,
        404,
        "something was half made"
    );

    for (path, query) in [
        ("db:dyn", "ttl=0"),
        ("db:dyn", "ttl=101"),
        ("db:dyn", "ttl=x"),
    ] {
        let (status, body) = api.get(&format!("/v1/secrets/{path}?{query}")).await;
        assert_eq!(status, 400, "{query}: {body}");
    }
}

fn merge(into: &mut Value, change: Value) {
    for (key, value) in change.as_object().unwrap() {
        if value.is_null() {
            into.as_object_mut().unwrap().remove(key);
        } else {
            into[key] = value.clone();
        }
    }
}

#[track_caller]
fn invalid((status, body): (u16, Value), field: &str) {
    assert_eq!(
        (status, body["error"].as_str(), body["code"].as_u64()),
        (400, Some("invalid"), Some(400)),
        "{field}: {body}"
    );
    let said = body["errors"]
        .as_object()
        .unwrap_or_else(|| panic!("{body}"));
    assert!(
        said.keys()
            .any(|key| key == field || key.starts_with(&format!("{field}."))),
        "{field} is not named: {body}"
    );
}

#[tokio::test]
async fn calls_that_make_no_sense() {
    let system = System::start().await;
    let pool = system.pool().await;
    let api = &system.api;
    let response = api
        .raw(
            Method::POST,
            "/v1/secrets/a",
            Some("{\n  \"data\": {,}\n}".to_owned()),
        )
        .await;
    assert_eq!(response.status(), 400);
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["error"], "malformed");
    let message = body["message"].as_str().unwrap();
    assert!(
        message.contains("line 2") && message.contains("column"),
        "{message}"
    );
    for path in ["/v1/secrets/a::b", "/v1/secrets/a%20b", "/v1/secrets/a:"] {
        let (status, body) = api.post(path, json!({"data": {}})).await;
        assert_eq!(
            (status, body["error"].as_str()),
            (400, Some("malformed")),
            "{path}: {body}"
        );
    }
    assert_eq!(
        api.post("/v1/secrets/a:b", json!({"data": {"x": 1}}))
            .await
            .0,
        201
    );
    let (status, body) = api.post("/v1/secrets/a/b", json!({"data": {}})).await;
    assert_eq!((status, body["error"].as_str()), (409, Some("exists")));
    let (status, body) = api.post("/v1/pools", json!({"name": pool})).await;
    assert_eq!((status, body["error"].as_str()), (409, Some("exists")));
    let (status, _) = api.post("/v1/pools", json!({"name": "No.Dots"})).await;
    assert_eq!(status, 400);
    for path in [
        "/v1/secrets/no:such",
        "/v1/pools/nosuch",
        "/v1/engines/nosuch",
        "/v1/leases/01890a5d-ac96-774b-bcce-b302099a8057",
        "/v1/nosuch",
    ] {
        let (status, body) = api.get(path).await;
        assert_eq!(
            (status, body["error"].as_str()),
            (404, Some("not_found")),
            "{path}: {body}"
        );
    }
    for path in [
        "/v1/leases?limit=0",
        "/v1/leases?limit=501",
        "/v1/leases?state=maybe",
        "/v1/leases?cursor=!!",
        "/v1/leases?colour=red",
    ] {
        assert_eq!(api.get(path).await.0, 400, "{path}");
    }
    for (act, known) in [
        ("check", "known: pool"),
        ("rotate", "no members"),
        ("tidy", "known: pool"),
    ] {
        let path = format!("/v1/secrets/a:b::{act}");
        let (status, body) = api.post(&path, json!({"poool": pool})).await;
        let reason = body["errors"]["poool"][0].as_str().unwrap_or_default();
        assert!(status == 400 && reason.contains(known), "{act}: {body}");
    }
    for path in ["/v1/leases", "/v1/leases?path="] {
        assert_eq!(
            api.delete(path).await.0,
            400,
            "a revocation of everything: {path}"
        );
    }
    for token in ["", "nonsense"] {
        let (status, body) = api.with_token(token).get("/v1/secrets").await;
        assert_eq!(
            (status, body["error"].as_str()),
            (401, Some("unauthenticated")),
            "{body}"
        );
    }
}

/// Each kind of refusal by the database, with its code.
#[tokio::test]
async fn databases_that_say_no() {
    let (system, site, pool, _engine) = Scenario::on(Server::pg18()).start_without_secret().await;
    let plain = Server::own("ssl = off\nlc_messages = 'de_DE.UTF-8'\ntimezone = 'Asia/Kathmandu'");
    let plain_site = plain.site(Admin::CreateRole).await;
    let root = site.server.superuser("postgres").await;
    let powerless = format!("powerless_{}", mayfly_tests::word());
    root.batch_execute(&format!("CREATE ROLE {powerless} LOGIN PASSWORD 'x'"))
        .await
        .unwrap();
    let closed = mayfly_tests::process::free_port();
    let cases = [
        (
            merged(site.data(), json!({"password": "wrong"})),
            502,
            "database_refused_login",
        ),
        (
            merged(site.data(), json!({"port": closed})),
            502,
            "database_unreachable",
        ),
        (
            merged(site.data(), json!({"host": "does-not-resolve.invalid"})),
            502,
            "database_unreachable",
        ),
        (
            merged(plain_site.data(), json!({"sslmode": "require"})),
            502,
            "database_unreachable",
        ),
        (
            merged(site.data(), json!({"database": "no_such_db"})),
            422,
            "no_such_object",
        ),
        (
            merged(site.data(), json!({"username": powerless, "password": "x"})),
            422,
            "admin_lacks_rights",
        ),
    ];
    for (n, (data, status, code)) in cases.into_iter().enumerate() {
        system
            .api
            .create(
                &format!("/v1/secrets/bad:root{n}"),
                json!({"attributes": {"type": "postgres"}, "data": data}),
            )
            .await;
        let attributes = json!({"grantPermissions": {"what": "SELECT", "where": "*.*"},
            "linkConfig": {"linkType": "dynamic", "linkedSecret": format!("bad:root{n}")}, "pool": pool, "ttl": 100});
        system
            .api
            .create(
                &format!("/v1/secrets/bad:dyn{n}"),
                json!({"attributes": attributes}),
            )
            .await;
        let (got, body) = system.api.get(&format!("/v1/secrets/bad:dyn{n}")).await;
        assert_eq!(
            (got, body["error"].as_str()),
            (status, Some(code)),
            "{body}"
        );
        assert!(
            !body["message"].as_str().unwrap().contains("wrong"),
            "{body}"
        );
    }
    // A server with German messages and the time zone of Kathmandu works too.
    let path = system.secret(&plain_site, &pool, json!({})).await;
    let credential = system.issue(&path, Some(3)).await;
    assert!(credential.login().await.is_ok());
    system.gone(&plain_site, &credential, seconds(10)).await;
}

fn merged(mut into: Value, change: Value) -> Value {
    merge(&mut into, change);
    into
}
