//! The store's database has failed over, and the former primary still runs: a dispatcher does not stay connected to
//! it.

use mayfly_tests::postgres::{Server, scalar};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::system::System;
use mayfly_tests::{eventually, run_dir, seconds, word};
use serde_json::json;

#[tokio::test]
async fn a_dispatcher_leaves_a_former_primary() {
    let former = Server::own("");
    let url = former.store().await;
    let database = url.rsplit('/').next().unwrap();
    let database = database.split('?').next().unwrap().to_owned();
    let next = former.standby();
    let (one, other) = (former.port(), next.port());
    let both = url.replace(&format!(":{one}/"), &format!(":{one},127.0.0.1:{other}/"));
    let file = run_dir().join(format!("store-url-{}", word()));
    std::fs::write(&file, both).unwrap();
    let setting = ("MAYFLY__STORE__URL_FILE", file.to_str().unwrap());
    let system = System::start_with(Rabbit::shared(), &[setting]).await;
    let body = json!({"read": ["db:*"], "ttl": 3600});
    let token = system.api.create("/v1/tokens", body).await;
    let id = token["id"].as_str().unwrap();
    let caller = system.api.with_token(token["token"].as_str().unwrap());
    let status = async || caller.get("/v1/secrets/db:none").await.0;
    assert_ne!(status().await, 401);
    let there = next.superuser(&database).await;
    let count = format!("SELECT count(*) FROM tokens WHERE id = '{id}'");
    eventually("the standby has the token", seconds(20), async || {
        (scalar(&there, &count).await == "1").then_some(())
    })
    .await;
    next.promote().await;
    // Another dispatcher, which is connected to the primary, would delete the token in this way.
    let deleted = format!("DELETE FROM tokens WHERE id = '{id}'");
    there.batch_execute(&deleted).await.unwrap();
    let here = former.superuser(&database).await;
    assert_eq!(scalar(&here, &count).await, "1", "it is still there");
    // The dispatcher looks every 10 s for another primary. Its sessions at the former primary never end by
    // themselves.
    eventually("the token is refused", seconds(20), async || {
        (status().await == 401).then_some(())
    })
    .await;
    // The session that writes may leave the former primary after the sessions that read.
    let token = eventually("it writes again", seconds(20), async || {
        let body = json!({"read": ["db:*"], "ttl": 3600});
        let (status, token) = system.api.post("/v1/tokens", body).await;
        (status == 201).then_some(token)
    })
    .await;
    let id = token["id"].as_str().unwrap();
    let count = format!("SELECT count(*) FROM tokens WHERE id = '{id}'");
    assert_eq!(scalar(&there, &count).await, "1");
    assert_eq!(scalar(&here, &count).await, "0");
}
