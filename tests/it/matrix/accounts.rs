//! The end of accounts that something holds: sessions, objects, privileges, in any database; and roles that are not
//! Mayfly's.

use mayfly_tests::postgres::{Admin, Server, scalar, sqlstate};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::{seconds, word};
use serde_json::{Value, json};

async fn owns_things_everywhere(server: Server, admin: Admin) {
    let (system, site, pool, _engine) = Scenario::on(server.clone())
        .admin(admin)
        .start_without_secret()
        .await;
    let grants = json!({"grantPermissions": [
        {"what": "ALL", "where": "*.*"}, {"what": "CREATE", "where": "schema:app"},
        {"what": "CREATE, TEMP", "where": format!("database:{}", site.name)}]});
    let path = system.secret(&site, &pool, grants).await;
    let credential = system.issue(&path, None).await;
    let role = credential.username.clone();

    let client = credential.login().await.unwrap();
    client
        .batch_execute(
            "CREATE TABLE app.mine (id serial PRIMARY KEY); INSERT INTO app.mine DEFAULT VALUES; CREATE VIEW app.seen AS SELECT * FROM app.mine; \
             CREATE FUNCTION app.one() RETURNS int LANGUAGE sql AS 'SELECT 1'; CREATE TYPE app.mood AS ENUM ('sad'); \
             CREATE SCHEMA own_schema; CREATE TABLE own_schema.t (id int); CREATE TEMP TABLE passing (id int); \
             ALTER DEFAULT PRIVILEGES IN SCHEMA app GRANT SELECT ON TABLES TO public",
        )
        .await
        .unwrap();
    // One open transaction has a lock and has changed rows, another has only begun.
    client.batch_execute("BEGIN; INSERT INTO public.items (note) VALUES ('open'); LOCK TABLE app.orders IN SHARE MODE").await.unwrap();
    let idle = credential.login().await.unwrap();
    idle.batch_execute("BEGIN; SELECT 1").await.unwrap();
    // These privileges are given by hand, in this database and in another one.
    let hand = site.admin().await;
    hand.batch_execute(&format!("GRANT INSERT ON public.items TO \"{role}\"; ALTER DEFAULT PRIVILEGES IN SCHEMA app GRANT INSERT ON TABLES TO \"{role}\"")).await.unwrap();
    let other = format!("other_{}", word());
    let root = server.superuser("postgres").await;
    root.batch_execute(&format!("CREATE DATABASE {other} OWNER {}", site.name))
        .await
        .unwrap();
    let there = server
        .login(&site.name, &site.password, &other)
        .await
        .unwrap();
    there.batch_execute(&format!("CREATE TABLE notes (id int); GRANT SELECT ON notes TO \"{role}\"; GRANT CREATE ON SCHEMA public TO \"{role}\"")).await.unwrap();
    let far = credential.login_to(&other).await.unwrap();
    far.batch_execute("CREATE TABLE public.theirs (id int)")
        .await
        .unwrap();

    let (status, _) = system
        .api
        .delete(&format!("/v1/leases/{}", credential.lease))
        .await;
    assert_eq!(status, 200);
    system.gone(&site, &credential, seconds(15)).await;
    assert!(
        client.simple_query("SELECT 1").await.is_err()
            && far.simple_query("SELECT 1").await.is_err()
    );
    // The objects that the account created still exist, and their owner cannot log in.
    assert_eq!(scalar(&hand, "SELECT count(*) FROM app.mine").await, "1");
    let owner = scalar(&hand, "SELECT rolname || ' ' || rolcanlogin || ' ' || rolsuper FROM pg_roles r JOIN pg_class c ON c.relowner = r.oid WHERE relname = 'mine'").await;
    assert!(
        owner.starts_with("mayfly_quarantine_") && owner.ends_with(" false false"),
        "{owner}"
    );
    assert_eq!(
        scalar(&there, "SELECT count(*) FROM public.theirs").await,
        "0"
    );
    let may = "SELECT count(*) FROM pg_namespace, aclexplode(nspacl) a JOIN pg_roles r ON r.oid = a.grantee WHERE r.rolname LIKE 'mayfly_quarantine%' AND nspname = 'app'";
    assert_eq!(
        scalar(&hand, may).await,
        "0",
        "the quarantine role kept a privilege"
    );
    system
        .lease_becomes(&credential.lease, "revoked", seconds(60))
        .await;
}

#[tokio::test]
async fn owning_things_on_15_as_superuser() {
    owns_things_everywhere(Server::pg15(), Admin::Superuser).await;
}

#[tokio::test]
async fn owning_things_on_15_as_createrole() {
    owns_things_everywhere(Server::pg15(), Admin::CreateRole).await;
}

#[tokio::test]
async fn owning_things_on_18_as_superuser() {
    owns_things_everywhere(Server::pg18(), Admin::Superuser).await;
}

#[tokio::test]
async fn owning_things_on_18_as_createrole() {
    owns_things_everywhere(Server::pg18(), Admin::CreateRole).await;
}

/// On 16 and later an account cannot become its grant role. A session that became another role ends too.
#[tokio::test]
async fn set_role() {
    let server = Server::pg18();
    let (system, site, path, _engine) = Scenario::on(server.clone()).start().await;
    let credential = system.issue(&path, Some(5)).await;
    let client = credential.login().await.unwrap();
    let group = scalar(&client, "SELECT rolname FROM pg_roles r JOIN pg_auth_members m ON m.roleid = r.oid WHERE m.member = (SELECT oid FROM pg_roles WHERE rolname = current_user)").await;
    assert_eq!(
        sqlstate(&client, &format!("SET ROLE \"{group}\"")).await,
        "42501"
    );
    let helper = format!("helper_{}", word());
    let root = server.superuser("postgres").await;
    root.batch_execute(&format!(
        "CREATE ROLE {helper}; GRANT {helper} TO \"{}\"",
        credential.username
    ))
    .await
    .unwrap();
    client
        .batch_execute(&format!("SET ROLE {helper}"))
        .await
        .unwrap();
    system.gone(&site, &credential, seconds(10)).await;
    assert!(
        client.simple_query("SELECT 1").await.is_err(),
        "the session lives on under another role"
    );
    root.batch_execute(&format!("DROP ROLE {helper}"))
        .await
        .unwrap();
}

/// An account's objects are dropped, or given to the role that the operator named, if the secret requires that.
#[tokio::test]
async fn owned_objects_as_asked() {
    let (system, site, pool, _engine) = Scenario::on(Server::pg18()).start_without_secret().await;
    let hand = site.admin().await;
    let owner = format!("owner_{}", word());
    hand.batch_execute(&format!(
        "CREATE ROLE {owner}; GRANT {owner} TO CURRENT_USER WITH INHERIT TRUE, SET TRUE"
    ))
    .await
    .unwrap();
    for (wish, expected) in [
        (json!("drop"), "0 "),
        (json!({"reassignTo": owner}), "1 owner_"),
    ] {
        let attributes = json!({"grantPermissions": {"what": "CREATE", "where": "schema:app"}, "ownedObjects": wish});
        let path = system.secret(&site, &pool, attributes).await;
        let credential = system.issue(&path, None).await;
        credential
            .login()
            .await
            .unwrap()
            .batch_execute("CREATE TABLE app.made (id int)")
            .await
            .unwrap();
        system
            .api
            .delete(&format!("/v1/leases/{}", credential.lease))
            .await;
        system.gone(&site, &credential, seconds(15)).await;
        let found = scalar(&hand, "SELECT count(*) || ' ' || coalesce(max(rolname), '') FROM pg_class c JOIN pg_roles r ON r.oid = c.relowner WHERE relname = 'made'").await;
        assert!(found.starts_with(expected), "{wish}: {found}");
    }
}

/// A new owner that owns the schema, or may create in it, keeps that right after it has inherited.
async fn the_new_owner_keeps_its_own(server: Server) {
    let (system, site, pool, _engine) = Scenario::on(server).start_without_secret().await;
    let hand = site.admin().await;
    let new_owner = format!("owner_{}", word());
    let version = scalar(&hand, "SHOW server_version_num").await;
    let options = if version.as_str() < "160000" {
        ""
    } else {
        " WITH INHERIT TRUE, SET TRUE"
    };
    hand.batch_execute(&format!(
        "CREATE ROLE {new_owner}; GRANT {new_owner} TO CURRENT_USER{options}; \
         CREATE SCHEMA owned AUTHORIZATION {new_owner}; GRANT CREATE, USAGE ON SCHEMA app TO {new_owner}"
    ))
    .await
    .unwrap();
    let attributes = json!({"ownedObjects": {"reassignTo": new_owner}, "grantPermissions": [
        {"what": "CREATE", "where": "schema:app"}, {"what": "CREATE", "where": "schema:owned"}]});
    let path = system.secret(&site, &pool, attributes).await;
    let credential = system.issue(&path, None).await;
    credential
        .login()
        .await
        .unwrap()
        .batch_execute("CREATE TABLE app.made (id int); CREATE TABLE owned.made (id int)")
        .await
        .unwrap();
    system
        .api
        .delete(&format!("/v1/leases/{}", credential.lease))
        .await;
    system.gone(&site, &credential, seconds(15)).await;
    let inherited = format!(
        "SELECT count(*) FROM pg_class c JOIN pg_roles r ON r.oid = c.relowner WHERE relname = 'made' AND rolname = '{new_owner}'"
    );
    assert_eq!(scalar(&hand, &inherited).await, "2");
    hand.batch_execute(&format!(
        "SET ROLE {new_owner}; CREATE TABLE app.later (id int); CREATE TABLE owned.later (id int)"
    ))
    .await
    .unwrap();
}

#[tokio::test]
async fn the_new_owner_keeps_its_own_on_15() {
    the_new_owner_keeps_its_own(Server::pg15()).await;
}

#[tokio::test]
async fn the_new_owner_keeps_its_own_on_18() {
    the_new_owner_keeps_its_own(Server::pg18()).await;
}

/// A prepared transaction holds its account: the failure names it, and the account ends after it.
#[tokio::test]
async fn a_prepared_transaction_is_named_and_heals() {
    let (system, site, path, _engine) = Scenario::on(Server::pg15())
        .admin(Admin::Superuser)
        .attributes(json!({"grantPermissions": {"what": "CREATE", "where": "schema:app"}}))
        .start()
        .await;
    let credential = system.issue(&path, Some(10)).await;
    let gid = format!("gid_{}", word());
    let client = credential.login().await.unwrap();
    client
        .batch_execute(&format!(
            "BEGIN; CREATE TABLE app.prepared (id int); PREPARE TRANSACTION '{gid}'"
        ))
        .await
        .unwrap();
    let stuck = mayfly_tests::eventually("the lease is stuck", seconds(60), async || {
        let listed = system.api.ok("/v1/leases?state=stuck").await;
        listed["leases"].as_array().unwrap().first().cloned()
    })
    .await;
    assert_eq!(stuck["id"], credential.lease.as_str());
    assert!(
        stuck["lastError"].as_str().unwrap().contains(&gid),
        "{stuck}"
    );
    let objects = stuck["objects"].as_array().unwrap();
    // A session of another test may hold the same lock for a moment.
    let is_named = |object: &Value| object.as_str().unwrap().contains(&gid);
    assert!(objects.iter().any(is_named), "{stuck}");
    assert!(
        credential.is_refused().await,
        "a stuck account can still log in"
    );
    site.admin()
        .await
        .batch_execute(&format!("ROLLBACK PREPARED '{gid}'"))
        .await
        .unwrap();
    let healed = system
        .lease_becomes(&credential.lease, "revoked", seconds(60))
        .await;
    assert_eq!(healed["stuck"], false);
    assert!(site.server.roles(&credential.username).await.is_empty());
}

/// A role of the same name with another comment belongs to somebody else.
#[tokio::test]
async fn what_is_not_ours_is_not_touched() {
    let (system, site, path, _engine) = Scenario::on(Server::pg18())
        .admin(Admin::Superuser)
        .start()
        .await;
    let credential = system.issue(&path, Some(3)).await;
    let hand = site.admin().await;
    hand.batch_execute(&format!(
        "COMMENT ON ROLE \"{}\" IS 'payroll'",
        credential.username
    ))
    .await
    .unwrap();
    mayfly_tests::eventually("the lease is stuck", seconds(60), async || {
        (system.lease(&credential.lease).await["stuck"] == true).then_some(())
    })
    .await;
    assert_eq!(
        site.accounts().await,
        std::slice::from_ref(&credential.username)
    );
    let login = scalar(
        &hand,
        &format!(
            "SELECT rolcanlogin FROM pg_roles WHERE rolname = '{}'",
            credential.username
        ),
    )
    .await;
    assert_eq!(login, "t", "somebody else's role lost its login");
    hand.batch_execute(&format!("DROP ROLE \"{}\"", credential.username))
        .await
        .unwrap();
    system
        .lease_becomes(&credential.lease, "revoked", seconds(60))
        .await;
}

/// A role that somebody dropped by hand is gone, which is all that a revocation needs.
#[tokio::test]
async fn dropped_by_hand() {
    let (system, site, path, _engine) = Scenario::on(Server::pg15()).start().await;
    let credential = system.issue(&path, Some(2)).await;
    site.admin()
        .await
        .batch_execute(&format!("DROP ROLE \"{}\"", credential.username))
        .await
        .unwrap();
    system
        .lease_becomes(&credential.lease, "revoked", seconds(15))
        .await;
}
