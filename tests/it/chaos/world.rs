//! The processes, the paths between them, and the supervisor that starts dead processes again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::Timestamp;
use mayfly_tests::api::Api;
use mayfly_tests::disk::Disk;
use mayfly_tests::postgres::{Admin, Credential, Server, Site};
use mayfly_tests::process::Process;
use mayfly_tests::proxy::Proxy;
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::system::{Engine, System, prefix};
use mayfly_tests::users::Part;
use mayfly_tests::{eventually, seconds};
use rand::seq::IndexedRandom;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::sync::Mutex as Gate;

use super::places::Place;
use super::tally::{Life, Tally};

pub(super) const ENGINES: usize = 3;
/// The database's host, which has another address for each engine.
const HOST: &str = "database.test";
/// Size of the store's disk, in MiB. Some 20,000 leases fit.
const DISK: u32 = 64;

/// The parts of a world.
pub(super) struct Plan {
    pub(super) rabbit: Rabbit,
    /// One dispatcher with its store on a disk, or several with one in PostgreSQL.
    pub(super) dispatchers: usize,
    pub(super) create_deadline_seconds: u64,
    /// See [`Tally`].
    pub(super) late: Duration,
}

/// An account that somebody holds.
#[derive(Clone)]
pub(super) struct Held {
    pub(super) credential: Credential,
    pub(super) end: Timestamp,
    /// When it was handed out.
    pub(super) since: Timestamp,
    /// The account's end was requested: from then on it may be gone.
    pub(super) revoked: Arc<AtomicBool>,
    /// A renewal was requested and not answered: it may end later than known, and the database decides.
    pub(super) unsure: bool,
}

impl Held {
    pub(super) fn life(&self) -> Life {
        Life {
            since: self.since,
            end: self.end,
        }
    }
}

pub(super) enum Store {
    Disk(Disk),
    Server(Server),
}

/// Paths that can be cut.
pub(super) struct Ways {
    /// Paths of all dispatchers to each node of the broker.
    pub(super) dispatchers_to_broker: Vec<Proxy>,
    pub(super) engine_to_broker: Vec<Vec<Proxy>>,
    pub(super) engine_to_database: Vec<Proxy>,
    pub(super) applications_to_dispatcher: Vec<Proxy>,
    pub(super) dispatcher_to_store: Vec<Proxy>,
}

pub(super) struct World {
    /// The first has the broker.
    pub(super) dispatchers: Gate<Vec<System>>,
    pub(super) engines: Gate<Vec<Engine>>,
    pub(super) rabbit: Rabbit,
    pub(super) store: Store,
    pub(super) site: Site,
    pub(super) pool: String,
    pub(super) path: String,
    /// The API of each dispatcher, on a path that can be cut.
    pub(super) apis: Vec<Api>,
    pub(super) ways: Ways,
    hosts: Vec<PathBuf>,
    engine_urls: Vec<PathBuf>,
    pub(super) dispatcher_fault: PathBuf,
    pub(super) engine_fault: PathBuf,
    /// The target of a fault.
    pub(super) taken: Mutex<BTreeSet<Place>>,
    pub(super) tally: Mutex<Tally>,
    pub(super) held: Mutex<BTreeMap<String, Held>>,
    /// Accounts that are gone, to be tried again.
    pub(super) gone: Mutex<Vec<Held>>,
    /// Number of crashes of the database.
    pub(super) crashes: AtomicU32,
    pub(super) calm: AtomicBool,
}

fn port_of(url: &str) -> u16 {
    let place = url.rsplit('@').next().unwrap();
    let port = place.split(['/', '?']).next().unwrap().rsplit(':').next();
    port.unwrap().parse().unwrap()
}

/// Paths to each of these URLs, and a file with the URLs through these paths.
async fn by_ways(urls: &[String], file: PathBuf) -> (Vec<Proxy>, PathBuf) {
    let (mut proxies, mut by) = (Vec::new(), Vec::new());
    for url in urls {
        let port = port_of(url);
        let proxy = Proxy::to(port).await;
        by.push(url.replace(&format!(":{port}/"), &format!(":{}/", proxy.port)));
        proxies.push(proxy);
    }
    std::fs::write(&file, by.join(",")).unwrap();
    (proxies, file)
}

/// A path to the database for each engine, all at one port, and a file with its address.
async fn ways_to_database(server: &Server, directory: &Path) -> (Vec<Proxy>, Vec<PathBuf>) {
    let (mut proxies, mut files): (Vec<Proxy>, _) = (Vec::new(), Vec::new());
    for n in 0..ENGINES {
        let address = format!("127.0.1.{}", n + 1);
        let port = proxies.first().map_or(0, |first| first.port);
        let listen: SocketAddr = format!("{address}:{port}").parse().unwrap();
        proxies.push(Proxy::at(listen, server.port()).await);
        let file = directory.join(format!("hosts-{n}"));
        std::fs::write(&file, format!("127.0.0.1 localhost\n{address} {HOST}\n")).unwrap();
        files.push(file);
    }
    (proxies, files)
}

impl World {
    pub(super) async fn new(plan: Plan) -> Arc<Self> {
        let Plan { rabbit, late, .. } = plan;
        let server = Server::own("");
        let directory = rabbit.directory().to_owned();
        let urls = rabbit.urls_for(&Part::Dispatcher);
        let next_pool = rabbit.next_pool().expect("a pool is ready");
        let engine_urls_at_broker = rabbit.urls_for(&Part::Engine(next_pool));
        let (dispatchers_to_broker, dispatcher_url) =
            by_ways(&urls, directory.join("url-of-dispatchers")).await;
        let (mut engine_to_broker, mut engine_urls) = (Vec::new(), Vec::new());
        for n in 0..ENGINES {
            let file = directory.join(format!("url-of-engine-{n}"));
            let (ways, file) = by_ways(&engine_urls_at_broker, file).await;
            engine_to_broker.push(ways);
            engine_urls.push(file);
        }
        let (engine_to_database, hosts) = ways_to_database(&server, &directory).await;

        let dispatcher_fault = directory.join("fault-of-dispatchers");
        let token_file = directory.join("root-token");
        let mut environment = vec![
            ("MAYFLY__AMQP__URL_FILE", text(&dispatcher_url)),
            ("MAYFLY_FAULT_FILE", text(&dispatcher_fault)),
            ("MAYFLY__INIT__ROOT_TOKEN_FILE", text(&token_file)),
            (
                "MAYFLY__CREATE__DEADLINE_SECONDS",
                plan.create_deadline_seconds.to_string(),
            ),
            ("MAYFLY__LEASE__SWEEP_SECONDS", "10".to_owned()),
            ("MAYFLY__LEASE__SWEEP_GRACE_SECONDS", "20".to_owned()),
            ("MAYFLY__LOG__LEVEL", "info".to_owned()),
        ];
        let mut dispatcher_to_store = Vec::new();
        let mut store_urls = Vec::new();
        let store = if plan.dispatchers == 1 {
            let disk = Disk::new(DISK);
            environment.push(("MAYFLY__DATA_DIR", text(disk.path())));
            Store::Disk(disk)
        } else {
            let server = Server::own("");
            let url = [server.store().await];
            for n in 0..plan.dispatchers {
                let file = directory.join(format!("url-of-store-{n}"));
                let (mut ways, file) = by_ways(&url, file).await;
                dispatcher_to_store.append(&mut ways);
                store_urls.push(text(&file));
            }
            environment.push(("MAYFLY__STORE__URL_FILE", store_urls[0].clone()));
            Store::Server(server)
        };
        let environment: Vec<_> = environment.iter().map(|(k, v)| (*k, v.as_str())).collect();
        let handle = rabbit.handle();
        let mut dispatchers = vec![System::start_with(rabbit, &environment).await];
        for url in store_urls.iter().skip(1) {
            let other = dispatchers[0].beside(&[("MAYFLY__STORE__URL_FILE", url)]);
            other.ready().await;
            dispatchers.push(other);
        }
        let first = &dispatchers[0];
        let site = server.site(Admin::CreateRole).await;
        let pool = first.pool().await;
        let path = first
            .secret(
                &site,
                &pool,
                // SCRAM rounds would only cost CPU.
                json!({"ttl": 30, "maxTtl": 60, "scramIterations": 1}),
            )
            .await;
        let base = format!("/v1/secrets/db:{}:root", site.name);
        let change = json!({"data": {"host": HOST, "port": engine_to_database[0].port,
            "password": site.password}});
        let (status, body) = first.api.put(&base, change).await;
        assert_eq!(status, 200, "{body}");
        let mut applications_to_dispatcher = Vec::new();
        let mut apis = Vec::new();
        for system in &dispatchers {
            let port = system.api.address.rsplit(':').next().unwrap();
            let proxy = Proxy::to(port.parse().unwrap()).await;
            let address = format!("http://127.0.0.1:{}", proxy.port);
            apis.push(Api::new(address, system.api.token.clone()));
            applications_to_dispatcher.push(proxy);
        }
        let world = Arc::new(Self {
            dispatchers: Gate::new(dispatchers),
            engines: Gate::new(Vec::new()),
            rabbit: handle,
            store,
            site,
            pool,
            path,
            apis,
            ways: Ways {
                dispatchers_to_broker,
                engine_to_broker,
                engine_to_database,
                applications_to_dispatcher,
                dispatcher_to_store,
            },
            hosts,
            engine_urls,
            dispatcher_fault,
            engine_fault: directory.join("fault-of-engines"),
            taken: Mutex::default(),
            tally: Mutex::new(Tally::new(late)),
            held: Mutex::default(),
            gone: Mutex::default(),
            crashes: AtomicU32::new(0),
            calm: AtomicBool::new(false),
        });
        for n in 0..ENGINES {
            let engine = world.start_engine(n).await;
            world.engines.lock().await.push(engine);
        }
        eventually("an engine answers", seconds(30), async || {
            let path = format!("/v1/secrets/{}?ttl=1", world.path);
            let (status, _) = world.apis[0].get(&path).await;
            (status == 200).then_some(())
        })
        .await;
        world
    }

    pub(super) async fn start_engine(&self, n: usize) -> Engine {
        let url = text(&self.engine_urls[n]);
        let fault = text(&self.engine_fault);
        self.dispatchers.lock().await[0].engine_with_hosts(
            &self.pool,
            &self.hosts[n],
            &[
                ("MAYFLY__AMQP__URL_FILE", &url),
                ("MAYFLY_FAULT_FILE", &fault),
                ("MAYFLY__LOG__LEVEL", "info"),
            ],
        )
    }

    /// What `look` sees of the process at a place.
    async fn process<T>(&self, place: Place, look: impl FnOnce(&Process) -> T) -> T {
        match place {
            Place::Dispatcher(n) => look(self.dispatchers.lock().await[n].dispatcher()),
            Place::Engine(n) => look(&self.engines.lock().await[n].process),
            other => panic!("{other:?} is no process"),
        }
    }

    pub(super) async fn signal(&self, place: Place, signal: Signal) {
        self.process(place, |process| process.signal(signal)).await;
    }

    pub(super) async fn id(&self, place: Place) -> i32 {
        self.process(place, Process::id).await
    }

    pub(super) async fn is_alive(&self, place: Place) -> bool {
        self.process(place, Process::is_alive).await
    }

    pub(super) async fn is_stopped(&self, place: Place) -> bool {
        self.process(place, Process::is_stopped).await
    }

    /// Starts dead processes again.
    pub(super) async fn supervise(&self) {
        loop {
            tokio::time::sleep(Duration::from_millis(300)).await;
            {
                let mut engines = self.engines.lock().await;
                for (n, engine) in engines.iter_mut().enumerate() {
                    if !engine.process.is_alive() {
                        *engine = self.start_engine(n).await;
                    }
                }
            }
            for system in self.dispatchers.lock().await.iter_mut() {
                if !system.dispatcher().is_alive() {
                    system.start_dispatcher_unready();
                }
            }
        }
    }

    /// What the names of leases' roles begin with.
    pub(super) fn prefix(&self) -> String {
        prefix(&self.site)
    }

    pub(super) fn change(&self, role: &str, change: impl FnOnce(&mut Held)) {
        if let Some(held) = self.held.lock().unwrap().get_mut(role) {
            change(held);
        }
    }

    fn any_api(&self) -> &Api {
        self.apis.choose(&mut rand::rng()).unwrap()
    }

    pub(super) async fn get(&self, path: &str) -> Option<(u16, Value)> {
        let api = self.any_api();
        api.try_call(reqwest::Method::GET, path, None).await
    }

    pub(super) async fn post(&self, path: &str, body: Value) -> Option<(u16, Value)> {
        let api = self.any_api();
        api.try_call(reqwest::Method::POST, path, Some(body)).await
    }

    pub(super) async fn delete(&self, path: &str) -> Option<(u16, Value)> {
        let api = self.any_api();
        api.try_call(reqwest::Method::DELETE, path, None).await
    }
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}
