//! The command line against a real system: the documented bodies, the documented behaviour, and the exit codes.

use std::process::Command;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use mayfly_tests::cli::Cli;
use mayfly_tests::postgres::{Admin, Server};
use mayfly_tests::process::binary;
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::system::System;
use mayfly_tests::{run_dir, seconds, word};
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn what_a_user_does() {
    let system = System::start().await;
    let site = Server::pg18().site(Admin::CreateRole).await;
    system.broker_up().await;
    let cli = Cli { system: &system };
    cli.ok(&["pool", "create", "pool1", "--key-file", "pool1.key"]);
    cli.fails(1, &["pool", "create", "pool1", "--key-file", "again.key"]);
    assert!(!system.directory.join("again.key").exists());
    let root = r#"{ "path": "db:postgresql:root", "attributes": {"type": "postgresql"}, "description": "postgresql root credentials",
  "data": {"host": "127.0.0.1", "password": PASSWORD, "port": PORT, "username": "USER", "database": "USER"} }"#;
    let root = root
        .replace("PASSWORD", &serde_json::to_string(&site.password).unwrap())
        .replace("PORT", &site.server.port().to_string())
        .replace("USER", &site.name);
    std::fs::write(system.directory.join("root.json"), root).unwrap();
    let dynamic = r#"{ "path": "db:postgresql:dyn1",
  "attributes": { "grantPermissions": {"what": "SELECT", "where": "*.*"},
    "linkConfig": {"linkType": "dynamic", "linkedSecret": "db:postgresql:root"}, "pool": "pool1", "ttl": 1000, },
  "data": {}, }"#;
    std::fs::write(system.directory.join("dyn1.json"), dynamic).unwrap();
    cli.ok(&["secret", "create", "--body", "@root.json"]);
    cli.ok(&["secret", "create", "--body", "@dyn1.json"]);
    cli.fails(1, &["secret", "create", "--body", "@dyn1.json"]);
    cli.fails(5, &["secret", "read", "db:postgresql:dyn1"]);
    let engine = system.engine("pool1").await;

    let user = cli.ok(&[
        "secret",
        "read",
        "db:postgresql:dyn1",
        "--ttl",
        "60",
        "-f",
        "data.username",
    ]);
    assert!(site.server.roles(&user).await == [user.clone()]);
    cli.ok(&["secret", "db/postgresql/dyn1", "-o", "file:credential.json"]);
    let credential: serde_json::Value = serde_json::from_str(
        &std::fs::read_to_string(system.directory.join("credential.json")).unwrap(),
    )
    .unwrap();
    let credential = mayfly_tests::postgres::Credential::from_answer(&credential);
    assert!(credential.login().await.is_ok());
    assert_eq!(
        cli.ok(&["lease", "show", &credential.lease, "-f", "engine"]),
        engine.name
    );
    assert!(cli.ok(&["lease", "list", "--role", &user]).contains(&user));
    let (by_psql, status) = {
        let psql = std::fs::read_to_string(site.server.directory().join("bin")).unwrap();
        let psql = format!("{}/psql", psql.trim());
        let output = cli.run(&[
            "exec",
            "db:postgresql:dyn1",
            "--",
            &psql,
            "-Atc",
            "SELECT count(*), current_user FROM items",
        ]);
        (
            String::from_utf8(output.stdout).unwrap(),
            output.status.code(),
        )
    };
    assert!(status == Some(0) && by_psql.starts_with("2|"), "{by_psql}");
    let role = by_psql.trim().trim_start_matches("2|").to_owned();
    mayfly_tests::eventually("exec's account is gone", seconds(10), async || {
        site.server.roles(&role).await.is_empty().then_some(())
    })
    .await;
    assert_eq!(
        cli.run(&["exec", "db:postgresql:dyn1", "--", "sh", "-c", "exit 7"])
            .status
            .code(),
        Some(7)
    );

    cli.ok(&["lease", "revoke", "--path", "db:postgresql"]);
    system.gone(&site, &credential, seconds(10)).await;
    let engines = cli.ok(&["engine", "list"]);
    assert!(engines.contains(&engine.name), "{engines}");
    cli.ok(&["engine", "ping", &engine.name]);
    assert!(cli.ok(&["status"]).contains("pool1"));
    let token = cli.ok(&[
        "token",
        "create",
        "--read",
        "db:postgresql:*",
        "--ttl",
        "1h",
        "-f",
        "token",
    ]);
    let limited = cli
        .command(&["pool", "list"])
        .env("MAYFLY_TOKEN", &token)
        .output()
        .unwrap();
    assert_eq!(limited.status.code(), Some(4));
    cli.fails(3, &["secret", "read", "no:such"]);
    cli.fails(2, &["secret", "create", "x:y", "--data", "{"]);
    cli.fails(
        1,
        &["secret", "read", "db:postgresql:root", "-f", "data.nothing"],
    );
    let away = cli
        .command(&["status"])
        .env("MAYFLY_ADDRESS", "http://127.0.0.1:1")
        .output()
        .unwrap();
    assert_eq!(away.status.code(), Some(5));
    assert!(cli.ok(&["completions", "bash"]).contains("mayfly"));
}

/// What a Kubernetes Secret of this manifest holds under a key.
fn held(manifest: &str, name: &str, key: &str) -> String {
    let manifest: serde_json::Value = serde_json::from_str(manifest).unwrap();
    assert_eq!(manifest["kind"], "Secret");
    assert_eq!(manifest["metadata"]["name"], name);
    let value = manifest["data"][key].as_str().unwrap();
    String::from_utf8(BASE64_STANDARD.decode(value).unwrap()).unwrap()
}

/// Keys that were made before, for pods that cannot keep the keys that they make.
#[tokio::test(flavor = "multi_thread")]
async fn keys_come_as_kubernetes_secrets() {
    let init = |name: &str| {
        let mut command = Command::new(binary("mayfly"));
        command.args(["init", "--secret", name]).output().unwrap()
    };
    assert_eq!(init("Not_A_Name").status.code(), Some(2));
    let manifest = String::from_utf8(init("mayfly-keys").stdout).unwrap();
    let directory = run_dir().join(format!("keys-{}", word()));
    std::fs::create_dir_all(&directory).unwrap();
    let file = |key: &str| {
        let file = directory.join(key);
        std::fs::write(&file, held(&manifest, "mayfly-keys", key)).unwrap();
        file.to_str().unwrap().to_owned()
    };
    let (master_key, root_token) = (file("master-key"), file("root-token"));
    let given = std::fs::read_to_string(&root_token).unwrap();
    let settings = [
        ("MAYFLY__SEAL__KEY_FILE", master_key.as_str()),
        ("MAYFLY__INIT__ROOT_TOKEN_FILE", root_token.as_str()),
    ];
    let system = System::start_with(Rabbit::shared(), &settings).await;
    assert_eq!(
        std::fs::read_to_string(&root_token).unwrap(),
        given,
        "written again"
    );
    assert!(!system.directory.join("data/master-key").exists());
    system.broker_up().await;

    let cli = Cli { system: &system };
    let arguments = ["pool", "create", "orders", "--secret", "mayfly-pool-orders"];
    let manifest = cli.ok(&arguments);
    let key = held(&manifest, "mayfly-pool-orders", "pool.key");
    std::fs::write(system.key_file("orders"), key).unwrap();
    let _engine = system.engine("orders").await;
    let site = Server::pg15().site(Admin::CreateRole).await;
    let path = system.secret(&site, "orders", json!({})).await;
    assert!(system.issue(&path, None).await.login().await.is_ok());
}
