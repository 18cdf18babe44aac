//! What may happen to a message: delivered twice, altered, replayed, meant for others.

use mayfly_tests::amqp::Tap;
use mayfly_tests::postgres::{Admin, Credential, Server};
use mayfly_tests::system::{System, prefix};
use mayfly_tests::{eventually, seconds};
use serde_json::json;

/// The same create twice: one account, one credential, and one end.
#[tokio::test]
async fn a_create_delivered_twice() {
    let system = System::start().await;
    let site = Server::pg18().site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let path = system.secret(&site, &pool, json!({})).await;
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
    assert_eq!(site.server.roles(&prefix(&site)).await.len(), 1);
    system.gone(&site, &credential, seconds(10)).await;
}

/// A create that comes once more after its account has ended is not lost sight of.
#[tokio::test]
async fn a_create_that_comes_again_after_the_end() {
    let system = System::start().await;
    let site = Server::pg15().site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let path = system.secret(&site, &pool, json!({})).await;
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
    put(&url, &queue, &create).await;
    let made_again =
        format!(r#"mayfly_engine_tasks_total{{kind="create",outcome="ok",pool="{pool}"}} 2"#);
    eventually("the replay is done", seconds(10), async || {
        engine
            .admin_text("/metrics")
            .await
            .contains(&made_again)
            .then_some(())
    })
    .await;
    eventually(
        "the account of the replay is gone, too",
        seconds(70),
        async || {
            let gone = site.server.roles(&prefix(&site)).await.is_empty();
            gone.then_some(())
        },
    )
    .await;
}

async fn put(url: &str, queue: &str, delivery: &lapin::message::Delivery) {
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

/// An altered create is refused, counted, and answered; an altered revocation goes round and
/// round but never away, and the account ends all the same.
#[tokio::test]
async fn altered_messages() {
    let system = System::start().await;
    let site = Server::pg18().site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let path = system.secret(&site, &pool, json!({})).await;
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
    assert!(site.server.roles(&prefix(&site)).await.is_empty());
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
