//! TLS of the API and of the admin listeners.

mod authorities;
mod plaintext;
mod renewal;
mod slow_handshakes;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use mayfly_tests::pki::Pki;
use mayfly_tests::process::{Process, binary, free_port};
use mayfly_tests::{eventually, run_dir, seconds, word};
use reqwest::{Certificate, Client, ClientBuilder, Identity};
use serde_json::json;

/// A key file's content: 32 bytes are as good a private as a public key.
const KEY: &str = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";

/// An authority, with a certificate for this machine and one of a client.
fn pki() -> Pki {
    let pki = Pki::new();
    pki.certificate("server", "localhost", Some("DNS:localhost,IP:127.0.0.1"));
    pki.certificate("client", "app", Some("DNS:app"));
    pki
}

/// A client that trusts only these authorities.
fn trusting(pkis: &[&Pki]) -> ClientBuilder {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let roots = pkis.iter().map(|pki| pki.text("root.crt"));
    let roots: Vec<_> = roots
        .map(|pem| Certificate::from_pem(pem.as_bytes()).unwrap())
        .collect();
    Client::builder()
        .no_proxy()
        .timeout(seconds(30))
        .tls_certs_only(roots)
}

fn identity(pki: &Pki) -> Identity {
    let pem = pki.text("client.crt") + &pki.text("client.key");
    Identity::from_pem(pem.as_bytes()).unwrap()
}

/// The files of a certificate, as a program is given them.
struct Files(PathBuf);

impl Files {
    fn of(pki: &Pki) -> Self {
        let files = Self(run_dir().join(format!("tls-{}", word())));
        std::fs::create_dir_all(&files.0).unwrap();
        files.put(pki, "crt");
        files.put(pki, "key");
        files
    }

    fn path(&self, ending: &str) -> PathBuf {
        self.0.join(format!("server.{ending}"))
    }

    /// Puts a file of this authority into its place, whole.
    fn put(&self, pki: &Pki, ending: &str) {
        self.write(ending, &pki.text(&format!("server.{ending}")));
    }

    fn write(&self, ending: &str, text: &str) {
        let beside = self.0.join("new");
        std::fs::write(&beside, text).unwrap();
        std::fs::rename(beside, self.path(ending)).unwrap();
    }

    fn settings(&self, section: &str) -> Vec<(String, PathBuf)> {
        let key = |name: &str| format!("MAYFLY__{section}__TLS__{name}");
        vec![
            (key("CERT_FILE"), self.path("crt")),
            (key("KEY_FILE"), self.path("key")),
        ]
    }
}

/// A program with listeners that need no broker.
struct Program {
    process: Option<Process>,
    directory: PathBuf,
    http: SocketAddr,
    admin: SocketAddr,
    /// A page that answers when its listeners do: an engine is never ready without a broker.
    probe: &'static str,
}

impl Program {
    fn start(name: &str, settings: &[(String, PathBuf)]) -> Self {
        let directory = run_dir().join(format!("https-{}", word()));
        std::fs::create_dir_all(&directory).unwrap();
        let [http, admin] = [(); 2].map(|()| (Ipv4Addr::LOCALHOST, free_port()).into());
        let mut command = Command::new(binary(name));
        command
            .env("MAYFLY__AMQP__URL", "amqp://127.0.0.1:1")
            .env("MAYFLY__ADMIN__LISTEN", format!("{admin}"))
            .env("MAYFLY__LOG__LEVEL", "debug")
            .envs(settings.iter().cloned());
        let probe = match name {
            "mayfly-engine" => {
                let key =
                    json!({"version": 1, "pool": "pool1", "privateKey": KEY, "dispatcherKey": KEY});
                let file = directory.join("pool.key");
                std::fs::write(&file, key.to_string()).unwrap();
                command.env("MAYFLY__POOL__KEY_FILE", file);
                "/healthz"
            }
            _ => {
                command
                    .env("MAYFLY__HTTP__LISTEN", format!("{http}"))
                    .env("MAYFLY__DATA_DIR", directory.join("data"));
                "/readyz"
            }
        };
        let process = Some(Process::start(&command, &directory.join("log")));
        Self {
            process,
            directory,
            http,
            admin,
            probe,
        }
    }

    /// A page of the admin listener, by TLS.
    async fn page(&self, client: &Client, path: &str) -> Option<String> {
        let address = format!("https://{}{path}", self.admin);
        let answer = client.get(address).send().await.ok()?;
        answer.text().await.ok()
    }

    async fn healthy(&self, client: &Client) {
        eventually("it answers by TLS", seconds(20), async || {
            let page = self.page(client, self.probe).await?;
            (page == "ok\n").then_some(())
        })
        .await;
    }

    fn token(&self) -> String {
        let token = std::fs::read_to_string(self.directory.join("data/root-token")).unwrap();
        token.trim().to_owned()
    }

    /// A call of the API that needs the token.
    async fn ask(&self, client: &Client) -> reqwest::Result<u16> {
        let address = format!("https://{}/v1/tokens", self.http);
        let asked = client.get(address).bearer_auth(self.token());
        asked.send().await.map(|answer| answer.status().as_u16())
    }

    /// Waits until the metric says of each listener whether its files are in use.
    async fn reloaded(&self, client: &Client, is_current: bool) {
        let wanted = ["admin", "http"].map(|listener| {
            let value = u8::from(is_current);
            format!("mayfly_tls_last_reload_successful{{listener=\"{listener}\"}} {value}")
        });
        eventually(&wanted[1], seconds(20), async || {
            let page = self.page(client, "/metrics").await?;
            wanted.iter().all(|line| page.contains(line)).then_some(())
        })
        .await;
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.join("log")).unwrap()
    }

    /// The command line, with its login in a directory of its own.
    fn cli(&self, arguments: &[&str]) -> Output {
        Command::new(binary("mayfly"))
            .args(arguments)
            .env("XDG_CONFIG_HOME", self.directory.join("config"))
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The settings of both listeners of a dispatcher with these files.
fn both(files: &Files) -> Vec<(String, PathBuf)> {
    [files.settings("HTTP"), files.settings("ADMIN")].concat()
}
