//! The harness: private RabbitMQ and PostgreSQL servers, real dispatcher and engine processes,
//! and the HTTP API, driven from outside. Shared by the end-to-end tests and the benchmarks.
//! Run through `make e2e`, which starts the shared servers.

#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    missing_docs,
    reason = "a harness panics where a test fails"
)]

pub mod amqp;
pub mod api;
pub mod cli;
pub mod disk;
pub mod liar;
pub mod local_proxy;
pub mod pgbouncer;
pub mod pki;
pub mod postgres;
pub mod process;
pub mod proxy;
pub mod rabbit;
pub mod rogue;
pub mod scenario;
pub mod system;
pub mod thief;
pub mod users;
pub mod windows;

use std::time::{Duration, Instant};

/// A test waits for three times its limit before it fails. A limit is what an idle machine needs, and the
/// suite runs six tests at a time on two cores. What is missing stays missing.
const PATIENCE: u32 = 3;

/// Polls until `check` returns something, and fails after three times `within`.
pub async fn eventually<T>(
    what: &str,
    within: Duration,
    mut check: impl AsyncFnMut() -> Option<T>,
) -> T {
    let limit = within * PATIENCE;
    let started = Instant::now();
    loop {
        if let Some(found) = check().await {
            return found;
        }
        assert!(started.elapsed() < limit, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The files below a directory that contain these bytes. A file that ends meanwhile counts as without them.
pub fn files_with(directory: &std::path::Path, bytes: &[u8]) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files_with(&path, bytes));
        } else if let Ok(content) = std::fs::read(&path)
            && memchr::memmem::find(&content, bytes).is_some()
        {
            found.push(path);
        }
    }
    found
}

/// Seconds as a duration.
pub const fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// A short random word for names.
pub fn word() -> String {
    use rand::RngExt;
    let mut rng = rand::rng();
    (0..8)
        .map(|_| char::from(b'a' + rng.random_range(0..26)))
        .collect()
}

/// A script of `deploy/local`.
pub fn script(name: &str) -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../deploy/local")
        .join(name)
}

/// The directory of this run. All files of the run are below it, and are removed with it.
pub fn run_dir() -> std::path::PathBuf {
    // What tests write are mostly secrets, which the programs refuse where others can read them.
    static CLOSED: std::sync::Once = std::sync::Once::new();
    CLOSED.call_once(|| {
        rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    });
    std::env::var_os("MAYFLY_TEST_DIR")
        .expect("MAYFLY_TEST_DIR is not set: run the end-to-end tests with `make e2e`")
        .into()
}
