//! The commands for people who look after leases, secrets and pools: what they do, print and return.

use std::os::unix::fs::PermissionsExt;

use mayfly_tests::cli::Cli;
use mayfly_tests::postgres::{Credential, Server, Site};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::{Engine, System};
use mayfly_tests::{eventually, seconds};
use serde_json::{Value, json};

async fn furnished(server: Server) -> (System, Site, String, String, Engine) {
    let (system, site, path, engine) = Scenario::on(server)
        .attributes(json!({"maxTtl": 900}))
        .start()
        .await;
    let pool = engine.pool.clone();
    (system, site, pool, path, engine)
}

#[tokio::test(flavor = "multi_thread")]
async fn lease_renew() {
    let (system, _site, _, path, _engine) = furnished(Server::pg18()).await;
    let cli = Cli { system: &system };
    let credential = system.issue(&path, Some(60)).await;
    let id = &credential.lease;
    let renew = ["lease", "renew", id, "--increment"];
    let moved = cli.ok(&[&renew[..], &["10m", "-f", "expiration"]].concat());
    let moved: jiff::Timestamp = moved.parse().unwrap();
    assert!(moved > credential.expiration + seconds(500), "{moved}");
    assert_eq!(
        cli.ok(&["lease", "show", id, "-f", "expiration"]),
        moved.to_string()
    );
    let said = cli.fails(1, &[&renew[..], &["16m"]].concat());
    assert!(said.contains("maximum (maxTtl)"), "{said}");
    cli.fails(2, &[&renew[..], &["soon"]].concat());
    let nobody = "01890a5d-ac96-774b-bcce-b302099a8057";
    cli.fails(3, &["lease", "renew", nobody, "--increment", "60"]);
}

/// The table shows what prevents the end, with the time of the next try. A try by hand succeeds when the cause is
/// gone.
#[tokio::test(flavor = "multi_thread")]
async fn lease_retry_and_what_is_stuck() {
    let (system, site, _, path, _engine) = furnished(Server::pg15()).await;
    let cli = Cli { system: &system };
    let credential = system.issue(&path, Some(60)).await;
    let id = &credential.lease;
    let said = cli.fails(1, &["lease", "retry", id]);
    assert!(said.contains("in_use"), "{said}");
    let root = site.server.superuser(&site.name).await;
    // A role of which the admin is no member has given a privilege.
    let helper = format!("{}_helper", site.name);
    root.batch_execute(&format!(
        "CREATE ROLE {helper}; CREATE TABLE public.theirs (n int); ALTER TABLE public.theirs OWNER TO {helper}; \
         SET ROLE {helper}; GRANT SELECT ON public.theirs TO \"{}\"",
        credential.username
    ))
    .await
    .unwrap();
    cli.ok(&["lease", "revoke", id]);
    let table = eventually("it is listed as stuck", seconds(30), async || {
        let list = ["-e", "table", "lease", "list", "--state", "stuck"];
        let table = cli.ok(&list);
        table.contains(id.as_str()).then_some(table)
    })
    .await;
    let (heading, row) = table.split_once('\n').unwrap();
    for column in ["ATTEMPTS", "LAST ERROR", "IN THE WAY", "NEXT TRY"] {
        assert!(heading.contains(column), "{table}");
    }
    let in_the_way = heading.find("IN THE WAY").unwrap()..heading.find("NEXT TRY").unwrap();
    assert!(row[in_the_way.clone()].contains("theirs"), "{table}");
    let next: jiff::Timestamp = row[in_the_way.end..].trim().parse().unwrap();
    assert!(next > jiff::Timestamp::now() - seconds(5), "{table}");
    root.batch_execute("RESET ROLE; DROP TABLE public.theirs")
        .await
        .unwrap();
    root.batch_execute(&format!("DROP ROLE {helper}"))
        .await
        .unwrap();
    // The engine may have tried on its own shortly before and ended the account.
    let retried = cli.run(&["lease", "retry", id]);
    let said = String::from_utf8_lossy(&retried.stderr);
    assert!(
        retried.status.success() || said.contains("is revoked"),
        "{said}"
    );
    system.gone(&site, &credential, seconds(5)).await;
    system.lease_becomes(id, "revoked", seconds(70)).await;
    cli.fails(1, &["lease", "retry", id]);
}

/// Mayfly does nothing more for a detached lease, until the databases are compared with the store.
#[tokio::test(flavor = "multi_thread")]
async fn lease_detach_and_reconcile() {
    // A comparison looks at all roles of a server.
    let (system, site, _, path, _engine) = furnished(Server::own("")).await;
    let cli = Cli { system: &system };
    let dry = ["lease", "reconcile", "--dry-run"];
    let kept = system.issue(&path, Some(120)).await;
    cli.ok(&dry);
    let detached = system.issue(&path, Some(8)).await;
    system.rabbit.lose_parked();
    cli.ok(&["lease", "revoke", &detached.lease, "--detach"]);
    assert_eq!(
        cli.ok(&["lease", "show", &detached.lease, "-f", "state"]),
        "revoked"
    );
    assert_eq!(site.server.roles(&detached.username).await.len(), 1);
    eventually("its date has passed", seconds(20), async || {
        detached.is_refused().await.then_some(())
    })
    .await;
    for _ in 0..2 {
        let output = cli.run(&dry);
        assert_eq!(output.status.code(), Some(1));
        let found: Value = serde_json::from_slice(&output.stdout).unwrap();
        let differs = &found["differences"][0];
        assert_eq!(
            (&differs["kind"], &differs["role"]),
            (
                &json!("settled_in_store"),
                &json!(detached.username.as_str())
            ),
            "{found}"
        );
    }
    cli.ok(&["lease", "reconcile"]);
    system.gone(&site, &detached, seconds(10)).await;
    eventually("nothing differs any more", seconds(10), async || {
        cli.run(&dry).status.success().then_some(())
    })
    .await;
    assert!(kept.login().await.is_ok());
    // A server that cannot be asked is reported; it does not count as a server without differences.
    site.server.kill();
    let said = cli.fails(1, &dry);
    assert!(said.contains("not every server"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn secret_rotate_and_tidy() {
    let (system, site, _, path, _engine) = furnished(Server::pg18()).await;
    let cli = Cli { system: &system };
    let base = format!("db:{}:root", site.name);
    let credential = system.issue(&path, Some(60)).await;
    cli.ok(&["secret", "rotate", &base]);
    let login = site.server.login(&site.name, &site.password, &site.name);
    assert!(login.await.is_err(), "the earlier password still works");
    cli.fails(3, &["secret", "rotate", "no:such"]);
    cli.fails(1, &["secret", "rotate", &path]);

    let tidy = ["-e", "table", "secret", "tidy", &base];
    let table = cli.ok(&tidy);
    assert!(
        table.contains("stays") && table.contains(&credential.username),
        "{table}"
    );
    cli.ok(&["lease", "revoke", &credential.lease]);
    system.gone(&site, &credential, seconds(10)).await;
    let table = cli.ok(&tidy);
    assert!(
        table.contains("removed") && table.contains("mayfly_grant_"),
        "{table}"
    );
    assert!(cli.ok(&tidy).contains("nothing"));
}

#[tokio::test(flavor = "multi_thread")]
async fn secret_delete_with_leases() {
    let (system, site, pool, path, _engine) = furnished(Server::pg15()).await;
    let cli = Cli { system: &system };
    let revoked = system.issue(&path, Some(60)).await;
    let said = cli.fails(1, &["secret", "delete", &path]);
    assert!(said.contains("in_use"), "{said}");
    assert!(revoked.login().await.is_ok());
    cli.ok(&["secret", "delete", &path, "--leases", "revoke"]);
    system.gone(&site, &revoked, seconds(10)).await;
    cli.fails(3, &["secret", "read", &path]);

    let path = system.secret(&site, &pool, json!({})).await;
    let detached = system.issue(&path, Some(60)).await;
    cli.fails(2, &["secret", "delete", &path, "--leases", "forget"]);
    cli.ok(&["secret", "delete", &path, "--leases", "detach"]);
    let lease = system.lease(&detached.lease).await;
    assert_eq!(lease["state"], "revoked", "{lease}");
    assert!(detached.login().await.is_ok(), "its account was ended");
}

/// One name, one account; and a token may not have more leases than its limit.
#[tokio::test(flavor = "multi_thread")]
async fn secret_read_once_and_not_too_often() {
    let (system, site, _, path, _engine) = furnished(Server::pg18()).await;
    let cli = Cli { system: &system };
    let read = |key: &str| {
        let answer = cli.ok(&["secret", "read", &path, "--idempotency-key", key]);
        Credential::from_answer(&serde_json::from_str(&answer).unwrap())
    };
    let (first, again, other) = (read("one"), read("one"), read("two"));
    assert_eq!(
        (&first.lease, &first.password),
        (&again.lease, &again.password)
    );
    assert_ne!(first.lease, other.lease);
    assert!(again.login().await.is_ok());
    cli.ok(&["lease", "revoke", &first.lease]);
    system.gone(&site, &first, seconds(10)).await;
    let said = cli.fails(1, &["secret", "read", &path, "--idempotency-key", "one"]);
    assert!(said.contains("exists"), "{said}");

    let create = ["token", "create", "--read", &path, "--ttl", "1h"];
    let token = cli.ok(&[&create[..], &["--max-leases", "1", "-f", "token"]].concat());
    cli.fails(2, &[&create[..], &["--max-leases", "0"]].concat());
    let ask = || {
        let mut command = cli.command(&["secret", "read", &path, "--ttl", "60"]);
        command.env("MAYFLY_TOKEN", &token).output().unwrap()
    };
    assert!(ask().status.success());
    let refused = ask();
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(
        said.contains("maxLeases of this token: 1 of 1")
            && said.contains("a place becomes free at")
            && said.contains("(quota)"),
        "{said}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn pool_rotate_key() {
    let (system, _site, pool, path, old) = furnished(Server::pg15()).await;
    let cli = Cli { system: &system };
    let rotate = ["pool", "rotate-key", &pool];
    let present = format!("{pool}.key");
    let begin = |file: &'static str| {
        let files = ["--old-key-file", &present, "--key-file", file];
        [&rotate[..], &files].concat()
    };
    let finish = [&rotate[..], &["--finish"]].concat();
    let file = |name: &str| system.directory.join(name);
    cli.fails(1, &finish);
    cli.ok(&begin("new.key"));
    let mode = std::fs::metadata(file("new.key")).unwrap().permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
    cli.fails(2, &begin("new.key"));
    cli.fails(1, &begin("other.key"));
    assert!(!file("other.key").exists());

    // A new key that was given up does not work, and the old one works in full.
    cli.ok(&[&rotate[..], &["--give-up"]].concat());
    cli.fails(1, &finish);
    assert!(system.issue(&path, Some(30)).await.login().await.is_ok());

    cli.ok(&begin("newer.key"));
    let new = system.engine_with_key(&file("newer.key")).await;
    let said = cli.fails(1, &finish);
    assert!(said.contains(&old.name), "{said}");
    tokio::task::spawn_blocking(move || old.process.stop())
        .await
        .unwrap();
    eventually("the old engine is forgotten", seconds(15), async || {
        cli.run(&finish).status.success().then_some(())
    })
    .await;
    let credential = system.issue(&path, Some(30)).await;
    assert!(credential.login().await.is_ok());
    assert_eq!(
        cli.ok(&["lease", "show", &credential.lease, "-f", "engine"]),
        new.name
    );
}
