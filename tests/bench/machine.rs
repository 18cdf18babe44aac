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
    /// Of one minute, at the start. Above 0.5 somebody else uses the cores.
    load: String,
    fsync: String,
    profile: String,
    repeats: usize,
    seconds: f64,
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
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
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
            load: load.split(' ').next().unwrap_or_default().to_owned(),
            fsync: variable("MAYFLY_PG_FSYNC", "on"),
            profile: format!(
                "release, LTO {}, level {}",
                variable("CARGO_PROFILE_RELEASE_LTO", "thin"),
                variable("CARGO_PROFILE_RELEASE_OPT_LEVEL", "3")
            ),
            repeats: plan.repeats,
            seconds: plan.seconds,
            openbao: openbao.to_owned(),
        }
    }

    /// In one sentence.
    pub fn sentence(&self) -> String {
        format!(
            "Commit {}, {}: {} cores ({}), {} GB, load {} at the start; {}; fsync {}; {} repeats of {} s; OpenBao: {}.",
            self.commit,
            self.date,
            self.cores,
            self.processor,
            self.memory_gb,
            self.load,
            self.profile,
            self.fsync,
            self.repeats,
            self.seconds,
            self.openbao
        )
    }

    /// For `bench.json`.
    pub fn json(&self) -> Value {
        json!({
            "commit": self.commit, "date": self.date, "cores": self.cores, "processor": self.processor,
            "memoryGb": self.memory_gb, "load": self.load, "fsync": self.fsync, "profile": self.profile,
            "repeats": self.repeats, "seconds": self.seconds, "openbao": self.openbao,
        })
    }
}

/// What a program printed; empty if it failed.
pub fn printed(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.ok().filter(|output| output.status.success());
    output
        .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        .unwrap_or_default()
}
