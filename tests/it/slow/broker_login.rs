//! How processes log in to RabbitMQ: passwords that are renewed while they run, and certificates.

use std::path::Path;
use std::process::Command;

use mayfly_tests::postgres::{Admin, Credential, Server};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::System;
use mayfly_tests::users::Part;
use mayfly_tests::{eventually, seconds};
use serde_json::json;

/// The file with the URL is written again, as External Secrets does; the old password is refused.
#[tokio::test]
async fn a_renewed_password_is_read_from_its_file() {
    let (system, site, path, engine) = Scenario::on(Server::pg15()).start().await;
    let pool = engine.pool.clone();
    let before = system.issue(&path, Some(60)).await;
    system.rabbit.change_passwords();
    system.write_urls(&[&pool]);
    let credential = eventually("both log in again", seconds(60), async || {
        let (status, answer) = system.api.get(&format!("/v1/secrets/{path}?ttl=5")).await;
        (status == 200).then(|| Credential::from_answer(&answer))
    })
    .await;
    engine.ready().await;
    system.gone(&site, &credential, seconds(30)).await;
    system
        .api
        .delete(&format!("/v1/leases/{}", before.lease))
        .await;
    system.gone(&site, &before, seconds(30)).await;
}

/// A certificate by the broker's authority, for this common name: `NAME.pem` and `NAME.key`.
fn certificate(rabbit: &Rabbit, directory: &Path, name: &str, common_name: &str) {
    let made = Command::new("openssl")
        .args(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30".split(' '),
        )
        .args(["-subj", &format!("/CN={common_name}")])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .arg("-CA")
        .arg(rabbit.authority())
        .arg("-CAkey")
        .arg(rabbit.directory().join("ca.key"))
        .arg("-keyout")
        .arg(directory.join(format!("{name}.key")))
        .arg("-out")
        .arg(directory.join(format!("{name}.pem")))
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
}

/// A dispatcher that shows a certificate beside its password, and an engine whose certificate is its
/// login (SASL EXTERNAL). Without one nobody is let in.
#[tokio::test]
async fn client_certificates() {
    let rabbit = Rabbit::with_client_certificates();
    let directory = mayfly_tests::run_dir().join(format!("certificates-{}", mayfly_tests::word()));
    std::fs::create_dir_all(&directory).unwrap();
    certificate(&rabbit, &directory, "dispatcher", "anybody");
    let authority = rabbit.authority();
    let file = |name: &str| directory.join(name).to_str().unwrap().to_owned();
    let (cert, key) = (file("dispatcher.pem"), file("dispatcher.key"));
    let ours = [
        ("MAYFLY__AMQP__CA_FILE", authority.to_str().unwrap()),
        ("MAYFLY__AMQP__CLIENT_CERT_FILE", cert.as_str()),
        ("MAYFLY__AMQP__CLIENT_KEY_FILE", key.as_str()),
    ];
    let system = System::start_with(rabbit, &ours).await;
    let site = Server::pg15().site(Admin::CreateRole).await;
    let pool = system.pool().await;

    let stranger = system.engine_with(&pool, &ours[..1]);
    eventually("it is not let in", seconds(30), async || {
        let logged = system.logged();
        let refused = logged.lines().any(|line| {
            line.contains("the broker cannot be reached") && !line.contains("UnknownIssuer")
        });
        refused.then_some(())
    })
    .await;
    assert_ne!(stranger.admin_text("/readyz").await.trim(), "ok");
    drop(stranger);

    let user = system.rabbit.user_name(&Part::Engine(pool.clone()));
    certificate(&system.rabbit, &directory, "engine", &user);
    let url = system.rabbit.url();
    let place = url.split_once('@').unwrap().1;
    let url = format!("amqps://{place}?auth_mechanism=external");
    let (cert, key) = (file("engine.pem"), file("engine.key"));
    let engine = system.engine_with(
        &pool,
        &[
            ours[0],
            ("MAYFLY__AMQP__CLIENT_CERT_FILE", cert.as_str()),
            ("MAYFLY__AMQP__CLIENT_KEY_FILE", key.as_str()),
            ("MAYFLY__AMQP__URL_FILE", &write(&directory, &url)),
        ],
    );
    engine.ready().await;
    let path = system.secret(&site, &pool, json!({})).await;
    let credential = system.issue(&path, Some(5)).await;
    assert!(credential.login().await.is_ok());
    system.gone(&site, &credential, seconds(30)).await;
}

fn write(directory: &Path, url: &str) -> String {
    let file = directory.join("engine-url");
    std::fs::write(&file, url).unwrap();
    file.to_str().unwrap().to_owned()
}
