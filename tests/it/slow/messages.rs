//! What can happen to a message: delivered twice, altered, recorded and sent again, sent to the wrong receiver.

use lapin::message::Delivery;
use lapin::types::{AMQPValue, ShortString};
use mayfly_tests::amqp::Tap;
use mayfly_tests::postgres::{Credential, Server, Site, scalar};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::{Engine, System};
use mayfly_tests::{eventually, seconds};
use serde_json::{Value, json};

/// The same create twice: one account, one credential, and one end.
#[tokio::test]
async fn a_create_delivered_twice() {
    let (system, site, path, pool) = Scenario::on(Server::pg18()).start_without_engine().await;
    let mut tap = Tap::on(
        &system.rabbit.url(),
        &format!("mayfly.v1.pool.{pool}.create"),
    )
    .await;
    let ask = async { system.api.get(&format!("/v1/secrets/{path}?ttl=3")).await };
    let twice = async {
        let create = tap.take().await;
        assert!(
            !create.data.windows(8).any(|part| part == b"SCRAM-SH"),
            "the task can be read"
        );
        tap.put(&create, |_| {}).await;
        tap.put(&create, |_| {}).await;
        tap.ack(&create).await;
        tap.leave().await;
        (system.engine(&pool).await, create)
    };
    let ((status, answer), (_engine, _create)) = tokio::join!(ask, twice);
    assert_eq!(status, 200, "{answer}");
    let credential = Credential::from_answer(&answer);
    assert!(credential.login().await.is_ok());
    assert_eq!(site.accounts().await.len(), 1);
    system.gone(&site, &credential, seconds(10)).await;
}

/// A create that comes again after its account has ended: the new account is found and ended.
#[tokio::test]
async fn a_create_that_comes_again_after_the_end() {
    // The replay must come before the create's deadline. On a busy machine the steps before it take long.
    let deadline = ("MAYFLY__CREATE__DEADLINE_SECONDS", "120");
    let (system, site, path, pool) = Scenario::on(Server::pg15())
        .settings(&[deadline])
        .start_without_engine()
        .await;
    let url = system.rabbit.url();
    let queue = format!("mayfly.v1.pool.{pool}.create");
    let mut tap = Tap::on(&url, &queue).await;
    let ask = async { system.api.get(&format!("/v1/secrets/{path}?ttl=1")).await };
    let keep = async {
        let create = tap.take().await;
        tap.put(&create, |_| {}).await;
        tap.ack(&create).await;
        tap.leave().await;
        (system.engine(&pool).await, create)
    };
    let ((status, answer), (engine, create)) = tokio::join!(ask, keep);
    assert_eq!(status, 200, "{answer}");
    let credential = Credential::from_answer(&answer);
    system.gone(&site, &credential, seconds(10)).await;
    // Another engine does not know that the account has ended.
    engine.process.stop();
    let engine = system.engine(&pool).await;
    put(&url, &queue, &create).await;
    let made_again =
        format!(r#"mayfly_engine_tasks_total{{kind="create",outcome="ok",pool="{pool}"}} 1"#);
    eventually("the replay is done", seconds(10), async || {
        engine
            .admin_text("/metrics")
            .await
            .contains(&made_again)
            .then_some(())
    })
    .await;
    site.no_accounts(seconds(70)).await;
}

async fn put(url: &str, queue: &str, delivery: &Delivery) {
    use lapin::options::BasicPublishOptions;
    let connection = lapin::Connection::connect(url, lapin::ConnectionProperties::default())
        .await
        .unwrap();
    let channel = connection.create_channel().await.unwrap();
    channel
        .basic_publish(
            "".into(),
            queue.into(),
            BasicPublishOptions::default(),
            &delivery.data,
            delivery.properties.clone(),
        )
        .await
        .unwrap()
        .await
        .unwrap();
    connection.close(200, "bye".into()).await.unwrap();
}

/// An altered create is refused, counted, and answered. An altered revocation comes again and again and is never
/// dropped, and the account still ends.
#[tokio::test]
async fn altered_messages() {
    let (system, site, path, pool) = Scenario::on(Server::pg18()).start_without_engine().await;
    let url = system.rabbit.url();
    let mut tap = Tap::on(&url, &format!("mayfly.v1.pool.{pool}.create")).await;
    let ask = async { system.api.get(&format!("/v1/secrets/{path}")).await };
    let bend = async {
        let create = tap.take().await;
        tap.put(&create, |body| *body.last_mut().unwrap() ^= 1)
            .await;
        tap.ack(&create).await;
        tap.leave().await;
        system.engine(&pool).await
    };
    let ((status, answer), engine) = tokio::join!(ask, bend);
    assert_eq!(
        (status, answer["error"].as_str()),
        (503, Some("no_engine")),
        "{answer}"
    );
    assert!(site.accounts().await.is_empty());
    let metrics = engine.admin_text("/metrics").await;
    let line =
        format!(r#"mayfly_engine_tasks_refused_total{{pool="{pool}",reason="not_authentic"}} 1"#);
    assert!(metrics.contains(&line), "{metrics}");
    engine.process.stop();

    let engine = system.engine(&pool).await;
    let credential = system.issue(&path, Some(4)).await;
    engine.process.stop();
    let mut tap = Tap::on(&url, &format!("mayfly.v1.pool.{pool}.revoke")).await;
    let expire = tap.take().await;
    tap.put(&expire, |body| *body.last_mut().unwrap() ^= 1)
        .await;
    tap.ack(&expire).await;
    tap.leave().await;
    let engine = system.engine(&pool).await;
    system.gone(&site, &credential, seconds(20)).await;
    let metrics = engine.admin_text("/metrics").await;
    assert!(
        metrics.contains(r#"reason="not_authentic"} "#)
            && !metrics.contains(r#"reason="not_authentic"} 0"#),
        "{metrics}"
    );
    let parked = eventually(
        "the bent message is parked, not lost",
        seconds(20),
        async || {
            let parked =
                system.rabbit.messages("mayfly.v1.delay") + system.rabbit.messages("revoke");
            (parked > 0).then_some(parked)
        },
    )
    .await;
    assert!(parked >= 1);
}

async fn furnished() -> (System, Site, String, String, Engine) {
    let (system, site, path, engine) = Scenario::on(Server::pg18()).start().await;
    let pool = engine.pool.clone();
    (system, site, pool, path, engine)
}

fn end(lease: &Value) -> jiff::Timestamp {
    lease["expiration"].as_str().unwrap().parse().unwrap()
}

/// Renews while only a tap consumes; returns the tasks in the order of the increments.
async fn renewals(
    system: &System,
    tap: &mut Tap,
    lease: &str,
    increments: &[u64],
) -> (Vec<Delivery>, Vec<tokio::task::JoinHandle<(u16, Value)>>) {
    let (mut tasks, mut answers) = (Vec::new(), Vec::new());
    for increment in increments {
        let (api, path) = (system.api.clone(), format!("/v1/leases/{lease}/renew"));
        let body = json!({"increment": increment});
        answers.push(tokio::spawn(async move { api.post(&path, body).await }));
        tasks.push(tap.take().await);
    }
    (tasks, answers)
}

/// The longest renewal is delivered first, then shorter renewals, each twice: the end does not move back.
#[tokio::test]
async fn renewals_delivered_twice_and_out_of_order() {
    let (system, site, pool, path, engine) = furnished().await;
    let credential = system.issue(&path, Some(60)).await;
    engine.process.stop();
    let (url, queue) = (system.rabbit.url(), format!("mayfly.v1.pool.{pool}.create"));
    let mut tap = Tap::on(&url, &queue).await;
    let (tasks, mut answers) = renewals(&system, &mut tap, &credential.lease, &[5, 8, 240]).await;
    let [short, middle, long] = tasks.as_slice() else {
        panic!("three renewals are three tasks");
    };
    tap.put(long, |_| {}).await;
    for task in &tasks {
        tap.ack(task).await;
    }
    tap.leave().await;
    let engine = system.engine(&pool).await;
    let (status, body) = answers.pop().unwrap().await.unwrap();
    assert_eq!(status, 200, "{body}");
    let until = end(&body);
    for task in [middle, short, middle, short] {
        put(&url, &queue, task).await;
    }
    for answer in answers {
        let (status, body) = answer.await.unwrap();
        assert_eq!((status, end(&body)), (200, until), "{body}");
    }
    let done = format!(r#"mayfly_engine_tasks_total{{kind="renew",outcome="ok",pool="{pool}"}} 5"#);
    eventually("all five are done", seconds(10), async || {
        let metrics = engine.admin_text("/metrics").await;
        metrics.contains(&done).then_some(())
    })
    .await;
    let root = site.server.superuser("postgres").await;
    let left = format!(
        "SELECT rolvaliduntil > clock_timestamp() + interval '2 minutes' FROM pg_roles WHERE rolname = '{}'",
        credential.username
    );
    assert_eq!(scalar(&root, &left).await, "t", "it was moved back");
    assert!(credential.login().await.is_ok());

    // The longest renewal is delivered again after the account's end: no account comes back.
    system
        .api
        .delete(&format!("/v1/leases/{}", credential.lease))
        .await;
    system.gone(&site, &credential, seconds(10)).await;
    put(&url, &queue, long).await;
    let failed =
        format!(r#"mayfly_engine_tasks_total{{kind="renew",outcome="failed",pool="{pool}"}} 1"#);
    eventually("the replay is refused", seconds(10), async || {
        let metrics = engine.admin_text("/metrics").await;
        metrics.contains(&failed).then_some(())
    })
    .await;
    assert!(site.accounts().await.is_empty());
}

/// A revocation twice at the same time, and again after the end: one end, no failure, and no other account is ended.
async fn a_revocation_delivered_twice(asked: bool) {
    let (system, site, pool, path, engine) = furnished().await;
    let ttl = if asked { 300 } else { 4 };
    let credential = system.issue(&path, Some(ttl)).await;
    let other = system.issue(&path, Some(300)).await;
    engine.process.stop();
    let (url, queue) = (system.rabbit.url(), format!("mayfly.v1.pool.{pool}.revoke"));
    let mut tap = Tap::on(&url, &queue).await;
    if asked {
        let lease = format!("/v1/leases/{}", credential.lease);
        assert_eq!(system.api.delete(&lease).await.0, 200);
    }
    let revocation = tap.take().await;
    tap.put(&revocation, |_| {}).await;
    tap.put(&revocation, |_| {}).await;
    tap.ack(&revocation).await;
    tap.leave().await;
    let engine = system.engine(&pool).await;
    system.gone(&site, &credential, seconds(15)).await;
    system
        .lease_becomes(&credential.lease, "revoked", seconds(10))
        .await;
    // The other account lives on.
    system.leases_left(1).await;
    put(&url, &queue, &revocation).await;
    eventually("it is worked on", seconds(10), async || {
        (system.rabbit.messages(&queue) == 0).then_some(())
    })
    .await;
    let lease = system.lease(&credential.lease).await;
    assert_eq!(
        (&lease["state"], &lease["stuck"]),
        (&json!("revoked"), &json!(false)),
        "{lease}"
    );
    assert!(other.login().await.is_ok());
    let metrics = engine.admin_text("/metrics").await;
    let failed = metrics
        .lines()
        .find(|line| line.contains(r#"kind="revoke",outcome="failed""#));
    assert!(failed.is_none_or(|line| line.ends_with(" 0")), "{metrics}");
}

#[tokio::test]
async fn an_expiry_delivered_twice() {
    a_revocation_delivered_twice(false).await;
}

#[tokio::test]
async fn a_revocation_asked_for_delivered_twice() {
    a_revocation_delivered_twice(true).await;
}

fn refused(pool: &str, reason: &str) -> String {
    format!(r#"mayfly_engine_tasks_refused_total{{pool="{pool}",reason="{reason}"}} 1"#)
}

/// A request of an unknown kind is refused, and the caller gets an error.
#[tokio::test]
async fn a_request_of_an_unknown_kind() {
    let (system, site, pool, path, engine) = furnished().await;
    engine.process.stop();
    let queue = format!("mayfly.v1.pool.{pool}.create");
    let mut tap = Tap::on(&system.rabbit.url(), &queue).await;
    let ask = async { system.api.get(&format!("/v1/secrets/{path}")).await };
    let rename = async {
        let create = tap.take().await;
        tap.put_as(&create, "of_tomorrow").await;
        tap.ack(&create).await;
        tap.leave().await;
        system.engine(&pool).await
    };
    let ((status, answer), engine) = tokio::join!(ask, rename);
    assert_eq!(
        (status, answer["error"].as_str()),
        (503, Some("no_engine")),
        "{answer}"
    );
    let metrics = engine.admin_text("/metrics").await;
    assert!(
        metrics.contains(&refused(&pool, "unknown_version")),
        "{metrics}"
    );
    assert!(site.accounts().await.is_empty());
}

/// The headers that the sender has set. RabbitMQ's own begin with `x-`.
fn written(delivery: &Delivery) -> Vec<(ShortString, AMQPValue)> {
    let headers = delivery.properties.headers().as_ref().unwrap().inner();
    let own = headers
        .iter()
        .filter(|(name, _)| !name.as_str().starts_with("x-"));
    own.map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

fn kind(delivery: &Delivery) -> Option<&str> {
    delivery.properties.kind().as_ref().map(ShortString::as_str)
}

/// A revocation of an unknown kind is parked unchanged for a newer engine, and is counted.
#[tokio::test]
async fn a_revocation_of_an_unknown_kind() {
    let (system, site, pool, path, engine) = furnished().await;
    let credential = system.issue(&path, Some(3)).await;
    engine.process.stop();
    let url = system.rabbit.url();
    let mut tap = Tap::on(&url, &format!("mayfly.v1.pool.{pool}.revoke")).await;
    let expire = tap.take().await;
    tap.put_as(&expire, "of_tomorrow").await;
    tap.put(&expire, |_| {}).await;
    tap.ack(&expire).await;
    tap.leave().await;
    let engine = system.engine(&pool).await;
    system.gone(&site, &credential, seconds(10)).await;
    let count = |metrics: &str| {
        let line = refused(&pool, "unknown_version");
        let line = line.trim_end_matches('1').to_owned();
        let found = metrics.lines().find_map(|one| one.strip_prefix(&line));
        found.map_or(0, |n| n.parse::<u64>().unwrap())
    };
    eventually("it comes again and again", seconds(30), async || {
        (count(&engine.admin_text("/metrics").await) >= 3).then_some(())
    })
    .await;
    engine.process.stop();
    let mut tap = Tap::on(&url, &format!("mayfly.v1.pool.{pool}.revoke")).await;
    // A dispatcher that has just connected to a new broker parks the ends of all leases again, so a second
    // revocation of this lease may come first.
    let parked = tokio::time::timeout(seconds(30), async {
        loop {
            let delivery = tap.take().await;
            if kind(&delivery) != Some("revoke") {
                return delivery;
            }
        }
    })
    .await;
    let parked = parked.expect("it is parked");
    assert_eq!(parked.data, expire.data);
    let counted = |delivery: &Delivery| {
        let mut all = written(delivery);
        all.retain(|(name, _)| name.as_str() != "mayfly-attempt");
        all
    };
    assert_eq!(counted(&parked), written(&expire));
    assert_eq!(kind(&parked), Some("of_tomorrow"));
    assert_eq!(
        parked.properties.content_type(),
        expire.properties.content_type()
    );
}
