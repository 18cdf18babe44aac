//! Dispatchers on one store in PostgreSQL, 1 ms away: each adds its share.

use std::time::Duration;

use mayfly_tests::postgres::{Admin, Server};
use mayfly_tests::system::System;
use serde_json::json;

use crate::Bench;
use crate::load::{self, Target, Until};
use crate::report::Of;
use crate::stand::{Stand, StoreDatabase, port};

const DISPATCHERS: usize = 3;
const ROUND_TRIP: Duration = Duration::from_millis(1);
const IN_FLIGHT: usize = 48;
const LIMITS: [(&str, &str); 2] = [
    ("MAYFLY__LIMITS__READS_PER_SERVER", "64"),
    ("MAYFLY__LIMITS__READS_PER_CALLER", "64"),
];

pub async fn run(bench: &mut Bench, group: &str) {
    let server = Server::pg15();
    let site = server.site(Admin::Superuser).await;
    let store = StoreDatabase::new(ROUND_TRIP).await;
    let stand = Stand::start(4, &[LIMITS.as_slice(), &[store.setting()]].concat()).await;
    let path = stand
        .secret(&site, server.port(), json!({"scramIterations": 1}))
        .await;
    let mut others: Vec<System> = Vec::new();
    for number in 1..=DISPATCHERS {
        if number > 1 {
            let other = stand.system.beside(&[]);
            other.ready().await;
            others.push(other);
        }
        let ports: Vec<u16> = others.iter().chain([&stand.system]).map(port).collect();
        let reads = stand.reads(&path).at(&ports);
        load::run(&reads, IN_FLIGHT, Until::Count(IN_FLIGHT * 2)).await;
        for _ in 0..bench.plan.repeats {
            let load = load::run(&reads, IN_FLIGHT, Until::Time(bench.plan.time())).await;
            let name = format!("dispatchers: {number}, store 1 ms away, {IN_FLIGHT} in flight");
            bench
                .report
                .add(group, &name, "leases/s", Of::Mayfly, load.rate());
            let load = load::run(&reads, 1, Until::Count(20)).await;
            let name = format!("dispatchers: {number}, store 1 ms away, 1 in flight, p50");
            bench
                .report
                .add(group, &name, "ms", Of::Mayfly, load.percentile(50));
        }
    }
    wrong_tokens(bench, group, &stand, &path).await;
    drop(others);
    stand.end(&[&site]).await;
}

/// Callers whose tokens the dispatcher does not know, beside a caller that reads.
pub async fn wrong_tokens(bench: &mut Bench, group: &str, stand: &Stand, path: &str) {
    let reads = stand.reads(path);
    let wrong: Vec<String> = (0..64)
        .map(|n| format!("Authorization: Bearer wrong-{n}"))
        .collect();
    let wrong = Target::get(port(&stand.system), &format!("/v1/secrets/{path}"), &wrong).refused();
    for _ in 0..bench.plan.repeats {
        let alone = load::run(&reads, 1, Until::Time(bench.plan.time())).await;
        bench.report.add(
            group,
            "read alone, p50",
            "ms",
            Of::Mayfly,
            alone.percentile(50),
        );
        let (load, refused) = tokio::join!(
            load::run(&reads, 1, Until::Time(bench.plan.time())),
            load::run(&wrong, 64, Until::Time(bench.plan.time())),
        );
        bench.report.add(
            group,
            "read beside 64 callers with wrong tokens, p50",
            "ms",
            Of::Mayfly,
            load.percentile(50),
        );
        bench.report.add(
            group,
            "wrong tokens refused",
            "requests/s",
            Of::Mayfly,
            refused.rate(),
        );
    }
}
