//! Locks that anybody can take: Mayfly waits for none of them.

use mayfly_tests::postgres::{Admin, Credential, Server, Site, scalar};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::{System, prefix};
use mayfly_tests::{eventually, run_dir, seconds, word};
use serde_json::json;

use crate::chaos::faults::arm;

/// The key of a role's advisory lock, as Mayfly had it once: the first 64 bits of a hash.
fn lock_key(role: &str) -> String {
    format!("('x' || left(encode(sha256('mayfly:{role}'), 'hex'), 16))::bit(64)::bigint")
}

/// Names of Mayfly's roles that anybody can read, and from which anybody can compute locks.
async fn names(credential: &Credential) -> Vec<String> {
    let client = credential.login().await.unwrap();
    let rows = client
        .query(
            "SELECT rolname::text FROM pg_roles WHERE rolname ~ '^mayfly_(grant|quarantine)_'",
            &[],
        )
        .await
        .unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

async fn an_account_takes_every_lock(server: Server, admin: Admin) {
    let (system, site, path, _engine) = Scenario::on(server.clone())
        .admin(admin)
        .attributes(
            json!({"grantPermissions": {"what": "SELECT", "where": "*.*"}, "connectionLimit": 4}),
        )
        .start()
        .await;
    let attacker = system.issue(&path, None).await;
    let mut sessions = Vec::new();
    for database in [site.name.as_str(), "postgres"] {
        // One session takes all: other tests have grant roles on this server, too.
        let client = attacker.login_to(database).await.unwrap();
        let names = names(&attacker).await;
        assert!(!names.is_empty());
        for name in names {
            let lock = format!("SELECT pg_advisory_lock({})", lock_key(&name));
            scalar(&client, &lock).await;
        }
        sessions.push(client);
    }
    // New objects are granted, too.
    site.admin()
        .await
        .batch_execute("CREATE TABLE later (id int); INSERT INTO later VALUES (3)")
        .await
        .unwrap();
    let other = eventually("the new table is granted", seconds(10), async || {
        let credential = system.issue(&path, None).await;
        let client = credential.login().await.unwrap();
        let seen = client.simple_query("SELECT id FROM later").await.is_ok();
        seen.then_some(credential)
    })
    .await;
    let revoke = |lease: &str| format!("/v1/leases/{lease}");
    system.api.delete(&revoke(&other.lease)).await;
    system.gone(&site, &other, seconds(10)).await;
    let tidy = format!("/v1/secrets/db:{}:root::tidy", site.name);
    let (status, answer) = system.api.post(&tidy, json!({})).await;
    let kept = answer["kept"][0]["inUse"] == true;
    assert!(status == 200 && kept, "{answer}");
    system.api.delete(&revoke(&attacker.lease)).await;
    system.gone(&site, &attacker, seconds(10)).await;
    for client in &sessions {
        assert!(client.simple_query("SELECT 1").await.is_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn locks_of_an_account_hold_nothing_up_on_15() {
    an_account_takes_every_lock(Server::pg15(), Admin::CreateRole).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn locks_of_an_account_hold_nothing_up_on_18() {
    an_account_takes_every_lock(Server::pg18(), Admin::CreateRole).await;
}

/// The grant role of the site's only secret.
async fn grant_role(site: &Site) -> String {
    let root = site.server.superuser("postgres").await;
    let group = format!(
        "SELECT g.rolname FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid \
         JOIN pg_roles r ON r.oid = m.member WHERE starts_with(r.rolname, '{}') AND starts_with(g.rolname, 'mayfly_grant_')",
        prefix(site)
    );
    scalar(&root, &group).await
}

/// A grant role that is dropped during a create takes nothing from the account: the create looks again.
async fn a_grant_role_goes_beside_a_create(server: Server, whole: bool) {
    let fault = run_dir().join(format!("fault-{}", word()));
    let system = System::start().await;
    let site = server.site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let environment = [("MAYFLY_FAULT_FILE", fault.to_str().unwrap())];
    let engine = system.engine_with(&pool, &environment);
    engine.ready().await;
    let path = system.secret(&site, &pool, json!({})).await;
    let first = system.issue(&path, None).await;
    let group = grant_role(&site).await;
    system
        .api
        .delete(&format!("/v1/leases/{}", first.lease))
        .await;
    system.gone(&site, &first, seconds(10)).await;

    arm(&fault, "create.before_look sleep 3000");
    let (second, ()) = tokio::join!(system.issue(&path, None), async {
        eventually("the create is committed", seconds(20), async || {
            let roles = site.accounts().await;
            (!roles.is_empty()).then_some(())
        })
        .await;
        assert!(!fault.exists());
        // A tidying engine that saw no member renames the role. Later it drops the role, too.
        let root = server.superuser(&site.name).await;
        let gone = format!("mayfly_gone_{}", word());
        root.batch_execute(&format!("ALTER ROLE {group} RENAME TO {gone}"))
            .await
            .unwrap();
        if whole {
            root.batch_execute(&format!("DROP OWNED BY {gone}; DROP ROLE {gone}"))
                .await
                .unwrap();
        }
    });
    // A create has 4.5 s for its pattern grants. On a busy machine the rest follows in the background.
    let client = second.login().await.unwrap();
    eventually("it has what was granted", seconds(20), async || {
        client.simple_query("SELECT FROM items").await.ok()
    })
    .await;
    assert_eq!(scalar(&client, "SELECT count(*) FROM items").await, "2");
    assert_eq!(grant_role(&site).await, group);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grant_role_is_dropped_beside_a_create_on_15() {
    a_grant_role_goes_beside_a_create(Server::pg15(), true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grant_role_is_dropped_beside_a_create_on_18() {
    a_grant_role_goes_beside_a_create(Server::pg18(), true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grant_role_is_renamed_beside_a_create_on_18() {
    a_grant_role_goes_beside_a_create(Server::pg18(), false).await;
}
