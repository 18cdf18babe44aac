//! A store with 30 days of ended leases: what must not grow with them.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use mayfly_tests::postgres::{Admin, Server};
use mayfly_tests::process::binary;
use mayfly_tests::run_dir;
use serde_json::json;

use crate::Bench;
use crate::cpu::resident_mb;
use crate::load::{self, Load, Until};
use crate::report::Of;
use crate::stand::Stand;

/// Ended leases in the store.
const ROWS: usize = 100_000;
const ROWS_FULL: usize = 1_000_000;
/// Requests of one sample.
const REQUESTS: usize = 50;
/// How far the middle page is back.
const MIDDLE: Duration = Duration::from_hours(15 * 24);
/// After this time a start is reported as failed.
const PATIENCE: Duration = Duration::from_secs(300);

pub async fn run(bench: &mut Bench, group: &str) {
    one_store(bench, group, "SQLite").await;
    one_store(bench, group, "PostgreSQL").await;
}

async fn one_store(bench: &mut Bench, group: &str, store: &str) {
    let server = Server::pg15();
    let site = server.site(Admin::Superuser).await;
    let url = match store {
        "PostgreSQL" => Some(Server::pg18().store().await),
        _ => None,
    };
    let file = run_dir().join(format!("store-of-{}", site.name));
    let mut environment = Vec::new();
    if let Some(url) = &url {
        std::fs::write(&file, url).unwrap();
        environment.push(("MAYFLY__STORE__URL_FILE", file.to_str().unwrap()));
    }
    let stand = Stand::start(1, &environment).await;
    let one_round = json!({"scramIterations": 1});
    let shared = json!({"scramIterations": 1, "share": true});
    let path = stand.secret(&site, server.port(), one_round).await;
    let shared = stand.secret(&site, server.port(), shared).await;
    let number = match bench.plan.full {
        true => bench.plan.number(ROWS_FULL),
        false => bench.plan.number(ROWS),
    };
    let mut rows = Rows {
        bench,
        group,
        stand,
        path,
        shared,
        name: format!("{number} rows in {store}"),
    };
    rows.fill(number, url.as_deref()).await;
    rows.start("start until ready").await;
    for _ in 0..3 {
        rows.costs().await;
    }
    rows.memory();
    rows.reconcile().await;
    rows.forget().await;
    rows.stand.end(&[&site]).await;
}

struct Rows<'a> {
    bench: &'a mut Bench,
    group: &'a str,
    stand: Stand,
    path: String,
    /// A secret whose callers share leases.
    shared: String,
    /// Number and store, as the rows are named.
    name: String,
}

impl Rows<'_> {
    fn add(&mut self, what: &str, unit: &'static str, value: f64) {
        let name = format!("{what}, {}", self.name);
        self.bench
            .report
            .add(self.group, &name, unit, Of::Mayfly, value);
    }

    fn add_load(&mut self, what: &str, load: &Load) {
        self.add(&format!("{what}, p50"), "ms", load.percentile(50));
        self.add(&format!("{what}, p99"), "ms", load.percentile(99));
    }

    fn data(&self) -> PathBuf {
        self.stand.system.directory.join("data")
    }

    /// Writes the history while no dispatcher runs.
    async fn fill(&mut self, number: usize, url: Option<&str>) {
        self.stand.fill(&self.path, 1).await;
        self.stand.system.stop_dispatcher();
        let begun = Instant::now();
        let mut filling = Command::new(binary("examples/add_history"));
        filling.arg(self.data()).arg(number.to_string());
        if let Some(url) = url {
            filling.env("STORE_URL", url);
        }
        assert!(filling.status().unwrap().success());
        let rate = number as f64 / begun.elapsed().as_secs_f64();
        eprintln!("{}: {rate:.0} rows/s written", self.name);
        if url.is_none() {
            let file = std::fs::metadata(self.data().join("mayfly.db")).unwrap();
            self.add(
                "store, bytes per row",
                "B",
                file.len() as f64 / number as f64,
            );
        }
    }

    async fn start(&mut self, what: &str) {
        let begun = Instant::now();
        self.stand.system.start_dispatcher_unready();
        while !self.stand.system.is_ready().await {
            assert!(begun.elapsed() < PATIENCE, "the dispatcher is not ready");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        self.add(what, "s", begun.elapsed().as_secs_f64());
        self.stand.system.broker_up().await;
        // The first read also waits until the engine is heard.
        self.stand.fill(&self.path, 1).await;
    }

    /// Pages, counts, and what a caller waits for.
    async fn costs(&mut self) {
        let middle = jiff::Timestamp::now() - MIDDLE;
        let middle = format!("{:012x}", middle.as_millisecond());
        let middle = format!("{}-{}-7000-8000-000000000000", &middle[..8], &middle[8..]);
        let middle = BASE64_URL_SAFE_NO_PAD.encode(middle);
        let path = self.path.clone();
        let pages = [
            ("newest page", String::new()),
            ("page of the middle", format!("?cursor={middle}")),
            ("page of a path and all below", format!("?path={path}")),
            (
                "the same in the middle",
                format!("?path={path}&cursor={middle}"),
            ),
            ("page of 1 % of the paths", format!("?path={path}:h07")),
            ("page of revoked ones", "?state=revoked".to_owned()),
            ("page of active ones", "?state=active".to_owned()),
            ("page of failed ones", "?state=failed".to_owned()),
            (
                "page of revoked ones below a path",
                format!("?state=revoked&path={path}"),
            ),
            ("page of a role", "?role=mayfly_none".to_owned()),
        ];
        for (what, query) in pages {
            let target = self.stand.root(&format!("/v1/leases{query}"));
            let load = load::run(&target, 1, Until::Count(REQUESTS)).await;
            self.add_load(what, &load);
        }
        let port = self.stand.system.admin_port();
        let mut shared = self.stand.reads(&self.shared);
        // The same caller gets the same lease.
        shared.requests.truncate(1);
        let others = [
            ("status", self.stand.root("/v1/status")),
            ("scrape of metrics", self.stand.root("/metrics").at(&[port])),
            ("shared read", shared),
            ("issue, 1 in flight", self.stand.reads(&self.path)),
        ];
        for (what, target) in others {
            let load = load::run(&target, 1, Until::Count(REQUESTS)).await;
            self.add_load(what, &load);
        }
    }

    fn memory(&mut self) {
        let dispatcher = self.stand.system.dispatcher().id();
        self.add("dispatcher, resident", "MB", resident_mb(dispatcher, false));
    }

    async fn reconcile(&mut self) {
        let begun = Instant::now();
        let body = json!({"dryRun": true});
        let api = &self.stand.system.api;
        api.post("/v1/leases/reconcile", body).await;
        let seconds = begun.elapsed().as_secs_f64();
        self.add("`lease reconcile --dry-run`", "s", seconds);
    }

    /// Half of the history is too old from one start to the next: an issue does not wait while it is forgotten.
    async fn forget(&mut self) {
        self.stand.system.stop_dispatcher();
        self.stand.system.set("MAYFLY__LEASE__HISTORY_DAYS", "15");
        self.start("start until ready, with half of them to forget")
            .await;
        let (before, begun) = (self.revoked().await, Instant::now());
        let reads = self.stand.reads(&self.path);
        let load = load::run(&reads, 1, Until::Time(self.bench.plan.time() * 2)).await;
        self.add_load("issue while they are forgotten, 1 in flight", &load);
        let page = self.stand.root("/v1/leases?state=revoked");
        let load = load::run(&page, 1, Until::Time(self.bench.plan.time() * 2)).await;
        self.add_load("page of revoked ones meanwhile", &load);
        let forgotten = before.saturating_sub(self.revoked().await);
        let rate = forgotten as f64 / begun.elapsed().as_secs_f64();
        self.add("forgotten", "leases/s", rate);
    }

    /// Ended leases in the store, as the metrics count them.
    async fn revoked(&self) -> u64 {
        let text = self.stand.system.admin_text("/metrics").await;
        let of_state = |line: &&str| {
            line.starts_with("mayfly_dispatcher_leases{") && line.contains("state=\"revoked\"")
        };
        let counts = text.lines().filter(of_state);
        let count = |line: &str| line.rsplit(' ').next()?.parse::<f64>().ok();
        counts.filter_map(count).sum::<f64>() as u64
    }
}
