//! Planted secrets are searched for in everything that is written: store, logs, broker, server.

use mayfly_tests::files_with;
use mayfly_tests::postgres::{Admin, Server};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::seconds;
use mayfly_tests::system::System;
use serde_json::json;

#[tokio::test]
async fn nothing_is_written_in_clear() {
    let system = System::start_on(Rabbit::own()).await;
    let server = Server::own("log_statement = 'all'\nlog_min_duration_statement = 0");
    let mut site = server.site(Admin::Superuser).await;
    let admin_password = "PlantedAdminPassword42";
    let root = server.superuser("postgres").await;
    root.batch_execute(&format!(
        "ALTER ROLE {} PASSWORD '{admin_password}'",
        site.name
    ))
    .await
    .unwrap();
    site.password = admin_password.to_owned();
    let pool = system.pool().await;
    let engine = system.engine(&pool).await;
    let path = system.secret(&site, &pool, json!({})).await;
    system
        .api
        .create(
            "/v1/secrets/static:planted",
            json!({"data": {"word": "PlantedStaticWord42"}}),
        )
        .await;
    assert_eq!(
        system.api.ok("/v1/secrets/static:planted").await["data"]["word"],
        "PlantedStaticWord42"
    );
    let credential = system.issue(&path, Some(2)).await;
    let parked = system.issue(&path, Some(200)).await;
    credential.login().await.unwrap();
    // A failure is where secrets could be printed.
    let bad = system
        .secret(
            &site,
            &pool,
            json!({"grantPermissions": {"what": "SELECT", "where": "no.table"}}),
        )
        .await;
    system.api.get(&format!("/v1/secrets/{bad}")).await;
    system.gone(&site, &credential, seconds(10)).await;
    system
        .api
        .delete(&format!("/v1/leases/{}", parked.lease))
        .await;
    system.gone(&site, &parked, seconds(10)).await;
    let key = std::fs::read_to_string(system.directory.join(format!("{pool}.key"))).unwrap();
    let key: serde_json::Value = serde_json::from_str(&key).unwrap();
    let pool_key = key["privateKey"].as_str().unwrap();
    let metrics = system.admin_text("/metrics").await + &engine.admin_text("/metrics").await;

    // The test's own statement above is in the server's log once; nothing else may be.
    for (what, secret) in [
        ("an account's password", credential.password.as_str()),
        ("an account's password", parked.password.as_str()),
        ("a static secret", "PlantedStaticWord42"),
        ("the admin's password", admin_password),
        ("the pool's key", pool_key),
        ("the root token", system.api.token.as_str()),
    ] {
        let mut found: Vec<_> = [
            system.directory.as_path(),
            system.rabbit.directory(),
            server.directory(),
        ]
        .into_iter()
        .flat_map(|directory| files_with(directory, secret.as_bytes()))
        .collect();
        found.retain(|file| {
            let expected = match what {
                "the admin's password" => {
                    file.ends_with("log") && file.starts_with(server.directory())
                }
                "the pool's key" => file.extension().is_some_and(|end| end == "key"),
                "the root token" => file.ends_with("root-token"),
                _ => false,
            };
            !expected
        });
        assert!(found.is_empty(), "{what} is in {found:?}");
        assert!(!metrics.contains(secret), "{what} is in the metrics");
    }
    for file in ["data/root-token", "data/master-key", "data/mayfly.db"] {
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::metadata(system.directory.join(file))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o077, 0, "{file} can be read by others");
    }
    let base = system
        .api
        .ok(&format!("/v1/secrets/db:{}:root", site.name))
        .await;
    assert!(base["data"]["host"].is_string() && !base.to_string().contains(admin_password));
}
