//! Stacks of Mayfly's processes while a row is measured, by `perf record`, for `make flame`.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use crate::cpu::Watched;

/// The directory for the stacks. Without this variable nothing is recorded.
const DIRECTORY: &str = "BENCH_FLAME";
/// Samples a second of each core. Each has 32 KiB of the stack, from which the callers are found afterwards: the
/// programs have no frame pointers.
const FREQUENCY: &str = "499";
const STACKS: &str = "dwarf,32768";
/// The programs of which a graph is made.
const NAMES: [&str; 2] = ["dispatcher", "engines"];

/// `perf record` of some processes. It ends when this is dropped.
pub struct Recording(Vec<Child>);

impl Recording {
    /// Begins, if [`DIRECTORY`] is set: a file `NAME.perf` for each of [`NAMES`].
    pub fn begin(watched: &[Watched]) -> Self {
        let Some(directory) = std::env::var_os(DIRECTORY).map(PathBuf::from) else {
            return Self(Vec::new());
        };
        let named = watched.iter().filter(|one| NAMES.contains(&one.name));
        let record = named.map(|one| {
            let pids: Vec<String> = one.pids.iter().map(i32::to_string).collect();
            Command::new("perf")
                .args(["record", "-q", "-F", FREQUENCY, "--call-graph", STACKS])
                .args(["-p", &pids.join(",")])
                .arg("-o")
                .arg(directory.join(format!("{}.perf", one.name)))
                .stdin(Stdio::null())
                .spawn()
                .expect("perf cannot be run")
        });
        Self(record.collect())
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let pid = rustix::process::Pid::from_child(child);
            // `perf` writes its file on this signal.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
            let _ = child.wait();
        }
    }
}
