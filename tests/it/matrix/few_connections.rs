//! Few connections: an admin with a connection limit, a database with one, and the engine's own limit. Mayfly works
//! with the few free connections, and waits if none is free.

use std::time::Instant;

use mayfly_tests::postgres::{Admin, Credential, Server, Site, scalar};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::System;
use mayfly_tests::{eventually, seconds, word};
use serde_json::{Value, json};

/// A dispatcher whose callers wait long: the test is that all get an answer, not how soon on a busy machine.
async fn patient() -> System {
    let deadline = ("MAYFLY__CREATE__DEADLINE_SECONDS", "50");
    System::start_with(Rabbit::shared(), &[deadline]).await
}

/// Reads at the same time; each answer.
async fn reads(system: &System, paths: &[String], number: usize) -> Vec<(u16, Value)> {
    let reading = (0..number).map(|n| async move {
        let path = &paths[n % paths.len()];
        system.api.get(&format!("/v1/secrets/{path}")).await
    });
    futures_util::future::join_all(reading).await
}

fn all_work(answers: &[(u16, Value)]) {
    let refused: Vec<&(u16, Value)> = answers
        .iter()
        .filter(|(status, _)| *status != 200)
        .collect();
    assert!(
        refused.is_empty(),
        "{} of {} refused, such as {:?}",
        refused.len(),
        answers.len(),
        refused[0]
    );
}

/// Another database of a site's server, owned by its admin.
async fn another_database(site: &Site) -> String {
    let name = format!("other_{}", word());
    let root = site.server.superuser("postgres").await;
    root.batch_execute(&format!("CREATE DATABASE {name} OWNER {}", site.name))
        .await
        .unwrap();
    let db = site.server.login(&site.name, &site.password, &name).await;
    db.unwrap()
        .batch_execute("CREATE TABLE t (id int)")
        .await
        .unwrap();
    name
}

async fn limited(server: Server) {
    let system = patient().await;
    let pool = system.pool().await;
    let _engines = [system.engine(&pool).await, system.engine(&pool).await];
    let site = server.site(Admin::CreateRole).await;
    let other = another_database(&site).await;
    let root = site.server.superuser("postgres").await;
    root.batch_execute(&format!("ALTER ROLE {} CONNECTION LIMIT 5", site.name))
        .await
        .unwrap();
    let paths = [
        system.secret(&site, &pool, json!({})).await,
        system
            .secret(&site, &pool, json!({"database": other}))
            .await,
        system
            .secret(
                &site,
                &pool,
                json!({"grantPermissions": {"what": "INSERT", "where": "app.*"}}),
            )
            .await,
    ];
    let answers = reads(&system, &paths, 60).await;
    all_work(&answers);
    for (_, answer) in answers.iter().take(6) {
        assert!(Credential::from_answer(answer).login().await.is_ok());
    }
    // All accounts can also be ended with these connections.
    let (status, _) = system
        .api
        .delete(&format!("/v1/leases?path=db:{}", site.name))
        .await;
    assert!(status < 300);
    eventually("all accounts are gone", seconds(30), async || {
        let prefix = mayfly_tests::system::prefix(&site);
        site.server.roles(&prefix).await.is_empty().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_admin_of_five_connections_serves_sixty_reads_at_once() {
    limited(Server::pg15()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_admin_of_five_connections_serves_sixty_reads_at_once_on_18() {
    limited(Server::pg18()).await;
}

/// The limit of the admin's database has the same effect.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_of_four_connections_serves_sixty_reads_at_once() {
    let system = patient().await;
    let pool = system.pool().await;
    let _engines = [system.engine(&pool).await, system.engine(&pool).await];
    let site = Server::pg15().site(Admin::CreateRole).await;
    let path = system.secret(&site, &pool, json!({})).await;
    let root = site.server.superuser("postgres").await;
    root.batch_execute(&format!("ALTER DATABASE {0} CONNECTION LIMIT 4", site.name))
        .await
        .unwrap();
    all_work(&reads(&system, &[path], 60).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_keeps_within_its_bound() {
    let system = patient().await;
    let pool = system.pool().await;
    let bound = ("MAYFLY__ENGINE__CONNECTIONS_PER_SERVER", "4");
    let engine = system.engine_with(&pool, &[bound]);
    engine.ready().await;
    let site = Server::pg15().site(Admin::CreateRole).await;
    let mut paths = vec![system.secret(&site, &pool, json!({})).await];
    for _ in 0..2 {
        let database = another_database(&site).await;
        paths.push(
            system
                .secret(&site, &pool, json!({"database": database}))
                .await,
        );
    }
    let (most, answers) = site.most_sessions(reads(&system, &paths, 60)).await;
    all_work(&answers);
    // The number includes the kept connection.
    assert!((2..=5).contains(&most), "{most} sessions");
}

/// Longer than the engine itself waits, and within the caller's deadline.
#[tokio::test(flavor = "multi_thread")]
async fn too_many_connections_are_waited_out() {
    let (system, site, path, _engine) = Scenario::on(Server::pg18()).start().await;
    let root = site.server.superuser("postgres").await;
    root.batch_execute(&format!("ALTER ROLE {} CONNECTION LIMIT 3", site.name))
        .await
        .unwrap();
    let taken = [site.admin().await, site.admin().await, site.admin().await];
    let begun = Instant::now();
    let free = async {
        tokio::time::sleep(seconds(9)).await;
        drop(taken);
    };
    let read = format!("/v1/secrets/{path}");
    let ((status, answer), ()) = tokio::join!(system.api.get(&read), free);
    assert_eq!(status, 200, "{answer}");
    assert!(begun.elapsed() >= seconds(9));
    assert!(Credential::from_answer(&answer).login().await.is_ok());
}

/// A renewal works while accounts hold every connection slot: it uses the kept connection.
#[tokio::test(flavor = "multi_thread")]
async fn a_lease_is_renewed_at_a_full_server() {
    let (system, site, path, _engine) = Scenario::on(Server::pg15()).start().await;
    let credential = system.issue(&path, Some(120)).await;
    let root = site.server.superuser("postgres").await;
    // The kept connection stays; no other session gets in.
    eventually(
        "only the kept connection is left",
        seconds(20),
        async || {
            let query = format!(
                "SELECT count(*) FROM pg_stat_activity WHERE usename = '{}'",
                site.name
            );
            (scalar(&root, &query).await == "1").then_some(())
        },
    )
    .await;
    root.batch_execute(&format!("ALTER ROLE {} CONNECTION LIMIT 1", site.name))
        .await
        .unwrap();
    assert!(
        site.server
            .login(&site.name, &site.password, &site.name)
            .await
            .is_err()
    );
    let renew = format!("/v1/leases/{}/renew", credential.lease);
    for increment in [200, 250] {
        let body = json!({"increment": increment});
        let (status, answer) = system.api.post(&renew, body).await;
        assert_eq!(status, 200, "{answer}");
    }
    let (_, lease) = system
        .api
        .get(&format!("/v1/leases/{}", credential.lease))
        .await;
    let until: jiff::Timestamp = lease["expiration"].as_str().unwrap().parse().unwrap();
    assert!(until > credential.expiration, "{lease}");
}
