//! An outage while a thousand leases become due: the time until they are gone after it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use jiff::Timestamp;
use mayfly_tests::postgres::Credential;
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::{eventually, seconds};
use serde_json::json;

use super::number;
use super::world::{Plan, World};

/// Issues `count` leases that end about `after` seconds from now, quickly.
async fn issue_many(world: &Arc<World>, count: usize, ttl: u64) -> Timestamp {
    let mut reads = tokio::task::JoinSet::new();
    let left = Arc::new(std::sync::atomic::AtomicUsize::new(count));
    for _ in 0..16 {
        let (world, left) = (world.clone(), left.clone());
        reads.spawn(async move {
            let mut last = Timestamp::UNIX_EPOCH;
            let one_more = |n: usize| n.checked_sub(1);
            while left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more)
                .is_ok()
            {
                let path = format!("/v1/secrets/{}?ttl={ttl}", world.path);
                let answer = world.apis[0].ok(&path).await;
                last = last.max(Credential::from_answer(&answer).expiration);
            }
            last
        });
    }
    reads.join_all().await.into_iter().max().unwrap()
}

/// An outage in which a thousand leases become due. The promise: all are gone within 10 s of its end.
async fn outage(name: &str, begin: impl AsyncFn(&World), end: impl AsyncFn(&World)) {
    let count = usize::try_from(number("CHAOS_LEASES", 1000)).unwrap();
    let world = World::new(Plan {
        rabbit: Rabbit::own(),
        dispatchers: 1,
        create_deadline_seconds: 8,
        late: super::LATE,
    })
    .await;
    let change = json!({"attributes": {"ttl": 120, "maxTtl": 120}});
    let api = &world.apis[0];
    let (status, _) = api
        .put(&format!("/v1/secrets/{}", world.path), change)
        .await;
    assert_eq!(status, 200);
    let issuing = Instant::now();
    let last = issue_many(&world, count, 60).await;
    println!(
        "{name}: {count} leases issued in {:.1} s",
        issuing.elapsed().as_secs_f64()
    );
    begin(&world).await;
    let begun = Instant::now();
    let left = last.duration_since(Timestamp::now()).unsigned_abs();
    tokio::time::sleep(left.max(seconds(60))).await;
    end(&world).await;
    let back = Instant::now();
    let mut watch = world.site.server.watch(&world.prefix());
    eventually("all are gone", seconds(120), async || {
        let look = watch.look().await?;
        look.roles.is_empty().then_some(())
    })
    .await;
    println!(
        "{name}: away for {:.0} s, all {count} gone {:.1} s after its return",
        begun.elapsed().as_secs_f64() - back.elapsed().as_secs_f64(),
        back.elapsed().as_secs_f64()
    );
    assert!(
        back.elapsed() < seconds(10),
        "10 s after its return some are left"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outage_of_the_broker() {
    outage(
        "broker",
        async |world: &World| {
            let rabbit = world.rabbit.handle();
            tokio::task::spawn_blocking(move || rabbit.kill(0))
                .await
                .unwrap();
        },
        async |world: &World| {
            let rabbit = world.rabbit.handle();
            tokio::task::spawn_blocking(move || rabbit.start(0))
                .await
                .unwrap();
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outage_of_the_database() {
    outage(
        "database",
        async |world: &World| world.site.server.kill(),
        async |world: &World| world.site.server.start(),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outage_of_all_engines() {
    outage(
        "engines",
        async |world: &World| world.engines.lock().await.clear(),
        async |world: &World| {
            let engine = world.start_engine(0).await;
            world.engines.lock().await.push(engine);
        },
    )
    .await;
}
