//! What the figures were measured on and with.

use std::process::Command;

use serde_json::{Value, json};

use crate::Plan;

/// The machine, the commit and the settings of a run.
pub struct Machine {
    commit: String,
    date: String,
    cores: usize,
    processor: String,
    memory_gb: u64,
    /// Load of all cores, in per cent, in the 3 s before the first row: of other programs and of idle servers.
    busy: f64,
    fsync: String,
    profile: String,
    repeats: usize,
    seconds: f64,
    scale: f64,
    openbao: String,
}

impl Machine {
    /// This machine, with what OpenBao says of its version or why it is missing.
    pub fn here(plan: &Plan, openbao: &str) -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name"));
        let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let kib = memory
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:"));
        let kib: u64 = kib
            .and_then(|text| text.trim().split(' ').next()?.parse().ok())
            .unwrap_or(0);
        let changed = printed("git", &["status", "--porcelain", "--untracked-files=no"]);
        let variable =
            |name: &str, default: &str| std::env::var(name).unwrap_or_else(|_| default.to_owned());
        Self {
            commit: printed("git", &["rev-parse", "--short=12", "HEAD"])
                + if changed.is_empty() {
                    ""
                } else {
                    " with changes"
                },
            date: jiff::Timestamp::now().strftime("%Y-%m-%d").to_string(),
            cores: std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
            processor: model
                .map(|text| text.trim_start_matches([' ', '\t', ':']).to_owned())
                .unwrap_or_default(),
            memory_gb: kib * 1024 / 1_000_000_000,
            busy: busy_percent(),
            fsync: variable("MAYFLY_PG_FSYNC", "on"),
            profile: format!(
                "release, LTO {}, level {}",
                variable("CARGO_PROFILE_RELEASE_LTO", "thin"),
                variable("CARGO_PROFILE_RELEASE_OPT_LEVEL", "3")
            ),
            repeats: plan.repeats,
            seconds: plan.seconds,
            scale: plan.scale,
            openbao: openbao.to_owned(),
        }
    }

    /// The machine in a sentence or two.
    pub fn sentence(&self) -> String {
        let small = match self.scale {
            1.0 => String::new(),
            scale => format!(", numbers of accounts × {scale}"),
        };
        let busy = match self.is_busy() {
            true => " The machine did other work: do not use these figures.",
            false => "",
        };
        format!(
            "Commit {}, {}: {} cores ({}), {} GB, {:.0} % busy before; {}; fsync {}; {} samples of {} s{small}; OpenBao: {}.{busy}",
            self.commit,
            self.date,
            self.cores,
            self.processor,
            self.memory_gb,
            self.busy,
            self.profile,
            self.fsync,
            self.repeats,
            self.seconds,
            self.openbao
        )
    }

    fn is_busy(&self) -> bool {
        const BUSY_PERCENT: f64 = 10.0;
        self.busy > BUSY_PERCENT
    }

    /// The machine for `bench.json`.
    pub fn json(&self) -> Value {
        json!({
            "commit": self.commit, "date": self.date, "cores": self.cores, "processor": self.processor,
            "memoryGb": self.memory_gb, "busyPercent": self.busy, "fsync": self.fsync, "profile": self.profile,
            "repeats": self.repeats, "seconds": self.seconds, "scale": self.scale, "openbao": self.openbao,
        })
    }
}

/// The part of the time in which the cores are not idle, over 3 s.
fn busy_percent() -> f64 {
    let before = cpu_ticks();
    std::thread::sleep(std::time::Duration::from_secs(3));
    let (idle, all) = cpu_ticks();
    let all = (all - before.1).max(1.0);
    100.0 * (1.0 - (idle - before.0) / all)
}

/// Idle and all ticks of all cores since the start (proc(5), /proc/stat).
fn cpu_ticks() -> (f64, f64) {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = text.lines().next().unwrap_or_default();
    let ticks = line.split_whitespace().skip(1);
    let ticks: Vec<f64> = ticks.filter_map(|tick| tick.parse().ok()).collect();
    // idle and iowait
    (
        ticks.iter().skip(3).take(2).sum(),
        ticks.iter().take(8).sum(),
    )
}

/// What a program printed; empty if it failed.
pub fn printed(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.ok().filter(|output| output.status.success());
    output
        .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        .unwrap_or_default()
}
