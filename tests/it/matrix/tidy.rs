//! Grant and quarantine roles are removed when nothing needs them, and nothing else is removed with them.

use mayfly_tests::cli::Cli;
use mayfly_tests::postgres::{Admin, Server, Site, scalar};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::System;
use mayfly_tests::{eventually, run_dir, seconds, word};
use serde_json::{Value, json};
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

/// Roles of this system: `grant`, `quarantine`, or with nothing all of them.
async fn roles_of(system: &System, site: &Site, kind: &str) -> Vec<String> {
    let status = system.api.ok("/v1/status").await;
    let installation = status["installation"].as_str().unwrap();
    let root = site.server.superuser("postgres").await;
    let rows = root
        .query(
            "SELECT r.rolname::text FROM pg_roles r JOIN pg_shdescription d ON d.objoid = r.oid \
             AND d.classoid = 'pg_authid'::regclass WHERE starts_with(d.description, $1) AND strpos(d.description, $2) > 0 ORDER BY 1",
            &[&format!("mayfly:{kind}"), &installation],
        )
        .await
        .unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

async fn tidy(system: &System, site: &Site) -> Value {
    let path = format!("/v1/secrets/db:{}:root::tidy", site.name);
    let (status, answer) = system.api.post(&path, json!({})).await;
    assert_eq!(status, 200, "{answer}");
    answer
}

async fn grant_roles_come_and_go(server: Server, admin: Admin) {
    let (system, site, pool, _engine) = Scenario::on(server.clone())
        .admin(admin)
        .start_without_secret()
        .await;
    let other = format!("other_{}", word());
    let root = server.superuser("postgres").await;
    root.batch_execute(&format!("CREATE DATABASE {other} OWNER {}", site.name))
        .await
        .unwrap();
    let there = server
        .login(&site.name, &site.password, &other)
        .await
        .unwrap();
    there
        .batch_execute("CREATE TABLE notes (id int); INSERT INTO notes VALUES (1)")
        .await
        .unwrap();
    let here = system.secret(&site, &pool, json!({})).await;
    let far = json!({"database": other, "grantPermissions": {"what": "ALL", "where": "*.*"}});
    let far = system.secret(&site, &pool, far).await;
    let (one, two) = (
        system.issue(&here, None).await,
        system.issue(&far, None).await,
    );
    assert_eq!(roles_of(&system, &site, "grant").await.len(), 2);

    // Both grant roles are in use: nothing is taken from them.
    let answer = tidy(&system, &site).await;
    assert_eq!(answer["removed"], json!([]));
    let kept = answer["kept"].as_array().unwrap();
    assert!(
        kept.len() == 2 && kept.iter().all(|kept| kept["inUse"] == true),
        "{answer}"
    );
    assert!(
        kept.iter()
            .any(|kept| kept["reason"].as_str().unwrap().contains(&one.username))
    );
    let items = "SELECT count(*) FROM items";
    assert_eq!(scalar(&one.login().await.unwrap(), items).await, "2");

    system
        .api
        .delete(&format!("/v1/leases/{}", two.lease))
        .await;
    system.gone(&site, &two, seconds(15)).await;
    let answer = tidy(&system, &site).await;
    assert_eq!(answer["removed"].as_array().unwrap().len(), 1, "{answer}");
    assert_eq!(answer["kept"].as_array().unwrap().len(), 1, "{answer}");
    assert_eq!(roles_of(&system, &site, "grant").await.len(), 1);
    assert_eq!(scalar(&there, "SELECT count(*) FROM notes").await, "1");
    assert_eq!(scalar(&one.login().await.unwrap(), items).await, "2");

    // The grant role is made again when it is needed.
    let again = system.issue(&far, None).await;
    let client = again.login().await.unwrap();
    assert_eq!(scalar(&client, "SELECT count(*) FROM notes").await, "1");
    drop(client);

    // The role of a deleted secret is removed by itself, and the last roles with the base secret.
    let (status, _) = system
        .api
        .delete(&format!("/v1/secrets/{far}?leases=revoke"))
        .await;
    assert_eq!(status, 204);
    eventually(
        "the deleted secret's role is gone",
        seconds(90),
        async || (roles_of(&system, &site, "grant").await.len() == 1).then_some(()),
    )
    .await;
    assert_eq!(scalar(&one.login().await.unwrap(), items).await, "2");
    system
        .api
        .delete(&format!("/v1/secrets/{here}?leases=revoke"))
        .await;
    system.gone(&site, &one, seconds(15)).await;
    let (status, answer) = system
        .api
        .delete(&format!("/v1/secrets/db:{}:root", site.name))
        .await;
    assert_eq!(status, 204, "{answer}");
    assert_eq!(
        roles_of(&system, &site, "grant").await,
        Vec::<String>::new()
    );
}

#[tokio::test]
async fn tidy_on_15_as_superuser() {
    grant_roles_come_and_go(Server::pg15(), Admin::Superuser).await;
}

#[tokio::test]
async fn tidy_on_15_as_createrole() {
    grant_roles_come_and_go(Server::pg15(), Admin::CreateRole).await;
}

#[tokio::test]
async fn tidy_on_18_as_superuser() {
    grant_roles_come_and_go(Server::pg18(), Admin::Superuser).await;
}

#[tokio::test]
async fn tidy_on_18_as_createrole() {
    grant_roles_come_and_go(Server::pg18(), Admin::CreateRole).await;
}

/// Objects that accounts left in quarantine stay there, with its role.
async fn quarantine_keeps_what_it_has(server: Server, admin: Admin) {
    let grants = json!({"grantPermissions": [
        {"what": "SELECT", "where": "*.*"}, {"what": "CREATE", "where": "schema:app"}]});
    let (system, site, path, _engine) = Scenario::on(server.clone())
        .admin(admin)
        .attributes(grants)
        .start()
        .await;
    let credential = system.issue(&path, None).await;
    let client = credential.login().await.unwrap();
    client
        .batch_execute(
            "CREATE TABLE app.left_behind (id int); INSERT INTO app.left_behind VALUES (7)",
        )
        .await
        .unwrap();
    system
        .api
        .delete(&format!("/v1/leases/{}", credential.lease))
        .await;
    system.gone(&site, &credential, seconds(15)).await;

    let answer = tidy(&system, &site).await;
    let quarantine = roles_of(&system, &site, "quarantine").await;
    assert_eq!(quarantine.len(), 1);
    assert!(
        roles_of(&system, &site, "grant").await.is_empty(),
        "{answer}"
    );
    let kept = &answer["kept"][0];
    assert!(
        kept["role"] == quarantine[0].as_str()
            && kept["inUse"] == false
            && kept["reason"].as_str().unwrap().contains(&site.name),
        "{answer}"
    );
    let root = server.superuser(&site.name).await;
    assert_eq!(scalar(&root, "SELECT id FROM app.left_behind").await, "7");
    root.batch_execute(&format!(
        "ALTER TABLE app.left_behind OWNER TO {}",
        site.name
    ))
    .await
    .unwrap();
    let answer = tidy(&system, &site).await;
    assert_eq!(answer["removed"], json!(quarantine), "{answer}");
    assert_eq!(scalar(&root, "SELECT id FROM app.left_behind").await, "7");
}

#[tokio::test]
async fn tidy_of_quarantine_on_15_as_createrole() {
    quarantine_keeps_what_it_has(Server::pg15(), Admin::CreateRole).await;
}

#[tokio::test]
async fn tidy_of_quarantine_on_18_as_createrole() {
    quarantine_keeps_what_it_has(Server::pg18(), Admin::CreateRole).await;
}

#[tokio::test]
async fn tidy_of_quarantine_on_18_as_superuser() {
    quarantine_keeps_what_it_has(Server::pg18(), Admin::Superuser).await;
}

/// A grant role stays if somebody made it an owner, or a member of another role.
#[tokio::test]
async fn tidy_leaves_what_others_made_of_a_grant_role() {
    let (system, site, path, _engine) = Scenario::on(Server::pg15())
        .admin(Admin::Superuser)
        .start()
        .await;
    let credential = system.issue(&path, None).await;
    system
        .api
        .delete(&format!("/v1/leases/{}", credential.lease))
        .await;
    system.gone(&site, &credential, seconds(15)).await;
    let group = roles_of(&system, &site, "grant").await.remove(0);
    let root = site.server.superuser(&site.name).await;
    let friend = format!("friend_{}", word());
    root.batch_execute(&format!(
        "CREATE ROLE {friend} NOLOGIN; GRANT {group} TO {friend}; \
         CREATE TABLE precious (id int); INSERT INTO precious VALUES (1); ALTER TABLE precious OWNER TO {group}"
    ))
    .await
    .unwrap();
    let answer = tidy(&system, &site).await;
    assert!(
        answer["kept"][0]["reason"]
            .as_str()
            .unwrap()
            .contains(&friend),
        "{answer}"
    );
    root.batch_execute(&format!("REVOKE {group} FROM {friend}"))
        .await
        .unwrap();
    let answer = tidy(&system, &site).await;
    assert!(
        answer["kept"][0]["reason"]
            .as_str()
            .unwrap()
            .contains("owns objects"),
        "{answer}"
    );
    assert_eq!(scalar(&root, "SELECT count(*) FROM precious").await, "1");
    assert_eq!(roles_of(&system, &site, "grant").await.join(" "), group);
    root.batch_execute(&format!("ALTER TABLE precious OWNER TO {}", site.name))
        .await
        .unwrap();
    let answer = tidy(&system, &site).await;
    assert_eq!(answer["removed"], json!([group]), "{answer}");
    assert_eq!(scalar(&root, "SELECT count(*) FROM precious").await, "1");
}

/// Reads continue while the server is tidied: every account can do what its secret grants.
async fn reads_beside_tidying(server: Server, admin: Admin) {
    let system = System::start().await;
    let site = server.site(admin).await;
    let pool = system.pool().await;
    let _engines = [system.engine(&pool).await, system.engine(&pool).await];
    let path = system.secret(&site, &pool, json!({})).await;
    system.issue(&path, Some(1)).await;
    let (removed, read) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let is_enough = || removed.load(Relaxed) >= 2 && read.load(Relaxed) >= 10;
    let tidying = async {
        while !is_enough() {
            let answer = tidy(&system, &site).await;
            removed.fetch_add(answer["removed"].as_array().unwrap().len(), Relaxed);
        }
    };
    let reading = async {
        while !is_enough() {
            let credential = system.issue(&path, None).await;
            let client = credential.login().await.unwrap();
            assert_eq!(scalar(&client, "SELECT count(*) FROM items").await, "2");
            read.fetch_add(1, Relaxed);
            // For a moment the role has no member, so that there is something to tidy.
            system
                .api
                .delete(&format!("/v1/leases/{}", credential.lease))
                .await;
            system.gone(&site, &credential, seconds(20)).await;
        }
    };
    let both = async { tokio::join!(tidying, reading) };
    let done = tokio::time::timeout(seconds(120), both).await;
    assert!(done.is_ok(), "{removed:?} removed, {read:?} read");
}

#[tokio::test(flavor = "multi_thread")]
async fn tidy_beside_reads_on_15() {
    reads_beside_tidying(Server::pg15(), Admin::CreateRole).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tidy_beside_reads_on_18() {
    reads_beside_tidying(Server::pg18(), Admin::CreateRole).await;
}

/// One engine has just made a grant role again, and has granted it nothing yet. An account that another engine makes
/// with its last look at the earlier role has all grants nevertheless.
#[tokio::test(flavor = "multi_thread")]
async fn a_grant_role_that_is_made_again_is_empty_at_first() {
    let system = System::start().await;
    let site = Server::pg15().site(Admin::Superuser).await;
    let (one, two) = (system.pool().await, system.pool().await);
    let fault = run_dir().join(word());
    let slow = [("MAYFLY_FAULT_FILE", fault.to_str().unwrap())];
    let engine = system.engine_with(&one, &slow);
    engine.ready().await;
    let _other = system.engine(&two).await;
    let slowly = system.secret(&site, &one, json!({})).await;
    let path = system.secret(&site, &two, json!({})).await;
    eventually("an issue in the time of a look", seconds(120), async || {
        // This read makes a look that counts as fresh for 1 s.
        let looked = Instant::now();
        let credential = system.issue(&path, None).await;
        let lease = format!("/v1/leases/{}", credential.lease);
        system.api.delete(&lease).await;
        system.gone(&site, &credential, seconds(15)).await;
        let issued = async {
            eventually("the role has lost its name", seconds(15), async || {
                let grants = roles_of(&system, &site, "grant").await;
                grants[0].starts_with("mayfly_gone_").then_some(())
            })
            .await;
            std::fs::write(&fault, "grant.page delay 3000").unwrap();
            let issue = async {
                eventually("the role is made again", seconds(15), async || {
                    (!fault.exists()).then_some(())
                })
                .await;
                let issued = system.issue(&path, None).await;
                let is_quick = looked.elapsed() < seconds(1);
                let client = issued.login().await.unwrap();
                assert_eq!(scalar(&client, "SELECT count(*) FROM items").await, "2");
                (issued, is_quick)
            };
            let (other, (issued, is_quick)) = tokio::join!(system.issue(&slowly, None), issue);
            for credential in [&other, &issued] {
                let lease = format!("/v1/leases/{}", credential.lease);
                system.api.delete(&lease).await;
                system.gone(&site, credential, seconds(15)).await;
            }
            is_quick
        };
        let (_, is_quick) = tokio::join!(tidy(&system, &site), issued);
        is_quick.then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn uninstall() {
    let system = System::start().await;
    let (one, two) = (
        Server::pg15().site(Admin::CreateRole).await,
        Server::pg18().site(Admin::Superuser).await,
    );
    let pool = system.pool().await;
    let engine = system.engine(&pool).await;
    let first = system.secret(&one, &pool, json!({})).await;
    let second = system.secret(&two, &pool, json!({})).await;
    let (a, b) = (
        system.issue(&first, None).await,
        system.issue(&second, None).await,
    );

    let cli = Cli { system: &system };
    let refused = cli.run(&["uninstall", "--yes"]);
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(
        said.contains("2 leases are live") && said.contains("--revoke"),
        "{said}"
    );
    assert!(a.login().await.is_ok() && b.login().await.is_ok());
    let unasked = cli.run(&["uninstall", "--revoke"]);
    assert_eq!(unasked.status.code(), Some(2), "nobody could be asked");
    assert!(a.login().await.is_ok());

    let done = cli.run(&["uninstall", "--revoke", "--yes"]);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status.code(), Some(0), "{said}");
    let answer: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(answer["servers"].as_array().unwrap().len(), 2, "{answer}");
    assert!(a.is_refused().await && b.is_refused().await);
    for site in [&one, &two] {
        assert!(roles_of(&system, site, "").await.is_empty(), "{answer}");
    }

    // If no engine can tidy, the answer reports that.
    tokio::task::spawn_blocking(move || engine.process.stop())
        .await
        .unwrap();
    let done = cli.run(&["uninstall", "--yes"]);
    assert_eq!(done.status.code(), Some(1));
    assert!(
        String::from_utf8(done.stdout)
            .unwrap()
            .contains("no_engine")
    );
}
