//! A store with 30 days of ended leases: what must not grow with them.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use mayfly_tests::process::binary;

use super::flat::{Flat, SAMPLES};
use crate::Bench;
use crate::load::{self, Until};
use crate::stand::StoreDatabase;

/// Ended leases in the store.
const ROWS: usize = 100_000;
const ROWS_FULL: usize = 1_000_000;
/// How far the middle page is back.
const MIDDLE: Duration = Duration::from_hours(15 * 24);

pub async fn run(bench: &mut Bench, group: &str) {
    one_store(bench, group, "SQLite").await;
    one_store(bench, group, "PostgreSQL").await;
}

async fn one_store(bench: &mut Bench, group: &str, store: &str) {
    let database = match store {
        "PostgreSQL" => Some(StoreDatabase::new(Duration::ZERO).await),
        _ => None,
    };
    let environment: Vec<_> = database.iter().map(StoreDatabase::setting).collect();
    let number = match bench.plan.full {
        true => bench.plan.number(ROWS_FULL),
        false => bench.plan.number(ROWS),
    };
    let mut flat = Flat::start(bench, group, 1, &environment).await;
    flat.with = format!("{number} rows in {store}");
    let mut rows = Rows { flat, database };
    rows.fill(number).await;
    rows.start("start until ready").await;
    for _ in 0..SAMPLES {
        rows.costs().await;
    }
    rows.flat.memory();
    rows.flat.reconcile().await;
    rows.forget().await;
    rows.flat.end().await;
}

struct Rows<'a> {
    flat: Flat<'a>,
    /// The database of a store in PostgreSQL.
    database: Option<StoreDatabase>,
}

impl Rows<'_> {
    fn data(&self) -> PathBuf {
        self.flat.stand.system.directory.join("data")
    }

    /// Writes the history while no dispatcher runs.
    async fn fill(&mut self, number: usize) {
        self.flat.stand.fill(&self.flat.path, 1).await;
        self.flat.stand.system.stop_dispatcher();
        let before = self.bytes().await;
        let begun = Instant::now();
        let mut filling = Command::new(binary("examples/add_history"));
        filling.arg(self.data()).arg(number.to_string());
        if let Some(database) = &self.database {
            filling.env("STORE_URL", &database.url);
        }
        assert!(filling.status().unwrap().success());
        let rate = number as f64 / begun.elapsed().as_secs_f64();
        eprintln!("{}: {rate:.0} rows/s written", self.flat.with);
        let grown = self.bytes().await.saturating_sub(before) as f64;
        self.flat
            .add("store, bytes per row", "B", grown / number as f64);
    }

    /// Bytes of the store, with its indexes.
    async fn bytes(&self) -> u64 {
        match &self.database {
            Some(database) => database.bytes().await,
            None => std::fs::metadata(self.data().join("mayfly.db"))
                .unwrap()
                .len(),
        }
    }

    async fn start(&mut self, what: &str) {
        self.flat.start_again(what).await;
        // The first read also waits until the engine is heard.
        self.flat.stand.fill(&self.flat.path, 1).await;
    }

    /// Pages, counts, and what a caller waits for.
    async fn costs(&mut self) {
        let flat = &mut self.flat;
        let middle = jiff::Timestamp::now() - MIDDLE;
        let middle = format!("{:012x}", middle.as_millisecond());
        let middle = format!("{}-{}-7000-8000-000000000000", &middle[..8], &middle[8..]);
        let middle = BASE64_URL_SAFE_NO_PAD.encode(middle);
        let path = flat.path.clone();
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
            let target = flat.stand.root(&format!("/v1/leases{query}"));
            flat.cost(what, &target).await;
        }
        flat.costs().await;
        let issues = flat.stand.reads(&path);
        flat.cost("issue, 1 in flight", &issues).await;
    }

    /// Half of the history is too old from one start to the next: an issue does not wait while it is forgotten.
    async fn forget(&mut self) {
        self.flat.stand.system.stop_dispatcher();
        self.flat
            .stand
            .system
            .set("MAYFLY__LEASE__HISTORY_DAYS", "15");
        self.start("start until ready, with half of them to forget")
            .await;
        let (before, begun) = (self.revoked().await, Instant::now());
        let reads = self.flat.stand.reads(&self.flat.path);
        let load = load::run(&reads, 1, Until::Time(self.flat.bench.plan.time() * 2)).await;
        self.flat
            .add_load("issue while they are forgotten, 1 in flight", &load);
        let page = self.flat.stand.root("/v1/leases?state=revoked");
        let load = load::run(&page, 1, Until::Time(self.flat.bench.plan.time() * 2)).await;
        self.flat.add_load("page of revoked ones meanwhile", &load);
        let forgotten = before.saturating_sub(self.revoked().await);
        let rate = forgotten as f64 / begun.elapsed().as_secs_f64();
        self.flat.add("forgotten", "leases/s", rate);
    }

    /// Ended leases in the store, as the metrics count them.
    async fn revoked(&self) -> u64 {
        let text = self.flat.stand.system.admin_text("/metrics").await;
        let of_state = |line: &&str| {
            line.starts_with("mayfly_dispatcher_leases{") && line.contains("state=\"revoked\"")
        };
        let counts = text.lines().filter(of_state);
        let count = |line: &str| line.rsplit(' ').next()?.parse::<f64>().ok();
        counts.filter_map(count).sum::<f64>() as u64
    }
}
