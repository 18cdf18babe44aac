//! Servers in the middle, or in the place of the server: none gets the admin's password, or what replaces it, unless
//! the base secret allows that.

use mayfly_tests::pki::Pki;
use mayfly_tests::postgres::{Admin, Server, Site};
use mayfly_tests::rogue::{Rogue, Wants};
use mayfly_tests::system::{Engine, System};
use mayfly_tests::word;
use serde_json::{Value, json};

const PASSWORD: &str = "correct horse battery staple";

struct Furnished {
    system: System,
    pool: String,
    _engine: Engine,
}

async fn furnished() -> Furnished {
    let system = System::start().await;
    let pool = system.pool().await;
    let engine = system.engine(&pool).await;
    Furnished {
        system,
        pool,
        _engine: engine,
    }
}

impl Furnished {
    /// A base secret of this data and a dynamic one linked to it; the paths of both.
    async fn secret(&self, data: Value) -> (String, String) {
        let base = format!("rogue:{}:root", word());
        let path = format!("rogue:{}:dyn", word());
        let api = &self.system.api;
        api.create(
            &format!("/v1/secrets/{base}"),
            json!({"attributes": {"type": "postgresql"}, "data": data}),
        )
        .await;
        api.create(
            &format!("/v1/secrets/{path}"),
            json!({"attributes": {"grantPermissions": {"what": "SELECT", "where": "*.*"},
                "linkConfig": {"linkType": "dynamic", "linkedSecret": base},
                "pool": self.pool, "ttl": 60}}),
        )
        .await;
        (base, path)
    }

    /// The answer to a read that fails.
    async fn refused(&self, data: Value) -> (String, String) {
        let (_, path) = self.secret(data).await;
        let (status, body) = self.system.api.get(&format!("/v1/secrets/{path}")).await;
        assert_eq!(status, 502, "{body}");
        (
            body["error"].as_str().unwrap().to_owned(),
            body["message"].as_str().unwrap().to_owned(),
        )
    }
}

fn at(port: u16, more: Value) -> Value {
    let mut data =
        json!({"host": "127.0.0.1", "port": port, "username": "admin", "password": PASSWORD});
    for (name, value) in more.as_object().unwrap() {
        data[name] = value.clone();
    }
    data
}

fn has(heard: &[u8], text: &str) -> bool {
    heard
        .windows(text.len())
        .any(|part| part == text.as_bytes())
}

/// Each asks for another method; with TLS by a certificate of an unknown authority, and without TLS. They get the
/// client's first message, and not a byte more: by a read, a check and a rotation.
#[tokio::test]
async fn a_rogue_server_learns_nothing() {
    let it = furnished().await;
    for (wants, tls, sslmode) in [
        (Wants::Password, true, "require"),
        (Wants::Password, true, "prefer"),
        (Wants::Password, false, "prefer"),
        (Wants::Password, false, "disable"),
        (Wants::Md5, true, "require"),
        (Wants::Md5, false, "disable"),
        (Wants::Scram, true, "require"),
        (Wants::Scram, true, "prefer"),
        (Wants::Nothing, true, "require"),
    ] {
        let rogue = Rogue::start(wants, tls).await;
        let what = format!("{wants:?}, tls {tls}, {sslmode}");
        let (base, path) = it.secret(at(rogue.port, json!({"sslmode": sslmode}))).await;
        let (status, body) = it.system.api.get(&format!("/v1/secrets/{path}")).await;
        assert_eq!(
            (status, body["error"].as_str()),
            (502, Some("database_refused_login")),
            "{what}: {body}"
        );
        let said = body["message"].as_str().unwrap();
        let way_out = match wants {
            Wants::Password => "\"auth\": \"password\"",
            Wants::Md5 => "\"auth\": \"md5\"",
            _ => "verify-full",
        };
        assert!(said.contains(way_out), "{what}: {said}");
        assert!(rogue.logins() > 0, "{what}");
        let (status, body) = it
            .system
            .api
            .post(&format!("/v1/secrets/{path}::check"), json!({}))
            .await;
        assert_eq!((status, &body["ok"]), (200, &json!(false)), "{what}");
        let (status, body) = it
            .system
            .api
            .post(&format!("/v1/secrets/{base}::rotate"), json!({}))
            .await;
        assert!(status >= 400, "{what}: {body}");
        // A trial with a random password shows that the server accepts any login. The engine stops after that.
        let heard = rogue.heard();
        let is_little = match wants {
            Wants::Nothing => heard.chunks(5).all(|one| one == b"X\0\0\0\x04"),
            _ => heard.is_empty(),
        };
        assert!(is_little, "{what}: {:?}", String::from_utf8_lossy(&heard));
    }
    // If TLS is required, a server without TLS gets no login. If the name is verified, a server with another name
    // gets none.
    let rogue = Rogue::start(Wants::Scram, false).await;
    let data = at(rogue.port, json!({"sslmode": "require"}));
    assert!(it.refused(data).await.1.contains("offers no TLS"));
    let rogue = Rogue::start(Wants::Password, true).await;
    let data = at(rogue.port, json!({"sslmode": "verify-full"}));
    let (_, said) = it.refused(data).await;
    assert!(
        said.contains("certificate") || said.contains("authorities"),
        "{said}"
    );
    assert_eq!(rogue.logins(), 0);
}

/// If the base secret allows a method, it is used: so the rogue servers do ask correctly.
#[tokio::test]
async fn a_weaker_login_must_be_asked_for() {
    let it = furnished().await;
    for (wants, more, heard) in [
        (Wants::Password, json!({"auth": "password"}), PASSWORD),
        (Wants::Md5, json!({"auth": "md5"}), "md5"),
        (Wants::Scram, json!({"channelBinding": "disable"}), ",p="),
    ] {
        let rogue = Rogue::start(wants, true).await;
        let mut data = at(rogue.port, more);
        data["sslmode"] = json!("require");
        it.refused(data).await;
        assert!(has(&rogue.heard(), heard), "{wants:?}");
    }
    // If the base secret allows MD5, a request for the weaker method (a password in clear) is refused.
    let rogue = Rogue::start(Wants::Password, true).await;
    it.refused(at(rogue.port, json!({"auth": "md5"}))).await;
    assert!(rogue.heard().is_empty());
}

/// A server in the middle passes the admin's login on to the real one, and would then have its session: without TLS
/// on its other side, where nothing is bound, and with TLS, where the server sees that the login is bound to another
/// connection.
#[tokio::test]
async fn a_login_is_not_passed_on() {
    let it = furnished().await;
    let site = Server::pg15().site(Admin::CreateRole).await;
    for tls in [false, true] {
        let port = site.server.port();
        let rogue = Rogue::start(Wants::Between { port, tls }, true).await;
        let mut data = site.data();
        data["port"] = json!(rogue.port);
        data["sslmode"] = json!("require");
        let (error, said) = it.refused(data.clone()).await;
        assert_eq!(error, "database_refused_login", "{said}");
        if tls {
            assert!(has(&rogue.heard(), "p=tls-server-end-point"), "{said}");
            assert!(!has(&rogue.heard(), "SELECT"), "{said}");
        } else {
            assert!(said.contains("channel binding"), "{said}");
            assert!(rogue.heard().is_empty());
        }
        // If the base secret allows this method, the login works, and the rogue server sees the password.
        data["channelBinding"] = json!("disable");
        let (_, path) = it.secret(data).await;
        let (status, body) = it.system.api.get(&format!("/v1/secrets/{path}")).await;
        assert_eq!(status, 200, "{body}");
        assert!(has(&rogue.heard(), "CREATE ROLE"));
    }
}

/// Real servers that ask for a password in clear, or for MD5.
#[tokio::test]
async fn lines_of_pg_hba_that_are_not_scram() {
    let it = furnished().await;
    let server = Server::own("");
    let site = server.site(Admin::CreateRole).await;
    let md5 = server.site(Admin::CreateRole).await;
    let root = server.superuser("postgres").await;
    let literal = md5.password.replace('\\', "\\\\").replace('\'', "\\'");
    root.batch_execute(&format!(
        "SET password_encryption = 'md5'; ALTER ROLE {} PASSWORD E'{literal}'",
        md5.name
    ))
    .await
    .unwrap();
    server
        .put_hba(&format!(
            "host all {} 127.0.0.1/32 password\nhost all {} 127.0.0.1/32 md5",
            site.name, md5.name
        ))
        .await;
    for (site, auth, method) in [(&site, "password", "in clear"), (&md5, "md5", "md5")] {
        let (error, said) = it.refused(site.data()).await;
        assert_eq!(error, "database_refused_login", "{said}");
        assert!(said.contains(&format!("\"auth\": \"{auth}\"")), "{said}");
        let mut data = site.data();
        data["auth"] = json!(auth);
        let (_, path) = it.secret(data).await;
        let (status, body) = it.system.api.get(&format!("/v1/secrets/{path}")).await;
        assert_eq!(status, 200, "{body}");
        let (_, answer) = it
            .system
            .api
            .post(&format!("/v1/secrets/{path}::check"), json!({}))
            .await;
        let login = finding(&answer, "login");
        assert!(
            login["message"].as_str().unwrap().contains(method),
            "{login}"
        );
    }
}

fn finding<'a>(answer: &'a Value, check: &str) -> &'a Value {
    let list = answer["findings"].as_array().unwrap();
    let found = list.iter().find(|one| one["check"] == check);
    found.unwrap_or_else(|| panic!("{check} in {answer:#}"))
}

/// Off loopback the default is a login that is bound to TLS without verification: it works, and a check recommends
/// verify-full, which works with the machine's authorities alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_of_another_machine() {
    let system = System::start().await;
    let pool = system.pool().await;
    let server = Server::own("");
    let site = server.site(Admin::CreateRole).await;
    let pki = Pki::new();
    pki.certificate("server", "server", Some("DNS:db.example"));
    pki.install(&server);
    let root = server.superuser("postgres").await;
    root.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    let hosts = system.directory.join("hosts");
    std::fs::write(&hosts, "127.0.0.1 db.example other.example localhost\n").unwrap();
    let authorities = pki.file("root.crt");
    let trusting = [("SSL_CERT_FILE", authorities.to_str().unwrap())];
    let engine = system.engine_with_hosts(&pool, &hosts, &trusting);
    engine.ready().await;
    let it = Furnished {
        system,
        pool,
        _engine: engine,
    };
    let data = |host: &str, more: Value| {
        let mut data = at(site.server.port(), more);
        for name in ["username", "password", "database"] {
            data[name] = site.data()[name].clone();
        }
        data["host"] = json!(host);
        data
    };
    for (data, tls_ok, said) in [
        (data("db.example", json!({})), false, "verify-full"),
        (
            data("db.example", json!({"sslrootcert": pki.text("root.crt")})),
            false,
            "not its name",
        ),
        (
            data("db.example", json!({"sslmode": "prefer"})),
            false,
            "verify-full",
        ),
        (
            data("db.example", json!({"sslmode": "disable"})),
            false,
            "verify-full",
        ),
        (
            data("127.0.0.1", json!({"sslmode": "require"})),
            true,
            "not verified",
        ),
        (
            data("db.example", json!({"sslmode": "verify-full"})),
            true,
            "the server verified",
        ),
    ] {
        let (base, _) = it.secret(data.clone()).await;
        let (_, answer) = it
            .system
            .api
            .post(&format!("/v1/secrets/{base}::check"), json!({}))
            .await;
        let tls = finding(&answer, "tls");
        let message = tls["message"].as_str().unwrap();
        assert!(tls["ok"] == tls_ok && message.contains(said), "{answer:#}");
        let bound = data["sslmode"] != "disable";
        let login = finding(&answer, "login");
        assert_eq!(login["ok"], true);
        assert_eq!(
            login["message"].as_str().unwrap().contains("bound"),
            bound,
            "{login}"
        );
    }
    // Another name is another server; so is a server with an unknown authority.
    let (_, said) = it
        .refused(data("other.example", json!({"sslmode": "verify-full"})))
        .await;
    assert!(said.contains("not valid for name"), "{said}");
    let empty = it.system.directory.join("empty.pem");
    std::fs::write(&empty, "").unwrap();
    let none = [
        ("SSL_CERT_FILE", empty.to_str().unwrap()),
        ("SSL_CERT_DIR", ""),
    ];
    let pool = it.system.pool().await;
    let engine = it.system.engine_with_hosts(&pool, &hosts, &none);
    engine.ready().await;
    let it = Furnished {
        system: it.system,
        pool,
        _engine: engine,
    };
    let (_, said) = it
        .refused(data("db.example", json!({"sslmode": "verify-full"})))
        .await;
    assert!(
        said.contains("no certificate authorities") && said.contains("SSL_CERT_FILE"),
        "{said}"
    );
}

/// A caller who may change a base secret cannot send its password to another place.
#[tokio::test]
async fn a_kept_password_does_not_follow_an_address() {
    let it = furnished().await;
    let site: Site = Server::pg15().site(Admin::CreateRole).await;
    let rogue = Rogue::start(Wants::Password, false).await;
    let path = it.system.secret(&site, &it.pool, json!({})).await;
    it.system.issue(&path, Some(60)).await;
    let base = format!("/v1/secrets/db:{}:root", site.name);
    for change in [
        json!({"port": rogue.port, "sslmode": "disable"}),
        json!({"port": rogue.port, "sslmode": "disable", "auth": "password"}),
        json!({"host": format!("127.0.0.1:{},127.0.0.1", rogue.port)}),
        json!({"auth": "password"}),
        json!({"sslmode": "disable"}),
        json!({"username": "postgres"}),
    ] {
        let body = json!({"data": change});
        let (status, answer) = it.system.api.put(&base, body).await;
        assert_eq!(
            (status, answer["error"].as_str()),
            (400, Some("invalid")),
            "{change}: {answer}"
        );
        assert!(answer["errors"]["data.password"].is_array(), "{answer}");
    }
    it.system.issue(&path, Some(60)).await;
    assert_eq!(rogue.logins(), 0);
    let cli = mayfly_tests::cli::Cli { system: &it.system };
    let data = json!({"port": rogue.port}).to_string();
    let name = format!("db:{}:root", site.name);
    let said = cli.fails(1, &["secret", "update", &name, "--data", &data]);
    assert!(
        said.contains("data.password") && said.contains("port"),
        "{said}"
    );
    // With the password in it, the update shows that its author knows the password.
    let body =
        json!({"data": {"port": rogue.port, "sslmode": "disable", "password": site.password}});
    let (status, answer) = it.system.api.put(&base, body).await;
    assert_eq!(status, 200, "{answer}");
    let (status, _) = it.system.api.get(&format!("/v1/secrets/{path}")).await;
    assert_eq!(status, 502);
    assert!(rogue.logins() > 0 && rogue.heard().is_empty());
}

/// No machine is in the middle of a Unix socket: SCRAM without TLS is enough.
#[tokio::test]
async fn a_server_by_its_unix_socket() {
    let it = furnished().await;
    // The path is relative to the server's data directory.
    let site = Server::own("unix_socket_directories = '.'")
        .site(Admin::CreateRole)
        .await;
    let mut data = site.data();
    data["host"] = json!(site.server.directory().join("data"));
    let (_, path) = it.secret(data.clone()).await;
    let credential = it.system.issue(&path, Some(60)).await;
    assert!(credential.login().await.is_ok());
    let (_, answer) = it
        .system
        .api
        .post(&format!("/v1/secrets/{path}::check"), json!({}))
        .await;
    assert_eq!(finding(&answer, "tls")["ok"], true, "{answer:#}");
    assert_eq!(finding(&answer, "login")["message"], "scram-sha-256");
    // A TLS setting does not concern a Unix socket, as in libpq, also if another host is named with it.
    data["sslmode"] = json!("require");
    let (_, path) = it.secret(data.clone()).await;
    it.system.issue(&path, Some(60)).await;
    let directory = data["host"].as_str().unwrap().to_owned();
    data["host"] = json!([directory, "db2.example"]);
    let (_, path) = it.secret(data.clone()).await;
    it.system.issue(&path, Some(60)).await;
    // A login that must be bound to a connection is refused without a binding.
    data["host"] = json!(directory);
    data["channelBinding"] = json!("require");
    let (_, said) = it.refused(data.clone()).await;
    assert!(said.contains("channelBinding"), "{said}");
}
