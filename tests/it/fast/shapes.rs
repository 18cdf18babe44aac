//! The form of answers, for clients that parse strictly: every timestamp is RFC 3339 in UTC with `Z` and without a
//! fraction, and a secret's `version` is text.

use mayfly_tests::postgres::Server;
use mayfly_tests::scenario::Scenario;
use serde_json::{Value, json};

/// Every text in an answer that is a timestamp, with its place.
fn moments(value: &Value, place: &str, found: &mut Vec<(String, String)>) {
    match value {
        Value::String(text) if text.parse::<jiff::Timestamp>().is_ok() => {
            found.push((place.to_owned(), text.clone()));
        }
        Value::Array(list) => {
            for value in list {
                moments(value, place, found);
            }
        }
        Value::Object(members) => {
            for (name, value) in members {
                moments(value, &format!("{place}.{name}"), found);
            }
        }
        _ => {}
    }
}

#[tokio::test]
async fn dates_without_a_fraction_and_versions_as_text() {
    let (system, _site, path, engine) = Scenario::on(Server::pg15()).start().await;
    let secret = system.api.ok(&format!("/v1/secrets/{path}")).await;
    let lease = secret["data"]["leaseId"].as_str().unwrap().to_owned();
    let (status, token) = system
        .api
        .post("/v1/tokens", json!({"read": ["db:*"], "ttl": 60}))
        .await;
    assert_eq!(status, 201, "{token}");
    assert_eq!(secret["version"], "1");

    let one = format!("/v1/leases/{lease}");
    let renewed = system
        .api
        .post(&format!("{one}/renew"), json!({"increment": 30}))
        .await
        .1;
    let mut answers = vec![
        ("a secret", secret),
        ("a token", token),
        ("a renewal", renewed),
    ];
    let revoked = system.api.delete(&one).await.1;
    answers.push(("a revocation", revoked));
    mayfly_tests::eventually("it is gone", mayfly_tests::seconds(20), async || {
        system.lease(&lease).await["revokedAt"]
            .is_string()
            .then_some(())
    })
    .await;
    let described = format!("/v1/secrets/{path}::description");
    let of_engine = format!("/v1/engines/{}", engine.name);
    for call in [
        "/v1/secrets",
        &described,
        "/v1/leases",
        &one,
        "/v1/pools",
        "/v1/engines",
        &of_engine,
        "/v1/tokens",
    ] {
        answers.push((call, system.api.ok(call).await));
    }
    let listed = answers
        .iter()
        .find(|(call, _)| *call == "/v1/secrets")
        .unwrap();
    for secret in listed.1["secrets"].as_array().unwrap() {
        assert!(secret["version"].is_string(), "{secret}");
    }
    let mut found = Vec::new();
    for (call, answer) in &answers {
        let before = found.len();
        moments(answer, call, &mut found);
        assert!(found.len() > before, "no date in {call}: {answer}");
    }
    for (place, text) in found {
        // 2026-11-25T12:00:00Z
        assert!(text.len() == 20 && text.ends_with('Z'), "{place}: {text}");
    }
}
