//! What most tests begin with: a dispatcher, a database with its admin, a pool with one engine, and a
//! dynamic secret.

use serde_json::{Value, json};

use crate::postgres::{Admin, Server, Site};
use crate::rabbit::Rabbit;
use crate::system::{Engine, System};

/// The configuration of a scenario.
pub struct Scenario {
    server: Server,
    admin: Admin,
    broker: Option<Rabbit>,
    settings: Vec<(String, String)>,
    of_engine: Vec<(String, String)>,
    attributes: Value,
}

/// A started scenario without a secret.
pub struct Stage {
    pub system: System,
    pub site: Site,
    pub pool: String,
    pub engine: Engine,
}

impl Scenario {
    /// A scenario on this server: an admin with `CREATEROLE`, the shared broker, no settings, and a secret with the
    /// attributes that [`System::secret`] gives.
    pub fn on(server: Server) -> Self {
        Self {
            server,
            admin: Admin::CreateRole,
            broker: None,
            settings: Vec::new(),
            of_engine: Vec::new(),
            attributes: json!({}),
        }
    }

    /// Another kind of admin.
    pub fn admin(mut self, admin: Admin) -> Self {
        self.admin = admin;
        self
    }

    /// Another broker.
    pub fn broker(mut self, broker: Rabbit) -> Self {
        self.broker = Some(broker);
        self
    }

    /// Settings of the dispatcher, as environment variables.
    pub fn settings(mut self, settings: &[(&str, &str)]) -> Self {
        self.settings.extend(settings.iter().map(owned));
        self
    }

    /// Settings of the engine, as environment variables.
    pub fn engine(mut self, settings: &[(&str, &str)]) -> Self {
        self.of_engine.extend(settings.iter().map(owned));
        self
    }

    /// Attributes of the dynamic secret, which replace those of the same name.
    pub fn attributes(mut self, attributes: Value) -> Self {
        self.attributes = attributes;
        self
    }

    /// Starts it: the dispatcher, the database, the path of the secret, and the engine, which consumes
    /// and ends when it is dropped. Its pool is [`Engine::pool`].
    pub async fn start(mut self) -> (System, Site, String, Engine) {
        let (system, site, pool) = self.begin().await;
        let (path, engine) = self.furnish(&system, &site, &pool).await;
        (system, site, path, engine)
    }

    /// Adds it to a system that runs: the database, the path of the secret, the engine. The broker and the
    /// settings of the dispatcher are those of the system.
    pub async fn start_in(self, system: &System) -> (Site, String, Engine) {
        let site = self.server.site(self.admin).await;
        let pool = system.pool().await;
        let (path, engine) = self.furnish(system, &site, &pool).await;
        (site, path, engine)
    }

    /// Starts it without an engine: the dispatcher, the database, the path of the secret, the pool.
    pub async fn start_without_engine(mut self) -> (System, Site, String, String) {
        let (system, site, pool) = self.begin().await;
        let path = system.secret(&site, &pool, self.attributes).await;
        (system, site, path, pool)
    }

    /// Starts it without a secret: the dispatcher, the database, the pool, the engine.
    pub async fn start_without_secret(mut self) -> (System, Site, String, Engine) {
        let (system, site, pool) = self.begin().await;
        let engine = system.engine_with(&pool, &borrowed(&self.of_engine));
        engine.ready().await;
        (system, site, pool, engine)
    }

    /// The same as one value, for tests that make many secrets.
    pub async fn stage(self) -> Stage {
        let (system, site, pool, engine) = self.start_without_secret().await;
        Stage {
            system,
            site,
            pool,
            engine,
        }
    }

    async fn furnish(self, system: &System, site: &Site, pool: &str) -> (String, Engine) {
        let engine = system.engine_with(pool, &borrowed(&self.of_engine));
        let path = system.secret(site, pool, self.attributes).await;
        engine.ready().await;
        (path, engine)
    }

    async fn begin(&mut self) -> (System, Site, String) {
        let broker = self.broker.take().unwrap_or_else(Rabbit::shared);
        let settings = borrowed(&self.settings);
        let (system, site) = tokio::join!(
            System::start_with(broker, &settings),
            self.server.site(self.admin)
        );
        let pool = system.pool().await;
        (system, site, pool)
    }
}

impl Stage {
    /// A dynamic secret with these attributes besides those that [`System::secret`] gives; its path.
    pub async fn secret(&self, attributes: Value) -> String {
        self.system.secret(&self.site, &self.pool, attributes).await
    }

    /// A dynamic secret that grants this; its path.
    pub async fn granting(&self, what: &str, on: &str) -> String {
        let grant = json!({"grantPermissions": {"what": what, "where": on}});
        self.secret(grant).await
    }

    /// A session of a new account that is granted this.
    pub async fn login(&self, what: &str, on: &str) -> tokio_postgres::Client {
        let path = self.granting(what, on).await;
        self.system.issue(&path, None).await.login().await.unwrap()
    }

    /// A read of a secret: the status, and the answer.
    pub async fn read(&self, path: &str) -> (u16, Value) {
        self.system.api.get(&format!("/v1/secrets/{path}")).await
    }

    /// The findings of `secret check`.
    pub async fn findings(&self, path: &str) -> Vec<Value> {
        let check = format!("/v1/secrets/{path}::check");
        let (status, answer) = self.system.api.post(&check, json!({})).await;
        assert_eq!(status, 200, "{answer}");
        answer["findings"].as_array().unwrap().clone()
    }

    /// The finding of `secret check` with this name.
    pub async fn finding(&self, path: &str, check: &str) -> Value {
        let findings = self.findings(path).await;
        let found = findings.iter().find(|found| found["check"] == check);
        found
            .unwrap_or_else(|| panic!("{check}: {findings:?}"))
            .clone()
    }
}

fn owned((key, value): &(&str, &str)) -> (String, String) {
    ((*key).to_owned(), (*value).to_owned())
}

fn borrowed(settings: &[(String, String)]) -> Vec<(&str, &str)> {
    settings
        .iter()
        .map(|(key, value)| (key.as_str(), value.as_str()))
        .collect()
}
