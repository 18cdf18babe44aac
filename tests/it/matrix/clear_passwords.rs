//! A secret that sends its accounts' passwords to the server in clear, for servers that refuse verifiers: never over
//! a connection that others could read, and never into the server's log.

use mayfly_tests::postgres::{Admin, Credential, Server, scalar};
use mayfly_tests::scenario::{Scenario, Stage};
use mayfly_tests::system::prefix;
use serde_json::{Value, json};

/// A server that logs as much as possible and has the extension passwordcheck.
const TALKATIVE: &str = "shared_preload_libraries = 'pg_stat_statements,auto_explain,passwordcheck'\n\
    log_statement = 'all'\nlog_min_duration_statement = 0\nlog_duration = on\nlog_min_error_statement = 'debug5'\n\
    log_transaction_sample_rate = 1\nauto_explain.log_min_duration = 0\nauto_explain.log_nested_statements = on\n\
    pg_stat_statements.track = 'all'\nfsync = off";

async fn in_clear(stage: &Stage) -> String {
    stage.secret(json!({"accountPassword": "clear"})).await
}

async fn finding(stage: &Stage, path: &str) -> Value {
    stage.finding(path, "account password in clear").await
}

fn log(stage: &Stage) -> String {
    std::fs::read_to_string(stage.site.server.directory().join("log")).unwrap()
}

/// The server makes the verifier itself. Its log, its statistics and its list of sessions do not contain the
/// password.
async fn nothing_is_kept(version: Option<&str>) {
    let s = Scenario::on(Server::own_of(version, TALKATIVE))
        .admin(Admin::Superuser)
        .stage()
        .await;
    let hand = s.site.admin().await;
    hand.batch_execute("CREATE EXTENSION pg_stat_statements")
        .await
        .unwrap();
    let path = in_clear(&s).await;
    let found = finding(&s, &path).await;
    assert_eq!(found["ok"], true, "{found}");
    let credential = s.system.issue(&path, None).await;
    assert!(credential.login().await.is_ok());
    let stored = format!(
        "SELECT rolpassword FROM pg_authid WHERE rolname = '{}'",
        credential.username
    );
    let stored = scalar(&hand, &stored).await;
    assert!(stored.starts_with("SCRAM-SHA-256$"), "{stored}");
    // The verifier is the server's own: the verifier that the dispatcher would have sent is nowhere.
    let log = log(&s);
    assert!(log.contains(&credential.username), "the log says much");
    assert!(!log.contains(&stored), "a verifier was sent");
    assert!(
        !log.contains(&credential.password),
        "the log has the password"
    );
    let kept = format!(
        "SELECT count(*) FROM (SELECT query FROM pg_stat_statements UNION ALL SELECT query FROM pg_stat_activity) q \
         WHERE q.query LIKE '%{}%' AND q.query NOT LIKE '%FROM pg_stat_activity%'",
        credential.password
    );
    assert_eq!(scalar(&hand, &kept).await, "0");
    let text = std::fs::read_to_string(s.system.log()).unwrap();
    assert!(!text.contains(&credential.password), "our own log has it");
    assert!(
        text.contains("is sent to its server in clear"),
        "no warning"
    );
    let lease = format!("/v1/leases/{}", credential.lease);
    assert_eq!(s.system.api.delete(&lease).await.0, 200);
    s.system
        .gone(&s.site, &credential, mayfly_tests::seconds(30))
        .await;
}

#[tokio::test]
async fn nothing_is_kept_on_14() {
    nothing_is_kept(Some("14")).await;
}

#[tokio::test]
async fn nothing_is_kept_on_15() {
    nothing_is_kept(None).await;
}

#[tokio::test]
async fn nothing_is_kept_on_18() {
    nothing_is_kept(Some("18")).await;
}

/// No log contains a password that the server refuses, although the error's context would.
#[tokio::test]
async fn a_refused_password_is_kept_nowhere() {
    let s = Scenario::on(Server::own_of(Some("18"), TALKATIVE))
        .admin(Admin::Superuser)
        .stage()
        .await;
    let hand = s.site.admin().await;
    for statement in [
        "ALTER SYSTEM SET passwordcheck.min_password_length = 60",
        "SELECT pg_reload_conf()",
    ] {
        hand.simple_query(statement).await.unwrap();
    }
    mayfly_tests::eventually("it is in force", mayfly_tests::seconds(30), async || {
        let length = scalar(&hand, "SHOW passwordcheck.min_password_length").await;
        length.starts_with("60").then_some(())
    })
    .await;
    let path = in_clear(&s).await;
    let (status, answer) = s.read(&path).await;
    assert_eq!(status, 422, "{answer}");
    assert_eq!(answer["error"], "statement_failed", "{answer}");
    let message = answer["message"].as_str().unwrap();
    assert!(
        message.contains("password") && message.contains("22023"),
        "{message}"
    );
    let log = log(&s);
    assert!(log.contains("refuses the account or its password"));
    let made = log.lines().filter(|line| line.contains("CREATE ROLE"));
    for line in made.filter(|line| line.contains(&prefix(&s.site))) {
        assert!(line.contains("mayfly.password"), "{line}");
    }
    assert!(s.site.accounts().await.is_empty());
}

/// An admin that cannot keep the server from logging sends nothing, and the check says what helps.
#[tokio::test]
async fn a_server_that_would_log_it_gets_nothing() {
    let options = "log_statement = 'all'\nfsync = off";
    let s = Scenario::on(Server::own_of(None, options)).stage().await;
    let path = in_clear(&s).await;
    let found = finding(&s, &path).await;
    assert_eq!(found["ok"], false, "{found}");
    let (status, answer) = s.read(&path).await;
    assert_eq!(
        (status, &answer["error"]),
        (422, &json!("admin_lacks_rights")),
        "{answer}"
    );
    let message = answer["message"].as_str().unwrap();
    assert!(message.contains("log_statement"), "{message}");
    assert!(s.site.accounts().await.is_empty());
    let root = s.site.server.superuser("postgres").await;
    root.batch_execute(found["fix"][0].as_str().unwrap())
        .await
        .unwrap();
    // The engine's earlier connections have the earlier setting.
    let credential =
        mayfly_tests::eventually("an account", mayfly_tests::seconds(30), async || {
            let (status, answer) = s.read(&path).await;
            (status == 200).then(|| Credential::from_answer(&answer))
        })
        .await;
    assert!(credential.login().await.is_ok());
    assert!(!log(&s).contains(&credential.password));
}

/// Outside of this machine the password goes only to a verified server.
#[tokio::test]
async fn an_unverified_server_gets_nothing() {
    let s = Scenario::on(Server::pg18())
        .admin(Admin::Superuser)
        .stage()
        .await;
    let hosts = s.system.directory.join("hosts");
    std::fs::write(&hosts, "127.0.0.1 localhost db.example\n").unwrap();
    let pool = s.system.pool().await;
    let _engine = s.system.engine_with_hosts(&pool, &hosts, &[]);
    _engine.ready().await;
    let mut data = s.site.data();
    data["host"] = json!("db.example");
    data["sslmode"] = json!("require");
    let base = format!("db:{}:root", s.site.name);
    s.system
        .api
        .create(
            &format!("/v1/secrets/{base}"),
            json!({"attributes": {"type": "postgresql"}, "data": data}),
        )
        .await;
    let verifier = s.system.secret(&s.site, &pool, json!({})).await;
    assert_eq!(s.read(&verifier).await.0, 200, "a verifier may go there");
    let attributes = json!({"accountPassword": "clear"});
    let clear = s.system.secret(&s.site, &pool, attributes).await;
    let (status, answer) = s.read(&clear).await;
    assert_eq!(status, 422, "{answer}");
    let message = answer["message"].as_str().unwrap();
    assert!(message.contains("verify-full"), "{message}");
    let found = finding(&s, &clear).await;
    assert_eq!(found["ok"], false, "{found}");
}
