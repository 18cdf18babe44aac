//! A broker that speaks TLS only, with a certificate of a private authority.

use mayfly_tests::postgres::Server;
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::users::Part;
use mayfly_tests::{eventually, seconds};

/// The whole path with the authority in the settings. Without it there is no connection; this is reported, without
/// the password.
#[tokio::test]
async fn amqps_trusts_the_authority_it_is_told() {
    let rabbit = Rabbit::with_tls();
    let authority = rabbit.authority();
    let trusting = [("SSL_CERT_FILE", authority.to_str().unwrap())];
    let url = rabbit.url_for(&Part::Dispatcher);
    assert!(url.starts_with("amqps://"), "{url}");
    let (mut system, site, path, engine) = Scenario::on(Server::pg15())
        .broker(rabbit)
        .settings(&trusting)
        .engine(&trusting)
        .start()
        .await;
    let pool = engine.pool.clone();
    let credential = system.issue(&path, Some(3)).await;
    assert!(credential.login().await.is_ok());
    system.gone(&site, &credential, seconds(10)).await;
    system
        .lease_becomes(&credential.lease, "revoked", seconds(20))
        .await;

    engine.process.kill();
    system.kill_dispatcher();
    std::fs::remove_file(system.log()).unwrap();
    // The certificate of a server of another authority.
    let other = Server::pg15().directory().join("data/server.crt");
    let distrusting = [("SSL_CERT_FILE", other.to_str().unwrap())];
    let system = system.beside(&distrusting);
    system.ready().await;
    let _engine = system.engine_with(&pool, &distrusting);
    let log = eventually("both say why", seconds(20), async || {
        let log = std::fs::read_to_string(system.log()).unwrap();
        let said = log.lines().filter(|line| {
            line.contains("the broker cannot be reached") && line.contains("UnknownIssuer")
        });
        (said.count() == 2).then_some(log)
    })
    .await;
    let password = url.split([':', '@']).nth(2).unwrap();
    assert!(!log.contains(password));
    let (status, body) = system.api.get(&format!("/v1/secrets/{path}")).await;
    assert_eq!(
        (status, body["error"].as_str()),
        (503, Some("broker_unavailable")),
        "{body}"
    );
}
