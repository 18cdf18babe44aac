//! Reads that are repeated, shared and counted.

use mayfly_tests::cli::Cli;
use mayfly_tests::postgres::{Credential, Server, Site};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::{Engine, System};
use mayfly_tests::{eventually, seconds};
use rustix::process::Signal;
use serde_json::{Value, json};

async fn furnished(attributes: Value) -> (System, Site, String, Engine) {
    let (system, site, path, engine) = Scenario::on(Server::pg18())
        .attributes(attributes)
        .start()
        .await;
    (system, site, path, engine)
}

async fn read(system: &System, path: &str, key: &str) -> (u16, Value) {
    let path = format!("/v1/secrets/{path}");
    system.api.get_with(&path, ("idempotency-key", key)).await
}

#[tokio::test]
async fn a_read_sent_again_gets_the_same_lease() {
    let (mut system, site, path, _engine) = furnished(json!({})).await;
    let (status, first) = read(&system, &path, "one").await;
    assert_eq!(status, 200, "{first}");
    // The read is repeated three times at once, and again after a restart.
    for _ in 0..2 {
        let again = [1, 2, 3].map(|_| read(&system, &path, "one"));
        for (status, answer) in futures_util::future::join_all(again).await {
            assert_eq!((status, &answer["data"]), (200, &first["data"]));
        }
        system.kill_dispatcher();
        system.start_dispatcher().await;
        system.broker_up().await;
    }
    assert!(Credential::from_answer(&first).login().await.is_ok());
    assert_eq!(site.accounts().await.len(), 1);
    let (_, other) = read(&system, &path, "two").await;
    assert_ne!(other["data"]["leaseId"], first["data"]["leaseId"]);
    // A read with a different ttl is not the same request.
    let (status, body) = read(&system, &format!("{path}?ttl=7"), "one").await;
    assert_eq!(status, 400, "{body}");
    assert!(body["errors"]["Idempotency-Key"].is_array(), "{body}");
    for bad in ["two words", &"x".repeat(256)] {
        let (status, body) = read(&system, &path, bad).await;
        assert_eq!((status, body["error"].as_str()), (400, Some("invalid")));
    }
    // A key belongs to one caller.
    let token = system
        .api
        .create("/v1/tokens", json!({"read": [path], "ttl": 60}))
        .await;
    let reader = system.api.with_token(token["token"].as_str().unwrap());
    let (_, theirs) = reader
        .get_with(&format!("/v1/secrets/{path}"), ("idempotency-key", "one"))
        .await;
    assert_ne!(theirs["data"]["leaseId"], first["data"]["leaseId"]);
    // The lease of the key has ended: the caller gets an error, and no other lease is made.
    let lease = first["data"]["leaseId"].as_str().unwrap();
    system.api.delete(&format!("/v1/leases/{lease}")).await;
    let (status, body) = read(&system, &path, "one").await;
    assert_eq!(
        (status, body["error"].as_str()),
        (409, Some("exists")),
        "{body}"
    );
}

/// The first caller leaves, or the first try fails: the second read under the same key gets an account.
#[tokio::test]
async fn while_the_first_is_under_way_or_has_failed() {
    let (system, site, path, engine) = furnished(json!({})).await;
    engine.process.signal(Signal::STOP);
    // The caller stops waiting. Its account is kept, because its retry will come.
    let gone = tokio::time::timeout(seconds(1), read(&system, &path, "patient")).await;
    assert!(gone.is_err());
    let (answers, ()) = tokio::join!(
        futures_util::future::join_all([1, 2].map(|_| read(&system, &path, "patient"))),
        async {
            tokio::time::sleep(seconds(1)).await;
            engine.process.signal(Signal::CONT);
        }
    );
    assert_eq!(answers[0].0, 200, "{:?}", answers[0]);
    assert_eq!(answers[0].1["data"], answers[1].1["data"]);
    assert!(Credential::from_answer(&answers[0].1).login().await.is_ok());
    assert_eq!(site.accounts().await.len(), 1);

    let broken = system
        .secret(
            &site,
            system
                .lease(answers[0].1["data"]["leaseId"].as_str().unwrap())
                .await["pool"]
                .as_str()
                .unwrap(),
            json!({"grantPermissions": {"what": "SELECT", "where": "public.later"}}),
        )
        .await;
    let (status, body) = read(&system, &broken, "k").await;
    assert_eq!(
        (status, body["error"].as_str()),
        (422, Some("no_such_object")),
        "{body}"
    );
    site.admin()
        .await
        .batch_execute("CREATE TABLE public.later (n int)")
        .await
        .unwrap();
    let (status, body) = read(&system, &broken, "k").await;
    assert_eq!(
        status, 200,
        "nobody had got a credential under this key: {body}"
    );
}

#[tokio::test]
async fn shared_leases() {
    let (system, site, path, _engine) = furnished(json!({"share": true})).await;
    let reads = (0..8).map(|_| system.issue(&path, Some(6)));
    let shared = futures_util::future::join_all(reads).await;
    for credential in &shared {
        assert_eq!(credential.lease, shared[0].lease);
        assert_eq!(credential.password, shared[0].password);
    }
    assert_eq!(site.accounts().await.len(), 1);
    let token = system
        .api
        .create("/v1/tokens", json!({"read": [path], "ttl": 60}))
        .await;
    let reader = system.api.with_token(token["token"].as_str().unwrap());
    let theirs = Credential::from_answer(&reader.ok(&format!("/v1/secrets/{path}?ttl=6")).await);
    assert_ne!(theirs.lease, shared[0].lease, "another caller has its own");
    // If less than half of the requested life is left, the caller gets another lease.
    tokio::time::sleep(seconds(4)).await;
    let fresh = system.issue(&path, Some(6)).await;
    assert_ne!(fresh.lease, shared[0].lease);
    // The grants of the secret have changed: a new lease is made.
    let change = json!({"attributes": {"connectionLimit": 5}});
    let (status, _) = system.api.put(&format!("/v1/secrets/{path}"), change).await;
    assert_eq!(status, 200);
    assert_ne!(system.issue(&path, Some(6)).await.lease, fresh.lease);
    system.gone(&site, &shared[0], seconds(10)).await;
}

/// A lease with a short TTL that is being made is not shared with a caller that requests a long one.
#[tokio::test]
async fn a_shared_lease_lives_for_long_enough() {
    let (system, _site, path, engine) = furnished(json!({"share": true})).await;
    engine.process.signal(Signal::STOP);
    let read = |ttl: u64| {
        let (api, path) = (system.api.clone(), format!("/v1/secrets/{path}?ttl={ttl}"));
        tokio::spawn(async move { Credential::from_answer(&api.ok(&path).await) })
    };
    let short = read(2);
    pending(&system, &path, 1).await;
    let long = read(60);
    pending(&system, &path, 2).await;
    engine.process.signal(Signal::CONT);
    let (short, long) = (short.await.unwrap(), long.await.unwrap());
    assert_ne!(short.lease, long.lease);
    assert!(long.expiration > short.expiration);
}

async fn pending(system: &System, path: &str, count: u64) {
    let list = format!("/v1/leases?path={path}&state=pending");
    eventually("its lease is recorded", seconds(5), async || {
        (system.api.ok(&list).await["length"] == count).then_some(())
    })
    .await;
}

/// The dispatcher dies during a read: the same read sent again begins again, at once.
#[tokio::test]
async fn a_read_whose_dispatcher_died_begins_anew() {
    let fault = mayfly_tests::run_dir().join(format!("fault-{}", mayfly_tests::word()));
    let settings = [("MAYFLY_FAULT_FILE", fault.to_str().unwrap())];
    let (mut system, site, path, _engine) = Scenario::on(Server::pg18())
        .settings(&settings)
        .start()
        .await;
    for step in ["recorded", "sent"] {
        std::fs::write(&fault, format!("issue.{step} kill")).unwrap();
        let api = system.api.clone();
        let secret = format!("/v1/secrets/{path}");
        let died =
            tokio::spawn(async move { api.get_with(&secret, ("idempotency-key", step)).await });
        assert!(died.await.is_err(), "{step}: it was answered");
        system.kill_dispatcher();
        system.start_dispatcher().await;
        system.broker_up().await;
        let started = std::time::Instant::now();
        let (status, answer) = read(&system, &path, step).await;
        assert_eq!(status, 200, "{step}: {answer}");
        // Otherwise the read would wait for the deadline of the dead dispatcher's read, 30 s.
        assert!(started.elapsed() < seconds(25), "{:?}", started.elapsed());
        let credential = Credential::from_answer(&answer);
        assert!(credential.login().await.is_ok());
        // The account of the first try is ended.
        eventually("one account is left", seconds(70), async || {
            (site.accounts().await == [credential.username.clone()]).then_some(())
        })
        .await;
        let lease = format!("/v1/leases/{}", credential.lease);
        system.api.delete(&lease).await;
        system.gone(&site, &credential, seconds(10)).await;
    }
}

/// `exec` renews a shared lease in time, even if most of its life is used up.
#[tokio::test(flavor = "multi_thread")]
async fn exec_renews_a_shared_lease_that_is_old() {
    let (system, site, path, _engine) = furnished(json!({"share": true})).await;
    let credential = system.issue(&path, Some(10)).await;
    tokio::time::sleep(seconds(5)).await;
    let cli = Cli { system: &system };
    let mut command = cli.command(&["exec", "--ttl", "9", &path, "--"]);
    command.args(["sh", "-c", "echo $PGUSER; sleep 9"]);
    let running = tokio::task::spawn_blocking(move || command.output().unwrap());
    let past = credential.expiration + seconds(2);
    eventually("its first end has passed", seconds(15), async || {
        (jiff::Timestamp::now() > past).then_some(())
    })
    .await;
    assert!(credential.login().await.is_ok(), "it was not renewed");
    let ended = running.await.unwrap();
    let user = String::from_utf8(ended.stdout).unwrap();
    assert_eq!(user.trim(), credential.username, "the shared one");
    system.gone(&site, &credential, seconds(20)).await;
}

/// `exec` of a shared secret leaves the lease to the others.
#[tokio::test(flavor = "multi_thread")]
async fn exec_leaves_a_shared_lease() {
    let (system, site, path, _engine) = furnished(json!({"share": true})).await;
    let credential = system.issue(&path, Some(30)).await;
    let cli = Cli { system: &system };
    cli.ok(&["exec", "--ttl", "30", &path, "--", "true"]);
    tokio::time::sleep(seconds(1)).await;
    assert!(credential.login().await.is_ok());
    assert_eq!(site.accounts().await.len(), 1);
}

#[tokio::test]
async fn quotas_hold_under_concurrency() {
    let (system, site, path, _engine) =
        furnished(json!({"maxLeases": 5, "maxLeasesPerCaller": 4})).await;
    let token = system
        .api
        .create(
            "/v1/tokens",
            json!({"read": [path], "ttl": 60, "maxLeases": 1}),
        )
        .await;
    let reader = system.api.with_token(token["token"].as_str().unwrap());
    let secret = format!("/v1/secrets/{path}?ttl=8");
    let reads = (0..20).map(|_| system.api.get(&secret));
    let answers = futures_util::future::join_all(reads).await;
    let served = answers.iter().filter(|(status, _)| *status == 200).count();
    assert_eq!(served, 4);
    for (status, body) in answers.iter().filter(|(status, _)| *status != 200) {
        assert_eq!(
            (*status, body["error"].as_str()),
            (429, Some("quota")),
            "{body}"
        );
        let message = body["message"].as_str().unwrap();
        assert!(
            message.starts_with("maxLeasesPerCaller")
                && message.contains("a place becomes free at"),
            "{message}"
        );
    }
    reader.ok(&secret).await;
    let (_, body) = reader.get(&secret).await;
    assert!(
        body["message"]
            .as_str()
            .unwrap()
            .starts_with(&format!("maxLeases of `{path}`")),
        "{body}"
    );
    assert_eq!(site.accounts().await.len(), 5);
    let response = system.api.raw(reqwest::Method::GET, &secret, None).await;
    let wait: u64 = response.headers()["retry-after"]
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!((1..=8).contains(&wait), "{wait}");
    // One lease is given back: its place is free as soon as its account is gone.
    let one = answers.iter().find(|(status, _)| *status == 200).unwrap();
    let one = Credential::from_answer(&one.1);
    system
        .api
        .delete(&format!("/v1/leases/{}", one.lease))
        .await;
    eventually("its place is free", seconds(5), async || {
        (system.api.get(&secret).await.0 == 200).then_some(())
    })
    .await;
    // The token's own limit is separate.
    system.gone(&site, &one, seconds(5)).await;
    let (status, body) = reader.get(&secret).await;
    assert_eq!(status, 429);
    assert!(
        body["message"]
            .as_str()
            .unwrap()
            .starts_with("maxLeases of"),
        "{body}"
    );
    eventually("places free up by themselves", seconds(20), async || {
        (reader.get(&secret).await.0 == 200).then_some(())
    })
    .await;
}

/// A token's limit counts over all secrets, also those without a limit of their own.
#[tokio::test]
async fn a_tokens_own_limit() {
    let (system, site, path, _engine) = furnished(json!({})).await;
    let body = json!({"read": [path], "ttl": 60, "maxLeases": 2});
    let token = system.api.create("/v1/tokens", body).await;
    let reader = system.api.with_token(token["token"].as_str().unwrap());
    let secret = format!("/v1/secrets/{path}?ttl=30");
    let first = Credential::from_answer(&reader.ok(&secret).await);
    reader.ok(&secret).await;
    let (status, body) = reader.get(&secret).await;
    assert_eq!(
        (status, body["error"].as_str()),
        (429, Some("quota")),
        "{body}"
    );
    let message = body["message"].as_str().unwrap();
    assert!(
        message.starts_with("maxLeases of this token: 2 of 2")
            && message.contains("a place becomes free at"),
        "{message}"
    );
    // The limit of one token does not affect others.
    system.issue(&path, Some(30)).await;
    let lease = format!("/v1/leases/{}", first.lease);
    assert_eq!(reader.delete(&lease).await.0, 200);
    system.gone(&site, &first, seconds(5)).await;
    eventually("its place is free", seconds(5), async || {
        (reader.get(&secret).await.0 == 200).then_some(())
    })
    .await;
}
