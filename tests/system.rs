//! The system under test: a dispatcher, engines, pools and secrets, as real processes.

use std::path::{Path, PathBuf};
use std::process::Command;

use reqwest::Method;
use serde_json::{Value, json};

use crate::api::Api;
use crate::postgres::{Credential, Site};
use crate::process::{Process, binary, free_port};
use crate::rabbit::Rabbit;
use crate::users::Part;
use crate::windows::final_within;
use crate::{eventually, run_dir, seconds, word};

/// A dispatcher and what it needs.
pub struct System {
    pub rabbit: Rabbit,
    pub directory: PathBuf,
    pub api: Api,
    dispatcher: Option<Process>,
    http_port: u16,
    admin_port: u16,
    environment: Vec<(String, String)>,
    /// Where the programs are that are started next; None: those of this build.
    pub programs: Option<PathBuf>,
    /// Its users still have the rights that an earlier version needed.
    rights_of_before: bool,
}

/// An engine.
pub struct Engine {
    pub name: String,
    /// The name of its pool, as its key file has it.
    pub pool: String,
    pub process: Process,
    admin_port: u16,
}

impl System {
    /// A dispatcher on a virtual host of the shared broker.
    pub async fn start() -> Self {
        Self::start_on(Rabbit::shared()).await
    }

    /// A dispatcher on this broker.
    pub async fn start_on(rabbit: Rabbit) -> Self {
        Self::start_with(rabbit, &[]).await
    }

    /// A dispatcher with more settings.
    pub async fn start_with(rabbit: Rabbit, environment: &[(&str, &str)]) -> Self {
        Self::start_from(None, rabbit, environment).await
    }

    /// A dispatcher that is, like the engines after it, of another build.
    pub async fn start_from(
        programs: Option<PathBuf>,
        rabbit: Rabbit,
        environment: &[(&str, &str)],
    ) -> Self {
        let directory = run_dir().join(format!("system-{}", word()));
        std::fs::create_dir_all(&directory).unwrap();
        let url = rabbit.url_for(&Part::Dispatcher);
        std::fs::write(directory.join("amqp-url"), url).unwrap();
        std::fs::write(directory.join("amqp-url-of-all"), rabbit.url()).unwrap();
        let http_port = free_port();
        let mut system = Self {
            rabbit,
            directory,
            api: Api::new(format!("http://127.0.0.1:{http_port}"), String::new()),
            dispatcher: None,
            http_port,
            admin_port: free_port(),
            environment: environment
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect(),
            rights_of_before: programs.is_some(),
            programs,
        };
        system.start_dispatcher().await;
        let told = system
            .environment
            .iter()
            .find(|(key, _)| key == "MAYFLY__INIT__ROOT_TOKEN_FILE");
        let token = match told {
            Some((_, file)) => file.into(),
            None => system.directory.join("data/root-token"),
        };
        let token = std::fs::read_to_string(token).unwrap();
        system.api = system.api.with_token(token.trim());
        system
    }

    /// Another dispatcher, with the same broker, store and files and more settings; it may not be
    /// ready yet. The store must be one for several.
    pub fn beside(&self, environment: &[(&str, &str)]) -> Self {
        let http_port = free_port();
        let more = environment
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        let mut system = Self {
            rabbit: self.rabbit.handle(),
            directory: self.directory.clone(),
            api: Api::new(
                format!("http://127.0.0.1:{http_port}"),
                self.api.token.clone(),
            ),
            dispatcher: None,
            http_port,
            admin_port: free_port(),
            environment: self.environment.iter().cloned().chain(more).collect(),
            rights_of_before: self.rights_of_before,
            programs: self.programs.clone(),
        };
        system.start_dispatcher_unready();
        system
    }

    /// Waits until the dispatcher takes requests.
    pub async fn ready(&self) {
        ready("dispatcher", self.admin_port).await;
    }

    /// Whether the dispatcher says that it takes requests. One that has ended says nothing.
    pub async fn is_ready(&self) -> bool {
        says_ready(self.admin_port).await
    }

    /// Whether it is this dispatcher that reconciles.
    pub async fn reconciles(&self) -> bool {
        let text = self.admin_text("/metrics").await;
        text.contains("\nmayfly_dispatcher_reconciler 1")
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(match &self.programs {
            Some(directory) => directory.join(program),
            None => binary(program),
        });
        let url = match self.has_all_rights() {
            true => "amqp-url-of-all",
            false => "amqp-url",
        };
        command
            .env("MAYFLY__AMQP__URL_FILE", self.directory.join(url))
            .env("MAYFLY__LOG__LEVEL", "debug")
            .env("MAYFLY__LOG__FORMAT", "json");
        command
    }

    fn has_all_rights(&self) -> bool {
        self.rights_of_before || self.programs.is_some()
    }

    /// Writes the broker's URLs again, as its users' passwords are now.
    pub fn write_urls(&self, pools: &[&str]) {
        let url = self.rabbit.url_for(&Part::Dispatcher);
        std::fs::write(self.directory.join("amqp-url"), url).unwrap();
        for pool in pools {
            let url = self.rabbit.url_for(&Part::Engine((*pool).to_owned()));
            std::fs::write(self.directory.join(format!("amqp-url-{pool}")), url).unwrap();
        }
    }

    /// What all processes of this system have logged.
    pub fn logged(&self) -> String {
        std::fs::read_to_string(self.log()).unwrap_or_default()
    }

    /// The log file of all processes of this system.
    pub fn log(&self) -> PathBuf {
        self.directory.join("log")
    }

    /// Starts the dispatcher (again) and waits until it is ready.
    pub async fn start_dispatcher(&mut self) {
        self.start_dispatcher_unready();
        ready("dispatcher", self.admin_port).await;
        let status = self.admin_text("/healthz").await;
        assert_eq!(status.trim(), "ok");
    }

    fn dispatcher_command(&self) -> Command {
        let mut command = self.command("mayfly-dispatcher");
        command
            .env(
                "MAYFLY__HTTP__LISTEN",
                format!("127.0.0.1:{}", self.http_port),
            )
            .env(
                "MAYFLY__ADMIN__LISTEN",
                format!("127.0.0.1:{}", self.admin_port),
            )
            .env("MAYFLY__DATA_DIR", self.directory.join("data"))
            .envs(self.environment.iter().cloned());
        command
    }

    /// A copy of the store, made as it should be while the dispatcher runs.
    pub fn backup(&self, to: &Path) {
        let made = self
            .dispatcher_command()
            .arg("--backup")
            .arg(to)
            .status()
            .unwrap();
        assert!(made.success());
    }

    /// Puts a backup in the place of the store. The dispatcher must not run.
    pub fn restore(&self, from: &Path) {
        assert!(self.dispatcher.is_none());
        let data = self.directory.join("data");
        for name in ["mayfly.db-wal", "mayfly.db-shm"] {
            let _ = std::fs::remove_file(data.join(name));
        }
        std::fs::copy(from, data.join("mayfly.db")).unwrap();
    }

    /// Says that the store was restored from a backup. The dispatcher must not run.
    pub fn mark_restored(&self) {
        assert!(self.dispatcher.is_none());
        let marked = self.dispatcher_command().arg("--restored").status();
        assert!(marked.unwrap().success());
    }

    /// Renews a key with these arguments after `--rekey`; the dispatcher may run.
    pub fn rekey(&self, arguments: &[&str]) {
        let output = self.try_rekey(arguments, &[]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "--rekey {arguments:?}: {said}");
    }

    /// The same, which may fail, with more settings.
    pub fn try_rekey(
        &self,
        arguments: &[&str],
        environment: &[(&str, &str)],
    ) -> std::process::Output {
        let arguments = [&["--rekey"], arguments].concat();
        self.local(&arguments, environment)
    }

    /// Runs the dispatcher's program for one thing, with its settings and more.
    pub fn local(&self, arguments: &[&str], environment: &[(&str, &str)]) -> std::process::Output {
        self.dispatcher_command()
            .args(arguments)
            .envs(environment.iter().copied())
            .output()
            .unwrap()
    }

    /// Waits until the dispatcher has the broker.
    pub async fn broker_up(&self) {
        eventually("the dispatcher has the broker", seconds(30), async || {
            let (_, status) = self.api.get("/v1/status").await;
            (status["broker"] == "up").then_some(())
        })
        .await;
    }

    /// Starts the dispatcher (again) and does not wait for it.
    pub fn start_dispatcher_unready(&mut self) {
        self.dispatcher = Some(Process::start(&self.dispatcher_command(), &self.log()));
    }

    /// SIGKILL to the dispatcher.
    pub fn kill_dispatcher(&mut self) {
        self.dispatcher.take().unwrap().kill();
    }

    /// SIGTERM to the dispatcher.
    pub fn stop_dispatcher(&mut self) {
        self.dispatcher.take().unwrap().stop();
    }

    pub fn dispatcher(&self) -> &Process {
        self.dispatcher.as_ref().unwrap()
    }

    /// Port of the dispatcher's admin listener.
    pub fn admin_port(&self) -> u16 {
        self.admin_port
    }

    /// A page of the dispatcher's admin listener.
    pub async fn admin_text(&self, path: &str) -> String {
        text(self.admin_port, path).await
    }

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

    /// Starts an engine to which hosts are where this file says, in the way of /etc/hosts.
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

    /// Where the broker is for engines with this key file: as the user of their pool.
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

    /// Stores a base secret for a site and a dynamic secret linked to it, with these attributes
    /// beside pool, ttl 300 and SELECT on everything. Returns the dynamic secret's path.
    pub async fn secret(&self, site: &Site, pool: &str, attributes: Value) -> String {
        let base = format!("db:{}:root", site.name);
        let (status, _) = self
            .api
            .get(&format!("/v1/secrets/{base}::description"))
            .await;
        if status == 404 {
            self.api
                .create(
                    &format!("/v1/secrets/{base}"),
                    json!({"attributes": {"type": "postgresql"}, "data": site.data()}),
                )
                .await;
        }
        let path = format!("db:{}:{}", site.name, word());
        let mut all = json!({
            "grantPermissions": {"what": "SELECT", "where": "*.*"},
            "linkConfig": {"linkType": "dynamic", "linkedSecret": base},
            "pool": pool, "ttl": 300, "userPrefix": prefix(site),
        });
        for (key, value) in attributes.as_object().unwrap() {
            all[key] = value.clone();
        }
        self.api
            .create(
                &format!("/v1/secrets/{path}"),
                json!({"attributes": all, "data": {}}),
            )
            .await;
        path
    }

    /// Reads a dynamic secret; it must work.
    pub async fn issue(&self, path: &str, ttl: Option<u64>) -> Credential {
        let query = ttl.map(|ttl| format!("?ttl={ttl}")).unwrap_or_default();
        Credential::from_answer(&self.api.ok(&format!("/v1/secrets/{path}{query}")).await)
    }

    /// A lease.
    pub async fn lease(&self, id: &str) -> Value {
        self.api.ok(&format!("/v1/leases/{id}")).await
    }

    /// Waits until a lease has this state.
    pub async fn lease_becomes(&self, id: &str, state: &str, within: std::time::Duration) -> Value {
        eventually(&format!("lease {id} becomes {state}"), within, async || {
            let (_, lease) = self.api.get(&format!("/v1/leases/{id}")).await;
            (lease["state"] == state).then_some(lease)
        })
        .await
    }

    /// Waits until every end is final: each lease is shown as ended, and its create can commit no more.
    pub async fn settled(&self) {
        self.leases_left(0).await;
    }

    /// The same, except for this number of leases, which live on.
    pub async fn leases_left(&self, left: u64) {
        let within = final_within(&self.environment);
        eventually("the ends are final", within, async || {
            let status = self.api.ok("/v1/status").await;
            (open_leases(&status) == left).then_some(())
        })
        .await;
    }

    /// Waits until a credential is refused and its role gone.
    pub async fn gone(&self, site: &Site, credential: &Credential, within: std::time::Duration) {
        eventually(
            &format!("role {} is gone", credential.username),
            within,
            async || {
                site.server
                    .roles(&credential.username)
                    .await
                    .is_empty()
                    .then_some(())
            },
        )
        .await;
        assert!(credential.is_refused().await, "the login still works");
    }
}

/// The same command, to which these are the hosts: a mount that only this process has.
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

/// Leases of all pools that are not settled, by the answer of `/v1/status`.
pub fn open_leases(status: &Value) -> u64 {
    // An older dispatcher does not tell of those that settle.
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let pools = status["pools"].as_array().unwrap();
    pools
        .iter()
        .map(|pool| {
            let leases = pool["leases"].as_object().unwrap();
            leases.values().map(number).sum::<u64>() + number(&pool["settling"])
        })
        .sum()
}

/// What the roles of a site's leases begin with.
pub fn prefix(site: &Site) -> String {
    format!("{}_", site.name.trim_start_matches("site_"))
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

async fn text(port: u16, path: &str) -> String {
    Api::new(format!("http://127.0.0.1:{port}"), String::new())
        .raw(Method::GET, path, None)
        .await
        .text()
        .await
        .unwrap()
}

async fn ready(what: &str, port: u16) {
    eventually(&format!("the {what} is ready"), seconds(30), async || {
        says_ready(port).await.then_some(())
    })
    .await;
}

async fn says_ready(port: u16) -> bool {
    let listener = Api::new(format!("http://127.0.0.1:{port}"), String::new());
    let page = listener.try_text("/readyz").await;
    page.is_some_and(|page| page.trim() == "ok")
}
