//! Processes of the system under test: started from the build directory, logged to files, killed
//! with their test.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::process::{Pid, Signal};

/// Ends its child when the test's process is gone for any reason.
const GUARD: &str =
    r#""$@" </dev/null >&2 & echo $!; cat >/dev/null; kill -9 $! 2>/dev/null; wait 2>/dev/null"#;

/// A running program.
pub struct Process {
    pid: Pid,
    guard: Child,
}

/// One of Mayfly's binaries, from the directory this test was built into.
pub fn binary(name: &str) -> PathBuf {
    let mut directory = std::env::current_exe().unwrap();
    directory.pop();
    if directory.ends_with("deps") {
        directory.pop();
    }
    let path = directory.join(name);
    assert!(
        path.exists(),
        "{} is not built: run `make e2e`",
        path.display()
    );
    path
}

/// A program of Prometheus' package, installed by `install.sh --for-tests`.
pub fn prometheus(name: &str) -> PathBuf {
    let cache = std::env::var_os("MAYFLY_CACHE").unwrap_or("/var/cache/mayfly".into());
    PathBuf::from(cache).join("prometheus").join(name)
}

impl Process {
    /// Starts `command`; its output goes to `log`.
    pub fn start(command: &Command, log: &Path) -> Self {
        let file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(log)
            .unwrap();
        let mut guard = Command::new("bash");
        guard
            .arg("-c")
            .arg(GUARD)
            .arg("guard")
            .arg(command.get_program())
            .args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => guard.env(name, value),
                None => guard.env_remove(name),
            };
        }
        let mut guard = guard
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(file)
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(guard.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let pid = Pid::from_raw(line.trim().parse().unwrap()).unwrap();
        Self { pid, guard }
    }

    /// Sends a signal. A process that is gone gets none. After SIGSTOP this waits until all threads stand still,
    /// which may take some time.
    pub fn signal(&self, signal: Signal) {
        let sent = rustix::process::kill_process(self.pid, signal);
        if sent.is_ok() && signal == Signal::STOP {
            let started = std::time::Instant::now();
            while self.is_alive() && !self.stands_still() {
                assert!(started.elapsed().as_secs() < 10, "it does not stop");
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
    }

    fn stands_still(&self) -> bool {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.id()));
        threads.into_iter().flatten().flatten().all(|thread| {
            let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            let state = stat.rsplit(')').next().unwrap_or_default();
            state.trim_start().starts_with(['T', 'X', 'Z'])
        })
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(self) {
        drop(self);
    }

    /// SIGTERM, and waits for the end.
    pub fn stop(self) {
        self.signal(Signal::TERM);
        let started = std::time::Instant::now();
        while self.is_alive() && started.elapsed().as_secs() < 40 {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        assert!(!self.is_alive(), "a process does not end after SIGTERM");
    }

    /// Id of the process.
    pub fn id(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Whether it runs.
    pub fn is_alive(&self) -> bool {
        self.state().is_some_and(|state| state != 'Z')
    }

    /// Whether SIGSTOP has stopped it.
    pub fn is_stopped(&self) -> bool {
        self.state() == Some('T')
    }

    /// The kernel's letter for its state; `None` when it is gone.
    fn state(&self) -> Option<char> {
        let stat = format!("/proc/{}/stat", self.pid.as_raw_nonzero());
        let stat = std::fs::read_to_string(stat).ok()?;
        stat.rsplit(')').next()?.trim_start().chars().next()
    }

    /// Resident memory, in MiB.
    pub fn resident_mib(&self) -> f64 {
        self.status_mib("VmRSS:")
    }

    /// Of this what it has made itself, without its text: a debug build's is many times a release's.
    pub fn allocated_mib(&self) -> f64 {
        self.status_mib("RssAnon:")
    }

    fn status_mib(&self, name: &str) -> f64 {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.pid.as_raw_nonzero())).unwrap();
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace()
            .nth(1)
            .unwrap()
            .parse::<f64>()
            .unwrap()
            / 1024.0
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
        drop(self.guard.stdin.take());
        let _ = self.guard.wait();
    }
}

/// Runs a script of the repository and returns what it printed.
pub fn run(program: &Path, arguments: &[&str]) -> String {
    run_command(Command::new(program).args(arguments))
}

/// The same, with more than arguments.
pub fn run_command(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let mut text = String::new();
    output.stdout.as_slice().read_to_string(&mut text).unwrap();
    text.trim().to_owned()
}

/// A port without a listener, which no other test of this run gets. It is below the ports that the kernel uses for
/// connections, and below those that the scripts choose.
pub fn free_port() -> u16 {
    const FIRST: u32 = 10_000;
    const PORTS: u32 = 10_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // Another run at the same time begins elsewhere.
    let begin = std::process::id().wrapping_mul(997);
    loop {
        let n = begin.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % PORTS;
        let port = u16::try_from(FIRST + n).unwrap();
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}
