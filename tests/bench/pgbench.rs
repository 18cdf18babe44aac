//! pgbench, to compare with: the statement that makes an account, and nothing else. No program that makes accounts
//! one by one can be faster on this server.

use std::process::Command;
use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine};
use mayfly_tests::postgres::Server;
use mayfly_tests::process::run_command;
use mayfly_tests::{run_dir, word};

use crate::load::Load;

/// What pgbench runs at a server.
pub struct Pgbench {
    server: Server,
    /// What the names of its accounts begin with.
    pub prefix: String,
}

impl Pgbench {
    /// Makes the role that its accounts are members of.
    pub async fn prepare(server: &Server) -> Self {
        let prefix = format!("bench{}", word());
        let root = server.superuser("postgres").await;
        let grant = format!("CREATE ROLE grant_{prefix} NOLOGIN");
        root.batch_execute(&grant).await.unwrap();
        Self {
            server: server.clone(),
            prefix,
        }
    }

    /// Creates accounts with a verifier of this number of SCRAM rounds, for about this time. The server spends these
    /// rounds on each `CREATE ROLE`, because it refuses the verifier of an empty password.
    ///
    /// # Panics
    /// If its clients cannot connect within a minute.
    pub fn run(&self, clients: usize, rounds: u32, time: Duration) -> Load {
        // The time in which pgbench's clients connect counts for pgbench: 64 logins on a busy machine take seconds.
        (1..=4)
            .find_map(|try_| self.try_run(clients, rounds, time * try_ * try_))
            .expect("no client of pgbench connects in time")
    }

    /// `None`: no client has connected in this time.
    fn try_run(&self, clients: usize, rounds: u32, time: Duration) -> Option<Load> {
        let directory = run_dir().join(format!("pgbench-{}", word()));
        std::fs::create_dir_all(&directory).unwrap();
        let key = BASE64_STANDARD.encode([7; 32]);
        let salt = BASE64_STANDARD.encode([7; 16]);
        let script = format!(
            "\\set n random(1, 1000000000000000)\n\
             CREATE ROLE {0}:n LOGIN PASSWORD 'SCRAM-SHA-256${rounds}:{salt}${key}:{key}' VALID UNTIL '2099-01-01' IN ROLE grant_{0};\n",
            self.prefix
        );
        let (file, times) = (directory.join("create.sql"), directory.join("times"));
        std::fs::write(&file, script).unwrap();
        let password = std::fs::read_to_string(self.server.directory().join("superuser-password"));
        let seconds = (time.as_secs_f64() + 1.0).ceil();
        let options = format!(
            "-n -l -j 1 -h 127.0.0.1 -U postgres -p {} -c {clients} -T {seconds}",
            self.server.port()
        );
        let mut command = Command::new(self.server.program("pgbench"));
        command
            .args(options.split(' '))
            .arg(format!("--log-prefix={}", times.display()))
            .arg("-f")
            .args([file.as_os_str(), "postgres".as_ref()])
            .env("PGPASSWORD", password.unwrap().trim());
        let printed = run_command(&mut command);
        let tps = printed
            .lines()
            .find_map(|line| line.strip_prefix("tps = "))?;
        let tps: f64 = tps.split(' ').next()?.parse().unwrap();
        let mut load = Load::default();
        for entry in std::fs::read_dir(&directory).unwrap().flatten() {
            if entry.file_name().to_string_lossy().starts_with("times") {
                let text = std::fs::read_to_string(entry.path()).unwrap();
                load.latencies.extend(text.lines().map(taken));
            }
        }
        load.latencies.sort();
        // pgbench's own figure leaves out the time in which it connects.
        load.elapsed = Duration::from_secs_f64(load.latencies.len() as f64 / tps);
        Some(load)
    }
}

/// The time of a transaction: the third column of pgbench's log, in microseconds.
fn taken(line: &str) -> Duration {
    Duration::from_micros(line.split(' ').nth(2).unwrap().parse().unwrap())
}
