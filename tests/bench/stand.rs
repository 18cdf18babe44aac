//! A dispatcher and engines for one group of rows, and what is counted at them.

use std::path::PathBuf;
use std::time::Duration;

use mayfly_tests::postgres::{Admin, Server, Site, scalar};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::system::{Engine, System, prefix};
use mayfly_tests::{eventually, run_dir, seconds};
use serde_json::{Value, json};
use tokio_postgres::Client;

use crate::Bench;
use crate::cpu::Watched;
use crate::load::{self, Load, Target, Until};
use crate::openbao::OpenBao;
use crate::relay::relay;

/// Callers that reads come from. One caller has at most 8 reads worked on at a time (`limits.reads_per_caller`).
const CALLERS: usize = 64;
/// Roles that one transaction drops. Each needs a lock of the server's shared table.
const DROPPED_AT_ONCE: usize = 500;
/// Settings as in use; the harness has more verbose ones.
pub const LOG: [(&str, &str); 2] = [
    ("MAYFLY__LOG__LEVEL", "info"),
    ("MAYFLY__LOG__FORMAT", "text"),
];

/// A system under load.
pub struct Stand {
    pub system: System,
    pub engines: Vec<Engine>,
    pub pool: String,
    headers: Vec<String>,
}

impl Stand {
    /// A dispatcher with more settings, a pool, and this number of engines.
    pub async fn start(engines: usize, environment: &[(&str, &str)]) -> Self {
        let system = System::start_with(Rabbit::shared(), &[&LOG, environment].concat()).await;
        let pool = system.pool().await;
        let mut headers = Vec::new();
        for _ in 0..CALLERS {
            let token = system
                .api
                .create("/v1/tokens", json!({"read": ["db:*"], "ttl": 86_400}))
                .await;
            headers.push(format!(
                "Authorization: Bearer {}",
                token["token"].as_str().unwrap()
            ));
        }
        let mut stand = Self {
            system,
            engines: Vec::new(),
            pool,
            headers,
        };
        stand.engines(engines).await;
        stand
    }

    /// Starts more engines, until there are this many.
    pub async fn engines(&mut self, number: usize) {
        while self.engines.len() < number {
            let engine = self.system.engine_with(&self.pool, &LOG);
            engine.ready().await;
            self.engines.push(engine);
        }
    }

    /// A dynamic secret of a site, whose server engines find at this port.
    pub async fn secret(&self, site: &Site, port: u16, attributes: Value) -> String {
        let base = format!("/v1/secrets/db:{}:root", site.name);
        let (status, _) = self.system.api.get(&format!("{base}::description")).await;
        if status == 404 {
            let mut data = site.data();
            data["port"] = json!(port);
            let body = json!({"attributes": {"type": "postgresql"}, "data": data});
            self.system.api.create(&base, body).await;
        }
        let mut all = json!({"ttl": 7200});
        for (key, value) in attributes.as_object().unwrap() {
            all[key] = value.clone();
        }
        self.system.secret(site, &self.pool, all).await
    }

    /// Reads of a path (which may have a query), by many callers.
    pub fn reads(&self, path: &str) -> Target {
        Target::get(
            port(&self.system),
            &format!("/v1/secrets/{path}"),
            &self.headers,
        )
    }

    /// A GET of a path by the root token.
    pub fn root(&self, path: &str) -> Target {
        let header = format!("Authorization: Bearer {}", self.system.api.token);
        Target::get(port(&self.system), path, &[header])
    }

    /// Issues this number of leases, as fast as it goes.
    pub async fn fill(&self, path: &str, number: usize) -> Load {
        load::run(&self.reads(path), 16, Until::Count(number)).await
    }

    /// Dispatcher, engines, RabbitMQ and a PostgreSQL server.
    pub fn watched(&self, server: &Server) -> Vec<Watched> {
        let one = |name, pid| Watched {
            name,
            pids: vec![pid],
            with_children: false,
        };
        let engines = self
            .engines
            .iter()
            .map(|engine| engine.process.id())
            .collect();
        let broker = std::fs::read_to_string(self.system.rabbit.directory().join("pid"));
        vec![
            one("dispatcher", self.system.dispatcher().id()),
            Watched {
                name: "engines",
                pids: engines,
                with_children: false,
            },
            one("RabbitMQ", broker.unwrap().trim().parse().unwrap()),
            postgres(server),
        ]
    }

    /// Ends all processes, and deletes what the sites' servers still have.
    pub async fn end(self, sites: &[&Site]) {
        drop(self.engines);
        drop(self.system);
        for site in sites {
            drop_roles(&site.server, &prefix(site)).await;
        }
    }
}

/// What makes accounts on PostgreSQL 15: Mayfly with two engines and a secret, and OpenBao where it can be had.
pub struct Issuers {
    pub server: Server,
    pub site: Site,
    pub stand: Stand,
    /// The secret of `site`.
    pub path: String,
    pub bao: Option<OpenBao>,
}

impl Issuers {
    /// Starts both. Mayfly's accounts have this number of SCRAM rounds.
    pub async fn start(bench: &Bench, rounds: u32) -> Self {
        let server = Server::pg15();
        let site = server.site(Admin::Superuser).await;
        let stand = Stand::start(2, &[]).await;
        let path = stand
            .secret(&site, server.port(), json!({"scramIterations": rounds}))
            .await;
        let bao = bench.openbao(&server).await;
        Self {
            server,
            site,
            stand,
            path,
            bao,
        }
    }

    /// Ends both, and deletes what they and the other sites still have.
    pub async fn end(self, others: &[&Site]) {
        let openbao = self.bao.as_ref().map(OpenBao::prefix);
        drop(self.bao);
        self.stand.end(&[&[&self.site], others].concat()).await;
        if let Some(prefix) = openbao {
            drop_roles(&self.server, &prefix).await;
        }
    }
}

/// An empty database for a store, on PostgreSQL 18.
pub struct StoreDatabase {
    name: String,
    pub url: String,
    url_file: PathBuf,
}

impl StoreDatabase {
    /// One that dispatchers reach with a round trip of this time.
    pub async fn new(round_trip: Duration) -> Self {
        let holder = Server::pg18();
        let mut url = holder.store().await;
        let name = url.rsplit('/').next().unwrap();
        let name = name.split('?').next().unwrap().to_owned();
        if !round_trip.is_zero() {
            let far = relay(holder.port(), round_trip);
            url = url.replace(&format!(":{}/", holder.port()), &format!(":{far}/"));
        }
        let url_file = run_dir().join(&name);
        std::fs::write(&url_file, &url).unwrap();
        Self {
            name,
            url,
            url_file,
        }
    }

    /// The setting of dispatchers that have their store there.
    pub fn setting(&self) -> (&'static str, &str) {
        ("MAYFLY__STORE__URL_FILE", self.url_file.to_str().unwrap())
    }

    /// Size of the store in bytes, with the indexes.
    pub async fn bytes(&self) -> u64 {
        let root = Server::pg18().superuser("postgres").await;
        let query = format!("SELECT pg_database_size('{}')", self.name);
        scalar(&root, &query).await.parse().unwrap()
    }
}

/// The port of a dispatcher's API.
pub fn port(system: &System) -> u16 {
    let port = system.api.address.rsplit(':').next().unwrap();
    port.parse().unwrap()
}

/// A PostgreSQL server with all its processes.
pub fn postgres(server: &Server) -> Watched {
    let file = std::fs::read_to_string(server.directory().join("data/postmaster.pid")).unwrap();
    let pid = file.lines().next().unwrap().trim().parse().unwrap();
    Watched {
        name: "PostgreSQL",
        pids: vec![pid],
        with_children: true,
    }
}

/// Roles whose name has this prefix.
pub async fn count(client: &Client, prefix: &str) -> usize {
    let query = "SELECT count(*) FROM pg_authid WHERE starts_with(rolname, $1)";
    let row = client.query_one(query, &[&prefix]).await.unwrap();
    usize::try_from(row.get::<_, i64>(0)).unwrap()
}

/// Waits until a server has no role with this prefix.
pub async fn all_gone(client: &Client, prefix: &str, within: Duration) {
    eventually(
        &format!("no role {prefix}… is left"),
        within,
        async || (count(client, prefix).await == 0).then_some(()),
    )
    .await;
}

/// Drops all roles with this prefix, so that the next rows find the server as it was.
pub async fn drop_roles(server: &Server, prefix: &str) {
    let root = server.superuser("postgres").await;
    let query = "SELECT quote_ident(rolname) FROM pg_authid WHERE starts_with(rolname, $1)";
    let rows = root.query(query, &[&prefix]).await.unwrap();
    let names: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    for some in names.chunks(DROPPED_AT_ONCE) {
        root.batch_execute(&format!("DROP ROLE IF EXISTS {}", some.join(", ")))
            .await
            .unwrap();
    }
    for catalog in [
        "pg_authid",
        "pg_auth_members",
        "pg_shdescription",
        "pg_shdepend",
    ] {
        root.batch_execute(&format!("VACUUM ANALYZE pg_catalog.{catalog}"))
            .await
            .unwrap();
    }
    all_gone(&root, prefix, seconds(30)).await;
}
