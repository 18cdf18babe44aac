//! Renewals: the end is moved in the database. Of a renewal and an end at the same time exactly one has its full
//! effect.

use mayfly_tests::cli::Cli;
use mayfly_tests::postgres::{Admin, Credential, Server, Site};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::System;
use mayfly_tests::windows::SOON_FINAL;
use mayfly_tests::{eventually, seconds};
use serde_json::{Value, json};

async fn renew(system: &System, lease: &str, increment: u64) -> (u16, Value) {
    let path = format!("/v1/leases/{lease}/renew");
    system
        .api
        .post(&path, json!({"increment": increment}))
        .await
}

fn end(lease: &Value) -> jiff::Timestamp {
    lease["expiration"].as_str().unwrap().parse().unwrap()
}

async fn until(moment: jiff::Timestamp, and_ms: i64) {
    let left = moment.as_millisecond() + and_ms - jiff::Timestamp::now().as_millisecond();
    tokio::time::sleep(std::time::Duration::from_millis(
        u64::try_from(left).unwrap_or(0),
    ))
    .await;
}

async fn a_life_prolonged(server: Server, admin: Admin) {
    let (system, site, path, _engine) = Scenario::on(server)
        .admin(admin)
        .settings(&SOON_FINAL)
        .attributes(json!({"maxTtl": 600}))
        .start()
        .await;
    let credential = system.issue(&path, Some(3)).await;
    let before = system.lease(&credential.lease).await;
    let most: jiff::Timestamp = before["maxExpiration"].as_str().unwrap().parse().unwrap();
    let whole = most.duration_since(credential.expiration).as_secs();
    assert_eq!(whole, 597, "the maximum counts from the making");

    let session = credential.login().await.unwrap();
    let (status, lease) = renew(&system, &credential.lease, 8).await;
    assert_eq!(status, 200, "{lease}");
    assert!(end(&lease) > credential.expiration);
    assert_eq!(lease["maxExpiration"], before["maxExpiration"]);
    // The account is tested after its first end, and after the parked message of that end.
    until(credential.expiration, 2000).await;
    assert!(credential.login().await.is_ok(), "renewed, yet refused");
    assert!(
        session.simple_query("SELECT 1").await.is_ok(),
        "its session was ended"
    );
    until(end(&lease), 0).await;
    system.gone(&site, &credential, seconds(4)).await;
    system
        .lease_becomes(&credential.lease, "revoked", seconds(60))
        .await;
    eventually("no message is left", seconds(60), async || {
        (system.rabbit.messages("mayfly.v1.delay") + system.rabbit.messages("mayfly.v1.pool") == 0)
            .then_some(())
    })
    .await;
}

#[tokio::test]
async fn on_15() {
    a_life_prolonged(Server::pg15(), Admin::CreateRole).await;
}

#[tokio::test]
async fn on_18() {
    a_life_prolonged(Server::pg18(), Admin::CreateRole).await;
}

#[tokio::test]
async fn on_18_as_superuser() {
    a_life_prolonged(Server::pg18(), Admin::Superuser).await;
}

async fn furnished(attributes: Value) -> (System, Site, String, mayfly_tests::system::Engine) {
    let (system, site, path, engine) = Scenario::on(Server::pg18())
        .attributes(attributes)
        .start()
        .await;
    (system, site, path, engine)
}

#[tokio::test]
async fn beyond_the_maximum_is_refused_and_never_cut() {
    let (system, _site, path, _engine) = furnished(json!({"ttl": 60, "maxTtl": 62})).await;
    let credential = system.issue(&path, None).await;
    let id = &credential.lease;
    // The first renewal is impossible by the request itself, the second by the database's clock.
    for (increment, wait) in [(63, 0), (62, 3)] {
        tokio::time::sleep(seconds(wait)).await;
        let (status, body) = renew(&system, id, increment).await;
        assert_eq!(
            (status, body["error"].as_str()),
            (400, Some("invalid")),
            "{body}"
        );
        let reason = body["errors"]["increment"][0].as_str().unwrap();
        assert!(
            reason.contains("maximum (maxTtl)") && reason.contains(" s from now"),
            "{reason}"
        );
        assert_eq!(end(&system.lease(id).await), credential.expiration);
    }
    let (status, lease) = renew(&system, id, 58).await;
    assert_eq!(status, 200, "{lease}");
    for (body, field) in [
        (json!({"increment": 0}), "increment"),
        (json!({"increment": "1"}), "increment"),
        (json!({}), "increment"),
        (json!({"increment": 5, "by": 1}), "by"),
    ] {
        let (status, answer) = system
            .api
            .post(&format!("/v1/leases/{id}/renew"), body)
            .await;
        assert_eq!(status, 400);
        assert!(answer["errors"][field].is_array(), "{answer}");
    }
}

/// Two at the same time, and a shorter one after a longer one: the end does not move back.
#[tokio::test]
async fn the_longest_wins() {
    let (system, site, path, _engine) = furnished(json!({})).await;
    let credential = system.issue(&path, Some(3)).await;
    let id = &credential.lease;
    let begun = jiff::Timestamp::now();
    let all = [9, 5, 7, 6, 8].map(|increment| renew(&system, id, increment));
    for (status, body) in futures_util::future::join_all(all).await {
        assert_eq!(status, 200, "{body}");
    }
    let after = end(&system.lease(id).await);
    // Answers have no fractions.
    assert!(after.as_second() >= begun.as_second() + 9, "{after}");
    let (status, body) = renew(&system, id, 1).await;
    assert_eq!((status, end(&body)), (200, after));
    until(after, -500).await;
    assert!(credential.login().await.is_ok());
    system.gone(&site, &credential, seconds(5)).await;
}

/// A live lease can be renewed, an ended one cannot.
#[tokio::test]
async fn in_the_last_second() {
    let (system, site, path, _engine) = furnished(json!({})).await;
    let credential = system.issue(&path, Some(3)).await;
    let first_end = site.server.valid_until(&credential.username).await;
    until(first_end, -900).await;
    let (status, body) = renew(&system, &credential.lease, 4).await;
    assert_eq!(status, 200, "{body}");
    until(first_end, 1500).await;
    assert!(
        credential.login().await.is_ok(),
        "it ended at its first date"
    );
    system.gone(&site, &credential, seconds(10)).await;
    let (status, body) = renew(&system, &credential.lease, 4).await;
    assert_eq!(
        (status, body["error"].as_str()),
        (409, Some("in_use")),
        "{body}"
    );
}

/// Renewals near the end and at the same time as revocations. Each has its full effect or none.
#[tokio::test]
async fn races_have_one_outcome() {
    let (system, site, path, _engine) = furnished(json!({})).await;
    let (system, site, path) = (&system, &site, &path);
    let around = (0..24).map(|n: i64| async move {
        let credential = system.issue(path, Some(2)).await;
        // The account is watched from half a second before the end to two seconds after it.
        let end = site.server.valid_until(&credential.username).await;
        until(end, n * 100 - 500).await;
        let (status, body) = renew(system, &credential.lease, 6).await;
        (credential, status, body)
    });
    let mut renewed = Vec::new();
    let mut lost = 0;
    for (credential, status, body) in futures_util::future::join_all(around).await {
        match status {
            200 => renewed.push((credential, end(&body))),
            409 => {
                lost += 1;
                system.gone(site, &credential, seconds(10)).await;
            }
            _ => panic!("{status} {body}"),
        }
    }
    assert!(
        !renewed.is_empty() && lost > 0,
        "{} renewed, {lost} lost",
        renewed.len()
    );
    for (credential, end) in &renewed {
        if jiff::Timestamp::now() < *end - seconds(1) {
            assert!(
                credential.login().await.is_ok(),
                "renewed to {end}, yet refused"
            );
        }
    }
    // If a renewal and a revocation are requested together, the account always ends.
    let beside = (0..12).map(|_| async move {
        let credential = system.issue(path, Some(60)).await;
        let one = format!("/v1/leases/{}", credential.lease);
        let (renewed, revoked) = tokio::join!(
            renew(system, &credential.lease, 60),
            system.api.delete(&one)
        );
        assert!(matches!(renewed.0, 200 | 409), "{renewed:?}");
        assert_eq!(revoked.0, 200, "{revoked:?}");
        credential
    });
    for credential in futures_util::future::join_all(beside).await {
        system.gone(site, &credential, seconds(10)).await;
        let (status, body) = renew(system, &credential.lease, 60).await;
        assert_eq!(
            (status, body["error"].as_str()),
            (409, Some("in_use")),
            "{body}"
        );
    }
    for (credential, _) in &renewed {
        system.gone(site, credential, seconds(15)).await;
    }
}

/// The engine renewed it and the dispatcher died before it knew: the row is corrected, and nothing ends early.
#[tokio::test]
async fn a_renewal_nobody_recorded() {
    let (mut system, site, path, _engine) = furnished(json!({})).await;
    let credential = system.issue(&path, Some(3)).await;
    system.kill_dispatcher();
    // This statement does the work of an engine.
    let admin = site.server.superuser("postgres").await;
    admin
        .batch_execute(&format!(
            "DO $$ BEGIN EXECUTE 'ALTER ROLE \"{}\" VALID UNTIL ' || quote_literal(clock_timestamp() + interval '9 seconds'); END $$",
            credential.username
        ))
        .await
        .unwrap();
    system.start_dispatcher().await;
    until(credential.expiration, 3000).await;
    assert!(credential.login().await.is_ok());
    let lease = eventually("the row is corrected", seconds(5), async || {
        let lease = system.lease(&credential.lease).await;
        (end(&lease) > credential.expiration + seconds(1)).then_some(lease)
    })
    .await;
    assert_eq!(lease["state"], "active");
    until(end(&lease), 0).await;
    system.gone(&site, &credential, seconds(5)).await;
}

#[tokio::test]
async fn a_token_renews_its_own_leases_only() {
    let (system, _site, path, _engine) = furnished(json!({})).await;
    let token = system
        .api
        .create("/v1/tokens", json!({"read": [path], "ttl": 60}))
        .await;
    let reader = system.api.with_token(token["token"].as_str().unwrap());
    let own = Credential::from_answer(&reader.ok(&format!("/v1/secrets/{path}")).await);
    let other = system.issue(&path, None).await;
    let ask = async |lease: &str| {
        let path = format!("/v1/leases/{lease}/renew");
        reader.post(&path, json!({"increment": 400})).await.0
    };
    assert_eq!((ask(&own.lease).await, ask(&other.lease).await), (200, 404));
    let (status, _) = reader
        .post("/v1/leases/reconcile", json!({"dryRun": true}))
        .await;
    assert_eq!(status, 403);
}

/// `exec` renews while its command runs, and revokes at its end.
#[tokio::test(flavor = "multi_thread")]
async fn exec_keeps_its_lease_alive() {
    let (system, site, path, _engine) = furnished(json!({})).await;
    let file = system.directory.join("credential");
    let cli = Cli { system: &system };
    let mut command = cli
        .command(&["exec", "--ttl", "3", &path, "--", "sh", "-c"])
        .arg(format!(
            "echo $PGUSER > {0}.new; mv {0}.new {0}; sleep 8",
            file.display()
        ))
        .spawn()
        .unwrap();
    let role = eventually("the command runs", seconds(15), async || {
        std::fs::read_to_string(&file).ok()
    })
    .await;
    tokio::time::sleep(seconds(6)).await;
    assert_eq!(
        site.server.roles(role.trim()).await.len(),
        1,
        "twice its ttl has passed"
    );
    assert!(command.wait().unwrap().success());
    site.no_accounts(seconds(5)).await;
}
