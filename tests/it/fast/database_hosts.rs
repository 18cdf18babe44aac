//! `pool.hosts`: an engine connects only to the hosts that its own operator allows, for any base secret.

use std::process::Command;

use mayfly_tests::postgres::{Admin, Server};
use mayfly_tests::process::binary;
use mayfly_tests::rogue::{Rogue, Wants};
use mayfly_tests::system::System;
use serde_json::json;

#[tokio::test]
async fn an_engine_connects_only_where_it_may() {
    let system = System::start().await;
    let site = Server::pg15().site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let allowed = format!("*.db.example, 127.0.0.0/8:{}", site.server.port());
    let engine = system.engine_with(&pool, &[("MAYFLY__POOL__HOSTS", allowed.as_str())]);
    engine.ready().await;
    let path = system.secret(&site, &pool, json!({})).await;
    assert!(system.issue(&path, None).await.login().await.is_ok());

    let rogue = Rogue::start(Wants::Password, false).await;
    let base = format!("/v1/secrets/db:{}:root", site.name);
    let to = async |host: &str, port: u16| {
        let data = json!({"host": host, "port": port, "password": site.password});
        let (status, body) = system.api.put(&base, json!({"data": data})).await;
        assert_eq!(status, 200, "{body}");
    };
    to("127.0.0.1", rogue.port).await;
    let (status, body) = system.api.get(&format!("/v1/secrets/{path}")).await;
    assert_eq!(
        (status, body["error"].as_str()),
        (502, Some("database_unreachable")),
        "{body}"
    );
    let said = body["message"].as_str().unwrap();
    let place = format!("127.0.0.1:{}", rogue.port);
    assert!(
        said.contains(&place) && said.contains("pool.hosts"),
        "{said}"
    );
    // A request by hand does not change that.
    for act in ["check", "rotate", "tidy"] {
        let (_, body) = system.api.post(&format!("{base}::{act}"), json!({})).await;
        assert!(body.to_string().contains("pool.hosts"), "{act}: {body}");
    }
    // If a secret names several hosts, only the allowed hosts are used.
    to(&format!("{place},127.0.0.1"), site.server.port()).await;
    system.api.ok(&format!("/v1/secrets/{path}")).await;
    assert_eq!(rogue.logins(), 0);
}

#[test]
fn a_bad_list_of_hosts_is_said_at_the_start() {
    for (list, said) in [
        ("db1,,db2", "empty entry"),
        ("db1:x", "port"),
        ("", "empty entry"),
    ] {
        let output = Command::new(binary("mayfly-engine"))
            .env("MAYFLY__AMQP__URL", "amqp://127.0.0.1:1")
            .env("MAYFLY__POOL__HOSTS", list)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(64), "{list:?}: {text}");
        assert!(
            text.contains("pool.hosts") && text.contains(said),
            "{list:?}: {text}"
        );
    }
}
