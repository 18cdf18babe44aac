//! `mayfly proxy` between pgbench and a server, beside pgbench at the server itself and PgBouncer in session mode.
//! Each of the three logs in to the server with TLS, or none does.

use std::process::Command;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use mayfly_tests::local_proxy::{LocalProxy, connect};
use mayfly_tests::pgbouncer::{Mode, PgBouncer};
use mayfly_tests::postgres::{Admin, Server, Site};
use mayfly_tests::process::{Process, run_command};
use mayfly_tests::{run_dir, word};
use serde_json::json;
use tokio_postgres::{Client, Config};

use crate::report::Of;
use crate::stand::Stand;
use crate::{Bench, in_turn};

const CLIENTS: usize = 16;
/// Connections whose memory is measured, besides the first.
const IDLE: usize = 1000;
/// Connections that are opened at a time.
const AT_ONCE: usize = 20;
const MORE: &str = "max_client_conn = 1200\ndefault_pool_size = 1100";

pub async fn run(bench: &mut Bench, group: &str) {
    let server = Server::own("max_connections = 3200\nshared_buffers = 256MB");
    let stand = Stand::start(1, &[]).await;
    let mut sites = Vec::new();
    for (what, sslmode) in [("without TLS", "disable"), ("with TLS", "require")] {
        let paths = Paths::open(&stand, &server, sslmode).await;
        for repeat in 0..bench.plan.repeats {
            paths.measure(bench, group, what, repeat);
        }
        if sslmode == "disable" {
            paths.idle(bench, group).await;
        }
        sites.push(paths.site);
    }
    let sites: Vec<&Site> = sites.iter().collect();
    stand.end(&sites).await;
}

/// The three paths to one database, with the same protection of the connection to the server.
struct Paths {
    site: Site,
    sslmode: &'static str,
    proxy: LocalProxy,
    bouncer: PgBouncer,
}

impl Paths {
    async fn open(stand: &Stand, server: &Server, sslmode: &'static str) -> Self {
        let site = server.site(Admin::Superuser).await;
        // Accounts may read the tables that exist when the accounts are made.
        pgbench(&site, server.port(), sslmode, &["-i", "-q", "-s", "5"]);
        let mut data = site.data();
        data["sslmode"] = json!(sslmode);
        let base = json!({"attributes": {"type": "postgresql"}, "data": data});
        let path = format!("/v1/secrets/db:{}:root", site.name);
        stand.system.api.create(&path, base).await;
        let attributes = json!({"connectionLimit": 1100});
        let path = stand.secret(&site, server.port(), attributes).await;
        let proxy = LocalProxy::start(&stand.system, &path, &["--max-connections", "1100"]).await;
        let more = format!("{MORE}\nserver_tls_sslmode = {sslmode}");
        let bouncer = PgBouncer::start(server, &[&site.name], Mode::Session, &more).await;
        Self {
            site,
            sslmode,
            proxy,
            bouncer,
        }
    }

    fn port(&self, of: Of) -> u16 {
        match of {
            Of::Mayfly => self.proxy.port,
            Of::PgBouncer => self.bouncer.port,
            Of::Pgbench | Of::OpenBao => self.site.server.port(),
        }
    }

    /// What pgbench prints.
    fn pgbench(&self, of: Of, options: &[&str]) -> String {
        let sslmode = match of {
            Of::Pgbench => self.sslmode,
            _ => "disable",
        };
        pgbench(&self.site, self.port(of), sslmode, options)
    }

    /// Round trips of one client, and transactions of many.
    fn measure(&self, bench: &mut Bench, group: &str, what: &str, repeat: usize) {
        let turn = in_turn(repeat, [Of::Pgbench, Of::Mayfly, Of::PgBouncer]);
        let time = bench.plan.time();
        let round_trips = turn.map(|of| (of, self.round_trip(of, time)));
        let direct = round_trips.iter().find(|(of, _)| *of == Of::Pgbench);
        let direct = direct.map_or(0.0, |(_, direct)| *direct);
        for (of, taken) in round_trips {
            let name = format!("round trip, 1 client, {what}, p50");
            bench.report.add(group, &name, "µs", of, taken);
            if of != Of::Pgbench {
                let name = format!("of this added, {what}");
                bench.report.add(group, &name, "µs", of, taken - direct);
            }
        }
        for of in turn {
            let rate = self.rate(of, time);
            let name = format!("pgbench -S, {CLIENTS} clients, {what}");
            bench.report.add(group, &name, "1/s", of, rate);
        }
    }

    /// The median of one client's round trips, in µs.
    fn round_trip(&self, of: Of, time: Duration) -> f64 {
        let directory = run_dir().join(format!("proxy-{}", word()));
        std::fs::create_dir_all(&directory).unwrap();
        let prefix = format!("--log-prefix={}", directory.join("times").display());
        let seconds = whole_seconds(time);
        self.pgbench(of, &["-n", "-S", "-c", "1", "-T", &seconds, "-l", &prefix]);
        let mut taken = Vec::new();
        for entry in std::fs::read_dir(&directory).unwrap().flatten() {
            let text = std::fs::read_to_string(entry.path()).unwrap();
            // The third column is the time of a transaction in µs.
            taken.extend(
                text.lines()
                    .map(|line| line.split(' ').nth(2).unwrap().parse::<u32>().unwrap()),
            );
        }
        taken.sort_unstable();
        f64::from(taken[taken.len() / 2])
    }

    /// Transactions per second of many clients.
    fn rate(&self, of: Of, time: Duration) -> f64 {
        let (clients, seconds) = (CLIENTS.to_string(), whole_seconds(time));
        let printed = self.pgbench(of, &["-n", "-S", "-c", &clients, "-T", &seconds]);
        let line = printed.lines().find_map(|it| it.strip_prefix("tps = "));
        line.unwrap().split(' ').next().unwrap().parse().unwrap()
    }

    /// Memory of idle connections, and what they cost others.
    async fn idle(&self, bench: &mut Bench, group: &str) {
        let config = self.proxy.config();
        let process = &self.proxy.process;
        self.idle_of(bench, group, Of::Mayfly, &config, process)
            .await;
        let mut config = Config::new();
        config
            .host("127.0.0.1")
            .port(self.bouncer.port)
            .user(&self.site.name)
            .password(&self.site.password)
            .dbname(&self.site.name);
        let process = &self.bouncer.process;
        self.idle_of(bench, group, Of::PgBouncer, &config, process)
            .await;
    }

    async fn idle_of(
        &self,
        bench: &mut Bench,
        group: &str,
        of: Of,
        config: &Config,
        process: &Process,
    ) {
        // The first clients cause the cost that all clients share.
        let mut clients = opened(config, AT_ONCE).await;
        let before = process.allocated_mib();
        let begun = Instant::now();
        while clients.len() < AT_ONCE + IDLE {
            clients.extend(opened(config, AT_ONCE).await);
        }
        let taken = begun.elapsed().as_secs_f64();
        let each = (process.allocated_mib() - before) * 1024.0 / IDLE as f64;
        let mut add = |name: String, unit, value| bench.report.add(group, &name, unit, of, value);
        add(format!("{IDLE} connections, time to open"), "s", taken);
        add(format!("{IDLE} connections, memory of each"), "KiB", each);
        let rate = self.rate(of, bench.plan.time());
        let name = format!("pgbench -S, {CLIENTS} clients, {IDLE} idle ones besides");
        bench.report.add(group, &name, "1/s", of, rate);
    }
}

/// Runs pgbench at a port, as the site's admin, and gives what it printed.
fn pgbench(site: &Site, port: u16, sslmode: &str, options: &[&str]) -> String {
    let mut command = Command::new(site.server.program("pgbench"));
    command
        .args(["-h", "127.0.0.1", "-U", &site.name, "-p"])
        .arg(port.to_string())
        .args(options)
        .arg(&site.name)
        .env("PGPASSWORD", &site.password)
        .env("PGSSLMODE", sslmode);
    run_command(&mut command)
}

fn whole_seconds(time: Duration) -> String {
    (time.as_secs_f64().ceil() as u64).max(1).to_string()
}

/// Connections that have sent a query. PgBouncer connects to the server with the first query.
async fn opened(config: &Config, number: usize) -> Vec<Client> {
    let some = join_all((0..number).map(|_| async {
        let client = connect(config).await.unwrap();
        client.batch_execute("SELECT 1").await.unwrap();
        client
    }));
    some.await
}
