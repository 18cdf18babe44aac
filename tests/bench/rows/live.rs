//! Cost, memory and bytes with many live leases, and a start with them.

use std::path::Path;
use std::time::Instant;

use super::flat::{Flat, SAMPLES};
use crate::Bench;
use crate::cpu::resident_mb;
use crate::load::{self, Until};
use crate::stand::Stand;

/// Live leases.
const LIVE: [usize; 2] = [0, 10_000];
const LIVE_FULL: usize = 100_000;
/// Issues of one sample.
const ISSUES: usize = 100;

pub async fn run(bench: &mut Bench, group: &str) {
    let flat = Flat::start(bench, group, 2, &[]).await;
    let empty = Sizes::of(&flat.stand);
    let mut rows = Rows {
        flat,
        empty,
        live: 0,
    };
    let full = rows.flat.bench.plan.full.then_some(LIVE_FULL);
    for number in LIVE.into_iter().chain(full) {
        let number = match number {
            0 => 0,
            _ => rows.flat.bench.plan.number(number),
        };
        rows.flat.with = format!("{number} live");
        rows.fill(number).await;
        for _ in 0..SAMPLES {
            rows.costs().await;
        }
        rows.memory();
        if number > 0 {
            rows.bytes();
            rows.start_again().await;
            rows.flat.reconcile().await;
        }
    }
    rows.flat.end().await;
}

struct Rows<'a> {
    flat: Flat<'a>,
    empty: Sizes,
    /// Leases that are live.
    live: usize,
}

impl Rows<'_> {
    /// Issues until there are enough.
    async fn fill(&mut self, number: usize) {
        if number > self.live {
            let flat = &mut self.flat;
            let load = flat.stand.fill(&flat.path, number - self.live).await;
            self.live = number;
            flat.add(
                "issue until there are, 16 in flight",
                "leases/s",
                load.rate(),
            );
        }
    }

    /// Latencies of an issue, and of what else must not grow.
    async fn costs(&mut self) {
        let flat = &mut self.flat;
        let load = load::run(&flat.stand.reads(&flat.path), 1, Until::Count(ISSUES)).await;
        self.live += ISSUES;
        flat.add_load("issue, 1 in flight", &load);
        let page = flat.stand.root("/v1/leases");
        flat.cost("page of leases", &page).await;
        flat.costs().await;
    }

    fn memory(&mut self) {
        self.flat.memory();
        let engine = self.flat.stand.engines[0].process.id();
        self.flat
            .add("engine, resident", "MB", resident_mb(engine, false));
    }

    fn bytes(&mut self) {
        let flat = &mut self.flat;
        let (now, live) = (Sizes::of(&flat.stand), self.live as f64);
        let waiting = flat.stand.system.rabbit.messages("delay") as f64;
        flat.add("broker, messages per lease", "", waiting / live);
        let broker = now.broker.saturating_sub(self.empty.broker);
        flat.add("broker, bytes on disk per lease", "B", broker as f64 / live);
        let store = now.store.saturating_sub(self.empty.store);
        flat.add("store, bytes per lease", "B", store as f64 / live);
    }

    async fn start_again(&mut self) {
        let begun = Instant::now();
        self.flat.stand.system.stop_dispatcher();
        self.flat
            .add("dispatcher, stop", "s", begun.elapsed().as_secs_f64());
        self.flat.start_again("dispatcher, start until ready").await;
    }
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

/// Size of all files in a directory and its subdirectories, in bytes.
fn bytes_below(directory: &Path) -> u64 {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(data) if data.is_dir() => bytes_below(&entry.path()),
        Ok(data) => data.len(),
        // The file was removed meanwhile.
        Err(_) => 0,
    });
    sizes.sum()
}
