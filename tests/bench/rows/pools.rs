//! Many pools, each with an engine, and two dispatchers on one store in PostgreSQL. An engine serves one pool, so
//! there are as many engines as pools.

use std::time::Duration;

use futures_util::future::join_all;
use mayfly_tests::postgres::{Admin, Server, Site};
use mayfly_tests::system::System;
use serde_json::json;

use crate::Bench;
use crate::load::{self, Target, Until};
use crate::report::Of;
use crate::stand::{Stand, StoreDatabase, port};

const POOLS: usize = 100;
/// How far the store is from the dispatchers.
const DISTANCES: [(&str, Duration); 2] = [
    ("store beside", Duration::ZERO),
    ("store 1 ms away", Duration::from_millis(1)),
];
const IN_FLIGHT: usize = 16;
/// Statuses and scrapes of one sample.
const LOOKS: usize = 20;
/// Engines that start at a time.
const AT_ONCE: usize = 4;

pub async fn run(bench: &mut Bench, group: &str) {
    let server = Server::pg15();
    for (distance, round_trip) in DISTANCES {
        let site = server.site(Admin::Superuser).await;
        let store = StoreDatabase::new(round_trip).await;
        let stand = Stand::start(1, &[store.setting()]).await;
        let mut rows = Rows {
            bench,
            group,
            distance,
            second: stand.system.beside(&[]),
            stand,
            site,
        };
        rows.second.ready().await;
        let path = rows.secret(&rows.stand.pool).await;
        rows.measure(1, "", &[&path]).await;
        rows.looks(1).await;
        let pools = rows.more_pools().await;
        rows.measure(POOLS, "", &[&path]).await;
        let mut paths = Vec::new();
        for pool in &pools[..IN_FLIGHT] {
            paths.push(rows.secret(pool).await);
        }
        let paths: Vec<&String> = paths.iter().collect();
        let each = format!(" of {IN_FLIGHT} of them");
        rows.measure(POOLS, &each, &paths).await;
        rows.looks(POOLS).await;
        drop(rows.second);
        rows.stand.end(&[&rows.site]).await;
    }
}

struct Rows<'a> {
    bench: &'a mut Bench,
    group: &'a str,
    distance: &'static str,
    stand: Stand,
    /// The other dispatcher.
    second: System,
    site: Site,
}

impl Rows<'_> {
    fn add(&mut self, pools: usize, what: &str, unit: &'static str, value: f64) {
        let name = format!("pools: {pools}, {}, {what}", self.distance);
        self.bench
            .report
            .add(self.group, &name, unit, Of::Mayfly, value);
    }

    async fn secret(&self, pool: &str) -> String {
        let attributes = json!({"scramIterations": 1, "ttl": 7200});
        self.stand.system.secret(&self.site, pool, attributes).await
    }

    /// Makes pools until there are enough, each with an engine. Returns the new pools.
    async fn more_pools(&mut self) -> Vec<String> {
        let mut pools = Vec::new();
        while pools.len() < POOLS - 1 {
            let number = AT_ONCE.min(POOLS - 1 - pools.len());
            let mut engines = Vec::new();
            for _ in 0..number {
                let pool = self.stand.system.pool().await;
                engines.push(self.stand.system.engine_with(&pool, &crate::stand::LOG));
                pools.push(pool);
            }
            join_all(engines.iter().map(|engine| engine.ready())).await;
            self.stand.engines.extend(engines);
        }
        pools
    }

    /// Reads of these secrets, each by other clients, at both dispatchers.
    async fn measure(&mut self, pools: usize, what: &str, paths: &[&String]) {
        let ports = [port(&self.stand.system), port(&self.second)];
        let of_each = paths.iter().map(|path| self.stand.reads(path));
        let of_each: Vec<Target> = of_each.collect();
        let mut reads = of_each[0].clone().at(&ports);
        for (number, request) in reads.requests.iter_mut().enumerate() {
            *request = of_each[number % paths.len()].requests[number].clone();
        }
        // Engines open their connections.
        load::run(&reads, IN_FLIGHT, Until::Count(IN_FLIGHT * 4)).await;
        for _ in 0..self.bench.plan.repeats {
            let load = load::run(&reads, IN_FLIGHT, Until::Time(self.bench.plan.time())).await;
            let what = format!("reads{what}, {IN_FLIGHT} in flight");
            self.add(pools, &what, "leases/s", load.rate());
            self.add(pools, &format!("{what}, p50"), "ms", load.percentile(50));
        }
    }

    /// What an operator looks at.
    async fn looks(&mut self, pools: usize) {
        let admin_port = self.stand.system.admin_port();
        let looks = [
            ("status, p50", self.stand.root("/v1/status")),
            (
                "scrape of metrics, p50",
                self.stand.root("/metrics").at(&[admin_port]),
            ),
        ];
        for _ in 0..self.bench.plan.repeats {
            for (what, target) in &looks {
                let load = load::run(target, 1, Until::Count(LOOKS)).await;
                self.add(pools, what, "ms", load.percentile(50));
            }
        }
    }
}
