//! A credential as the API gave it, and logins with it.

use serde_json::Value;
use tokio_postgres::Client;

use super::login;

/// A credential as the API gave it.
#[derive(Debug, Clone)]
pub struct Credential {
    pub host: String,
    pub port: u16,
    pub database: String,
    pub username: String,
    pub password: String,
    pub lease: String,
    pub expiration: jiff::Timestamp,
}

impl Credential {
    /// The credential of the answer to a read.
    pub fn from_answer(answer: &Value) -> Self {
        let data = &answer["data"];
        let text = |name: &str| {
            data[name]
                .as_str()
                .unwrap_or_else(|| panic!("data.{name} is missing: {answer}"))
                .to_owned()
        };
        Self {
            host: text("host"),
            port: u16::try_from(data["port"].as_u64().unwrap()).unwrap(),
            database: text("database"),
            username: text("username"),
            password: text("password"),
            lease: text("leaseId"),
            expiration: text("expiration").parse().unwrap(),
        }
    }

    /// Logs in with it.
    pub async fn login(&self) -> Result<Client, tokio_postgres::Error> {
        self.login_to(&self.database).await
    }

    /// Logs in to another database.
    pub async fn login_to(&self, database: &str) -> Result<Client, tokio_postgres::Error> {
        login(
            &self.host,
            self.port,
            &self.username,
            &self.password,
            database,
        )
        .await
    }

    /// Whether a login is refused, because of its password or of an absent role.
    pub async fn is_refused(&self) -> bool {
        match self.login().await {
            Ok(_) => false,
            Err(error) => error
                .code()
                .is_some_and(|code| code.code().starts_with("28")),
        }
    }
}
