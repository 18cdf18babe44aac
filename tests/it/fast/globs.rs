//! The holder of a read token chooses the paths that its globs are matched with. Nobody else waits for the matching.

use std::time::{Duration, Instant};

use mayfly_tests::seconds;
use mayfly_tests::system::System;
use serde_json::json;

#[tokio::test]
async fn the_worst_glob_and_path_hold_nobody_up() {
    let system = System::start().await;
    let api = &system.api;
    let few = "db:*-*-*-*-ro";
    let most = format!("db:{}ro", "*-".repeat(16));
    let asked = json!({"read": [few, most], "ttl": 600});
    let (status, token) = api.post("/v1/tokens", asked).await;
    assert_eq!(status, 201, "{token}");
    let reader = api.with_token(token["token"].as_str().unwrap());
    let path = format!("db:{}", "-".repeat(500));
    api.create(&format!("/v1/secrets/{path}"), json!({"data": {"a": 1}}))
        .await;

    // Each of these globs took 10 s, and more with each star.
    let attack = async {
        let begun = Instant::now();
        let read = format!("/v1/secrets/{path}");
        let calls = (0..8).map(|_| async {
            assert_eq!(reader.get(&read).await.0, 403);
            let listed = reader.ok("/v1/secrets").await;
            assert_eq!(listed["secrets"], json!([]));
        });
        futures_util::future::join_all(calls).await;
        begun.elapsed()
    };
    let others = async {
        let mut slowest = Duration::ZERO;
        for _ in 0..20 {
            let begun = Instant::now();
            api.ok("/v1/tokens").await;
            slowest = slowest.max(begun.elapsed());
        }
        slowest
    };
    let (attack, slowest) = tokio::join!(attack, others);
    assert!(attack < seconds(9), "the attack took {attack:?}");
    assert!(slowest < seconds(6), "another call took {slowest:?}");
}

#[tokio::test]
async fn a_glob_with_too_many_stars_is_refused_by_name() {
    let system = System::start().await;
    let asked = json!({"read": ["db:ok:*", format!("db:{}", "*a".repeat(17))], "ttl": 600});
    let (status, body) = system.api.post("/v1/tokens", asked).await;
    assert_eq!((status, &body["error"]), (400, &json!("invalid")), "{body}");
    let reasons = &body["errors"]["read.1"];
    assert_eq!(*reasons, json!(["a glob has at most 16 `*`, this has 17"]));
}
