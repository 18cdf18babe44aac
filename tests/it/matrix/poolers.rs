//! PgBouncer between the engine and the server, and between applications and the server, in session and
//! in transaction mode: accounts are made, renewed and ended, and what a pooler takes away is reported.

use mayfly_tests::pgbouncer::{Mode, PgBouncer};
use mayfly_tests::postgres::{Admin, Credential, Server, Site, scalar};
use mayfly_tests::system::System;
use mayfly_tests::{eventually, seconds};
use serde_json::{Value, json};

/// Stores a base secret that leads to this port, and a dynamic one linked to it.
async fn secret(system: &System, site: &Site, port: u16, pool: &str) -> String {
    let mut data = site.data();
    data["port"] = json!(port);
    let base = format!("/v1/secrets/db:{}:root", site.name);
    let body = json!({"attributes": {"type": "postgresql"}, "data": data});
    system.api.create(&base, body).await;
    let what = json!({"what": "SELECT,INSERT", "where": "*.*"});
    system
        .secret(site, pool, json!({"grantPermissions": what}))
        .await
}

async fn gone(site: &Site, credential: &Credential) {
    let root = site.server.superuser("postgres").await;
    let name = &credential.username;
    eventually(
        "the account and its sessions are gone",
        seconds(30),
        async || {
            let query = format!(
                "SELECT (SELECT count(*) FROM pg_roles WHERE rolname = '{name}') + \
                 (SELECT count(*) FROM pg_stat_activity WHERE usename = '{name}')"
            );
            (scalar(&root, &query).await == "0").then_some(())
        },
    )
    .await;
    assert!(credential.login().await.is_err(), "it lets in");
}

/// The life of accounts. Applications connect through the pooler, and engines too if `engines_too`.
async fn life(server: Server, mode: Mode, engines_too: bool) {
    let system = System::start().await;
    let pool = system.pool().await;
    let _engines = [system.engine(&pool).await, system.engine(&pool).await];
    let site = server.site(Admin::CreateRole).await;
    let pooler = PgBouncer::start(&site.server, &[&site.name], mode, "").await;
    let port = match engines_too {
        true => pooler.port,
        false => site.server.port(),
    };
    let path = secret(&system, &site, port, &pool).await;
    let read = format!("/v1/secrets/{path}");
    let reading = (0..20).map(|_| system.api.get(&read));
    let answers = futures_util::future::join_all(reading).await;
    let mut credentials = Vec::new();
    for (status, answer) in &answers {
        assert_eq!(*status, 200, "{answer}");
        credentials.push(Credential {
            port: pooler.port,
            ..Credential::from_answer(answer)
        });
    }

    // The accounts work. They have what was granted and no more.
    for credential in &credentials[..4] {
        let client = credential.login().await.unwrap();
        assert_eq!(scalar(&client, "SELECT count(*) > 1 FROM items").await, "t");
        client
            .batch_execute("INSERT INTO items (note) VALUES ('by way of a pooler')")
            .await
            .unwrap();
        assert!(client.batch_execute("DELETE FROM items").await.is_err());
    }
    let renewed = &credentials[0];
    let renew = format!("/v1/leases/{}/renew", renewed.lease);
    let (status, answer) = system.api.post(&renew, json!({"increment": 400})).await;
    assert_eq!(status, 200, "{answer}");

    // A revocation ends what is open: at rest, in a transaction, and in a statement.
    let resting = renewed.login().await.unwrap();
    assert_eq!(scalar(&resting, "SELECT 1").await, "1");
    let busy = renewed.login().await.unwrap();
    busy.batch_execute("BEGIN; SELECT 1").await.unwrap();
    let sleeping = renewed.login().await.unwrap();
    let asleep = tokio::spawn(async move { sleeping.batch_execute("SELECT pg_sleep(300)").await });
    system
        .api
        .delete(&format!("/v1/leases/{}", renewed.lease))
        .await;
    gone(&site, renewed).await;
    assert!(busy.batch_execute("SELECT 1").await.is_err());
    assert!(resting.batch_execute("SELECT 1").await.is_err());
    assert!(asleep.await.unwrap().is_err());

    // The end of the TTL ends an open session too.
    let short = Credential {
        port: pooler.port,
        ..system.issue(&path, Some(5)).await
    };
    let open = short.login().await.unwrap();
    gone(&site, &short).await;
    assert!(open.batch_execute("SELECT 1").await.is_err());

    // The others too, and then nothing is left.
    let (status, _) = system.api.delete(&format!("/v1/leases?path={path}")).await;
    assert!(status < 300);
    site.no_accounts(seconds(40)).await;
    assert!(pooler.is_alive());

    if engines_too {
        let findings = checked(&system, &path).await;
        let finding = findings.iter().find(|one| one["check"] == "pooler");
        match (mode, finding) {
            (Mode::Transaction, Some(finding)) => {
                let message = finding["message"].as_str().unwrap();
                assert!(
                    finding["ok"] == false && message.contains("transaction pooler"),
                    "{finding}"
                );
            }
            (Mode::Session, None) => {}
            _ => panic!("{mode:?}: {findings:#?}"),
        }
    }
}

async fn checked(system: &System, path: &str) -> Vec<Value> {
    let check = format!("/v1/secrets/{path}::check");
    let (status, answer) = system.api.post(&check, json!({})).await;
    assert_eq!(status, 200, "{answer}");
    answer["findings"].as_array().unwrap().clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn accounts_live_behind_a_session_pooler() {
    life(Server::pg15(), Mode::Session, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn accounts_live_behind_a_transaction_pooler() {
    life(Server::pg18(), Mode::Transaction, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn applications_behind_a_session_pooler() {
    life(Server::pg18(), Mode::Session, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn applications_behind_a_transaction_pooler() {
    life(Server::pg15(), Mode::Transaction, false).await;
}
