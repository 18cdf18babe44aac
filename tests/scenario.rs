//! What most tests begin with: a dispatcher, a database with its admin, a pool with one engine, and a
//! dynamic secret.

use serde_json::{Value, json};

use crate::postgres::{Admin, Server, Site};
use crate::rabbit::Rabbit;
use crate::system::{Engine, System};

/// How it is to be.
pub struct Scenario {
    server: Server,
    admin: Admin,
    broker: Option<Rabbit>,
    settings: Vec<(String, String)>,
    attributes: Value,
}

impl Scenario {
    /// On this server: an admin with `CREATEROLE`, the shared broker, no settings, and a secret with
    /// the attributes that [`System::secret`] gives.
    pub fn on(server: Server) -> Self {
        Self {
            server,
            admin: Admin::CreateRole,
            broker: None,
            settings: Vec::new(),
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
        let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        self.settings.extend(settings.iter().map(owned));
        self
    }

    /// Attributes of the dynamic secret, which replace those of the same name.
    pub fn attributes(mut self, attributes: Value) -> Self {
        self.attributes = attributes;
        self
    }

    /// Starts it: the dispatcher, the database, the path of the secret, and the engine, which consumes
    /// and ends when it is dropped. Its pool is [`Engine::pool`].
    pub async fn start(self) -> (System, Site, String, Engine) {
        let broker = self.broker.unwrap_or_else(Rabbit::shared);
        let settings: Vec<(&str, &str)> = self
            .settings
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect();
        let (system, site) = tokio::join!(
            System::start_with(broker, &settings),
            self.server.site(self.admin)
        );
        let pool = system.pool().await;
        let engine = system.engine_unready(&pool);
        let path = system.secret(&site, &pool, self.attributes).await;
        engine.ready().await;
        (system, site, path, engine)
    }
}
