//! Databases whose owners attack the admin: look-alikes of every name that the engine uses, before `pg_catalog` by a
//! planted `search_path`, and every other setting that an owner can plant. Accounts live and end as usual, and no
//! planted code runs.

mod attacker;

use std::collections::HashSet;

use mayfly_tests::postgres::{Admin, Credential, Server, Site, scalar};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::System;
use mayfly_tests::{eventually, seconds, word};
use serde_json::{Value, json};
use tokio_postgres::Client;

use attacker::{Attacker, PATH, SETTINGS};

/// A connection to a planted database, for the test's own use.
async fn calm(client: Client) -> Client {
    for setting in [
        "exit_on_error = off",
        "statement_timeout = 0",
        "idle_session_timeout = 0",
        "idle_in_transaction_session_timeout = 0",
        "search_path = public",
        "default_transaction_read_only = off",
        "default_transaction_isolation = 'read committed'",
        "jit = off",
        "role = none",
        // This setting is unknown before PostgreSQL 17.
        "transaction_timeout = 0",
    ] {
        let _ = client.batch_execute(&format!("SET {setting}")).await;
    }
    client
}

async fn post(system: &System, path: &str, body: Value) -> Value {
    let (status, answer) = system.api.post(path, body).await;
    assert_eq!(status, 200, "{path}: {answer}");
    answer
}

/// Issues, renews, checks, sweeps, rotates, ends and tidies, with an account that left something
/// behind.
async fn whole_life(system: &System, site: &Site, path: &str) {
    let credential = system.issue(path, Some(120)).await;
    let own = calm(credential.login().await.unwrap()).await;
    assert_eq!(scalar(&own, "SELECT count(*) FROM app.orders").await, "2");
    own.batch_execute("CREATE TABLE app.mine (n int)")
        .await
        .unwrap();
    let renew = format!("/v1/leases/{}/renew", credential.lease);
    post(system, &renew, json!({"increment": 200})).await;
    post(system, &format!("/v1/secrets/{path}::check"), json!({})).await;
    post(system, "/v1/leases/reconcile", json!({})).await;
    let base = format!("/v1/secrets/db:{}:root", site.name);
    post(system, &format!("{base}::rotate"), json!({})).await;
    let short = system.issue(path, Some(2)).await;
    system.gone(site, &short, seconds(30)).await;
    let lease = format!("/v1/leases/{}", credential.lease);
    let (status, _) = system.api.delete(&lease).await;
    assert_eq!(status, 200);
    system.gone(site, &credential, seconds(30)).await;
    assert!(
        own.simple_query("SELECT 1").await.is_err(),
        "its session lives"
    );
    let tidied = post(system, &format!("{base}::tidy"), json!({})).await;
    assert!(
        tidied["removed"].as_array().unwrap().len() >= 2
            || !tidied["kept"].as_array().unwrap().is_empty(),
        "{tidied}"
    );
}

async fn none_is_left(site: &Site) {
    site.no_accounts(seconds(30)).await;
}

/// The owner of the secret's own database, and the owner of a database that no secret names.
async fn owners_attack(server: Server, admin: Admin) {
    let system = System::start().await;
    let site = server.site(admin).await;
    let attacker = Attacker::new(&server).await;
    let pool = system.pool().await;
    let _engine = system.engine(&pool).await;
    let grants = json!({"grantPermissions": [
        {"what": "SELECT", "where": "*.*"}, {"what": "CREATE, USAGE", "where": "schema:app"}]});
    let path = system.secret(&site, &pool, grants).await;
    let elsewhere = format!("elsewhere_{}", word());
    let root = server.superuser("postgres").await;
    for statement in [
        format!("CREATE DATABASE {elsewhere} OWNER {}", attacker.name),
        format!("ALTER DATABASE {} OWNER TO {}", site.name, attacker.name),
        // Everything that the engine sent is checked below.
        format!("ALTER ROLE {} SET log_statement = 'all'", site.name),
    ] {
        root.batch_execute(&statement).await.unwrap();
    }
    for (database, settings) in [(&site.name, &SETTINGS[..]), (&elsewhere, PATH)] {
        let owner = server
            .login(&attacker.name, &attacker.password, database)
            .await
            .unwrap();
        attacker.plants(&owner, database, settings).await;
    }
    whole_life(&system, &site, &path).await;
    // The owner of the other database grants something to this account. So the clean-up finds the account there.
    let held = system.issue(&path, Some(120)).await;
    let owner = server
        .login(&attacker.name, &attacker.password, &elsewhere)
        .await
        .unwrap();
    let owner = calm(owner).await;
    let gift = format!("ON SCHEMA evil TO \"{}\"", held.username);
    owner
        .batch_execute(&format!("GRANT USAGE {gift}"))
        .await
        .unwrap();
    let lease = format!("/v1/leases/{}", held.lease);
    system.api.delete(&lease).await;
    if admin == Admin::CreateRole {
        // Only the owner or a superuser can revoke the grant. Until then the role stays without a login, and the
        // failure names who granted it.
        eventually(
            "the failure names what holds the role",
            seconds(30),
            async || {
                let lease = system.api.ok(&lease).await;
                let said = lease["lastError"].as_str().unwrap_or_default().to_owned();
                said.contains(&format!("in database {elsewhere}"))
                    .then_some(())
            },
        )
        .await;
        assert!(held.is_refused().await);
        let gift = gift.replace(" TO ", " FROM ");
        owner
            .batch_execute(&format!("REVOKE USAGE {gift}"))
            .await
            .unwrap();
        system.api.post(&format!("{lease}/retry"), json!({})).await;
    }
    system.gone(&site, &held, seconds(30)).await;
    none_is_left(&site).await;
    attacker.gained_nothing().await;
    everything_is_guarded(&server, &site).await;
}

/// What the engine sent, as the server has logged it: the first statement of every connection, and nothing outside of
/// a transaction that states Mayfly's settings.
async fn everything_is_guarded(server: &Server, site: &Site) {
    let log = std::fs::read_to_string(server.directory().join("log")).unwrap();
    let first = "SELECT pg_catalog.set_config('search_path', '', false)";
    let mut known = HashSet::new();
    let mut begun: HashSet<&str> = HashSet::new();
    for line in log.lines() {
        let Some((pid, said)) = line.split_once("] LOG:  statement: ") else {
            continue;
        };
        let pid = pid.rsplit_once('[').unwrap().1;
        if said.starts_with(first) {
            known.insert(pid);
            continue;
        }
        let begins = said.starts_with("BEGIN ISOLATION LEVEL READ COMMITTED READ ")
            && said
                .contains("; SET LOCAL search_path = pg_catalog, pg_temp; SET LOCAL ROLE NONE; ");
        if known.contains(pid) {
            assert!(
                begins || begun.contains(pid) || said == "COMMIT" || said == "ROLLBACK",
                "outside of a transaction of ours: {line}"
            );
        } else if said.contains("mayfly") {
            panic!("before the first statement: {line}");
        }
        if said.ends_with("COMMIT") || said == "ROLLBACK" {
            begun.remove(pid);
        } else if begins {
            begun.insert(pid);
        }
    }
    assert!(
        known.len() > 3,
        "{} connections to {}",
        known.len(),
        site.name
    );
}

/// A leased account that owns the secret's database by its grant.
async fn an_account_attacks(server: Server, admin: Admin) {
    let system = System::start().await;
    let site = server.site(admin).await;
    let attacker = Attacker::new(&server).await;
    let pool = system.pool().await;
    let _engine = system.engine(&pool).await;
    let owner = format!("owner_{}", word());
    let root = server.superuser("postgres").await;
    for statement in [
        format!("CREATE ROLE {owner}"),
        format!("GRANT {owner} TO {} WITH ADMIN OPTION", site.name),
        format!("ALTER DATABASE {} OWNER TO {owner}", site.name),
    ] {
        root.batch_execute(&statement).await.unwrap();
    }
    let grants = json!({"grantPermissions": [
        {"what": "SELECT", "where": "*.*"}, {"what": "CREATE, USAGE", "where": "schema:app"}]});
    let path = system.secret(&site, &pool, grants).await;
    let member = json!({"grantPermissions": {"what": "MEMBER", "where": format!("role:{owner}")}});
    let member = system.secret(&site, &pool, member).await;
    let account: Credential = system.issue(&member, Some(120)).await;
    let session = account.login().await.unwrap();
    attacker.plants(&session, &site.name, PATH).await;
    drop(session);
    whole_life(&system, &site, &path).await;
    system
        .api
        .delete(&format!("/v1/leases/{}", account.lease))
        .await;
    none_is_left(&site).await;
    attacker.gained_nothing().await;
}

#[tokio::test]
async fn owners_attack_a_superuser_on_14() {
    owners_attack(Server::of_version("14"), Admin::Superuser).await;
}

#[tokio::test]
async fn owners_attack_a_createrole_on_14() {
    owners_attack(Server::of_version("14"), Admin::CreateRole).await;
}

#[tokio::test]
async fn owners_attack_a_superuser_on_15() {
    owners_attack(Server::pg15(), Admin::Superuser).await;
}

#[tokio::test]
async fn owners_attack_a_createrole_on_15() {
    owners_attack(Server::pg15(), Admin::CreateRole).await;
}

#[tokio::test]
async fn owners_attack_a_superuser_on_18() {
    owners_attack(Server::pg18(), Admin::Superuser).await;
}

#[tokio::test]
async fn owners_attack_a_createrole_on_18() {
    owners_attack(Server::pg18(), Admin::CreateRole).await;
}

#[tokio::test]
async fn an_account_attacks_on_14() {
    an_account_attacks(Server::of_version("14"), Admin::CreateRole).await;
}

#[tokio::test]
async fn an_account_attacks_on_15() {
    an_account_attacks(Server::pg15(), Admin::Superuser).await;
}

#[tokio::test]
async fn an_account_attacks_on_18() {
    an_account_attacks(Server::pg18(), Admin::CreateRole).await;
}

/// Somebody else owns the database of the lease store, and its schema. Look-alikes are before `pg_catalog`, and in
/// `public`, where one would match the types better.
async fn the_store_is_attacked(server: Server) {
    let url = server.store().await;
    let (_, rest) = url.split_once("//").unwrap();
    let (store, _) = rest.split_once(':').unwrap();
    let attacker = Attacker::new(&server).await;
    let root = server.superuser(store).await;
    root.batch_execute(&format!(
        "GRANT CREATE ON SCHEMA public TO {store}; ALTER DATABASE {store} OWNER TO {}",
        attacker.name
    ))
    .await
    .unwrap();
    let owner = server
        .login(&attacker.name, &attacker.password, store)
        .await
        .unwrap();
    attacker.plants(&owner, store, &SETTINGS).await;
    owner
        .batch_execute(
            "CREATE FUNCTION evil.times(numeric, int4) RETURNS numeric LANGUAGE plpgsql SET search_path = pg_catalog AS \
               'BEGIN PERFORM evil.ran(''times''); RETURN $1 OPERATOR(pg_catalog.*) $2; END'; \
             CREATE OPERATOR public.* (LEFTARG = numeric, RIGHTARG = int4, FUNCTION = evil.times)",
        )
        .await
        .unwrap();
    let settings = [("MAYFLY__STORE__URL", url.as_str())];
    let (system, site, path, _engine) = Scenario::on(server).settings(&settings).start().await;
    let credential = system.issue(&path, Some(2)).await;
    system.gone(&site, &credential, seconds(30)).await;
    let base = format!("/v1/secrets/db:{}:root", site.name);
    post(&system, &format!("{base}::rotate"), json!({})).await;
    attacker.gained_nothing().await;
}

#[tokio::test]
async fn the_store_is_attacked_on_14() {
    the_store_is_attacked(Server::of_version("14")).await;
}

#[tokio::test]
async fn the_store_is_attacked_on_18() {
    the_store_is_attacked(Server::pg18()).await;
}

/// The owner of the secret's database lets nobody in: accounts end through another database.
#[tokio::test]
async fn an_owner_lets_nobody_in() {
    let system = System::start().await;
    let server = Server::pg18();
    let site = server.site(Admin::CreateRole).await;
    let attacker = Attacker::new(&server).await;
    let pool = system.pool().await;
    let _engine = system.engine(&pool).await;
    let path = system.secret(&site, &pool, json!({})).await;
    let root = server.superuser("postgres").await;
    root.batch_execute(&format!(
        "ALTER DATABASE {} OWNER TO {}",
        site.name, attacker.name
    ))
    .await
    .unwrap();
    let owner = server
        .login(&attacker.name, &attacker.password, "postgres")
        .await
        .unwrap();
    let name = &site.name;
    for (shut, open) in [
        (
            format!("ALTER DATABASE {name} ALLOW_CONNECTIONS false"),
            format!("ALTER DATABASE {name} ALLOW_CONNECTIONS true"),
        ),
        (
            format!("ALTER DATABASE {name} CONNECTION LIMIT 0"),
            format!("ALTER DATABASE {name} CONNECTION LIMIT -1"),
        ),
        (
            format!("REVOKE CONNECT ON DATABASE {name} FROM PUBLIC"),
            format!("GRANT CONNECT ON DATABASE {name} TO PUBLIC"),
        ),
        (
            format!("ALTER DATABASE {name} SET local_preload_libraries = 'nonsense'"),
            format!("ALTER DATABASE {name} RESET local_preload_libraries"),
        ),
    ] {
        let credential = system.issue(&path, Some(120)).await;
        owner.batch_execute(&shut).await.unwrap();
        // The connections of the issue are closed by then.
        tokio::time::sleep(seconds(2)).await;
        system
            .api
            .delete(&format!("/v1/leases/{}", credential.lease))
            .await;
        eventually(
            &format!("the account is gone: {shut}"),
            seconds(15),
            async || {
                let left = server.roles(&credential.username).await;
                left.is_empty().then_some(())
            },
        )
        .await;
        owner.batch_execute(&open).await.unwrap();
    }
}
