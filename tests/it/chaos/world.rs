//! The processes, the ways between them, and who starts again what has died.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::Timestamp;
use mayfly_tests::api::Api;
use mayfly_tests::postgres::{Admin, Credential, Server, Site};
use mayfly_tests::proxy::Proxy;
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::system::{Engine, System};
use mayfly_tests::{eventually, seconds};
use serde_json::json;
use tokio::sync::Mutex as Gate;

use super::tally::Tally;

pub(super) const ENGINES: usize = 3;
/// An account somebody holds.
#[derive(Clone)]
pub(super) struct Held {
    pub(super) credential: Credential,
    pub(super) end: Timestamp,
    /// When it was handed out.
    pub(super) since: Timestamp,
    /// Its end was asked for: from then on it may go.
    pub(super) revoked: bool,
    /// A renewal was asked for and not answered: it may end later than known.
    pub(super) unsure: bool,
}

pub(super) struct World {
    pub(super) system: Gate<System>,
    pub(super) engines: Gate<Vec<Engine>>,
    pub(super) site: Site,
    pub(super) pool: String,
    pub(super) path: String,
    pub(super) api: Api,
    /// Dispatcher's and engines', to each node.
    pub(super) to_broker: [Vec<Proxy>; 2],
    pub(super) to_database: Proxy,
    pub(super) to_dispatcher: Proxy,
    pub(super) engine_environment: Vec<(String, String)>,
    pub(super) dispatcher_fault: std::path::PathBuf,
    pub(super) engine_fault: std::path::PathBuf,
    pub(super) tally: Mutex<Tally>,
    pub(super) held: Mutex<BTreeMap<String, Held>>,
    pub(super) calm: AtomicBool,
}

pub(super) fn port_of(url: &str) -> u16 {
    let place = url.rsplit('@').next().unwrap();
    let port = place.split(['/', '?']).next().unwrap().rsplit(':').next();
    port.unwrap().parse().unwrap()
}

impl World {
    pub(super) async fn new(rabbit: Rabbit) -> Arc<Self> {
        let server = Server::own("");
        let mut to_broker = [Vec::new(), Vec::new()];
        for proxies in &mut to_broker {
            for url in rabbit.urls() {
                proxies.push(Proxy::to(port_of(&url)).await);
            }
        }
        let to_database = Proxy::to(server.port()).await;
        let through = |proxies: &[Proxy], name: &str| {
            let mut urls = rabbit.urls();
            for (url, proxy) in urls.iter_mut().zip(proxies) {
                *url = url.replace(&format!(":{}/", port_of(url)), &format!(":{}/", proxy.port));
            }
            let file = rabbit.directory().join(name);
            std::fs::write(&file, urls.join(",")).unwrap();
            file
        };
        let dispatcher_url = through(&to_broker[0], "url-of-dispatcher");
        let engine_url = through(&to_broker[1], "url-of-engines");
        let dispatcher_fault = rabbit.directory().join("fault-of-dispatcher");
        let engine_fault = rabbit.directory().join("fault-of-engines");
        let text = |path: &std::path::Path| path.to_str().unwrap().to_owned();
        let system = System::start_with(
            rabbit,
            &[
                ("MAYFLY__AMQP__URL_FILE", &text(&dispatcher_url)),
                ("MAYFLY_FAULT_FILE", &text(&dispatcher_fault)),
                ("MAYFLY__CREATE__DEADLINE_SECONDS", "8"),
                ("MAYFLY__LEASE__SWEEP_SECONDS", "10"),
                ("MAYFLY__LEASE__SWEEP_GRACE_SECONDS", "20"),
                ("MAYFLY__LOG__LEVEL", "info"),
            ],
        )
        .await;
        let site = server.site(Admin::CreateRole).await;
        let pool = system.pool().await;
        let engine_environment = vec![
            ("MAYFLY__AMQP__URL_FILE".to_owned(), text(&engine_url)),
            ("MAYFLY_FAULT_FILE".to_owned(), text(&engine_fault)),
            ("MAYFLY__LOG__LEVEL".to_owned(), "info".to_owned()),
        ];
        let path = system
            .secret(&site, &pool, json!({"ttl": 30, "maxTtl": 60}))
            .await;
        let base = format!("/v1/secrets/db:{}:root", site.name);
        let change = json!({"data": {"port": to_database.port}});
        let (status, body) = system.api.put(&base, change).await;
        assert_eq!(status, 200, "{body}");
        let to_dispatcher = Proxy::to(
            system
                .api
                .address
                .rsplit(':')
                .next()
                .unwrap()
                .parse()
                .unwrap(),
        )
        .await;
        let address = format!("http://127.0.0.1:{}", to_dispatcher.port);
        let world = Arc::new(Self {
            api: Api::new(address, system.api.token.clone()),
            system: Gate::new(system),
            engines: Gate::new(Vec::new()),
            site,
            pool,
            path,
            to_broker,
            to_database,
            to_dispatcher,
            engine_environment,
            dispatcher_fault,
            engine_fault,
            tally: Mutex::default(),
            held: Mutex::default(),
            calm: AtomicBool::new(false),
        });
        for _ in 0..ENGINES {
            let engine = world.start_engine().await;
            world.engines.lock().await.push(engine);
        }
        eventually("an engine answers", seconds(30), async || {
            let (status, _) = world
                .api
                .get(&format!("/v1/secrets/{}?ttl=1", world.path))
                .await;
            (status == 200).then_some(())
        })
        .await;
        world
    }

    pub(super) async fn start_engine(&self) -> Engine {
        let environment: Vec<_> = self
            .engine_environment
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        self.system
            .lock()
            .await
            .engine_with(&self.pool, &environment)
    }

    /// Starts again what has died.
    pub(super) async fn supervise(&self) {
        loop {
            tokio::time::sleep(Duration::from_millis(300)).await;
            {
                let mut engines = self.engines.lock().await;
                for engine in engines.iter_mut() {
                    if !engine.process.is_alive() {
                        *engine = self.start_engine().await;
                    }
                }
            }
            let mut system = self.system.lock().await;
            if !system.dispatcher().is_alive() {
                system.start_dispatcher_unready();
            }
        }
    }

    pub(super) fn count(&self, kind: &str, lasting: Duration) {
        self.tally.lock().unwrap().fault(kind, lasting);
    }

    pub(super) fn change(&self, role: &str, change: impl FnOnce(&mut Held)) {
        if let Some(held) = self.held.lock().unwrap().get_mut(role) {
            change(held);
        }
    }

    pub(super) async fn get(&self, path: &str) -> Option<(u16, serde_json::Value)> {
        self.api.try_call(reqwest::Method::GET, path, None).await
    }

    pub(super) async fn post(
        &self,
        path: &str,
        body: serde_json::Value,
    ) -> Option<(u16, serde_json::Value)> {
        self.api
            .try_call(reqwest::Method::POST, path, Some(body))
            .await
    }

    pub(super) async fn delete(&self, path: &str) -> Option<(u16, serde_json::Value)> {
        self.api.try_call(reqwest::Method::DELETE, path, None).await
    }
}
