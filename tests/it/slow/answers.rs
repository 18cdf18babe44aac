//! Engines whose answers the broker refuses.

use mayfly_tests::postgres::{Admin, Server};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::system::System;
use mayfly_tests::users::Part;
use mayfly_tests::{eventually, seconds};
use serde_json::json;

/// Answers have no confirm. The broker closes their channel when it refuses one. The engine opens the channel again
/// and needs no restart. Meanwhile the caller gets an error by its deadline, and the account is ended.
#[tokio::test]
async fn answers_that_were_refused_come_again_once_they_are_allowed() {
    let system = System::start_with(
        Rabbit::shared(),
        &[("MAYFLY__CREATE__DEADLINE_SECONDS", "4")],
    )
    .await;
    let site = Server::pg15().site(Admin::Superuser).await;
    let pool = system.pool().await;
    let part = Part::Engine(pool.clone());
    let may_write_to = |exchanges: &str| {
        system.rabbit.set_write(
            &part,
            &format!(r"^mayfly\.v1\.engine\.{pool}\..*$"),
            &format!(r"^mayfly\.v1\.({exchanges})$"),
            &format!(r"^mayfly\.v1\.(engine\.{pool}\..*|pool\.{pool}\.(create|revoke))$"),
        );
    };
    may_write_to(r"delay\.L24|engines|park");
    let _engine = system.engine(&pool).await;
    let path = system.secret(&site, &pool, json!({})).await;
    let read = format!("/v1/secrets/{path}?ttl=300");
    let (status, answer) = system.api.get(&read).await;
    assert_eq!(
        (status, answer["error"].as_str()),
        (504, Some("deadline")),
        "{answer}"
    );
    may_write_to(r"answers|delay\.L24|engines|park");
    eventually("the engine answers", seconds(60), async || {
        (system.api.get(&read).await.0 == 200).then_some(())
    })
    .await;
    let refused = "the broker has refused an answer";
    assert!(system.logged().contains(refused));
}
