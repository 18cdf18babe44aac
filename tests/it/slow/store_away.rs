//! A dispatcher starts before its store. It is alive, reports why it is not ready, and continues by itself when
//! the store answers.

use mayfly_tests::postgres::Server;
use mayfly_tests::proxy::{Mode, Proxy};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::System;
use mayfly_tests::{eventually, run_dir, seconds, word};

/// Waits until the dispatcher says that it waits for its store, and is alive.
async fn waits(system: &System, why: &str) {
    eventually("it says what it waits for", seconds(60), async || {
        let listens = tokio::net::TcpStream::connect(("127.0.0.1", system.admin_port())).await;
        listens.ok()?;
        let said = system.admin_text("/readyz").await;
        (said.contains("the lease store cannot be opened") && said.contains(why)).then_some(())
    })
    .await;
    assert_eq!(system.admin_text("/healthz").await.trim(), "ok");
    let metrics = system.admin_text("/metrics").await;
    assert!(
        metrics.contains("\nmayfly_dispatcher_store_up 0"),
        "{metrics}"
    );
    assert!(system.dispatcher().is_alive());
}

#[tokio::test]
async fn a_dispatcher_starts_before_its_store() {
    let server = Server::pg15();
    let proxy = Proxy::to(server.port()).await;
    let url = server.store().await;
    let url = url.replace(
        &format!(":{}/", server.port()),
        &format!(":{}/", proxy.port),
    );
    let file = run_dir().join(format!("store-url-{}", word()));
    std::fs::write(&file, &url).unwrap();
    let settings = [("MAYFLY__STORE__URL_FILE", file.to_str().unwrap())];
    let (mut system, _site, path, _engine) = Scenario::on(server).settings(&settings).start().await;

    // The store is unreachable in two forms: it refuses connections, and it does not answer.
    for mode in [Mode::Cut, Mode::Hole] {
        system.stop_dispatcher();
        proxy.set(mode);
        system.start_dispatcher_unready();
        let id = system.dispatcher().id();
        waits(&system, &format!("127.0.0.1:{}", proxy.port)).await;
        proxy.set(Mode::Pass);
        system.ready().await;
        system.broker_up().await;
        assert!(system.issue(&path, Some(60)).await.login().await.is_ok());
        assert_eq!(system.dispatcher().id(), id, "it was started again");
    }
    let log = system.logged();
    let waits_for = "the dispatcher waits for it and is not ready";
    let said = log.matches(waits_for).count();
    assert!((2..=8).contains(&said), "{said} lines in\n{log}");
    let password = url.split([':', '@']).nth(2).unwrap();
    assert!(!log.contains(password));

    // A dispatcher that is asked to stop does so, with or without a store.
    system.stop_dispatcher();
    proxy.set(Mode::Cut);
    system.start_dispatcher_unready();
    waits(&system, "127.0.0.1").await;
    system.stop_dispatcher();

    // Waiting does not help if the login is refused: settings are read at the start only.
    proxy.set(Mode::Pass);
    std::fs::write(&file, url.replace(password, "another")).unwrap();
    system.start_dispatcher_unready();
    eventually("it ends", seconds(60), async || {
        (!system.dispatcher().is_alive()).then_some(())
    })
    .await;
    assert!(system.logged().contains("SQLSTATE 28P01"));
}
