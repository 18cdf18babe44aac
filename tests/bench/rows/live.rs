//! Cost, memory and bytes with many live leases, and a start with them.

use std::path::Path;
use std::time::{Duration, Instant};

use mayfly_tests::postgres::{Admin, Server};
use reqwest::Method;
use serde_json::json;

use crate::Bench;
use crate::cpu::resident_mb;
use crate::load::{self, Target, Until};
use crate::report::Of;
use crate::stand::Stand;

/// Live leases.
const LIVE: [usize; 2] = [0, 10_000];
const LIVE_FULL: usize = 100_000;

pub async fn run(bench: &mut Bench, group: &str) {
    let server = Server::pg15();
    let site = server.site(Admin::Superuser).await;
    let stand = Stand::start(2, &[]).await;
    let one_round = json!({"scramIterations": 1});
    let shared = json!({"scramIterations": 1, "share": true});
    let path = stand.secret(&site, server.port(), one_round).await;
    let shared = stand.secret(&site, server.port(), shared).await;
    let empty = Sizes::of(&stand);
    let mut rows = Rows {
        bench,
        group,
        stand,
        path,
        shared,
        empty,
        live: 0,
        number: 0,
    };
    let full = rows.bench.plan.full.then_some(LIVE_FULL);
    for number in LIVE.into_iter().chain(full) {
        rows.number = match number {
            0 => 0,
            _ => rows.bench.plan.number(number),
        };
        rows.fill().await;
        for _ in 0..3 {
            rows.costs().await;
        }
        rows.memory();
        if number > 0 {
            rows.bytes();
            rows.start_again().await;
            rows.reconcile().await;
        }
    }
    rows.stand.end(&[&site]).await;
}

struct Rows<'a> {
    bench: &'a mut Bench,
    group: &'a str,
    stand: Stand,
    path: String,
    /// A secret whose callers share leases.
    shared: String,
    empty: Sizes,
    /// Leases that are live.
    live: usize,
    /// A number as the rows have it.
    number: usize,
}

impl Rows<'_> {
    fn add(&mut self, what: &str, unit: &'static str, value: f64) {
        let name = format!("{what}, {} live", self.number);
        self.bench
            .report
            .add(self.group, &name, unit, Of::Mayfly, value);
    }

    /// Issues until there are enough.
    async fn fill(&mut self) {
        if self.number > self.live {
            let load = self.stand.fill(&self.path, self.number - self.live).await;
            self.live = self.number;
            self.add(
                "issue until there are, 16 in flight",
                "leases/s",
                load.rate(),
            );
        }
    }

    /// Latencies of an issue, and of what else must not grow.
    async fn costs(&mut self) {
        const ISSUES: usize = 100;
        let load = load::run(&self.stand.reads(&self.path), 1, Until::Count(ISSUES)).await;
        self.live += ISSUES;
        self.add("issue, 1 in flight, p50", "ms", load.percentile(50));
        self.add("issue, 1 in flight, p99", "ms", load.percentile(99));
        let port = self.stand.system.admin_port();
        let others = [
            ("shared read", one_caller(self.stand.reads(&self.shared))),
            ("page of leases", self.stand.root("/v1/leases")),
            ("status", self.stand.root("/v1/status")),
            ("scrape of metrics", self.stand.root("/metrics").at(&[port])),
        ];
        for (what, target) in others {
            let load = load::run(&target, 1, Until::Count(50)).await;
            self.add(&format!("{what}, p50"), "ms", load.percentile(50));
        }
    }

    fn memory(&mut self) {
        let dispatcher = self.stand.system.dispatcher().id();
        self.add("dispatcher, resident", "MB", resident_mb(dispatcher, false));
        let engine = self.stand.engines[0].process.id();
        self.add("engine, resident", "MB", resident_mb(engine, false));
    }

    fn bytes(&mut self) {
        let (now, live) = (Sizes::of(&self.stand), self.live as f64);
        let waiting = self.stand.system.rabbit.messages("delay") as f64;
        self.add("broker, messages per lease", "", waiting / live);
        let broker = now.broker.saturating_sub(self.empty.broker);
        self.add("broker, bytes on disk per lease", "B", broker as f64 / live);
        let store = now.store.saturating_sub(self.empty.store);
        self.add("store, bytes per lease", "B", store as f64 / live);
    }

    async fn start_again(&mut self) {
        let begun = Instant::now();
        self.stand.system.stop_dispatcher();
        self.add("dispatcher, stop", "s", begun.elapsed().as_secs_f64());
        let begun = Instant::now();
        self.stand.system.start_dispatcher_unready();
        while !self.stand.system.is_ready().await {
            assert!(
                begun.elapsed() < Duration::from_secs(300),
                "the dispatcher is not ready"
            );
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        self.add(
            "dispatcher, start until ready",
            "s",
            begun.elapsed().as_secs_f64(),
        );
        self.stand.system.broker_up().await;
    }

    /// The comparison of store, broker and database, and what it takes of memory. It changes nothing.
    async fn reconcile(&mut self) {
        let begun = Instant::now();
        let body = json!({"dryRun": true});
        let answer =
            self.stand
                .system
                .api
                .try_call(Method::POST, "/v1/leases/reconcile", Some(body));
        // With very many leases it takes longer than the harness waits.
        let Some((200, _)) = answer.await else {
            return;
        };
        self.add(
            "`lease reconcile --dry-run`",
            "s",
            begun.elapsed().as_secs_f64(),
        );
        let dispatcher = self.stand.system.dispatcher().id();
        self.add(
            "dispatcher, highest resident in it",
            "MB",
            resident_mb(dispatcher, true),
        );
    }
}

/// The same caller gets the same lease.
fn one_caller(mut target: Target) -> Target {
    target.requests.truncate(1);
    target
}

/// Bytes of files.
struct Sizes {
    /// The SQLite store with its write-ahead log.
    store: u64,
    /// All of the broker's node.
    broker: u64,
}

impl Sizes {
    fn of(stand: &Stand) -> Self {
        let store = ["mayfly.db", "mayfly.db-wal"]
            .map(|name| stand.system.directory.join("data").join(name));
        let files = store.iter().filter_map(|file| std::fs::metadata(file).ok());
        Self {
            store: files.map(|file| file.len()).sum(),
            broker: bytes_below(&stand.system.rabbit.directory().join("data")),
        }
    }
}

/// Of all files in a directory and its subdirectories.
fn bytes_below(directory: &Path) -> u64 {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(data) if data.is_dir() => bytes_below(&entry.path()),
        Ok(data) => data.len(),
        // It was removed meanwhile.
        Err(_) => 0,
    });
    sizes.sum()
}
