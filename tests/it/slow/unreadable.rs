//! Messages that are not Mayfly's, put into its queues by somebody whose broker user has too many rights: they are
//! set aside at once, and the messages behind them arrive in time.

use std::time::Duration;

use jiff::Timestamp;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Connection, ConnectionProperties};
use mayfly_tests::amqp::Tap;
use mayfly_tests::postgres::{Credential, Server, Site};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::{Engine, System};
use mayfly_tests::{eventually, seconds};

/// Maximum lateness of an end, on a machine with other work too. The park adds 0.5 s.
const LATE: Duration = Duration::from_secs(9);

async fn flood(url: &str, queue: &str, count: usize, body: &[u8], properties: &BasicProperties) {
    let connection = Connection::connect(url, ConnectionProperties::default())
        .await
        .unwrap();
    let channel = connection.create_channel().await.unwrap();
    let confirms = ConfirmSelectOptions::default();
    channel.confirm_select(confirms).await.unwrap();
    let mut sent = Vec::new();
    for _ in 0..count {
        let published = channel.basic_publish(
            "".into(),
            queue.into(),
            BasicPublishOptions::default(),
            body,
            properties.clone(),
        );
        sent.push(published.await.unwrap());
    }
    for one in sent {
        one.await.unwrap();
    }
    connection.close(200, "bye".into()).await.unwrap();
}

async fn furnished() -> (System, Site, String, Engine, String) {
    let (system, site, path, engine) = Scenario::on(Server::pg15()).start().await;
    let pool = engine.pool.clone();
    (system, site, pool, engine, path)
}

/// Waits for the end of an account, which must not be late.
async fn ends_in_time(system: &System, site: &Site, credential: &Credential) {
    let lease = system.lease(&credential.lease).await;
    let end: Timestamp = lease["expiration"].as_str().unwrap().parse().unwrap();
    system.gone(site, credential, seconds(60)).await;
    let late = Timestamp::now().duration_since(end);
    assert!(late <= LATE.try_into().unwrap(), "it ended {late:#} late");
}

fn metric(text: &str, line: &str) -> u64 {
    let found = text.lines().find_map(|one| one.strip_prefix(line));
    found.map_or(0, |n| n.trim().parse().unwrap())
}

#[tokio::test]
async fn ten_thousand_unreadable_messages_delay_nobody() {
    let (system, site, pool, engine, path) = furnished().await;
    let queue = format!("mayfly.v1.pool.{pool}.revoke");
    let credential = system.issue(&path, Some(5)).await;
    let url = system.rabbit.url();
    flood(&url, &queue, 10_000, b"x", &BasicProperties::default()).await;
    // The head of a request that never existed, and a body that is sealed to nobody.
    let mut headers = FieldTable::default();
    let text = |text: &str| AMQPValue::LongString(text.into());
    headers.insert("mayfly-pool".into(), text(&pool));
    headers.insert("mayfly-issued-ms".into(), AMQPValue::LongLongInt(1));
    for kind in ["revoke", "of_tomorrow", "create"] {
        let properties = BasicProperties::default()
            .with_type(kind.into())
            .with_headers(headers.clone());
        flood(&url, &queue, 300, b"x", &properties).await;
    }
    let after = system.issue(&path, Some(2)).await;
    ends_in_time(&system, &site, &credential).await;
    ends_in_time(&system, &site, &after).await;

    // None of these messages comes again, and the newest are kept for the operator.
    let refused =
        format!(r#"mayfly_engine_tasks_refused_total{{pool="{pool}",reason="unreadable"}}"#);
    eventually("all are set aside", seconds(60), async || {
        let text = engine.admin_text("/metrics").await;
        let (refused, left) = (metric(&text, &refused), system.rabbit.messages(&queue));
        // The parked messages belong to the two accounts.
        let parked = system.rabbit.messages(".delay.");
        (refused == 10_900 && left == 0 && parked <= 4).then_some(())
    })
    .await;
    let kept = system.rabbit.messages("mayfly.v1.unreadable");
    assert!((1..=1000).contains(&kept), "{kept}");
    eventually("the dispatcher shows it", seconds(20), async || {
        let text = system.admin_text("/metrics").await;
        (metric(&text, "mayfly_dispatcher_unreadable_messages") > 0).then_some(())
    })
    .await;
}

/// The same holds in the dispatchers' queues, and in the queue of requests.
#[tokio::test]
async fn unreadable_messages_stay_nowhere() {
    let (system, site, pool, _engine, path) = furnished().await;
    let url = system.rabbit.url();
    let queues = [
        format!("mayfly.v1.pool.{pool}.create"),
        "mayfly.v1.outcomes".to_owned(),
        "mayfly.v1.unroutable".to_owned(),
    ];
    for queue in &queues {
        flood(&url, queue, 2_000, b"", &BasicProperties::default()).await;
    }
    let credential = system.issue(&path, Some(2)).await;
    ends_in_time(&system, &site, &credential).await;
    eventually("they are gone", seconds(60), async || {
        let left: u64 = queues
            .iter()
            .map(|queue| system.rabbit.messages(queue))
            .sum();
        (left == 0).then_some(())
    })
    .await;
    assert!(system.rabbit.messages("mayfly.v1.unreadable") <= 1000);
}

/// Revocations that are sealed, but cannot be opened, come again; many of them, with a high count of tries, do not
/// delay valid messages.
#[tokio::test]
async fn sealed_messages_that_do_not_open_go_round() {
    let (system, site, pool, engine, path) = furnished().await;
    let queue = format!("mayfly.v1.pool.{pool}.revoke");
    let bent = system.issue(&path, Some(2)).await;
    engine.process.stop();
    let mut tap = Tap::on(&system.rabbit.url(), &queue).await;
    let expire = tap.take().await;
    let mut headers = expire.properties.headers().clone().unwrap();
    headers.insert("mayfly-attempt".into(), AMQPValue::LongLongInt(30));
    let properties = expire.properties.clone().with_headers(headers);
    let mut body = expire.data.clone();
    *body.last_mut().unwrap() ^= 1;
    tap.put(&expire, |_| {}).await;
    tap.ack(&expire).await;
    tap.leave().await;
    flood(&system.rabbit.url(), &queue, 500, &body, &properties).await;
    let engine = system.engine(&pool).await;
    let good = system.issue(&path, Some(3)).await;
    ends_in_time(&system, &site, &good).await;
    system.gone(&site, &bent, seconds(20)).await;
    let refused =
        format!(r#"mayfly_engine_tasks_refused_total{{pool="{pool}",reason="not_authentic"}}"#);
    eventually("each was tried once and parked", seconds(60), async || {
        let text = engine.admin_text("/metrics").await;
        let (refused, left) = (metric(&text, &refused), system.rabbit.messages(&queue));
        (refused >= 500 && left == 0).then_some(())
    })
    .await;
}
