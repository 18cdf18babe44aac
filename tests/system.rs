//! The system under test: a dispatcher, engines, pools and secrets, as real processes.

mod engine;
mod leases;

pub use engine::Engine;
pub use leases::{open_leases, prefix};

use std::path::{Path, PathBuf};
use std::process::Command;

use reqwest::Method;

use crate::api::Api;
use crate::process::{Process, binary, free_port};
use crate::rabbit::Rabbit;
use crate::users::Part;
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
    /// The directory of the programs that are started next. `None`: those of this build.
    pub programs: Option<PathBuf>,
    /// The broker users of this system have all rights, as an earlier version needed.
    all_rights: bool,
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

    /// A dispatcher of another build. Engines that are started after it are of the same build.
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
            all_rights: programs.is_some(),
            programs,
        };
        system.start_dispatcher().await;
        let set = system
            .environment
            .iter()
            .find(|(key, _)| key == "MAYFLY__INIT__ROOT_TOKEN_FILE");
        let token = match set {
            Some((_, file)) => file.into(),
            None => system.directory.join("data/root-token"),
        };
        let token = std::fs::read_to_string(token).unwrap();
        system.api = system.api.with_token(token.trim());
        system
    }

    /// Another dispatcher, with the same broker, store and files, and more settings. It may not be ready
    /// yet. The store must be in PostgreSQL.
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
            all_rights: self.all_rights,
            programs: self.programs.clone(),
        };
        system.start_dispatcher_unready();
        system
    }

    /// Waits until the dispatcher takes requests.
    pub async fn ready(&self) {
        ready("dispatcher", self.admin_port).await;
    }

    /// Whether the dispatcher reports that it takes requests. `false` if it has ended.
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
        self.all_rights || self.programs.is_some()
    }

    /// Writes the broker's URLs again, with the present passwords of its users.
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

    /// A backup of the store (`--backup`), while the dispatcher runs.
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

    /// Marks the store as restored from a backup (`--restored`). The dispatcher must not run.
    pub fn mark_restored(&self) {
        assert!(self.dispatcher.is_none());
        let marked = self.dispatcher_command().arg("--restored").status();
        assert!(marked.unwrap().success());
    }

    /// Renews a key with these arguments after `--rekey`. The dispatcher may run.
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

    /// Runs the dispatcher's program with these arguments, its settings and more settings.
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

    /// Changes a setting of dispatchers that are started after this.
    pub fn set(&mut self, key: &str, value: &str) {
        self.environment.push((key.to_owned(), value.to_owned()));
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
