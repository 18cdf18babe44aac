//! The broker's operator records messages and sends them again: creates, answers, renewals. No ended account comes
//! back for long, and no answer counts for another request. An engine of another pool can report anything, and
//! settles nothing.

use std::path::PathBuf;

use jiff::Timestamp;
use lapin::BasicProperties;
use lapin::message::Delivery;
use mayfly_protocol::task::Kind;
use mayfly_tests::amqp::{Recorded, Recorder, Tap, put};
use mayfly_tests::liar::Liar;
use mayfly_tests::postgres::{Admin, Server, Site, scalar};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::system::{Engine, System};
use mayfly_tests::{eventually, seconds};
use serde_json::{Value, json};

/// A short deadline, so that a create is over soon; and no sweep that could help.
const SHORT: &[(&str, &str)] = &[
    ("MAYFLY__CREATE__DEADLINE_SECONDS", "2"),
    ("MAYFLY__LEASE__SWEEP_SECONDS", "86400"),
];

async fn furnished(settings: &[(&str, &str)]) -> (System, Site, String, String) {
    let system = System::start_from(programs(), Rabbit::shared(), settings).await;
    let site = Server::pg18().site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let path = system.secret(&site, &pool, json!({})).await;
    (system, site, pool, path)
}

fn programs() -> Option<PathBuf> {
    std::env::var_os("MAYFLY_REPLAY_PROGRAMS").map(PathBuf::from)
}

fn queue(pool: &str) -> String {
    format!("mayfly.v1.pool.{pool}.create")
}

fn count(metrics: &str, line: &str) -> u64 {
    let found = metrics.lines().find(|found| found.starts_with(line));
    found.map_or(0, |found| {
        found.rsplit(' ').next().unwrap().parse().unwrap()
    })
}

/// Waits until an engine has settled this number of requests of a kind, with any result.
async fn settled(engine: &Engine, pool: &str, kind: &str, most: u64) -> String {
    eventually(&format!("{most} {kind} requests are settled"), seconds(15), async || {
        let metrics = engine.admin_text("/metrics").await;
        let all = ["ok", "failed", "refused"].map(|outcome| {
            let line = format!(r#"mayfly_engine_tasks_total{{kind="{kind}",outcome="{outcome}",pool="{pool}"}}"#);
            count(&metrics, &line)
        });
        (all.iter().sum::<u64>() >= most).then_some(metrics)
    })
    .await
}

/// Reads while a tap is the only engine: the create is recorded before an engine gets it.
async fn recorded_create(
    system: &System,
    pool: &str,
    path: &str,
    ttl: u64,
) -> (mayfly_tests::postgres::Credential, Delivery, Engine) {
    let mut tap = Tap::on(&system.rabbit.url(), &queue(pool)).await;
    let read = format!("/v1/secrets/{path}?ttl={ttl}");
    let ask = async { system.api.get(&read).await };
    let record = async {
        let engine = system.engine_unready(pool);
        let create = tap.take().await;
        tap.put(&create, |_| {}).await;
        tap.ack(&create).await;
        tap.leave().await;
        engine.ready().await;
        (create, engine)
    };
    let ((status, answer), (create, engine)) = tokio::join!(ask, record);
    assert_eq!(status, 200, "{answer}");
    let credential = mayfly_tests::postgres::Credential::from_answer(&answer);
    (credential, create, engine)
}

/// A request without changes, except that its answer goes nowhere: the dispatcher would end an account that is made
/// too late at once.
fn silent(request: &Delivery) -> BasicProperties {
    let came = &request.properties;
    BasicProperties::default()
        .with_type(came.kind().clone().unwrap())
        .with_message_id(came.message_id().clone().unwrap())
        .with_headers(came.headers().clone().unwrap())
}

/// The create of an account that was revoked for good is sent again, to the engine that ended the account and to an
/// engine that does not know of it.
#[tokio::test]
async fn a_recorded_create_after_the_final_revocation() {
    let (system, site, pool, path) = furnished(&[
        ("MAYFLY__CREATE__DEADLINE_SECONDS", "6"),
        ("MAYFLY__LEASE__SWEEP_SECONDS", "86400"),
    ])
    .await;
    let begun = std::time::Instant::now();
    let (credential, create, engine) = recorded_create(&system, &pool, &path, 300).await;
    system
        .api
        .delete(&format!("/v1/leases/{}", credential.lease))
        .await;
    system.gone(&site, &credential, seconds(10)).await;
    // The replay comes at once: within the deadline only the engine that ended the account knows of its end.
    put(
        &system.rabbit.url(),
        &queue(&pool),
        &create.data,
        silent(&create),
    )
    .await;
    settled(&engine, &pool, "create", 2).await;
    assert!(credential.is_refused().await, "the account is back");
    // 24 s after the deadline the account's absence is final, and nobody looks for it any more.
    eventually("the window is over", seconds(60), async || {
        (begun.elapsed() > seconds(31)).then_some(())
    })
    .await;
    let other = system.engine(&pool).await;
    engine.process.stop();
    put(
        &system.rabbit.url(),
        &queue(&pool),
        &create.data,
        silent(&create),
    )
    .await;
    let metrics = settled(&other, &pool, "create", 1).await;
    let roles = site.accounts().await;
    assert_eq!(
        roles,
        Vec::<String>::new(),
        "a revoked account is back for {} s",
        300
    );
    let refused =
        format!(r#"mayfly_engine_tasks_refused_total{{pool="{pool}",reason="past_deadline"}}"#);
    assert_eq!(count(&metrics, &refused), 1, "{metrics}");
}

/// If an account of an ended lease exists, the next sweep ends it, whatever its `VALID UNTIL` is.
#[tokio::test]
async fn an_account_whose_lease_has_ended_is_swept() {
    let (system, site, pool, path) = furnished(&[
        ("MAYFLY__CREATE__DEADLINE_SECONDS", "2"),
        ("MAYFLY__LEASE__SWEEP_SECONDS", "1"),
        ("MAYFLY__LEASE__SWEEP_GRACE_SECONDS", "1"),
    ])
    .await;
    let engine = system.engine(&pool).await;
    let live = system.issue(&path, Some(300)).await;
    let gone = system.issue(&path, Some(300)).await;
    system
        .api
        .delete(&format!("/v1/leases/{}", gone.lease))
        .await;
    system.gone(&site, &gone, seconds(10)).await;
    system
        .lease_becomes(&gone.lease, "revoked", seconds(60))
        .await;
    let installation = system.api.ok("/v1/status").await["installation"].clone();
    let text = format!(
        "CREATE ROLE \"{0}\" LOGIN VALID UNTIL '2100-01-01'; COMMENT ON ROLE \"{0}\" IS 'mayfly:lease:{1}:{2}'",
        gone.username,
        installation.as_str().unwrap(),
        gone.lease
    );
    site.admin().await.batch_execute(&text).await.unwrap();
    eventually("it is ended", seconds(20), async || {
        site.server
            .roles(&gone.username)
            .await
            .is_empty()
            .then_some(())
    })
    .await;
    assert!(live.login().await.is_ok(), "a live credential died");
    drop(engine);
}

/// An engine of another pool, with its pool's key, answers sweeps with a lease of the first pool: on
/// a role that is not there, on the lease's own role, as overdue, as ended long ago. It reports the
/// end of the account as an outcome, too.
#[tokio::test]
async fn an_engine_of_another_pool_settles_nothing() {
    let (system, site, pool, path) = furnished(&[
        ("MAYFLY__CREATE__DEADLINE_SECONDS", "2"),
        ("MAYFLY__LEASE__SWEEP_SECONDS", "1"),
        ("MAYFLY__LEASE__SWEEP_GRACE_SECONDS", "1"),
    ])
    .await;
    let _engine = system.engine(&pool).await;
    let other_site = site.server.site(Admin::CreateRole).await;
    let other_pool = system.pool().await;
    let url = system.rabbit.url();
    let mut tap = Tap::on(&url, &queue(&other_pool)).await;
    let rogue = Liar::new(url, &system.key_file(&other_pool));
    system.secret(&other_site, &other_pool, json!({})).await;

    let begun = std::time::Instant::now();
    let credential = system.issue(&path, Some(300)).await;
    let installation = system.api.ok("/v1/status").await["installation"].clone();
    let root = site.server.superuser("postgres").await;
    let server = scalar(&root, "SELECT system_identifier FROM pg_control_system()").await;
    let past = "2020-01-01T00:00:00Z";
    let found = |role: &str, expiration: &str| {
        json!({"role": role, "installation": installation, "lease": credential.lease,
            "expiration": expiration, "owns": false})
    };
    let mut answers = 0;
    // The create's window is over after 26 s: from then on an absence is final.
    while begun.elapsed() < seconds(30) {
        let asked = rogue.open(tap.take().await);
        assert_eq!(asked.kind, Kind::Sweep);
        let roles = match answers % 3 {
            0 => json!([found("absent", past)]),
            1 => json!([found("absent", past), found(&credential.username, past)]),
            _ => json!([found(&credential.username, "2100-01-01T00:00:00Z")]),
        };
        let page =
            json!({"server": server, "now": Timestamp::now(), "roles": roles, "more": false});
        rogue.answer(&asked, json!({"ledger": page})).await;
        let gone = json!({"at": Timestamp::now(), "server": server, "conclusive": true});
        for result in [
            json!({"dropped": gone}),
            json!({"not_due": {"until": past}}),
        ] {
            rogue
                .outcome(&credential.lease, Some(&credential.username), result)
                .await;
        }
        answers += 1;
    }
    tap.leave().await;
    let lease = system.lease(&credential.lease).await;
    assert_eq!(
        (&lease["state"], &lease["revokedAt"], &lease["attempts"]),
        (&json!("active"), &Value::Null, &json!(0)),
        "after {answers} answers: {lease}"
    );
    assert!(credential.login().await.is_ok());
    let revoke = format!("/v1/leases/{}", credential.lease);
    system.api.delete(&revoke).await;
    system.gone(&site, &credential, seconds(10)).await;
}

fn rotate_path(site: &Site) -> String {
    format!("/v1/secrets/db:{}:root::rotate", site.name)
}

/// An operator of the broker keeps a rotation from the engines, and sends the answers of an earlier rotation again.
#[tokio::test]
async fn recorded_answers_of_a_rotation() {
    let (system, site, pool, path) = furnished(SHORT).await;
    let engine = system.engine(&pool).await;
    let recorder = Recorder::on(&system.rabbit).await;
    let (status, answer) = system.api.post(&rotate_path(&site), json!({})).await;
    assert_eq!(status, 200, "{answer}");
    let answers: Vec<Recorded> = recorder
        .stop()
        .await
        .into_iter()
        .filter(|one| one.kind() == "reply")
        .collect();
    assert!(answers.len() >= 2, "a look and a change: {}", answers.len());
    let root = site.server.superuser("postgres").await;
    let stored = format!(
        "SELECT rolpassword FROM pg_authid WHERE rolname = '{}'",
        site.name
    );
    let before = scalar(&root, &stored).await;

    engine.process.stop();
    let mut tap = Tap::on(&system.rabbit.url(), &queue(&pool)).await;
    let ask = async { system.api.post(&rotate_path(&site), json!({})).await };
    let play = async {
        for answer in answers.iter().cycle() {
            let request = tap.take().await;
            tap.ack(&request).await;
            answer.replay_to(&system.rabbit.url(), &request).await;
        }
    };
    let (status, answer) = tokio::select! {
        answer = ask => answer,
        () = play => unreachable!("it plays on"),
    };
    assert_ne!(status, 200, "a password that was never set: {answer}");
    assert_eq!(scalar(&root, &stored).await, before);
    tap.leave().await;
    let _engine = system.engine(&pool).await;
    let credential = system.issue(&path, None).await;
    assert!(credential.login().await.is_ok(), "the admin is locked out");
}

fn end(lease: &Value) -> Timestamp {
    lease["expiration"].as_str().unwrap().parse().unwrap()
}

async fn until(site: &Site, role: &str) -> String {
    let root = site.server.superuser("postgres").await;
    let text = format!("SELECT rolvaliduntil::text FROM pg_roles WHERE rolname = '{role}'");
    scalar(&root, &text).await
}

/// A renewal that is sent again moves nothing; its answer, sent again, renews nothing.
#[tokio::test]
async fn a_recorded_renewal_and_its_answer() {
    let (system, site, pool, path) = furnished(&[("MAYFLY__LEASE__SWEEP_SECONDS", "86400")]).await;
    let engine = system.engine(&pool).await;
    let credential = system.issue(&path, Some(30)).await;
    let recorder = Recorder::on(&system.rabbit).await;
    let renew = format!("/v1/leases/{}/renew", credential.lease);
    let (status, renewed) = system.api.post(&renew, json!({"increment": 60})).await;
    assert_eq!(status, 200, "{renewed}");
    let recorded = recorder.stop().await;
    let of = |kind: &str| {
        let found = recorded.iter().find(|one| one.kind() == kind);
        found.unwrap_or_else(|| panic!("no {kind} came by"))
    };
    let (request, answer) = (of("renew"), of("reply"));
    let first = until(&site, &credential.username).await;
    tokio::time::sleep(seconds(2)).await;
    let url = system.rabbit.url();
    put(
        &url,
        &queue(&pool),
        &request.body,
        request.properties.clone(),
    )
    .await;
    settled(&engine, &pool, "renew", 2).await;
    assert_eq!(
        until(&site, &credential.username).await,
        first,
        "the replay moved its end"
    );
    // A renewal that a caller requests works, also from another end than the store knows.
    let (status, longer) = system.api.post(&renew, json!({"increment": 90})).await;
    assert_eq!(status, 200, "{longer}");
    assert!(end(&longer) > end(&renewed));

    engine.process.stop();
    let mut tap = Tap::on(&url, &queue(&pool)).await;
    let ask = async { system.api.post(&renew, json!({"increment": 200})).await };
    let play = async {
        let request = tap.take().await;
        tap.ack(&request).await;
        answer.replay_to(&url, &request).await;
        tap.leave().await;
    };
    let ((status, answer), ()) = tokio::join!(ask, play);
    assert_ne!(
        status, 200,
        "an old answer counts for a new renewal: {answer}"
    );
}
