//! The metrics that Prometheus knows of every process, under their usual names
//! (<https://prometheus.io/docs/instrumenting/writing_clientlibs/#process-metrics>), in its text format.
//!
//! Of `/proc` only this process's own files are read, since a service manager may hide the rest:
//! `/proc/stat`, where others find the moment of the boot, is absent under systemd's
//! `ProcSubset=pid`. A number that cannot be read is left out: 0 would be a wrong answer.

use std::fmt::{Display, Write};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::param::{clock_ticks_per_second, page_size};
use rustix::process::{Resource, getrlimit};
use rustix::time::{ClockId, Timespec, clock_gettime};

/// All metrics of this module, in the text format.
#[must_use]
pub fn text() -> String {
    let mut text = String::new();
    let mut add = |name: &str, kind: &str, help: &str, value: Option<&dyn Display>| {
        if let Some(value) = value {
            // Writing to a text does not fail.
            let _ = write!(
                text,
                "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n"
            );
        }
    };
    let stat = Stat::read();
    let cpu = seconds(clock_gettime(ClockId::ProcessCPUTime));
    add(
        "process_cpu_seconds_total",
        "counter",
        "CPU time in user and system mode, in seconds.",
        Some(&cpu),
    );
    let files = open_files();
    add(
        "process_open_fds",
        "gauge",
        "Open file descriptors.",
        files.as_ref().map(|n| n as &dyn Display),
    );
    let most = getrlimit(Resource::Nofile)
        .current
        .map_or_else(|| "+Inf".to_owned(), |most| most.to_string());
    add(
        "process_max_fds",
        "gauge",
        "Maximum number of open file descriptors.",
        Some(&most),
    );
    if let Some(stat) = &stat {
        let resident = stat.resident_pages.saturating_mul(page_size() as u64);
        add(
            "process_virtual_memory_bytes",
            "gauge",
            "Virtual memory, in bytes.",
            Some(&stat.virtual_bytes),
        );
        add(
            "process_resident_memory_bytes",
            "gauge",
            "Resident memory, in bytes.",
            Some(&resident),
        );
        add(
            "process_threads",
            "gauge",
            "Number of threads.",
            Some(&stat.threads),
        );
        let started = started(stat);
        add(
            "process_start_time_seconds",
            "gauge",
            "Start time of the process, in seconds since 1970-01-01 UTC.",
            started.as_ref().map(|at| at as &dyn Display),
        );
    }
    text
}

fn seconds(time: Timespec) -> f64 {
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Number of open descriptors, without the descriptor that counts them.
fn open_files() -> Option<usize> {
    let all = std::fs::read_dir("/proc/self/fd").ok()?.count();
    all.checked_sub(1)
}

/// When the process started, in seconds since 1970. It is computed once, so a clock that is set later does not move
/// it.
fn started(stat: &Stat) -> Option<f64> {
    static STARTED: OnceLock<Option<f64>> = OnceLock::new();
    *STARTED.get_or_init(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
        let up = seconds(clock_gettime(ClockId::Boottime));
        let begun = stat.start_ticks as f64 / clock_ticks_per_second() as f64;
        let age = Duration::try_from_secs_f64(up - begun).ok()?;
        Some(now.checked_sub(age)?.as_secs_f64())
    })
}

/// Fields of `/proc/self/stat` (proc_pid_stat(5)).
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    threads: u64,
    /// Clock ticks from the boot to the start of the process.
    start_ticks: u64,
    virtual_bytes: u64,
    resident_pages: u64,
}

impl Stat {
    fn read() -> Option<Self> {
        Self::parse(&std::fs::read_to_string("/proc/self/stat").ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        // The second field is the program's name in brackets, with anything in it; the third follows.
        let (_, rest) = text.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse().ok();
        Some(Self {
            threads: field(20)?,
            start_ticks: field(22)?,
            virtual_bytes: field(23)?,
            resident_pages: field(24)?,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn value(name: &str) -> f64 {
        let text = text();
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("{name} in\n{text}"))
            .trim()
            .parse()
            .unwrap()
    }

    #[test]
    fn a_name_with_brackets_and_spaces_moves_no_field() {
        let text = "7 (a) b (c) S 1 2 3 0 -1 4 5 6 7 8 9 10 11 12 20 0 33 0 4400 5500 66 77";
        let stat = Stat {
            threads: 33,
            start_ticks: 4400,
            virtual_bytes: 5500,
            resident_pages: 66,
        };
        assert_eq!(Stat::parse(text), Some(stat));
        assert_eq!(Stat::parse("7 (a) S 1"), None);
    }

    #[test]
    fn the_numbers_are_of_this_process() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let started = value("process_start_time_seconds ");
        assert!(started <= now.as_secs_f64() && started > now.as_secs_f64() - 86_400.0);
        let memory = value("process_resident_memory_bytes ");
        assert!(memory > 1e6 && memory < value("process_virtual_memory_bytes "));
        let before = value("process_open_fds ");
        let files: Vec<_> = (0..20)
            .map(|_| std::fs::File::open("/dev/null").unwrap())
            .collect();
        assert!(value("process_open_fds ") >= before + 10.0, "{before}");
        drop(files);
        assert!(value("process_max_fds ") > before);
        let used = value("process_cpu_seconds_total ");
        let mut n = 0_u64;
        while value("process_cpu_seconds_total ") < used + 0.01 {
            n = std::hint::black_box(n + 1);
        }
        assert!(value("process_threads ") >= 1.0);
    }
}
