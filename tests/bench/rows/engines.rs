//! Engines far from the database: each adds its share, and takes few of the server's connections.

use std::time::Duration;

use mayfly_tests::postgres::{Admin, Server};
use serde_json::json;

use crate::Bench;
use crate::load::{self, Until};
use crate::relay::relay;
use crate::report::Of;
use crate::stand::Stand;

const ENGINES: [usize; 4] = [1, 2, 4, 8];
const ROUND_TRIP: Duration = Duration::from_millis(20);
/// Engines whose connections are counted.
const MANY: usize = 50;
/// Reads in flight: 8 engines with 8 requests each at one server, twice.
const IN_FLIGHT: usize = 128;
/// The limits do not bind here: the engines are measured.
const LIMITS: [(&str, &str); 2] = [
    ("MAYFLY__LIMITS__READS_PER_SERVER", "256"),
    ("MAYFLY__LIMITS__READS_PER_CALLER", "64"),
];

pub async fn run(bench: &mut Bench, group: &str) {
    let server = Server::pg15();
    let site = server.site(Admin::Superuser).await;
    let mut stand = Stand::start(0, &LIMITS).await;
    let far = relay(server.port(), ROUND_TRIP);
    let path = stand
        .secret(&site, far, json!({"scramIterations": 1}))
        .await;
    for engines in ENGINES {
        stand.engines(engines).await;
        let reads = stand.reads(&path);
        // Each engine opens its connections: about 6 round trips each.
        load::run(&reads, IN_FLIGHT, Until::Count(IN_FLIGHT * 2)).await;
        for _ in 0..bench.plan.repeats {
            let load = load::run(&reads, IN_FLIGHT, Until::Time(bench.plan.time())).await;
            let name =
                format!("engines: {engines}, 20 ms from the database, {IN_FLIGHT} in flight");
            bench
                .report
                .add(group, &name, "leases/s", Of::Mayfly, load.rate());
        }
        let load = load::run(&reads, 1, Until::Count(20)).await;
        let name = format!("engines: {engines}, 20 ms from the database, 1 in flight, p50");
        bench
            .report
            .add(group, &name, "ms", Of::Mayfly, load.percentile(50));
    }
    stand.engines(MANY).await;
    let reads = stand.reads(&path);
    let load = load::run(&reads, IN_FLIGHT, Until::Time(bench.plan.time()));
    let (most, _) = site.most_sessions(load).await;
    let name = format!(
        "engines: {MANY}, 20 ms from the database, {IN_FLIGHT} in flight, connections at most"
    );
    bench.report.add(group, &name, "", Of::Mayfly, most as f64);
    stand.end(&[&site]).await;
}
