//! An admin that may end every session (`pg_signal_backend`) does not become a member of the accounts it makes. From
//! 16 on no admin does: it joins an account that has sessions, when it ends.

use mayfly_tests::postgres::{Admin, Server, scalar};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::{eventually, seconds};

async fn an_admin_that_ends_all_sessions_joins_no_account(server: Server) {
    let (system, site, path, _engine) = Scenario::on(server.clone())
        .admin(Admin::CreateRole)
        .start()
        .await;
    let root = server.superuser("postgres").await;
    let version = scalar(&root, "SHOW server_version_num").await;
    let is_16 = version.parse::<u32>().unwrap() >= 160_000;
    let joined = async |role: &str| {
        // The server itself makes the admin a member that may only grant the role.
        let by_admin = if is_16 { "AND m.inherit_option" } else { "" };
        let query = format!(
            "SELECT count(*) FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.roleid \
             WHERE r.rolname = '{role}' {by_admin}"
        );
        scalar(&root, &query).await != "0"
    };
    let first = system.issue(&path, None).await;
    assert_eq!(joined(&first.username).await, !is_16);
    // The lease ends with an open session.
    let third = system.issue(&path, None).await;
    let session = third.login().await.unwrap();
    system
        .api
        .delete(&format!("/v1/leases/{}", third.lease))
        .await;
    system.gone(&site, &third, seconds(30)).await;
    assert!(session.simple_query("SELECT 1").await.is_err());

    let admin = &site.name;
    let grant = format!("GRANT pg_signal_backend TO \"{admin}\"");
    root.batch_execute(&grant).await.unwrap();
    // A connection reads the facts about its admin when it is opened. A connection that is idle for 1 s is closed.
    let second = eventually("a new connection knows it", seconds(60), async || {
        tokio::time::sleep(seconds(2)).await;
        let credential = system.issue(&path, None).await;
        (!joined(&credential.username).await).then_some(credential)
    })
    .await;

    // Both kinds of accounts end with an open session.
    for credential in [first, second] {
        let client = credential.login().await.unwrap();
        let revoke = format!("/v1/leases/{}", credential.lease);
        system.api.delete(&revoke).await;
        system.gone(&site, &credential, seconds(30)).await;
        assert!(client.simple_query("SELECT 1").await.is_err());
    }
}

#[tokio::test]
async fn an_admin_that_ends_all_sessions_joins_no_account_on_15() {
    an_admin_that_ends_all_sessions_joins_no_account(Server::pg15()).await;
}

#[tokio::test]
async fn an_admin_that_ends_all_sessions_joins_no_account_on_18() {
    an_admin_that_ends_all_sessions_joins_no_account(Server::pg18()).await;
}
