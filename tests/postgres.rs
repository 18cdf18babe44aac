//! PostgreSQL for tests: the shared servers of two versions, or a server of a test's own, with a database
//! and an admin for each test. Proof of an account is logging in with it.

mod credential;
mod site;
mod watch;

pub use credential::Credential;
pub use site::{Admin, Site};
pub use watch::{Look, Watch};

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::process::{Pid, Signal};
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use crate::process::{run, run_command};
use crate::{eventually, run_dir, script, seconds, word};

thread_local! {
    /// Connections that a test keeps for [`Server::look`], by port. Each test has threads of its own.
    static KEPT: RefCell<BTreeMap<u16, Arc<Client>>> = const { RefCell::new(BTreeMap::new()) };
}

/// A server.
#[derive(Clone)]
pub struct Server(Arc<Inner>);

struct Inner {
    directory: PathBuf,
    own: bool,
}

impl Server {
    /// The shared server of Debian's version.
    pub fn pg15() -> Self {
        Self::at("MAYFLY_TEST_PG15")
    }

    /// The shared server of version 18.
    pub fn pg18() -> Self {
        Self::at("MAYFLY_TEST_PG18")
    }

    fn at(variable: &str) -> Self {
        let directory =
            std::env::var_os(variable).expect("run the end-to-end tests with `make e2e`");
        Self(Arc::new(Inner {
            directory: directory.into(),
            own: false,
        }))
    }

    /// A server of its own, with these lines in its configuration.
    pub fn own(options: &str) -> Self {
        Self::started(&[], ("MAYFLY_PG_OPTIONS", options))
    }

    /// A server of its own of a version: 14, 16, 17 or 18.
    pub fn of_version(version: &str) -> Self {
        Self::started(&[version], ("MAYFLY_PG_FSYNC", "off"))
    }

    /// A server of its own of Debian's version or another, with these lines in its configuration.
    pub fn own_of(version: Option<&str>, options: &str) -> Self {
        Self::started(version.as_slice(), ("MAYFLY_PG_OPTIONS", options))
    }

    /// A server of its own whose clock is ahead or behind: `+300s`.
    pub fn with_clock(clock: &str) -> Self {
        Self::started(&[], ("MAYFLY_PG_CLOCK", clock))
    }

    fn started(arguments: &[&str], variable: (&str, &str)) -> Self {
        let directory = run_dir().join(format!("pg-{}", word()));
        let started = std::process::Command::new(script("postgres.sh"))
            .args(["start", directory.to_str().unwrap()])
            .args(arguments)
            .env(variable.0, variable.1)
            .status()
            .unwrap();
        assert!(started.success());
        Self(Arc::new(Inner {
            directory,
            own: true,
        }))
    }

    /// A streaming standby of this server, which accepts connections that read.
    pub fn standby(&self) -> Self {
        let directory = run_dir().join(format!("pg-{}", word()));
        run(
            &script("postgres.sh"),
            &[
                "standby",
                directory.to_str().unwrap(),
                self.0.directory.to_str().unwrap(),
            ],
        );
        Self(Arc::new(Inner {
            directory,
            own: true,
        }))
    }

    /// Puts all roles and databases of this server into another server of the same version or a newer version, whose
    /// programs dump them (PostgreSQL documentation, "Upgrading Data via pg_dumpall").
    pub fn restore_into(&self, other: &Self) {
        let password = |server: &Self| {
            let text = std::fs::read_to_string(server.0.directory.join("superuser-password"));
            text.unwrap().trim().to_owned()
        };
        let at = |program: &str, server: &Self| {
            let mut command = std::process::Command::new(other.program(program));
            command
                .args(["-h", "127.0.0.1", "-U", "postgres", "-p"])
                .arg(server.port().to_string())
                .env("PGPASSWORD", password(server));
            command
        };
        let made = run_command(&mut at("pg_dumpall", self));
        // The superuser exists already, and keeps its password.
        let made: Vec<&str> = made
            .lines()
            .filter(|line| !line.contains("ROLE postgres"))
            .collect();
        let dump = run_dir().join(format!("dump-{}", word()));
        std::fs::write(&dump, made.join("\n")).unwrap();
        run_command(
            at("psql", other)
                .args(["-q", "-d", "postgres", "-v", "ON_ERROR_STOP=1", "-f"])
                .arg(&dump),
        );
    }

    /// Makes this server one of a newer version by pg_upgrade, at the same port.
    pub fn upgrade(&self, version: &str) {
        assert!(self.0.own, "a shared server is not for upgrading");
        let directory = self.0.directory.to_str().unwrap();
        run(&script("postgres.sh"), &["upgrade", directory, version]);
    }

    /// Makes a standby the primary.
    pub async fn promote(&self) {
        let client = self.superuser("postgres").await;
        assert_eq!(scalar(&client, "SELECT pg_promote()").await, "t");
    }

    /// Sends the postmaster SIGSTOP or SIGCONT. While it is stopped the kernel accepts connections, and
    /// nobody answers them.
    pub fn hang(&self, hangs: bool) {
        assert!(self.0.own, "a shared server is not for stopping");
        let signal = if hangs { Signal::STOP } else { Signal::CONT };
        rustix::process::kill_process(self.postmaster(), signal).unwrap();
    }

    /// Sends the postmaster and all its children a signal, such as STOP or CONT.
    pub fn signal_all(&self, signal: Signal) {
        assert!(self.0.own, "a shared server is not for stopping");
        let postmaster = self.postmaster();
        let parent = postmaster.as_raw_nonzero().to_string();
        // The postmaster gets the signal first, so that it starts no more children.
        let _ = rustix::process::kill_process(postmaster, signal);
        let children = std::process::Command::new("pgrep")
            .args(["--parent", &parent])
            .output()
            .unwrap();
        for child in String::from_utf8(children.stdout).unwrap().lines() {
            let pid = Pid::from_raw(child.trim().parse().unwrap()).unwrap();
            // The child may have ended meanwhile.
            let _ = rustix::process::kill_process(pid, signal);
        }
    }

    fn postmaster(&self) -> Pid {
        let pid = std::fs::read_to_string(self.0.directory.join("data/postmaster.pid")).unwrap();
        Pid::from_raw(pid.lines().next().unwrap().trim().parse().unwrap()).unwrap()
    }

    /// A program that belongs to the server.
    pub fn program(&self, name: &str) -> PathBuf {
        let bin = std::fs::read_to_string(self.0.directory.join("bin")).unwrap();
        PathBuf::from(bin.trim()).join(name)
    }

    fn script(&self, verb: &str) {
        run(
            &script("postgres.sh"),
            &[verb, self.0.directory.to_str().unwrap()],
        );
    }

    /// Puts lines before all others of its `pg_hba.conf`, in place of those put there before, and
    /// waits until the server has read them.
    pub async fn put_hba(&self, lines: &str) {
        assert!(self.0.own, "a shared server keeps its rules");
        let file = self.0.directory.join("data/pg_hba.conf");
        let old = std::fs::read_to_string(&file).unwrap();
        let rest = old
            .split_once("# the test's\n")
            .map_or(old.as_str(), |(_, rest)| rest);
        std::fs::write(&file, format!("{lines}\n# the test's\n{rest}")).unwrap();
        let loaded = async || {
            // A new connection has the settings that the postmaster has read.
            let root = self.superuser("postgres").await;
            scalar(&root, "SELECT pg_conf_load_time()").await
        };
        let before = loaded().await;
        let root = self.superuser("postgres").await;
        root.batch_execute("SELECT pg_reload_conf()").await.unwrap();
        eventually("the lines are read", seconds(10), async || {
            (loaded().await != before).then_some(())
        })
        .await;
    }

    pub fn start(&self) {
        self.script("start");
    }

    pub fn kill(&self) {
        assert!(self.0.own, "a shared server is not for crashing");
        self.script("kill");
    }

    pub fn directory(&self) -> &std::path::Path {
        &self.0.directory
    }

    pub fn port(&self) -> u16 {
        std::fs::read_to_string(self.0.directory.join("port"))
            .unwrap()
            .trim()
            .parse()
            .unwrap()
    }

    /// A connection as the superuser.
    pub async fn superuser(&self, database: &str) -> Client {
        self.try_superuser(database).await.unwrap()
    }

    async fn try_superuser(&self, database: &str) -> Result<Client, tokio_postgres::Error> {
        let password =
            std::fs::read_to_string(self.0.directory.join("superuser-password")).unwrap();
        self.login("postgres", password.trim(), database).await
    }

    /// Rows of a query with one parameter, for a poll. Each test keeps one connection to a shared server for it: a
    /// login costs 7 ms of CPU, and polls look 20 times a second. Servers of a test's own may restart, or count
    /// their connections.
    async fn look(&self, query: &str, value: &str) -> Vec<tokio_postgres::Row> {
        let port = self.port();
        let kept = KEPT.with_borrow(|kept| kept.get(&port).cloned());
        let kept = kept.filter(|client| !client.is_closed());
        if let Some(client) = kept
            && let Ok(rows) = client.query(query, &[&value]).await
        {
            return rows;
        }
        let client = Arc::new(self.superuser("postgres").await);
        let rows = client.query(query, &[&value]).await.unwrap();
        if !self.0.own {
            KEPT.with_borrow_mut(|kept| kept.insert(port, client));
        }
        rows
    }

    /// Logs in.
    pub async fn login(
        &self,
        user: &str,
        password: &str,
        database: &str,
    ) -> Result<Client, tokio_postgres::Error> {
        login("127.0.0.1", self.port(), user, password, database).await
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.own {
            // A stopped server would not end.
            let pid = std::fs::read_to_string(self.directory.join("data/postmaster.pid"));
            let pid = pid
                .ok()
                .and_then(|text| Pid::from_raw(text.lines().next()?.trim().parse().ok()?));
            if let Some(pid) = pid.filter(|pid| is_ours(*pid, &self.directory)) {
                let _ = rustix::process::kill_process(pid, Signal::CONT);
            }
            run(
                &script("postgres.sh"),
                &["stop", self.directory.to_str().unwrap()],
            );
        }
    }
}

/// Whether a process was started for this directory: another process may have the id by now.
fn is_ours(pid: Pid, directory: &std::path::Path) -> bool {
    let line = std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
    String::from_utf8_lossy(&line).contains(directory.to_str().unwrap())
}

async fn login(
    host: &str,
    port: u16,
    user: &str,
    password: &str,
    database: &str,
) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::Config::new()
        .host(host)
        .port(port)
        .user(user)
        .password(password)
        .dbname(database)
        .connect_timeout(std::time::Duration::from_secs(5))
        .connect(NoTls)
        .await?;
    tokio::spawn(async move {
        let _ = connection.await;
    });
    Ok(client)
}

/// The only cell of the only row.
pub async fn scalar(client: &Client, query: &str) -> String {
    let messages = client
        .simple_query(query)
        .await
        .unwrap_or_else(|error| panic!("{query}: {error:?}"));
    messages
        .iter()
        .find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or("").to_owned()),
            _ => None,
        })
        .unwrap_or_default()
}

/// The SQLSTATE a statement fails with.
pub async fn sqlstate(client: &Client, statement: &str) -> String {
    match client.batch_execute(statement).await {
        Ok(()) => "00000".to_owned(),
        Err(error) => error
            .code()
            .map_or_else(|| error.to_string(), |code| code.code().to_owned()),
    }
}
