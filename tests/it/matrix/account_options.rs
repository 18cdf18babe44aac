//! What accounts have besides their grants: settings, attributes, roles they may become, and the user name for a
//! pooler.

use mayfly_tests::postgres::{Admin, Credential, Server, scalar, sqlstate};
use mayfly_tests::scenario::{Scenario, Stage};
use mayfly_tests::{seconds, word};
use serde_json::json;

async fn revoke(stage: &Stage, credential: &Credential) {
    let lease = format!("/v1/leases/{}", credential.lease);
    assert_eq!(stage.system.api.delete(&lease).await.0, 200);
    stage
        .system
        .gone(&stage.site, credential, seconds(30))
        .await;
}

/// Objects belong to the role that accounts become at login, on every version. Settings apply, values are never code,
/// and nothing is left behind.
async fn settings_apply(server: Server) {
    let s = Scenario::on(server).stage().await;
    let owner = format!("owner_{}", word());
    let hand = s.site.admin().await;
    hand.batch_execute(&format!(
        "CREATE ROLE {owner}; GRANT CREATE, USAGE ON SCHEMA app TO {owner}"
    ))
    .await
    .unwrap();
    let grants = json!([{"what": "SELECT", "where": "*.*"},
        {"what": "MEMBER", "where": format!("role:{owner}"), "setRole": true}]);
    let path = s
        .secret(json!({"grantPermissions": grants, "settings": {
            "role": owner, "search_path": "app, \"My ' S\"", "statement_timeout": "7s", "work_mem": 4096,
            "timezone": "Asia/Tokyo", "application_name": "x'; DROP TABLE items; --", "default_transaction_read_only": false}}))
        .await;
    let found = s.finding(&path, "settings").await;
    assert_eq!(found["ok"], true, "{found}");
    let credential = s.system.issue(&path, None).await;
    let client = credential.login().await.unwrap();
    let shown = "SELECT current_user || '|' || session_user || '|' || current_setting('search_path') || '|' || \
        current_setting('statement_timeout') || '|' || current_setting('work_mem') || '|' || current_setting('application_name')";
    assert_eq!(
        scalar(&client, shown).await,
        format!(
            "{owner}|{}|app, \"My ' S\"|7s|4MB|x'; DROP TABLE items; --",
            credential.username
        )
    );
    client
        .batch_execute("CREATE TABLE app.made (id int)")
        .await
        .unwrap();
    revoke(&s, &credential).await;
    assert!(client.simple_query("SELECT 1").await.is_err());
    let made = "SELECT tableowner FROM pg_tables WHERE tablename = 'made'";
    assert_eq!(scalar(&hand, made).await, owner);
    let left = "SELECT count(*) FROM pg_db_role_setting s LEFT JOIN pg_roles r ON r.oid = s.setrole WHERE s.setrole <> 0 AND r.oid IS NULL";
    assert_eq!(scalar(&hand, left).await, "0");

    // Without the setting the account only has the right to become the role.
    let path = s.secret(json!({"grantPermissions": grants})).await;
    let credential = s.system.issue(&path, None).await;
    let client = credential.login().await.unwrap();
    assert_eq!(
        scalar(&client, "SELECT current_user").await,
        credential.username
    );
    assert_eq!(
        sqlstate(&client, &format!("SET ROLE {owner}")).await,
        "00000"
    );
    assert_eq!(scalar(&client, "SELECT current_user").await, owner);
    client.batch_execute("RESET ROLE").await.unwrap();
    let version: u32 = scalar(&client, "SHOW server_version_num")
        .await
        .parse()
        .unwrap();
    if version >= 160_000 {
        let grant_role = "SELECT r.rolname FROM pg_roles r JOIN pg_auth_members m ON m.roleid = r.oid \
            JOIN pg_roles me ON me.oid = m.member WHERE me.rolname = current_user AND r.rolname LIKE 'mayfly\\_grant\\_%'";
        let grant_role = scalar(&client, grant_role).await;
        let become_it = format!("SET ROLE \"{grant_role}\"");
        assert_eq!(sqlstate(&client, &become_it).await, "42501");
        // A membership without `setRole` does not let an account become the role.
        let plain = json!({"what": "MEMBER", "where": format!("role:{owner}")});
        let path = s.secret(json!({"grantPermissions": plain})).await;
        let plain = s.system.issue(&path, None).await.login().await.unwrap();
        assert_eq!(
            sqlstate(&plain, &format!("SET ROLE {owner}")).await,
            "42501"
        );
    }
    revoke(&s, &credential).await;
}

#[tokio::test]
async fn settings_apply_on_14() {
    settings_apply(Server::of_version("14")).await;
}

#[tokio::test]
async fn settings_apply_on_15() {
    settings_apply(Server::pg15()).await;
}

#[tokio::test]
async fn settings_apply_on_18() {
    settings_apply(Server::pg18()).await;
}

/// A setting that an account could not set itself is refused, also for a superuser's secret. One that this server
/// does not have is named. Nothing is left behind.
#[tokio::test]
async fn settings_that_are_refused() {
    let s = Scenario::on(Server::pg15())
        .admin(Admin::Superuser)
        .stage()
        .await;
    for (setting, said) in [
        (
            json!({"session_replication_role": "replica"}),
            "session_replication_role",
        ),
        (json!({"temp_file_limit": -1}), "temp_file_limit"),
        (json!({"transaction_timeout": "5s"}), "PostgreSQL 15"),
        (json!({"work_mem": "much"}), "work_mem"),
    ] {
        let path = s.secret(json!({"settings": setting})).await;
        let (status, answer) = s.read(&path).await;
        assert_eq!(status, 422, "{setting}: {answer}");
        assert_eq!(answer["error"], "statement_failed", "{answer}");
        let message = answer["message"].as_str().unwrap();
        assert!(message.contains(said), "{setting}: {message}");
        let found = s.finding(&path, "settings").await;
        let message = found["message"].as_str().unwrap();
        assert!(found["ok"] == false && message.contains(said), "{found}");
    }
    assert!(s.site.accounts().await.is_empty());

    // A setting that the operator defined.
    let path = s.secret(json!({"settings": {"app.tenant": "7"}})).await;
    let client = s.system.issue(&path, None).await.login().await.unwrap();
    assert_eq!(scalar(&client, "SHOW app.tenant").await, "7");
}

/// An attribute is given if the admin may give it. Otherwise the read and the check report why.
#[tokio::test]
async fn attributes_as_the_admin_may_give_them() {
    for (server, admin, attribute, may) in [
        (Server::pg15(), Admin::Superuser, "bypassrls", true),
        (Server::pg15(), Admin::CreateRole, "createdb", true),
        (Server::pg15(), Admin::CreateRole, "replication", false),
        (Server::pg18(), Admin::Superuser, "replication", true),
        (Server::pg18(), Admin::CreateRole, "bypassrls", false),
    ] {
        let s = Scenario::on(server).admin(admin).stage().await;
        let path = s.secret(json!({attribute: true})).await;
        let found = s.finding(&path, attribute).await;
        assert_eq!(found["ok"], may, "{found}");
        let (status, answer) = s.read(&path).await;
        if !may {
            assert_eq!(answer["error"], "admin_lacks_rights", "{answer}");
            assert!(s.site.accounts().await.is_empty());
            if s.site.server.port() == Server::pg18().port() {
                let root = s.site.server.superuser("postgres").await;
                let fix = found["fix"][0].as_str().unwrap();
                root.batch_execute(fix).await.unwrap();
                assert_eq!(s.read(&path).await.0, 200, "after {fix}");
            }
            continue;
        }
        assert_eq!(status, 200, "{answer}");
        let credential = Credential::from_answer(&answer);
        let has = "SELECT concat_ws(' ', CASE WHEN rolcreatedb THEN 'createdb' END, CASE WHEN rolreplication THEN 'replication' END, \
            CASE WHEN rolbypassrls THEN 'bypassrls' END, CASE WHEN rolsuper THEN 'super' END, CASE WHEN rolcreaterole THEN 'createrole' END) \
            FROM pg_roles WHERE rolname = current_user";
        let client = credential.login().await.unwrap();
        assert_eq!(scalar(&client, has).await, attribute);
        revoke(&s, &credential).await;
    }
}

/// The databases that an account has made, with their content, get the new owner, even if the account let nobody in,
/// and if the secret says "drop".
async fn databases_of_an_account(server: Server) {
    let s = Scenario::on(server).stage().await;
    let root = s.site.server.superuser("postgres").await;
    root.batch_execute(&format!("ALTER ROLE {} CREATEDB", s.site.name))
        .await
        .unwrap();
    for owned in ["reassign", "drop"] {
        let path = s
            .secret(json!({"createdb": true, "ownedObjects": owned}))
            .await;
        let credential = s.system.issue(&path, None).await;
        let made = format!("made_{}", word());
        let client = credential.login().await.unwrap();
        client
            .batch_execute(&format!("CREATE DATABASE {made}"))
            .await
            .unwrap();
        let inside = credential.login_to(&made).await.unwrap();
        inside
            .batch_execute("CREATE SCHEMA s; CREATE TABLE s.t (id int)")
            .await
            .unwrap();
        drop(inside);
        client
            .batch_execute(&format!(
                "REVOKE CONNECT ON DATABASE {made} FROM PUBLIC; \
                 ALTER DATABASE {made} WITH ALLOW_CONNECTIONS false CONNECTION LIMIT 0"
            ))
            .await
            .unwrap();
        revoke(&s, &credential).await;
        let owner =
            format!("SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = '{made}'");
        let owner = scalar(&root, &owner).await;
        assert!(owner.starts_with("mayfly_quarantine_"), "{owned}: {owner}");
        let there = s.site.server.superuser(&made).await;
        let tables = "SELECT coalesce(max(tableowner), '') FROM pg_tables WHERE schemaname = 's'";
        let table = scalar(&there, tables).await;
        assert_eq!(table.is_empty(), owned == "drop", "{owned}: {table}");
        drop(there);
        root.batch_execute(&format!("DROP DATABASE {made}"))
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn databases_of_an_account_on_15() {
    databases_of_an_account(Server::pg15()).await;
}

#[tokio::test]
async fn databases_of_an_account_on_18() {
    databases_of_an_account(Server::pg18()).await;
}

/// A pooler's tenant is part of the user name that is handed out, and of nothing else.
#[tokio::test]
async fn a_user_name_for_a_pooler() {
    let s = Scenario::on(Server::pg18()).stage().await;
    let path = s
        .secret(json!({"usernameTemplate": "{{role}}.tenant 1", "share": true}))
        .await;
    for _ in 0..2 {
        let (status, answer) = s.read(&path).await;
        assert_eq!(status, 200, "{answer}");
        let mut credential = Credential::from_answer(&answer);
        let lease = s.system.lease(&credential.lease).await;
        let role = lease["role"].as_str().unwrap();
        assert_eq!(credential.username, format!("{role}.tenant 1"));
        let url = answer["data"]["url"].as_str().unwrap();
        assert!(
            url.starts_with(&format!("postgresql://{role}.tenant%201:")),
            "{url}"
        );
        credential.username = role.to_owned();
        assert!(credential.login().await.is_ok());
    }
}
