//! OpenBao, for comparison: a server in dev mode on loopback, with a database of its own, and with statements that
//! are as cheap as Mayfly's: membership of one role, no grants to the account.

use std::path::Path;
use std::process::Command;

use mayfly_tests::postgres::Server;
use mayfly_tests::process::{Process, free_port};
use mayfly_tests::{eventually, run_dir, seconds, word};
use reqwest::Method;
use serde_json::{Value, json};

use crate::cpu::Watched;
use crate::load::Target;

const TOKEN: &str = "root-of-dev-mode";

/// A server with a database mount.
pub struct OpenBao {
    process: Process,
    port: u16,
    /// What its roles' names in the configuration begin with. Four letters: OpenBao puts at most eight letters of
    /// them into account names.
    name: String,
    server: Server,
    client: reqwest::Client,
}

impl OpenBao {
    /// Starts OpenBao and configures a role whose accounts live 1 h.
    pub async fn start(program: &Path, server: &Server) -> Self {
        let (port, name) = (free_port(), word()[..4].to_owned());
        let directory = run_dir().join(format!("openbao-{name}"));
        std::fs::create_dir_all(&directory).unwrap();
        let mut command = Command::new(program);
        command
            .args(["server", "-dev", "-dev-no-store-token", "-log-level=error"])
            .arg(format!("-dev-root-token-id={TOKEN}"))
            .arg(format!("-dev-listen-address=127.0.0.1:{port}"))
            .env("HOME", &directory);
        let bao = Self {
            process: Process::start(&command, &directory.join("log")),
            port,
            name,
            server: server.clone(),
            client: reqwest::Client::builder().no_proxy().build().unwrap(),
        };
        eventually("OpenBao is unsealed", seconds(30), async || {
            let url = format!("http://127.0.0.1:{port}/v1/sys/health");
            let answer = bao.client.get(url).send().await.ok()?;
            answer.status().is_success().then_some(())
        })
        .await;
        bao.configure().await;
        bao
    }

    async fn configure(&self) {
        let admin = format!("bao_{}", self.name);
        let root = self.server.superuser("postgres").await;
        for statement in [
            format!("CREATE ROLE {admin} SUPERUSER LOGIN PASSWORD '{admin}'"),
            format!("CREATE ROLE {admin}_grant NOLOGIN"),
            format!("CREATE DATABASE {admin} OWNER {admin}"),
        ] {
            root.batch_execute(&statement).await.unwrap();
        }
        self.call(
            Method::POST,
            "sys/mounts/database",
            json!({"type": "database"}),
        )
        .await;
        let url = format!(
            "postgresql://{{{{username}}}}:{{{{password}}}}@127.0.0.1:{}/{admin}?sslmode=require",
            self.server.port()
        );
        let connection = json!({
            "plugin_name": "postgresql-database-plugin", "connection_url": url, "username": admin,
            "password": admin, "allowed_roles": "*", "password_authentication": "scram-sha-256",
            "max_open_connections": 16, "max_idle_connections": 16,
        });
        self.call(Method::POST, "database/config/server", connection)
            .await;
        self.role(3600).await;
    }

    /// Makes the role whose accounts live for this time; returns its name.
    pub async fn role(&self, ttl_seconds: u64) -> String {
        let name = format!("{}{ttl_seconds}", self.name);
        let create = format!(
            "CREATE ROLE \"{{{{name}}}}\" LOGIN PASSWORD '{{{{password}}}}' VALID UNTIL '{{{{expiration}}}}' IN ROLE bao_{}_grant",
            self.name
        );
        let role = json!({
            "db_name": "server", "creation_statements": [create],
            "revocation_statements": ["DROP ROLE IF EXISTS \"{{name}}\""],
            "default_ttl": ttl_seconds, "max_ttl": 86400,
        });
        self.call(Method::POST, &format!("database/roles/{name}"), role)
            .await;
        name
    }

    /// A read of an account of a role.
    pub fn target(&self, role: &str) -> Target {
        let path = format!("/v1/database/creds/{role}");
        Target::get(self.port, &path, &[format!("X-Vault-Token: {TOKEN}")])
    }

    /// A read of an account that lives for an hour.
    pub fn reads(&self) -> Target {
        self.target(&format!("{}3600", self.name))
    }

    /// What the names of its accounts begin with.
    pub fn prefix(&self) -> String {
        format!("v-token-{}", self.name)
    }

    /// Revokes all leases. It answers before they are revoked.
    pub async fn revoke_all(&self) {
        self.call(
            Method::PUT,
            "sys/leases/revoke-prefix/database/creds",
            json!({"sync": false}),
        )
        .await;
    }

    async fn call(&self, method: Method, path: &str, body: Value) {
        let request = self
            .client
            .request(method, format!("http://127.0.0.1:{}/v1/{path}", self.port));
        let answer = request
            .header("X-Vault-Token", TOKEN)
            .json(&body)
            .send()
            .await
            .unwrap();
        let (status, text) = (answer.status(), answer.text().await.unwrap());
        assert!(status.is_success(), "OpenBao: {path}: {status}: {text}");
    }

    /// The process of OpenBao.
    pub fn watched(&self) -> Watched {
        Watched {
            name: "OpenBao",
            pids: vec![self.process.id()],
            with_children: false,
        }
    }

    /// The process id of OpenBao.
    pub fn id(&self) -> i32 {
        self.process.id()
    }
}
