//! What the groups `live` and `rows` share: one system, and what must not grow with the leases in its store.

use std::time::{Duration, Instant};

use mayfly_tests::postgres::{Admin, Server, Site};
use serde_json::json;

use crate::Bench;
use crate::cpu::{forget_highest, resident_mb};
use crate::load::{self, Load, Target, Until};
use crate::report::Of;
use crate::stand::Stand;

/// Samples of each cost.
pub const SAMPLES: usize = 3;
/// Requests of one sample.
const REQUESTS: usize = 50;
/// After this time a start is reported as failed.
const PATIENCE: Duration = Duration::from_secs(300);

/// A system with one secret that issues and one whose callers share leases.
pub struct Flat<'a> {
    pub bench: &'a mut Bench,
    group: &'a str,
    site: Site,
    pub stand: Stand,
    /// The secret that issues, with 1 SCRAM round.
    pub path: String,
    shared: String,
    /// What is in the store, as the rows are named.
    pub with: String,
}

impl<'a> Flat<'a> {
    /// A system with this number of engines and more settings.
    pub async fn start(
        bench: &'a mut Bench,
        group: &'a str,
        engines: usize,
        environment: &[(&str, &str)],
    ) -> Self {
        let server = Server::pg15();
        let site = server.site(Admin::Superuser).await;
        let stand = Stand::start(engines, environment).await;
        let one_round = json!({"scramIterations": 1});
        let shared = json!({"scramIterations": 1, "share": true});
        let path = stand.secret(&site, server.port(), one_round).await;
        let shared = stand.secret(&site, server.port(), shared).await;
        Self {
            bench,
            group,
            site,
            stand,
            path,
            shared,
            with: String::new(),
        }
    }

    pub fn add(&mut self, what: &str, unit: &'static str, value: f64) {
        let name = format!("{what}, {}", self.with);
        self.bench
            .report
            .add(self.group, &name, unit, Of::Mayfly, value);
    }

    /// Adds the p50 and the p99 of a load.
    pub fn add_load(&mut self, what: &str, load: &Load) {
        self.add(&format!("{what}, p50"), "ms", load.percentile(50));
        self.add(&format!("{what}, p99"), "ms", load.percentile(99));
    }

    /// One sample of a cost.
    pub async fn cost(&mut self, what: &str, target: &Target) {
        let load = load::run(target, 1, Until::Count(REQUESTS)).await;
        self.add_load(what, &load);
    }

    /// One sample of a status, a scrape and a shared read.
    pub async fn costs(&mut self) {
        let admin_port = self.stand.system.admin_port();
        let mut shared = self.stand.reads(&self.shared);
        // The same caller gets the same lease, so one request is enough.
        shared.requests.truncate(1);
        let costs = [
            ("shared read", shared),
            ("status", self.stand.root("/v1/status")),
            (
                "scrape of metrics",
                self.stand.root("/metrics").at(&[admin_port]),
            ),
        ];
        for (what, target) in costs {
            self.cost(what, &target).await;
        }
    }

    /// Starts the dispatcher, which has stopped.
    pub async fn start_again(&mut self, what: &str) {
        let begun = Instant::now();
        self.stand.system.start_dispatcher_unready();
        while !self.stand.system.is_ready().await {
            assert!(begun.elapsed() < PATIENCE, "the dispatcher is not ready");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        self.add(what, "s", begun.elapsed().as_secs_f64());
        self.stand.system.broker_up().await;
    }

    pub fn memory(&mut self) {
        let dispatcher = self.stand.system.dispatcher().id();
        self.add("dispatcher, resident", "MB", resident_mb(dispatcher, false));
    }

    /// The comparison of store, broker and database, and what it takes of memory. It changes nothing.
    pub async fn reconcile(&mut self) {
        let dispatcher = self.stand.system.dispatcher().id();
        forget_highest(dispatcher);
        let begun = Instant::now();
        let body = json!({"dryRun": true});
        let api = &self.stand.system.api;
        let (status, answer) = api.post("/v1/leases/reconcile", body).await;
        assert_eq!(status, 200, "{answer}");
        let seconds = begun.elapsed().as_secs_f64();
        self.add("`lease reconcile --dry-run`", "s", seconds);
        self.add(
            "dispatcher, highest resident in it",
            "MB",
            resident_mb(dispatcher, true),
        );
    }

    pub async fn end(self) {
        self.stand.end(&[&self.site]).await;
    }
}
