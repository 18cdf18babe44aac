//! Programs that know nothing of Mayfly run over many leases and over faults behind `mayfly proxy`: pools of
//! node-postgres and of SQLAlchemy, and pgbench. No transaction fails, and no session outlives its lease.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mayfly_tests::local_proxy::LocalProxy;
use mayfly_tests::postgres::{Server, Site};
use mayfly_tests::process::{Process, run};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::{System, prefix};
use mayfly_tests::{eventually, run_dir, seconds, word};
use serde_json::json;
use tokio_postgres::Client;

/// Number of accounts of each proxy with the short life: one in 8 s. The next account has 3 s on a busy machine.
const ACCOUNTS: usize = 11;
const SHORT: u64 = 12;
/// The life of accounts during which dispatcher and broker are unreachable.
const LONG: u64 = 60;
const AWAY: Duration = seconds(20);
/// A session that the proxy ends may take this time on a busy machine. The engine would end it later.
const OVERDUE: Duration = seconds(3);

/// A program with a connection pool, until a line is sent to it.
struct Pool {
    name: &'static str,
    child: Child,
}

impl Pool {
    fn start(name: &'static str, command: &mut Command) -> Self {
        let child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self { name, child }
    }

    /// Fails if the program has had an error so far.
    fn check(&mut self) {
        if self.child.try_wait().unwrap().is_some() {
            let mut said = String::new();
            let mut stderr = self.child.stderr.take().unwrap();
            std::io::Read::read_to_string(&mut stderr, &mut said).unwrap();
            panic!("{} has ended: {said}", self.name);
        }
    }

    /// Ends it, and gives the numbers of its transactions and of its accounts.
    fn end(mut self) -> (usize, usize) {
        self.child.stdin.take().unwrap().write_all(b"\n").unwrap();
        let output = self.child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{}: {said} {errors}", self.name);
        let (done, accounts) = said.trim().split_once(' ').unwrap();
        (done.parse().unwrap(), accounts.parse().unwrap())
    }
}

/// pgbench, which runs up to its first error.
struct Pgbench {
    process: Process,
    log: PathBuf,
}

impl Pgbench {
    fn start(site: &Site, proxy: &LocalProxy, options: &str) -> Self {
        let script = run_dir().join(format!("pgbench-{}.sql", word()));
        std::fs::write(&script, "SELECT count(*) FROM things WHERE n > 0;\n").unwrap();
        let log = script.with_extension("log");
        let mut command = Command::new(site.server.program("pgbench"));
        command
            .args([
                "-n", "-M", "prepared", "-c", "2", "-T", "3600", "-P", "1", "-f",
            ])
            .arg(script)
            .args(options.split(' '))
            .args(["-h", "127.0.0.1", "-U", "app", "-p"])
            .args([&proxy.port.to_string(), &site.name])
            .env("PGSSLMODE", "prefer")
            .env_remove("PGPASSWORD");
        Self {
            process: Process::start(&command, &log),
            log,
        }
    }

    /// Fails if the program has had an error so far.
    fn check(&self) {
        let said = std::fs::read_to_string(&self.log).unwrap();
        let is_well =
            self.process.is_alive() && !said.contains("error") && !said.contains("aborted");
        assert!(is_well, "pgbench: {said}");
    }

    /// The seconds in which it had transactions.
    fn seconds(&self) -> usize {
        let said = std::fs::read_to_string(&self.log).unwrap();
        let progress = said.lines().filter(|line| line.starts_with("progress: "));
        progress.filter(|line| !line.contains(" 0.0 tps")).count()
    }
}

/// All programs that run, and the observations.
struct Seen {
    root: Client,
    site: Site,
    accounts: BTreeSet<String>,
    overdue: BTreeMap<i32, Instant>,
    pools: Vec<Pool>,
    pgbench: [Pgbench; 2],
}

impl Seen {
    /// Looks at the server and at the programs.
    async fn look(&mut self) {
        let prefix = prefix(&self.site);
        let roles = self
            .root
            .query(
                "SELECT rolname::text FROM pg_roles WHERE starts_with(rolname, $1)",
                &[&prefix],
            )
            .await
            .unwrap();
        self.accounts
            .extend(roles.iter().map(|row| row.get::<_, String>(0)));
        // The lateness is by the server's clock. The role of a session may be gone.
        let overdue = "SELECT a.pid FROM pg_stat_activity a LEFT JOIN pg_roles r ON r.oid = a.usesysid \
             WHERE a.datname = $1 AND a.backend_type = 'client backend' \
               AND (r.oid IS NULL OR r.rolvaliduntil < clock_timestamp())";
        let rows = self.root.query(overdue, &[&self.site.name]).await.unwrap();
        let now = Instant::now();
        let pids: Vec<i32> = rows.iter().map(|row| row.get(0)).collect();
        self.overdue = pids
            .iter()
            .map(|pid| (*pid, *self.overdue.get(pid).unwrap_or(&now)))
            .collect();
        for (pid, since) in &self.overdue {
            assert!(
                since.elapsed() < OVERDUE,
                "session {pid} outlives its lease"
            );
        }
        for pool in &mut self.pools {
            pool.check();
        }
        self.pgbench.iter().for_each(Pgbench::check);
    }

    /// Looks until there were this number of accounts.
    async fn accounts(&mut self, number: usize) {
        eventually("accounts follow each other", seconds(60), async || {
            self.look().await;
            (self.accounts.len() >= number).then_some(())
        })
        .await;
    }
}

/// The life of accounts from now on.
async fn set_life(system: &System, path: &str, ttl: u64) {
    let change = json!({"attributes": {"ttl": ttl, "maxTtl": ttl}});
    let (status, body) = system.api.put(&format!("/v1/secrets/{path}"), change).await;
    assert_eq!(status, 200, "{body}");
}

/// SQLAlchemy tests a connection before use, and node-postgres does not: its connections are held.
fn pools(site: &Site, proxy: &LocalProxy, holding: &LocalProxy) -> Vec<Pool> {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let drivers = PathBuf::from(run(&tests.join("documents/drivers.sh"), &[]));
    let [port, held] = [proxy, holding].map(|it| it.port.to_string());
    let file = |name: &str| tests.join("applications").join(name);
    let mut node = Command::new("node");
    node.arg(file("pool.js"))
        .args([&held, &site.name])
        .env("NODE_PATH", drivers.join("node_modules"));
    let mut python = Command::new(drivers.join("venv/bin/python"));
    python
        .arg(file("pool.py"))
        .args([&port, &site.name])
        .env_remove("PGPASSWORD");
    vec![
        Pool::start("node-postgres", &mut node),
        Pool::start("SQLAlchemy", &mut python),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_live_over_many_leases_and_faults() {
    let broker = Rabbit::own();
    let handle = broker.handle();
    let (mut system, site, path, engine) = Scenario::on(Server::pg15())
        .broker(broker)
        .attributes(json!({"ttl": SHORT, "maxTtl": SHORT}))
        .start()
        .await;
    let admin = site.admin().await;
    let things = "CREATE TABLE things (n int); INSERT INTO things VALUES (1)";
    admin.batch_execute(things).await.unwrap();
    let other = system.engine(&engine.pool).await;
    let (proxy, holding) = tokio::join!(
        LocalProxy::start(&system, &path, &[]),
        LocalProxy::start(&system, &path, &["--hold"])
    );
    let mut seen = Seen {
        root: site.server.superuser("postgres").await,
        pools: pools(&site, &proxy, &holding),
        // The first pgbench makes a connection for each transaction, and the second cannot connect again.
        pgbench: [
            Pgbench::start(&site, &proxy, "-C"),
            Pgbench::start(&site, &holding, "-R 50"),
        ],
        site,
        accounts: BTreeSet::new(),
        overdue: BTreeMap::new(),
    };

    seen.accounts(ACCOUNTS / 2 * 2).await;
    drop(engine);
    seen.accounts(ACCOUNTS * 2).await;
    // Accounts with a longer life continue while the dispatcher and the broker are down.
    set_life(&system, &path, LONG).await;
    eventually("accounts have the long life", seconds(30), async || {
        seen.look().await;
        let life = "mayfly_proxy_lease_life_left_seconds";
        let is_long = proxy.metric(life).await > 40.0 && holding.metric(life).await > 40.0;
        is_long.then_some(())
    })
    .await;
    let away = Instant::now();
    system.kill_dispatcher();
    handle.kill(0);
    while away.elapsed() < AWAY {
        seen.look().await;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    tokio::task::spawn_blocking(move || handle.start(0))
        .await
        .unwrap();
    system.start_dispatcher().await;
    let before = seen.accounts.len();
    seen.accounts(before + 2).await;

    for pool in seen.pools.drain(..) {
        let name = pool.name;
        let (done, accounts) = pool.end();
        assert!(
            done > 100 && accounts >= ACCOUNTS,
            "{name}: {done} transactions, {accounts} accounts"
        );
    }
    for pgbench in &seen.pgbench {
        pgbench.check();
        assert!(pgbench.seconds() > 20, "{}", pgbench.seconds());
    }
    for one in [&proxy, &holding] {
        for metric in [
            "mayfly_proxy_cut_total",
            "mayfly_proxy_logins_refused_total",
        ] {
            assert_eq!(one.metric(metric).await, 0.0, "{metric}: {}", one.logged());
        }
        assert!(one.metric("mayfly_proxy_leases_total").await >= ACCOUNTS as f64);
    }
    assert!(proxy.metric("mayfly_proxy_moved_total").await > 0.0);
    assert_eq!(holding.metric("mayfly_proxy_moved_total").await, 0.0);
    assert!(holding.metric("mayfly_proxy_swapped_total").await >= (2 * ACCOUNTS) as f64);

    let site = seen.site.clone();
    drop(seen);
    proxy.process.stop();
    holding.process.stop();
    site.no_accounts(seconds(20)).await;
    drop(other);
}
