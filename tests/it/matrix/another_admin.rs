//! From PostgreSQL 16 on only the maker of a role may end it: another CREATEROLE admin in the base secret may not end
//! what the earlier admin has made. The update warns of this, `check` gives the statements that help, and every known
//! password of the maker is tried.

use mayfly_tests::cli::Cli;
use mayfly_tests::postgres::Server;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::{eventually, seconds};
use serde_json::{Value, json};

async fn another_admin(server: Server) {
    let (system, site, path, _engine) = Scenario::on(server.clone()).start().await;
    let base = format!("db:{}:root", site.name);
    let kept = system.issue(&path, Some(300)).await;
    let by_maker = system.issue(&path, Some(300)).await;
    let root = server.superuser(&site.name).await;
    let said = async |data: Value| {
        let (status, body) = system
            .api
            .put(&format!("/v1/secrets/{base}"), json!({"data": data}))
            .await;
        assert_eq!(status, 200, "{body}");
        body
    };
    // First the maker's password changes, then another admin replaces it.
    root.batch_execute(&format!("ALTER ROLE {} PASSWORD 'later'", site.name))
        .await
        .unwrap();
    let body = said(json!({"password": "later"})).await;
    assert!(body["warnings"].is_null(), "{body}");
    let other = format!("{}_b", site.name);
    root.batch_execute(&format!(
        "CREATE ROLE {other} LOGIN CREATEROLE PASSWORD 'b'; GRANT CONNECT ON DATABASE {} TO {other}",
        site.name
    ))
    .await
    .unwrap();
    let body = said(json!({"username": other, "password": "b"})).await;
    let warning = &body["warnings"][0];
    let fix = format!(
        "GRANT \"{}\" TO \"{other}\" WITH ADMIN OPTION;",
        kept.username
    );
    assert!(
        warning["message"]
            .as_str()
            .unwrap()
            .contains("may not end 2 of the 2 existing accounts"),
        "{body}"
    );
    assert!(
        warning["fix"].as_array().unwrap().contains(&json!(fix)),
        "{body}"
    );
    let cli = Cli { system: &system };
    let again = json!({"data": {"username": other, "password": "b"}}).to_string();
    let output = cli.run(&["secret", "update", &base, "--body", &again]);
    assert!(
        output.status.success()
            && !String::from_utf8(output.stderr)
                .unwrap()
                .contains("warning"),
        "the admin stays"
    );

    // Neither the version of the secret that the lease names nor the present version works; the version between them
    // does.
    system
        .api
        .delete(&format!("/v1/leases/{}", by_maker.lease))
        .await;
    system.gone(&site, &by_maker, seconds(60)).await;

    // Now that version does not work any more either: the lease is stuck, with the reason. A kept session of the
    // engine would still work, so it is ended.
    root.batch_execute(&format!(
        "ALTER ROLE {0} NOLOGIN; SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{0}'",
        site.name
    ))
        .await
        .unwrap();
    system
        .api
        .delete(&format!("/v1/leases/{}", kept.lease))
        .await;
    let lease = eventually("it says what lacks", seconds(60), async || {
        let lease = system.lease(&kept.lease).await;
        let said = lease["lastError"].as_str().unwrap_or_default();
        said.starts_with("admin_lacks_rights").then_some(lease)
    })
    .await;
    let words = lease["lastError"].as_str().unwrap();
    assert!(
        words.contains("DETAIL") && words.contains("ADMIN") && words.contains("secret check"),
        "{words}"
    );
    let (status, check) = system
        .api
        .post(&format!("/v1/secrets/{base}::check"), json!({}))
        .await;
    assert_eq!(status, 200, "{check}");
    let found = check["findings"]
        .as_array()
        .unwrap()
        .iter()
        .find(|one| one["check"] == "live accounts");
    let found = found.unwrap();
    assert_eq!(
        (&found["ok"], &found["fix"]),
        (&json!(false), &json!([fix])),
        "{check:#}"
    );
    root.batch_execute(&fix).await.unwrap();
    eventually("the admin may end it", seconds(60), async || {
        system
            .api
            .post(&format!("/v1/leases/{}/retry", kept.lease), json!({}))
            .await;
        server.roles(&kept.username).await.is_empty().then_some(())
    })
    .await;
    let (_, check) = system
        .api
        .post(&format!("/v1/secrets/{base}::check"), json!({}))
        .await;
    let found = check["findings"]
        .as_array()
        .unwrap()
        .iter()
        .find(|one| one["check"] == "live accounts");
    assert_eq!(found.unwrap()["ok"], true, "{check:#}");
}

#[tokio::test]
async fn another_admin_on_16() {
    another_admin(Server::of_version("16")).await;
}

#[tokio::test]
async fn another_admin_on_18() {
    another_admin(Server::pg18()).await;
}
