//! TLS of the API and of the admin listeners: who is believed, how a certificate is renewed, who is slow,
//! and that nothing goes without it to another machine unless that is allowed by name.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use mayfly_tests::pki::Pki;
use mayfly_tests::process::{Process, binary, free_port};
use mayfly_tests::{eventually, run_dir, seconds, word};
use reqwest::{Certificate, Client, ClientBuilder, Identity};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

/// A key file's content: 32 bytes are as good a private as a public key.
const KEY: &str = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";
/// The beginning of a handshake: 5 bytes of the record, 4 of the hello, and not what they promise.
const HALF_A_HELLO: &[u8] = &[22, 3, 1, 2, 0, 1, 0, 1, 252];
/// What a handshake and a head may take together, and more for a machine that is busy.
const CLOSED_WITHIN: Duration = Duration::from_secs(30);

/// An authority, with a certificate for this machine and one of a client.
fn pki() -> Pki {
    let pki = Pki::new();
    pki.certificate("server", "localhost", Some("DNS:localhost,IP:127.0.0.1"));
    pki.certificate("client", "app", Some("DNS:app"));
    pki
}

/// A client that believes these authorities alone.
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
    /// What answers once its listeners do: an engine is never ready without a broker.
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

    /// Asks the API something that needs the token.
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

    /// The command line, with its login in a place of its own.
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

/// Both listeners of a dispatcher by these files.
fn both(files: &Files) -> Vec<(String, PathBuf)> {
    [files.settings("HTTP"), files.settings("ADMIN")].concat()
}

/// The command line trusts the authority it is given, keeps that with its login, and says what helps.
#[tokio::test]
async fn the_command_line_speaks_tls() {
    let pki = pki();
    let client = trusting(&[&pki]).build().unwrap();
    let dispatcher = Program::start("mayfly-dispatcher", &both(&Files::of(&pki)));
    dispatcher.healthy(&client).await;
    assert_eq!(dispatcher.ask(&client).await.unwrap(), 200);
    let page = dispatcher.page(&client, "/readyz").await.unwrap();
    assert_eq!(page, "ok\n");

    let https = format!("https://{}", dispatcher.http);
    let token = dispatcher.directory.join("data/root-token");
    let token = token.to_str().unwrap();
    let root = pki.file("root.crt");
    let login = ["login", "--address", &https, "--token-file", token];
    let refused = dispatcher.cli(&login);
    assert_eq!(refused.status.code(), Some(5), "{}", said(&refused));
    assert!(
        said(&refused).contains("UnknownIssuer") && said(&refused).contains("--ca-file"),
        "{}",
        said(&refused)
    );
    let trusting = [&login[..], &["--ca-file", root.to_str().unwrap()]].concat();
    let done = dispatcher.cli(&trusting);
    assert!(done.status.success(), "{}", said(&done));
    // The login knows the address and the authority.
    let listed = dispatcher.cli(&["token", "list", "-e", "json"]);
    assert!(listed.status.success(), "{}", said(&listed));

    // Without TLS a client hears what is wrong.
    let plain = format!("http://{}", dispatcher.http);
    let refused = dispatcher.cli(&["token", "list", "--address", &plain, "--token-file", token]);
    assert_eq!(refused.status.code(), Some(1), "{}", said(&refused));
    assert!(said(&refused).contains("https://"), "{}", said(&refused));

    let engine = Files::of(&pki).settings("ADMIN");
    let engine = Program::start("mayfly-engine", &engine);
    engine.healthy(&client).await;
    let page = engine.page(&client, "/metrics").await.unwrap();
    let line = "mayfly_tls_last_reload_successful{listener=\"admin\"} 1";
    assert!(page.contains(line), "{page}");
}

/// Clients that ask without a pause while the certificate is renewed, and while its files are broken.
#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_renewed_without_a_failed_request() {
    let (old, new) = (pki(), pki());
    let files = Files::of(&old);
    let dispatcher = Arc::new(Program::start("mayfly-dispatcher", &both(&files)));
    let both = trusting(&[&old, &new]).build().unwrap();
    dispatcher.healthy(&both).await;
    let (asked, stop) = (
        Arc::new(AtomicU32::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    let mut asking = JoinSet::new();
    for n in 0..4 {
        // Half of them make a connection for each request.
        let client = trusting(&[&old, &new]).pool_max_idle_per_host(n % 2);
        let client = client.build().unwrap();
        let (dispatcher, asked, stop) = (dispatcher.clone(), asked.clone(), stop.clone());
        asking.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                assert_eq!(dispatcher.ask(&client).await.unwrap(), 200);
                asked.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
    }
    // A client of its own each time: its connection begins now.
    let believes = async |pki: &Pki| {
        let client = trusting(&[pki]).build().unwrap();
        dispatcher.ask(&client).await.is_ok()
    };
    assert!(believes(&old).await && !believes(&new).await);
    dispatcher.reloaded(&both, true).await;
    // Half of it: the certificate is not the key's.
    files.put(&new, "crt");
    dispatcher.reloaded(&both, false).await;
    assert!(believes(&old).await && !believes(&new).await);
    files.put(&new, "key");
    dispatcher.reloaded(&both, true).await;
    assert!(believes(&new).await && !believes(&old).await);
    let broken: [&dyn Fn(); 4] = [
        &|| files.write("key", "no key"),
        &|| files.write("crt", ""),
        &|| std::fs::remove_file(files.path("crt")).unwrap(),
        &|| {
            let mode = std::fs::Permissions::from_mode(0o644);
            std::fs::set_permissions(files.path("key"), mode).unwrap();
        },
    ];
    for (n, break_it) in broken.into_iter().enumerate() {
        break_it();
        dispatcher.reloaded(&both, false).await;
        assert!(believes(&new).await, "broken {n}");
        files.put(&new, "crt");
        files.put(&new, "key");
        dispatcher.reloaded(&both, true).await;
    }
    let log = dispatcher.log();
    for words in [
        "http.tls.key_file is not the key of",
        "http.tls.key_file is not a PEM private key",
        "http.tls.cert_file has no PEM certificate",
        "http.tls.cert_file: cannot read",
        "chmod 600",
        "admin.tls.key_file",
    ] {
        assert!(log.contains(words), "{words} is not in {log}");
    }
    assert!(!log.contains("BEGIN"), "{log}");
    stop.store(true, Ordering::Relaxed);
    asking.join_all().await;
    let asked = asked.load(Ordering::Relaxed);
    assert!(asked > 50, "only {asked} requests");
}

/// A handshake by openssl, in one version of TLS.
fn handshake(to: SocketAddr, pki: &Pki, version: &str) -> (bool, String) {
    let output = Command::new("openssl")
        // Its own limits are set aside: it is the server that refuses.
        .args(["s_client", "-brief", "-cipher", "ALL:@SECLEVEL=0", version])
        .args(["-connect", &to.to_string(), "-CAfile"])
        .arg(pki.file("root.crt"))
        .arg("-cert")
        .arg(pki.file("client.crt"))
        .arg("-key")
        .arg(pki.file("client.key"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    (output.status.success(), said(&output))
}

/// Where clients are asked for a certificate, one of another authority does not do, nor none. And no
/// version of TLS before 1.2.
#[tokio::test]
async fn clients_show_a_certificate_and_speak_1_2() {
    let (pki, other) = (pki(), pki());
    let mut settings = both(&Files::of(&pki));
    settings.push((
        "MAYFLY__HTTP__TLS__CLIENT_CA_FILE".to_owned(),
        pki.file("root.crt"),
    ));
    let dispatcher = Program::start("mayfly-dispatcher", &settings);
    let nobody = trusting(&[&pki]).build().unwrap();
    dispatcher.healthy(&nobody).await;
    let known = trusting(&[&pki]).identity(identity(&pki)).build().unwrap();
    let unknown = trusting(&[&pki]).identity(identity(&other));
    let unknown = unknown.build().unwrap();
    assert_eq!(dispatcher.ask(&known).await.unwrap(), 200);
    assert!(dispatcher.ask(&nobody).await.is_err());
    assert!(dispatcher.ask(&unknown).await.is_err());

    let https = format!("https://{}", dispatcher.http);
    let file = |pki: &Pki, name: &str| pki.file(name).to_str().unwrap().to_owned();
    let token = dispatcher.directory.join("data/root-token");
    let (root, certificate, key) = (
        file(&pki, "root.crt"),
        file(&pki, "client.crt"),
        file(&pki, "client.key"),
    );
    let login = ["login", "--address", &https, "--ca-file", &root];
    let login = [&login[..], &["--token-file", token.to_str().unwrap()]].concat();
    let refused = dispatcher.cli(&login);
    assert_eq!(refused.status.code(), Some(5), "{}", said(&refused));
    let shown = [
        "--client-cert-file",
        &certificate,
        "--client-key-file",
        &key,
    ];
    let done = dispatcher.cli(&[&login[..], &shown[..]].concat());
    assert!(done.status.success(), "{}", said(&done));
    let listed = dispatcher.cli(&["token", "list", "-e", "json"]);
    assert!(listed.status.success(), "{}", said(&listed));

    for (version, is_taken) in [("-tls1_1", false), ("-tls1_2", true), ("-tls1_3", true)] {
        let (taken, told) = handshake(dispatcher.http, &pki, version);
        assert_eq!(taken, is_taken, "{version}: {told}");
        if !is_taken {
            // That it is the server's word.
            assert!(told.contains("SSL alert number"), "{told}");
        }
    }
}

/// A connection from 127.0.`site`.1.
async fn connect(to: SocketAddr, site: u8) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket
        .bind((Ipv4Addr::new(127, 0, site, 1), 0).into())
        .unwrap();
    socket.connect(to).await.unwrap()
}

/// A connection whose handshake is done.
async fn encrypted(pki: &Pki, to: SocketAddr) -> tokio_rustls::client::TlsStream<TcpStream> {
    let mut roots = rustls::RootCertStore::empty();
    let pem = pki.text("root.crt");
    roots
        .add(CertificateDer::from_pem_slice(pem.as_bytes()).unwrap())
        .unwrap();
    let config = rustls::ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").unwrap();
    let stream = connect(to, 1).await;
    let connector = TlsConnector::from(Arc::new(config));
    connector.connect(name, stream).await.unwrap()
}

/// Waits until the other side has closed.
async fn closed(mut stream: impl AsyncReadExt + Unpin) {
    let mut said = Vec::new();
    let end = stream.read_to_end(&mut said);
    // A reset is an end too.
    let _ = tokio::time::timeout(CLOSED_WITHIN, end)
        .await
        .expect("it is not closed");
}

/// Clients that never finish a handshake, or a head after it, or that do not read: they are closed in time,
/// and nobody else waits for them. Without limits on the handshake twenty of these stop the API for good.
#[tokio::test(flavor = "multi_thread")]
async fn half_a_handshake_shuts_nobody_out() {
    let pki = pki();
    let mut settings = both(&Files::of(&pki));
    settings.push(("MAYFLY__HTTP__MAX_CONNECTIONS".to_owned(), "20".into()));
    let dispatcher = Program::start("mayfly-dispatcher", &settings);
    let client = trusting(&[&pki]).pool_max_idle_per_host(0).build().unwrap();
    dispatcher.healthy(&client).await;

    // With room for all they are closed by the time they take.
    let mut few = JoinSet::new();
    let begun = Instant::now();
    for sent in [b"".as_slice(), HALF_A_HELLO] {
        let mut stream = connect(dispatcher.http, 1).await;
        stream.write_all(sent).await.unwrap();
        few.spawn(closed(stream));
    }
    let mut stream = encrypted(&pki, dispatcher.http).await;
    stream
        .write_all(b"GET /v1/status HTTP/1.1\r\n")
        .await
        .unwrap();
    few.spawn(closed(stream));
    let deaf = encrypted(&pki, dispatcher.http).await;
    few.spawn(async move {
        let mut deaf = deaf;
        let ask = b"GET /v1/status HTTP/1.1\r\nhost: x\r\n\r\n".repeat(100);
        // The answers fill what there is for them, and then the questions do.
        let asking = async { while deaf.write_all(&ask).await.is_ok() {} };
        tokio::time::timeout(seconds(90), asking)
            .await
            .expect("who does not read is not closed");
    });
    few.join_all().await;
    assert!(begun.elapsed() > seconds(5), "they had room and time");

    // Without room those who come later take their places.
    let mut many = JoinSet::new();
    for n in 0..100 {
        let to = if n % 3 == 0 {
            dispatcher.admin
        } else {
            dispatcher.http
        };
        let mut stream = connect(to, 1 + n % 8).await;
        // It may have been closed to make room already.
        let sent: &[u8] = if n % 2 == 0 { b"" } else { HALF_A_HELLO };
        let _ = stream.write_all(sent).await;
        many.spawn(closed(stream));
    }
    for _ in 0..10 {
        let begun = Instant::now();
        assert_eq!(dispatcher.ask(&client).await.unwrap(), 200);
        dispatcher.page(&client, "/healthz").await.unwrap();
        let took = begun.elapsed();
        assert!(took < seconds(20), "{took:?}");
    }
    many.join_all().await;

    // And a stop does not wait for them.
    let held = connect(dispatcher.http, 1).await;
    let begun = Instant::now();
    let mut dispatcher = dispatcher;
    dispatcher.process.take().unwrap().stop();
    assert!(begun.elapsed() < CLOSED_WITHIN);
    drop(held);
}

/// Runs a program's check of its settings; what it says where it refuses.
fn checked(program: &str, settings: &[(&str, &str)]) -> Result<(), String> {
    let directory = run_dir().join(format!("checked-{}", word()));
    std::fs::create_dir_all(&directory).unwrap();
    let key = directory.join("pool.key");
    let text = json!({"version": 1, "pool": "pool1", "privateKey": KEY, "dispatcherKey": KEY});
    std::fs::write(&key, text.to_string()).unwrap();
    let mut command = Command::new(binary(program));
    command
        .arg("--check-config")
        .env("MAYFLY__AMQP__URL", "amqps://u:hunter2@rabbitmq");
    if program == "mayfly-engine" {
        command.env("MAYFLY__POOL__KEY_FILE", key);
    }
    let output = command.envs(settings.iter().copied()).output().unwrap();
    assert!(!said(&output).contains("hunter2"));
    match output.status.code() {
        Some(0) => Ok(()),
        Some(64) => Err(said(&output)),
        code => panic!("{code:?}: {}", said(&output)),
    }
}

/// A listener that other machines reach, RabbitMQ on another machine and a dispatcher on another machine
/// need TLS, or a word for going without.
#[test]
fn plaintext_is_asked_for_by_name() {
    let pki = pki();
    let file = |name: &str| pki.file(name).to_str().unwrap().to_owned();
    let (certificate, key) = (file("server.crt"), file("server.key"));
    let amqp = (
        "MAYFLY__AMQP__URL",
        "amqp://u:hunter2@rabbitmq:5672",
        "MAYFLY__AMQP__ALLOW_PLAINTEXT",
    );
    let http = (
        "MAYFLY__HTTP__LISTEN",
        "0.0.0.0:8470",
        "MAYFLY__HTTP__ALLOW_PLAINTEXT",
    );
    let admin = (
        "MAYFLY__ADMIN__LISTEN",
        "[::]:8471",
        "MAYFLY__ADMIN__ALLOW_PLAINTEXT",
    );
    for (program, cases) in [
        ("mayfly-dispatcher", &[amqp, http, admin][..]),
        ("mayfly-engine", &[amqp, admin]),
    ] {
        checked(program, &[]).unwrap();
        for (name, value, allow) in cases {
            let refused = checked(program, &[(name, value)]).unwrap_err();
            assert!(refused.contains(allow), "{program}: {refused}");
            let refused = checked(program, &[(name, value), (allow, "false")]);
            assert!(refused.is_err(), "{program} {name}");
            checked(program, &[(name, value), (allow, "true")]).unwrap();
        }
        // TLS is the other way out.
        let (name, value, _) = admin;
        let tls = [
            (name, value),
            ("MAYFLY__ADMIN__TLS__CERT_FILE", &*certificate),
            ("MAYFLY__ADMIN__TLS__KEY_FILE", &*key),
        ];
        checked(program, &tls).unwrap();
        // Its key is nobody else's.
        for bits in [0o644, 0o640, 0o604] {
            let mode = std::fs::Permissions::from_mode(bits);
            std::fs::set_permissions(&key, mode).unwrap();
            let refused = checked(program, &tls).unwrap_err();
            let help = format!("chmod 600 {key}");
            let is_named = refused.contains("admin.tls.key_file") && refused.contains(&help);
            assert!(is_named, "{program} {bits:o}: {refused}");
        }
        let mode = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(&key, mode).unwrap();
    }

    let asked = |arguments: &[&str], allowed: Option<&str>| {
        let mut command = Command::new(binary("mayfly"));
        command.args(["token", "list"]).args(arguments);
        command.env("MAYFLY_TOKEN", "hunter2");
        if let Some(allowed) = allowed {
            command.env("MAYFLY_ALLOW_PLAINTEXT", allowed);
        }
        let output = command.stdin(Stdio::null()).output().unwrap();
        assert!(!said(&output).contains("hunter2"));
        (output.status.code(), said(&output))
    };
    let elsewhere = ["--address", "http://mayfly.invalid:1"];
    for allowed in [None, Some("false"), Some("")] {
        let (code, said) = asked(&elsewhere, allowed);
        assert_eq!(code, Some(2), "{said}");
        assert!(said.contains("--allow-plaintext"), "{said}");
    }
    // Then it is only that nobody is there.
    let allowed = [&elsewhere[..], &["--allow-plaintext"]].concat();
    assert_eq!(asked(&allowed, None).0, Some(5));
    assert_eq!(asked(&elsewhere, Some("true")).0, Some(5));
    assert_eq!(
        asked(&["--address", "https://mayfly.invalid:1"], None).0,
        Some(5)
    );
    assert_eq!(asked(&["--address", "http://127.0.0.1:1"], None).0, Some(5));
}
