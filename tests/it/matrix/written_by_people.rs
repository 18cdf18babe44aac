//! Hosts and files as people and their tools write them.

use mayfly_tests::cli::Cli;
use mayfly_tests::postgres::{Admin, Server};
use mayfly_tests::system::System;
use serde_json::{Value, json};

/// An IPv6 address has brackets in a URL, but no brackets in a parameter of its own (PostgreSQL
/// documentation, "Connection Strings" and "Environment Variables").
#[tokio::test]
async fn an_address_of_version_6_is_bare_where_libpq_wants_it_so() {
    let system = System::start().await;
    let server = Server::own("listen_addresses = '127.0.0.1,::1'\nfsync = off");
    let hba = server.directory().join("data/pg_hba.conf");
    let site = server.site(Admin::CreateRole).await;
    let lines = std::fs::read_to_string(&hba).unwrap();
    assert!(lines.contains("::1/128"), "{lines}");
    let pool = system.pool().await;
    let _engine = system.engine(&pool).await;
    let mut data = site.data();
    data["host"] = json!("[::1]");
    let base = format!("db:{}:root", site.name);
    system
        .api
        .create(
            &format!("/v1/secrets/{base}"),
            json!({"attributes": {"type": "postgresql"}, "data": data}),
        )
        .await;
    let path = system.secret(&site, &pool, json!({})).await;
    let answer = system.api.ok(&format!("/v1/secrets/{path}")).await;
    assert_eq!(answer["data"]["host"], "::1", "{answer}");
    let url = answer["data"]["url"].as_str().unwrap();
    assert!(url.contains("@[::1]:"), "{url}");
    assert!(system.issue(&path, None).await.login().await.is_ok());

    // psql uses libpq: by its variables, and by the URL.
    let cli = Cli { system: &system };
    let psql = server.program("psql");
    let counted = format!(
        "{psql} -XAtc 'SELECT count(*) FROM items' && {psql} -XAt \"$DATABASE_URL\" -c 'SELECT inet_server_addr()'",
        psql = psql.display()
    );
    let said = cli.ok(&["exec", &path, "--", "sh", "-c", &counted]);
    assert_eq!(said, "2\n::1");
}

/// Editors and shells of Windows begin a file with a byte order mark.
#[tokio::test]
async fn a_byte_order_mark_is_no_part_of_a_secret_file() {
    let system = System::start().await;
    let site = Server::pg15().site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let marked = |name: &str, text: &str| {
        let file = system.directory.join(name);
        std::fs::write(&file, format!("\u{feff}{text}\r\n")).unwrap();
        file
    };

    // An engine: its key file and its broker's URL.
    let key = std::fs::read_to_string(system.key_file(&pool)).unwrap();
    let key = marked("marked.key", &key);
    let user = mayfly_tests::users::Part::Engine(pool.clone());
    let url = marked("marked-url", &system.rabbit.url_for(&user));
    let engine = system.engine_with(
        &pool,
        &[
            ("MAYFLY__POOL__KEY_FILE", key.to_str().unwrap()),
            ("MAYFLY__AMQP__URL_FILE", url.to_str().unwrap()),
        ],
    );
    engine.ready().await;

    // The command line: its token, and what it reads as JSON.
    let cli = Cli { system: &system };
    let token = marked("marked-token", &system.api.token);
    let body = json!({"path": format!("db:{}:root", site.name), "attributes": {"type": "postgresql"}, "data": site.data()});
    let body = marked("marked-body", &body.to_string());
    let run = |arguments: &[&str]| {
        let token = token.to_str().unwrap();
        let mut command = cli.command(&[arguments, &["--token-file", token]].concat());
        let output = command.env_remove("MAYFLY_TOKEN").output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments:?}: {said}");
        String::from_utf8(output.stdout).unwrap()
    };
    run(&[
        "secret",
        "create",
        "--body",
        &format!("@{}", body.display()),
    ]);
    let path = system.secret(&site, &pool, json!({})).await;
    let answer: Value = serde_json::from_str(&run(&["secret", "read", &path])).unwrap();
    assert!(answer["data"]["leaseId"].is_string(), "{answer}");
}

/// The dispatcher: its root token, its master key and its file of settings.
#[tokio::test]
async fn a_byte_order_mark_is_no_part_of_the_dispatchers_files() {
    let directory = mayfly_tests::run_dir().join(format!("marked-{}", mayfly_tests::word()));
    std::fs::create_dir_all(&directory).unwrap();
    let token = "a-root-token-that-was-made-before-the-first-start";
    let file = directory.join("token");
    std::fs::write(&file, format!("\u{feff}{token}\r\n")).unwrap();
    let name = file.to_str().unwrap();
    let mut system = System::start_with(
        mayfly_tests::rabbit::Rabbit::shared(),
        &[("MAYFLY__INIT__ROOT_TOKEN_FILE", name)],
    )
    .await;
    system.api = system.api.with_token(token);
    system.api.ok("/v1/status").await;

    let key = system.directory.join("data/master-key");
    system.stop_dispatcher();
    let text = std::fs::read_to_string(&key).unwrap();
    std::fs::write(&key, format!("\u{feff}{text}")).unwrap();
    system.start_dispatcher().await;
    system.api.ok("/v1/secrets").await;
}
