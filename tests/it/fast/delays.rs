//! Leases with TTLs from a second to a year never delay each other.

use mayfly_tests::postgres::Server;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::seconds;
use serde_json::json;

#[tokio::test]
async fn mixed_ttls() {
    let (system, site, path, _engine) = Scenario::on(Server::pg18())
        .attributes(json!({"ttl": 31_536_000}))
        .start()
        .await;
    let mut long = Vec::new();
    let mut short = Vec::new();
    for ttl in [31_536_000, 4_000_000, 86_400, 4_200_000, 3_600, 65] {
        long.push(system.issue(&path, Some(ttl)).await);
        short.push((system.issue(&path, Some(1 + ttl % 4)).await, 1 + ttl % 4));
    }
    for (credential, _) in &short {
        let lease = system
            .lease_becomes(&credential.lease, "revoked", seconds(12))
            .await;
        let at: jiff::Timestamp = lease["revokedAt"].as_str().unwrap().parse().unwrap();
        let late = at.duration_since(credential.expiration).as_secs_f64();
        // Behind a lease with a long TTL the end would wait for more than a minute.
        assert!((0.0..10.0).contains(&late), "{late} s late");
    }
    for credential in &long {
        assert!(credential.login().await.is_ok(), "a long lease died early");
    }
    let revoked = system.api.delete(&format!("/v1/leases?path={path}")).await;
    assert_eq!(revoked.0, 200);
    for credential in &long {
        system.gone(&site, credential, seconds(15)).await;
    }
}
