//! `make bench`: Mayfly's figures, beside those of pgbench, OpenBao and PgBouncer, measured alternately in one run.
//! Prints a table, and writes it with all samples and a plot into `target/bench`.
//!
//! Environment: `BENCH_ROW` (groups, separated by commas), `BENCH_FULL=1` (the large rows too), `BENCH_REPEATS`,
//! `BENCH_SECONDS` (of one sample), `BENCH_SCALE` (multiplies the numbers of accounts), `BENCH_OUT` (the directory),
//! `BENCH_FLAME` (a directory for stacks of Mayfly's programs in the group `issue`, for `make flame`),
//! `BENCH_OPENBAO` (the path of `bao`; or a sentence that says why it is absent, which the table repeats).

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    missing_docs,
    unreachable_pub,
    reason = "a benchmark prints, and panics where it fails"
)]

mod cpu;
mod delays;
mod flame;
mod load;
mod machine;
mod openbao;
mod pgbench;
mod plot;
mod relay;
mod report;
mod rows;
mod stand;

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use futures_util::FutureExt;
use mayfly_tests::postgres::Server;

use crate::machine::{Machine, printed};
use crate::openbao::OpenBao;
use crate::report::{Of, Report};

/// How much is measured.
pub struct Plan {
    pub rows: Vec<String>,
    pub full: bool,
    pub repeats: usize,
    pub seconds: f64,
    pub scale: f64,
}

impl Plan {
    fn from_environment() -> Self {
        let rows = std::env::var("BENCH_ROW").unwrap_or_default();
        Self {
            rows: rows
                .split(',')
                .filter(|row| !row.is_empty())
                .map(str::to_owned)
                .collect(),
            full: std::env::var("BENCH_FULL").is_ok_and(|value| !value.is_empty()),
            repeats: variable("BENCH_REPEATS", 3),
            seconds: variable("BENCH_SECONDS", 3.0),
            scale: variable("BENCH_SCALE", 1.0),
        }
    }

    /// A number of accounts, at least 16.
    pub fn number(&self, of: usize) -> usize {
        ((of as f64 * self.scale) as usize).max(16)
    }

    /// Repeats of a row that takes a minute or more.
    pub fn slow_repeats(&self) -> usize {
        if self.full { self.repeats } else { 1 }
    }

    /// The time of one sample.
    pub fn time(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }

    fn wants(&self, group: &str) -> bool {
        self.rows.is_empty() || self.rows.iter().any(|row| row == group)
    }
}

/// A variable; the default if it is empty.
fn variable<T: FromStr>(name: &str, default: T) -> T {
    match std::env::var(name) {
        Ok(text) if !text.is_empty() => text
            .parse()
            .unwrap_or_else(|_| panic!("{name}: not a number")),
        _ => default,
    }
}

/// What all rows use.
pub struct Bench {
    pub plan: Plan,
    pub report: Report,
    openbao: Option<PathBuf>,
}

impl Bench {
    /// OpenBao on a server, if there is one.
    pub async fn openbao(&self, server: &Server) -> Option<OpenBao> {
        match &self.openbao {
            Some(program) => Some(OpenBao::start(program, server).await),
            None => None,
        }
    }
}

/// The systems that make accounts.
pub const ISSUERS: [Of; 3] = [Of::Mayfly, Of::Pgbench, Of::OpenBao];

/// The systems in the order of a repeat: each is the first, the second and the last equally often.
pub fn in_turn(repeat: usize, mut systems: [Of; 3]) -> [Of; 3] {
    let first = repeat % systems.len();
    systems.rotate_left(first);
    systems
}

#[tokio::main]
async fn main() {
    // `cargo test` builds and runs benchmarks too. They measure only with `--bench`.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let plan = Plan::from_environment();
    for row in &plan.rows {
        let known = rows::GROUPS.map(|group| format!("{}: {}", group.name, group.what));
        assert!(
            rows::GROUPS.iter().any(|group| group.name == row),
            "ROW={row}: one of\n{}",
            known.join("\n")
        );
    }
    let given = std::env::var("BENCH_OPENBAO").unwrap_or_default();
    let openbao = Some(PathBuf::from(&given)).filter(|program| program.is_file());
    let version = match &openbao {
        Some(program) => {
            let version = printed(program.to_str().unwrap(), &["version"]);
            version.split(" (").next().unwrap_or_default().to_owned()
        }
        None => format!("none ({given})"),
    };
    // Plain http does not use this provider, but every client needs one.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let report = Report::new(Machine::here(&plan, &version));
    let mut bench = Bench {
        plan,
        report,
        openbao,
    };
    let out = PathBuf::from(std::env::var("BENCH_OUT").unwrap_or("target/bench".to_owned()));
    for group in &rows::GROUPS {
        if !bench.plan.wants(group.name) {
            continue;
        }
        eprintln!("{}: {}", group.name, group.what);
        let run = AssertUnwindSafe(rows::run(group.name, &mut bench)).catch_unwind();
        if let Err(panic) = run.await {
            bench.report.failed(group.name, &reason(panic.as_ref()));
        }
        // The report is written after each group, so that results are kept if a later group is stopped.
        bench.report.write(&out).unwrap();
    }
    println!("{}", bench.report.table());
    if !bench.report.is_whole() {
        std::process::exit(1);
    }
}

fn reason(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("a panic")
        .to_owned()
}
