//! Reads that certainly made nothing leave nothing: no message parked for the life of an account that never existed,
//! and no row for long.

use mayfly_tests::postgres::Server;
use mayfly_tests::process::free_port;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::System;
use mayfly_tests::{eventually, seconds};
use serde_json::{Value, json};

/// Messages that wait in the delay levels, except a probe of the levels.
fn parked(system: &System) -> u64 {
    system.rabbit.messages(".delay.L").saturating_sub(1)
}

async fn leases(system: &System, path: &str) -> Vec<Value> {
    let all = system
        .api
        .ok(&format!("/v1/leases?path={path}&limit=500"))
        .await;
    all["leases"].as_array().unwrap().clone()
}

#[tokio::test]
async fn reads_against_a_dead_database() {
    let (system, site, pool, _engine) = Scenario::on(Server::pg15()).start_without_secret().await;
    let mut data = site.data();
    data["port"] = json!(free_port());
    let base = format!("db:{}:dead", site.name);
    let secret = json!({"attributes": {"type": "postgresql"}, "data": data});
    system
        .api
        .create(&format!("/v1/secrets/{base}"), secret)
        .await;
    let dead = system
        .secret(
            &site,
            &pool,
            json!({"linkConfig": {"linkType": "dynamic", "linkedSecret": base}, "ttl": 86_400}),
        )
        .await;
    for _ in 0..300 {
        let (status, body) = system.api.get(&format!("/v1/secrets/{dead}")).await;
        let error = body["error"].as_str();
        assert_eq!(
            (status, error),
            (502, Some("database_unreachable")),
            "{body}"
        );
    }
    // The end of the first lease was parked together with the create.
    let (messages, rows) = (parked(&system), leases(&system, &dead).await);
    assert!(
        messages <= 2 && rows.len() <= 2,
        "{messages} messages, {} rows",
        rows.len()
    );
    assert!(rows.iter().all(|row| row["state"] == "failed"), "{rows:?}");

    // An impossible grant leaves nothing either. When the grant becomes possible, the secret can be read.
    let grants = json!({"grantPermissions": {"what": "SELECT", "where": "app.later"}, "ttl": 3000});
    let later = system.secret(&site, &pool, grants).await;
    for _ in 0..20 {
        let (status, body) = system.api.get(&format!("/v1/secrets/{later}")).await;
        let error = body["error"].as_str();
        assert_eq!((status, error), (422, Some("no_such_object")), "{body}");
    }
    let (messages, rows) = (parked(&system), leases(&system, &later).await);
    assert!(
        messages <= 4 && rows.len() <= 2,
        "{messages} messages, {} rows",
        rows.len()
    );
    let admin = site.admin().await;
    admin
        .batch_execute("CREATE TABLE app.later (id int)")
        .await
        .unwrap();
    let credential = eventually("it can be read", seconds(30), async || {
        let (status, answer) = system.api.get(&format!("/v1/secrets/{later}?ttl=3")).await;
        (status == 200).then(|| mayfly_tests::postgres::Credential::from_answer(&answer))
    })
    .await;
    system.gone(&site, &credential, seconds(30)).await;
}
