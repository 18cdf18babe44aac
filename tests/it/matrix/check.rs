//! `::check` on real servers: what is correct, what the admin lacks (the printed statements are run, and then nothing
//! is lacking), and servers that let anybody in.

use mayfly_tests::cli::Cli;
use mayfly_tests::postgres::{Admin, Server, Site};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::System;
use mayfly_tests::word;
use serde_json::{Value, json};

async fn check(system: &System, path: &str) -> Value {
    let (status, answer) = system
        .api
        .post(&format!("/v1/secrets/{path}::check"), json!({}))
        .await;
    assert_eq!(status, 200, "{answer}");
    answer
}

fn findings<'a>(answer: &'a Value, check: &str) -> Vec<&'a Value> {
    let list = answer["findings"].as_array().unwrap();
    list.iter().filter(|one| one["check"] == check).collect()
}

/// The only finding of this name, and whether it is ok.
#[track_caller]
fn is_ok(answer: &Value, check: &str) -> bool {
    let found = findings(answer, check);
    assert_eq!(found.len(), 1, "{check} in {answer:#}");
    found[0]["ok"] == true
}

fn fixes(answer: &Value) -> Vec<String> {
    let list = answer["findings"].as_array().unwrap();
    list.iter()
        .flat_map(|one| one["fix"].as_array().unwrap())
        .map(|fix| fix.as_str().unwrap().to_owned())
        .collect()
}

async fn all_is_well(server: Server, admin: Admin) {
    let (system, site, path, pool) = Scenario::on(server.clone())
        .admin(admin)
        .attributes(json!({"share": true}))
        .start_without_engine()
        .await;
    let base = format!("db:{}:root", site.name);
    for path in [&path, &base] {
        let (status, answer) = system
            .api
            .post(&format!("/v1/secrets/{path}::check"), json!({}))
            .await;
        assert_eq!((status, &answer["error"]), (503, &json!("no_engine")));
    }
    let _engine = system.engine(&pool).await;
    // A lease of the same caller and secret, which the trial must leave alone.
    let shared = system.issue(&path, None).await;

    let answer = check(&system, &path).await;
    assert_eq!(answer["ok"], true, "{answer:#}");
    for name in [
        "connect",
        "admin password",
        "login",
        "tls",
        "clock",
        "create roles",
        "end sessions",
        "database",
        "issue",
        "account password",
        "revoke",
    ] {
        assert!(is_ok(&answer, name), "{name} in {answer:#}");
    }
    assert_eq!(findings(&answer, "grant").len(), 2, "{answer:#}");
    assert!(fixes(&answer).is_empty());
    let tls = findings(&answer, "tls")[0]["message"].as_str().unwrap();
    assert!(tls.starts_with("TLS"), "{tls}");
    assert_eq!(site.accounts().await.join(" "), shared.username);
    assert!(shared.login().await.is_ok());
    assert!(server.roles("mayfly_check_").await.is_empty());

    let answer = check(&system, &base).await;
    assert_eq!(answer["ok"], true, "{answer:#}");
    assert!(findings(&answer, "issue").is_empty());

    let cli = Cli { system: &system };
    let output = cli.run(&["secret", "check", &path, "-e", "table"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.contains("account password"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn check_all_is_well_on_15_as_superuser() {
    all_is_well(Server::pg15(), Admin::Superuser).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn check_all_is_well_on_15_as_createrole() {
    all_is_well(Server::pg15(), Admin::CreateRole).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn check_all_is_well_on_18_as_superuser() {
    all_is_well(Server::pg18(), Admin::Superuser).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn check_all_is_well_on_18_as_createrole() {
    all_is_well(Server::pg18(), Admin::CreateRole).await;
}

/// Objects of another owner, with names that need quotes.
async fn others_things(site: &Site) -> String {
    let other = format!("other_{}", word());
    let root = site.server.superuser(&site.name).await;
    root.batch_execute(&format!(
        "CREATE ROLE {other} NOLOGIN; CREATE SCHEMA \"Odd; schema\" AUTHORIZATION {other}; \
         CREATE TABLE \"Odd; schema\".\"odd \"\"table\" (id serial PRIMARY KEY); \
         ALTER TABLE \"Odd; schema\".\"odd \"\"table\" OWNER TO {other}; \
         CREATE FUNCTION \"Odd; schema\".\"two words\"(integer) RETURNS int LANGUAGE sql AS 'SELECT 1'; \
         ALTER FUNCTION \"Odd; schema\".\"two words\"(integer) OWNER TO {other}; \
         REVOKE EXECUTE ON FUNCTION \"Odd; schema\".\"two words\"(integer) FROM PUBLIC; \
         CREATE ROLE {other}_group NOLOGIN"
    ))
    .await
    .unwrap();
    other
}

async fn what_lacks_is_said_as_sql(server: Server) {
    let (system, site, pool, _engine) = Scenario::on(server.clone()).start_without_secret().await;
    let other = others_things(&site).await;
    let grants = json!({"grantPermissions": [
        {"what": "SELECT, INSERT", "where": "\"Odd; schema\".\"odd \"\"table\""},
        {"what": "EXECUTE", "where": "function:\"Odd; schema\".\"two words\""},
        {"what": "MEMBER", "where": format!("role:{other}_group")},
        {"what": "SELECT", "where": "*.*"},
    ], "ownedObjects": {"reassignTo": other}});
    let path = system.secret(&site, &pool, grants).await;
    let root = server.superuser(&site.name).await;
    root.batch_execute(&format!("ALTER ROLE {} NOCREATEROLE", site.name))
        .await
        .unwrap();
    let answer = check(&system, &path).await;
    assert_eq!(answer["ok"], false);
    assert!(!is_ok(&answer, "create roles") && !is_ok(&answer, "issue"));
    // Each round runs the statements that the check names. No statement may be named again.
    let mut rounds = 0;
    let last = loop {
        let answer = check(&system, &path).await;
        if answer["ok"] == true {
            break answer;
        }
        let fixes = fixes(&answer);
        assert!(!fixes.is_empty() && rounds < 3, "{answer:#}");
        rounds += 1;
        for fix in &fixes {
            root.batch_execute(fix)
                .await
                .unwrap_or_else(|error| panic!("{fix}: {error:?}"));
        }
        if rounds == 1 {
            let all = fixes.join("\n");
            for part in [
                format!("ALTER ROLE \"{}\" CREATEROLE;", site.name),
                format!(
                    "GRANT USAGE ON SCHEMA \"Odd; schema\" TO \"{}\" WITH GRANT OPTION;",
                    site.name
                ),
                format!(
                    "GRANT SELECT ON TABLE \"Odd; schema\".\"odd \"\"table\" TO \"{}\" WITH GRANT OPTION;",
                    site.name
                ),
                format!("TO \"{}\";", site.name),
            ] {
                assert!(all.contains(&part), "{part} is not in\n{all}");
            }
        }
    };
    assert!(is_ok(&last, "issue") && is_ok(&last, "new owner"));
    let credential = system.issue(&path, None).await;
    let client = credential.login().await.unwrap();
    client
        .batch_execute(
            "INSERT INTO \"Odd; schema\".\"odd \"\"table\" DEFAULT VALUES; SELECT \"Odd; schema\".\"two words\"(1)",
        )
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn check_says_what_lacks_on_15() {
    what_lacks_is_said_as_sql(Server::pg15()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn check_says_what_lacks_on_18() {
    what_lacks_is_said_as_sql(Server::pg18()).await;
}

/// A pattern that grants something is correct, and reports what it skips. One that matches nothing, or does not
/// exist, is not. An admin that cannot use what it makes (NOINHERIT, up to 15) is reported.
#[tokio::test(flavor = "multi_thread")]
async fn check_of_patterns_and_absent_things() {
    let (system, site, pool, _engine) = Scenario::on(Server::pg15()).start_without_secret().await;
    others_things(&site).await;
    let path = system.secret(&site, &pool, json!({})).await;
    let answer = check(&system, &path).await;
    assert_eq!(answer["ok"], true, "{answer:#}");
    assert!(fixes(&answer).iter().any(|fix| fix.contains("Odd; schema")));
    let everything = findings(&answer, "grant")[1]["message"].as_str().unwrap();
    assert!(everything.contains("skipped"), "{everything}");

    let absent = json!({"grantPermissions": {"what": "SELECT", "where": "public.nothing_here"}});
    let path = system.secret(&site, &pool, absent).await;
    let answer = check(&system, &path).await;
    assert!(
        answer["ok"] == false && !is_ok(&answer, "issue"),
        "{answer:#}"
    );
    let said = findings(&answer, "grant")[1]["message"].as_str().unwrap();
    assert!(said.contains("no_such_object"), "{said}");

    let root = site.server.superuser("postgres").await;
    root.batch_execute(&format!("ALTER ROLE {} NOINHERIT", site.name))
        .await
        .unwrap();
    let answer = check(&system, &format!("db:{}:root", site.name)).await;
    assert!(!is_ok(&answer, "end sessions"));
    assert_eq!(
        fixes(&answer),
        [format!("ALTER ROLE \"{}\" INHERIT;", site.name)]
    );
    let cli = Cli { system: &system };
    let output = cli.run(&[
        "secret",
        "check",
        &format!("db:{}:root", site.name),
        "-e",
        "table",
    ]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.ends_with(&format!("ALTER ROLE \"{}\" INHERIT;\n", site.name)),
        "{text}"
    );
}

/// A server that does not ask accounts for passwords is reported, with the name pg_hba.conf. An admin's password is
/// not changed if no login shows which one is in force.
#[tokio::test(flavor = "multi_thread")]
async fn check_finds_trust() {
    let server = Server::own("");
    let (system, site, path, _engine) = Scenario::on(server.clone()).start().await;
    let keep = format!(
        "host all postgres 127.0.0.1/32 scram-sha-256\nhost all {} 127.0.0.1/32 scram-sha-256\n",
        site.name
    );
    server
        .put_hba(&format!("{keep}host all all 127.0.0.1/32 trust"))
        .await;
    let answer = check(&system, &path).await;
    assert!(!is_ok(&answer, "account password") && is_ok(&answer, "admin password"));
    let said = findings(&answer, "account password")[0]["message"]
        .as_str()
        .unwrap();
    assert!(
        said.contains("pg_hba.conf") && said.contains("trust"),
        "{said}"
    );
    assert!(is_ok(&answer, "revoke"), "{answer:#}");

    server
        .put_hba(&format!("{keep}host all all 127.0.0.1/32 ident"))
        .await;
    let answer = check(&system, &path).await;
    let said = findings(&answer, "account password")[0]["message"]
        .as_str()
        .unwrap();
    assert!(
        !is_ok(&answer, "account password") && said.contains("28000"),
        "{said}"
    );

    server.put_hba("host all all 127.0.0.1/32 trust").await;
    let answer = check(&system, &path).await;
    assert!(!is_ok(&answer, "admin password"), "{answer:#}");
    let base = format!("db:{}:root", site.name);
    let (status, answer) = system
        .api
        .post(&format!("/v1/secrets/{base}::rotate"), json!({}))
        .await;
    assert_eq!(status, 422, "{answer}");
    assert!(answer["message"].as_str().unwrap().contains("pg_hba.conf"));
    // No rotation is open, and the old password is in force.
    server
        .put_hba(&format!("{keep}host all all 127.0.0.1/32 scram-sha-256"))
        .await;
    assert!(
        server
            .login(&site.name, &site.password, &site.name)
            .await
            .is_ok()
    );
    let (status, answer) = system
        .api
        .post(&format!("/v1/secrets/{base}::rotate"), json!({}))
        .await;
    assert_eq!(status, 200, "{answer}");
}

#[tokio::test]
async fn acts_are_for_root_and_for_what_they_fit() {
    let system = System::start().await;
    system.broker_up().await;
    system
        .api
        .create("/v1/secrets/app:mail", json!({"data": {"user": "x"}}))
        .await;
    for act in ["check", "rotate", "tidy"] {
        let at = |path: &str| format!("/v1/secrets/{path}::{act}");
        let (status, answer) = system.api.post(&at("app:mail"), json!({})).await;
        assert_eq!(
            (status, &answer["error"]),
            (400, &json!("invalid")),
            "{act}"
        );
        let (status, _) = system.api.post(&at("no:such"), json!({})).await;
        assert_eq!(status, 404, "{act}");
        let (status, _) = system.api.post(&at("no:such"), json!({"x": 1})).await;
        assert!(status == 400 || status == 404, "{act}");
    }
    let (status, answer) = system
        .api
        .post("/v1/secrets/app:mail::burn", json!({}))
        .await;
    assert_eq!((status, &answer["error"]), (400, &json!("malformed")));
    let token = system
        .api
        .create("/v1/tokens", json!({"read": ["app:*"], "ttl": 60}))
        .await;
    let reader = system.api.with_token(token["token"].as_str().unwrap());
    for act in ["check", "rotate", "tidy"] {
        let (status, _) = reader
            .post(&format!("/v1/secrets/app:mail::{act}"), json!({}))
            .await;
        assert_eq!(status, 403, "{act}");
    }
}
