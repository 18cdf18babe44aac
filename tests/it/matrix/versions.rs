//! The life of an account on the versions that the other tests do not use: 14, 16 and 17 (others use 15 and 18), with
//! both kinds of admin.

use mayfly_tests::postgres::{Admin, Server, scalar, sqlstate};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::seconds;
use serde_json::json;

async fn whole_life(version: &str) {
    let server = Server::of_version(version);
    for admin in [Admin::Superuser, Admin::CreateRole] {
        let (system, site, all, engine) = Scenario::on(server.clone()).admin(admin).start().await;
        let pool = engine.pool.clone();
        let one = system
            .secret(
                &site,
                &pool,
                json!({"grantPermissions": [
                    {"what": "SELECT, INSERT", "where": "public.items"},
                    {"what": "CREATE, USAGE", "where": "schema:app"},
                ]}),
            )
            .await;

        let ended = system.issue(&all, Some(4)).await;
        let session = ended.login().await.unwrap();
        let found = scalar(&session, "SHOW server_version_num").await;
        assert!(found.starts_with(version), "{found} is not {version}");
        assert_eq!(
            scalar(&session, "SELECT count(*) FROM app.orders").await,
            "2"
        );
        let write = "INSERT INTO public.items (note) VALUES ('x')";
        assert_eq!(sqlstate(&session, write).await, "42501");

        let asked = system.issue(&one, Some(60)).await;
        let worker = asked.login().await.unwrap();
        assert_eq!(sqlstate(&worker, write).await, "00000");
        assert_eq!(sqlstate(&worker, "SELECT * FROM app.orders").await, "42501");
        assert_eq!(
            sqlstate(&worker, "CREATE TABLE app.mine (n int)").await,
            "00000"
        );
        let renew = format!("/v1/leases/{}/renew", asked.lease);
        let (status, body) = system.api.post(&renew, json!({"increment": 120})).await;
        assert_eq!(status, 200, "{body}");

        system.gone(&site, &ended, seconds(12)).await;
        assert!(
            session.simple_query("SELECT 1").await.is_err(),
            "its session lives"
        );
        assert!(asked.login().await.is_ok());
        let lease = format!("/v1/leases/{}", asked.lease);
        system.api.delete(&lease).await;
        system.gone(&site, &asked, seconds(12)).await;
        let root = site.server.superuser(&site.name).await;
        let owner = "SELECT tableowner FROM pg_tables WHERE tablename = 'mine'";
        let owner = scalar(&root, owner).await;
        assert!(owner.starts_with("mayfly_quarantine_"), "{owner}");
        assert_eq!(site.accounts().await, Vec::<String>::new());
    }
}

#[tokio::test]
async fn on_14() {
    whole_life("14").await;
}

#[tokio::test]
async fn on_16() {
    whole_life("16").await;
}

#[tokio::test]
async fn on_17() {
    whole_life("17").await;
}
