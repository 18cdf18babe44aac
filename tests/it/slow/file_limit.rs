//! The usual limit on open files, 1,024: idle connections of callers leave enough for the dispatcher, such as for a
//! new connection to the broker.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;

use mayfly_tests::process::binary;
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::system::System;
use mayfly_tests::{eventually, run_dir, seconds, word};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

/// A keep-alive connection from 127.0.`site`.1 that was answered once.
async fn idle(to: SocketAddr, site: u8) -> Option<TcpStream> {
    let socket = TcpSocket::new_v4().unwrap();
    let from = (Ipv4Addr::new(127, 0, site, 1), 0);
    socket.bind(from.into()).unwrap();
    let mut stream = socket.connect(to).await.ok()?;
    let ask = b"HEAD /v1/status HTTP/1.1\r\nhost: x\r\n\r\n";
    stream.write_all(ask).await.ok()?;
    let mut buffer = [0; 1024];
    // The connection may have to make room at once.
    let read = tokio::time::timeout(seconds(10), stream.read(&mut buffer));
    read.await.ok()?.ok()?;
    Some(stream)
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_leave_files_for_the_broker() {
    let programs = run_dir().join(format!("limited-{}", word()));
    std::fs::create_dir_all(&programs).unwrap();
    let program = programs.join("mayfly-dispatcher");
    let real = binary("mayfly-dispatcher");
    let script = format!(
        "#!/bin/bash\nulimit -n 1024\nexec {} \"$@\"\n",
        real.display()
    );
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let many = [
        ("MAYFLY__HTTP__MAX_CONNECTIONS", "5000"),
        ("MAYFLY__HTTP__MAX_CONNECTIONS_PER_ADDRESS", "5000"),
    ];
    let system = System::start_from(Some(programs), Rabbit::shared(), &many).await;
    system.broker_up().await;
    let address: SocketAddr = system
        .api
        .address
        .trim_start_matches("http://")
        .parse()
        .unwrap();
    let mut held = Vec::new();
    for n in 0..1_100_u16 {
        held.push(idle(address, u8::try_from(1 + n % 8).unwrap()).await);
    }
    assert!(held.iter().flatten().count() > 500);
    system.rabbit.close_connections();
    eventually("the broker is connected again", seconds(60), async || {
        let (_, status) = system.api.get("/v1/status").await;
        (status["broker"] == "up").then_some(())
    })
    .await;
    // Pools need the broker and the store.
    let name = system.rabbit.take_pool();
    system.api.create("/v1/pools", json!({"name": name})).await;
    assert!(system.is_ready().await);
}
