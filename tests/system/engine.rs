//! Pools and engines of a system.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::{System, ready, text};
use crate::process::{Process, free_port};
use crate::users::Part;
use crate::windows::of_engines;
use crate::word;

/// An engine.
pub struct Engine {
    pub name: String,
    /// The name of its pool, as its key file has it.
    pub pool: String,
    pub process: Process,
    admin_port: u16,
}

impl Engine {
    /// Waits until it consumes.
    pub async fn ready(&self) {
        ready("engine", self.admin_port).await;
    }

    /// Port of the engine's admin listener.
    pub fn admin_port(&self) -> u16 {
        self.admin_port
    }

    /// A page of the engine's admin listener.
    pub async fn admin_text(&self, path: &str) -> String {
        text(self.admin_port, path).await
    }
}

impl System {
    /// Makes a pool of a random name.
    pub async fn pool(&self) -> String {
        self.broker_up().await;
        let name = self.rabbit.take_pool();
        let answer = self.api.create("/v1/pools", json!({"name": name})).await;
        let key = answer["engineKey"].as_str().unwrap();
        std::fs::write(self.key_file(&name), key).unwrap();
        name
    }

    /// The key file of a pool.
    pub fn key_file(&self, pool: &str) -> PathBuf {
        self.directory.join(format!("{pool}.key"))
    }

    /// Starts an engine and waits until it consumes.
    pub async fn engine(&self, pool: &str) -> Engine {
        let engine = self.engine_unready(pool);
        ready("engine", engine.admin_port).await;
        engine
    }

    /// Starts an engine with another key file, and waits until it consumes.
    pub async fn engine_with_key(&self, key_file: &Path) -> Engine {
        let engine = self.engine_of(key_file);
        ready("engine", engine.admin_port).await;
        engine
    }

    /// Starts an engine.
    pub fn engine_unready(&self, pool: &str) -> Engine {
        self.engine_of(&self.key_file(pool))
    }

    /// Starts an engine with more settings.
    pub fn engine_with(&self, pool: &str, environment: &[(&str, &str)]) -> Engine {
        self.engine_set(&self.key_file(pool), environment, None)
    }

    /// Starts an engine that finds hosts as this file says, which has the form of /etc/hosts.
    pub fn engine_with_hosts(
        &self,
        pool: &str,
        hosts: &Path,
        environment: &[(&str, &str)],
    ) -> Engine {
        self.engine_set(&self.key_file(pool), environment, Some(hosts))
    }

    fn engine_of(&self, key_file: &Path) -> Engine {
        self.engine_set(key_file, &[], None)
    }

    fn engine_set(
        &self,
        key_file: &Path,
        environment: &[(&str, &str)],
        hosts: Option<&Path>,
    ) -> Engine {
        let name = format!("engine-{}", word());
        let admin_port = free_port();
        let mut command = self.command("mayfly-engine");
        command
            .env("MAYFLY__POOL__KEY_FILE", key_file)
            .envs(self.url_of_engine(key_file))
            .env("MAYFLY__ENGINE__NAME", &name)
            .env("MAYFLY__ADMIN__LISTEN", format!("127.0.0.1:{admin_port}"))
            .envs(of_engines(&self.environment))
            .envs(environment.iter().copied());
        let command = match hosts {
            Some(hosts) => seeing(hosts, &command),
            None => command,
        };
        Engine {
            process: Process::start(&command, &self.log()),
            pool: key_file.file_stem().unwrap().to_str().unwrap().to_owned(),
            name,
            admin_port,
        }
    }

    /// The broker's address for engines with this key file: as the user of their pool.
    fn url_of_engine(&self, key_file: &Path) -> Option<(&'static str, PathBuf)> {
        let key: Value = serde_json::from_slice(&std::fs::read(key_file).ok()?).ok()?;
        let pool = key["pool"].as_str()?;
        if self.has_all_rights() {
            return None;
        }
        let file = self.directory.join(format!("amqp-url-{pool}"));
        let url = self.rabbit.url_for(&Part::Engine(pool.to_owned()));
        std::fs::write(&file, url).unwrap();
        Some(("MAYFLY__AMQP__URL_FILE", file))
    }
}

/// The same command with these hosts as its /etc/hosts, by a mount that only this process sees.
fn seeing(hosts: &Path, command: &Command) -> Command {
    const SEEING: &str = r#"mount --bind "$1" /etc/hosts && shift && exec "$@""#;
    let mut seeing = Command::new("unshare");
    seeing
        .args(["--mount", "--propagation", "private", "bash", "-c", SEEING])
        .args(["seeing".as_ref(), hosts, command.get_program().as_ref()])
        .args(command.get_args());
    for (name, value) in command.get_envs() {
        if let Some(value) = value {
            seeing.env(name, value);
        }
    }
    seeing
}
