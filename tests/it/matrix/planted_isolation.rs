//! A default isolation of repeatable read or serializable, set on the admin, the database or the server: no account
//! dies early because of it, and a store with it works for several dispatchers.

use mayfly_tests::postgres::{Admin, Credential, Server, Site, scalar};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::system::System;
use mayfly_tests::{eventually, run_dir, seconds, word};
use serde_json::json;
use tokio_postgres::Client;

const LEVELS: [&str; 2] = ["repeatable read", "serializable"];

/// Number of sessions that wait for a lock on pg_authid.
async fn waiting(root: &Client) -> usize {
    let query =
        "SELECT count(*) FROM pg_locks WHERE relation = 'pg_authid'::regclass AND NOT granted";
    scalar(root, query).await.parse().unwrap()
}

/// Accounts whose end a renewal moves between the first look of their revocation and the change: the
/// revocation has looked, and waits for the lock that this holds.
async fn renewed_during_a_revocation(server: &Server, sites: &[Site]) {
    let system = System::start().await;
    let pool = system.pool().await;
    let _engine = system.engine(&pool).await;
    let mut credentials: Vec<Credential> = Vec::new();
    for site in sites {
        let path = system.secret(site, &pool, json!({})).await;
        credentials.push(system.issue(&path, Some(15)).await);
    }
    let mut holder = server.superuser("postgres").await;
    let root = server.superuser("postgres").await;
    // Reads continue beside this lock, but changes wait. The engine waits for 3 s, and then looks again.
    let moved = holder.transaction().await.unwrap();
    moved
        .batch_execute("LOCK TABLE pg_authid IN SHARE MODE")
        .await
        .unwrap();
    let all = sites.len();
    eventually("every revocation waits", seconds(40), async || {
        (waiting(&root).await == all).then_some(())
    })
    .await;
    for credential in &credentials {
        let renewal = format!(
            "ALTER ROLE \"{}\" VALID UNTIL '{}'",
            credential.username,
            jiff::Timestamp::now() + jiff::SignedDuration::from_hours(1)
        );
        moved.batch_execute(&renewal).await.unwrap();
    }
    moved.commit().await.unwrap();
    for credential in &credentials {
        // The revocation has found the new end.
        eventually("the end is corrected", seconds(30), async || {
            let lease = system.lease(&credential.lease).await;
            assert_eq!(lease["state"], "active", "{lease}");
            let until: jiff::Timestamp = lease["expiration"].as_str()?.parse().unwrap();
            (until > credential.expiration + jiff::SignedDuration::from_mins(30)).then_some(())
        })
        .await;
        assert!(credential.login().await.is_ok(), "an account died early");
    }
}

async fn sites(server: &Server) -> Vec<Site> {
    let root = server.superuser("postgres").await;
    let mut sites = Vec::new();
    for kind in ["ROLE", "DATABASE"] {
        for level in LEVELS {
            let site = server.site(Admin::CreateRole).await;
            root.batch_execute(&format!(
                "ALTER {kind} {} SET default_transaction_isolation = '{level}'",
                site.name
            ))
            .await
            .unwrap();
            sites.push(site);
        }
    }
    sites
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewal_wins_whatever_isolation_admin_and_database_default_to() {
    let server = Server::own("fsync = off");
    renewed_during_a_revocation(&server, &sites(&server).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewal_wins_whatever_isolation_admin_and_database_default_to_on_18() {
    let server = Server::of_version("18");
    renewed_during_a_revocation(&server, &sites(&server).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewal_wins_whatever_isolation_the_server_defaults_to() {
    for level in LEVELS {
        let options = format!("fsync = off\ndefault_transaction_isolation = '{level}'");
        let server = Server::own(&options);
        let site = server.site(Admin::CreateRole).await;
        renewed_during_a_revocation(&server, &[site]).await;
    }
}

/// With a snapshot from the transaction's first statement a dispatcher would not see what the transaction before it
/// wrote.
#[tokio::test(flavor = "multi_thread")]
async fn two_dispatchers_share_a_store_of_another_isolation() {
    let server = Server::pg15();
    let site = server.site(Admin::CreateRole).await;
    for (kind, level) in [("DATABASE", LEVELS[0]), ("ROLE", LEVELS[1])] {
        let url = server.store().await;
        let name = url.rsplit('/').next().unwrap().split('?').next().unwrap();
        let root = server.superuser("postgres").await;
        root.batch_execute(&format!(
            "ALTER {kind} {name} SET default_transaction_isolation = '{level}'"
        ))
        .await
        .unwrap();
        let file = run_dir().join(format!("store-url-{}", word()));
        std::fs::write(&file, &url).unwrap();
        let environment = [("MAYFLY__STORE__URL_FILE", file.to_str().unwrap())];
        let first = System::start_with(Rabbit::shared(), &environment).await;
        let second = first.beside(&[]);
        second.ready().await;
        first.broker_up().await;
        second.broker_up().await;
        let pool = first.pool().await;
        let _engine = first.engine(&pool).await;
        let path = first.secret(&site, &pool, json!({})).await;
        let read = format!("/v1/secrets/{path}");
        let reading = (0..120).map(|n| {
            let system = if n % 2 == 0 { &first } else { &second };
            system.api.get(&read)
        });
        let answers = futures_util::future::join_all(reading).await;
        let refused = answers.iter().filter(|(status, _)| *status != 200);
        let refused: Vec<_> = refused.collect();
        assert!(
            refused.is_empty(),
            "{kind} {level}: {} refused, such as {:?}",
            refused.len(),
            refused[0]
        );
        let (status, _) = first.api.delete(&format!("/v1/leases?path={path}")).await;
        assert!(status < 300);
    }
}
