//! Jobs of accounts in pg_cron end with the account; what only looks like pg_cron is not touched.

use mayfly_tests::postgres::{Admin, Credential, Server, Site, scalar};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::System;
use mayfly_tests::{eventually, seconds};
use serde_json::json;

async fn revoke(system: &System, site: &Site, account: &Credential) {
    let (status, _) = system
        .api
        .delete(&format!("/v1/leases/{}", account.lease))
        .await;
    assert!(status < 300);
    eventually("the account is gone", seconds(20), async || {
        let roles = site.server.roles(&account.username).await;
        roles.is_empty().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_end_with_their_account() {
    let server =
        Server::own("shared_preload_libraries = 'pg_cron'\ncron.database_name = 'postgres'");
    let system = System::start().await;
    let pool = system.pool().await;
    let _engine = system.engine(&pool).await;
    let root = server.superuser("postgres").await;
    root.batch_execute("CREATE EXTENSION pg_cron; GRANT USAGE ON SCHEMA cron TO PUBLIC")
        .await
        .unwrap();
    let schedule = "SELECT cron.schedule('0 0 1 1 *', 'SELECT 1')";
    scalar(&root, schedule).await;
    for admin in [Admin::Superuser, Admin::CreateRole] {
        let site = server.site(admin).await;
        let path = system.secret(&site, &pool, json!({})).await;
        let (account, other) = (
            system.issue(&path, None).await,
            system.issue(&path, None).await,
        );
        for account in [&account, &other] {
            let client = account.login_to("postgres").await.unwrap();
            scalar(&client, schedule).await;
            scalar(&client, schedule).await;
        }
        let jobs = async |user: &str| {
            let query = format!("SELECT count(*) FROM cron.job WHERE username = '{user}'");
            scalar(&root, &query).await
        };
        assert_eq!(jobs(&account.username).await, "2");
        revoke(&system, &site, &account).await;
        assert_eq!(jobs(&account.username).await, "0", "{admin:?}");
        assert_eq!(jobs(&other.username).await, "2");
        assert_eq!(jobs("postgres").await, "1");
        revoke(&system, &site, &other).await;
        assert_eq!(jobs(&other.username).await, "0");
    }
}

/// The owner of the scheduler's database plants what looks like it: nothing of it runs.
#[tokio::test(flavor = "multi_thread")]
async fn what_looks_like_pg_cron_is_not_called() {
    let server = Server::own("shared_preload_libraries = 'pg_cron'\ncron.database_name = 'trap'");
    let (system, site, path, _engine) = Scenario::on(server.clone())
        .admin(Admin::Superuser)
        .start()
        .await;
    let account = system.issue(&path, None).await;
    let root = server.superuser("postgres").await;
    root.batch_execute("CREATE ROLE mallory LOGIN PASSWORD 'theirs'")
        .await
        .unwrap();
    root.batch_execute("CREATE DATABASE trap OWNER mallory")
        .await
        .unwrap();
    let mallory = server.login("mallory", "theirs", "trap").await.unwrap();
    let plant = format!(
        "CREATE SCHEMA cron; CREATE TABLE cron.job (jobid bigint, username text); \
         INSERT INTO cron.job VALUES (1, '{}'); \
         CREATE FUNCTION cron.unschedule(bigint) RETURNS bool LANGUAGE plpgsql AS \
         'BEGIN EXECUTE ''ALTER ROLE mallory SUPERUSER''; RETURN true; END'",
        account.username
    );
    mallory.batch_execute(&plant).await.unwrap();
    revoke(&system, &site, &account).await;
    let query = "SELECT rolsuper FROM pg_roles WHERE rolname = 'mallory'";
    assert_eq!(scalar(&root, query).await, "f");
}
