//! What others must not see: keys on the disk, the operator's messages for a read token, tokens in the process list.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use mayfly_tests::cli::Cli;
use mayfly_tests::postgres::Server;
use mayfly_tests::process::binary;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::System;
use mayfly_tests::{run_dir, word};
use serde_json::{Value, json};

/// A key file's content: any 32 bytes are a private key, and a public one.
const KEY: &str = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";

fn mode(file: &Path, bits: u32) {
    std::fs::set_permissions(file, std::fs::Permissions::from_mode(bits)).unwrap();
}

struct Files {
    directory: PathBuf,
}

impl Files {
    fn new() -> Self {
        let directory = run_dir().join(format!("private-{}", word()));
        std::fs::create_dir_all(&directory).unwrap();
        let files = Self { directory };
        let engine_key =
            json!({"version": 1, "pool": "pool1", "privateKey": KEY, "dispatcherKey": KEY});
        files.write("amqp-url", "amqp://u:p@127.0.0.1:1/%2f");
        files.write(
            "store-url",
            "postgres://u:p@127.0.0.1:1/mayfly?sslmode=disable",
        );
        files.write("pool.key", &engine_key.to_string());
        files.write("master-key", KEY);
        files.write("root-token", &"t".repeat(40));
        files
    }

    fn write(&self, name: &str, text: &str) {
        let file = self.directory.join(name);
        std::fs::write(&file, text).unwrap();
        mode(&file, 0o600);
    }

    fn checked(&self, program: &str, settings: &[(&str, &str)]) -> std::process::Output {
        let mut command = Command::new(binary(program));
        command
            .arg("--check-config")
            .env("MAYFLY__AMQP__URL_FILE", self.directory.join("amqp-url"));
        for (key, name) in settings {
            command.env(key, self.directory.join(name));
        }
        command.output().unwrap()
    }
}

/// No program starts with a secret that others can read; the error names the file and what helps.
#[test]
fn a_key_that_others_can_read_is_refused() {
    let files = Files::new();
    let dispatcher = [
        ("MAYFLY__SEAL__KEY_FILE", "master-key"),
        ("MAYFLY__INIT__ROOT_TOKEN_FILE", "root-token"),
        ("MAYFLY__STORE__URL_FILE", "store-url"),
    ];
    let engine = [("MAYFLY__POOL__KEY_FILE", "pool.key")];
    let all: [(&str, &[(&str, &str)]); 2] = [
        ("mayfly-dispatcher", &dispatcher),
        ("mayfly-engine", &engine),
    ];
    for (program, settings) in all {
        let fine = files.checked(program, settings);
        assert!(fine.status.success(), "{program}: {fine:?}");
        let names = settings.iter().map(|(_, name)| *name).chain(["amqp-url"]);
        for name in names {
            let file = files.directory.join(name);
            for bits in [0o644, 0o640, 0o604, 0o622] {
                mode(&file, bits);
                let refused = files.checked(program, settings);
                let said = String::from_utf8(refused.stderr).unwrap();
                assert_eq!(refused.status.code(), Some(64), "{name} {bits:o}: {said}");
                let help = format!("chmod 600 {}", file.display());
                assert!(said.contains(&help), "{name} {bits:o}: {said}");
            }
            // Kubernetes and systemd give a file that belongs to root and is readable by the program's group.
            mode(&file, 0o600);
        }
    }
}

/// A start writes its keys into new files, not through files that others have put there.
#[tokio::test]
async fn keys_are_written_past_links_and_open_files() {
    let mut system = System::start().await;
    system.kill_dispatcher();
    // A new store is a new installation, and needs a virtual host without an owner.
    system.rabbit.wipe();
    let data = system.directory.join("data");
    let elsewhere = system.directory.join("elsewhere");
    std::fs::remove_dir_all(&data).unwrap();
    std::fs::create_dir(&data).unwrap();
    std::fs::write(&elsewhere, "before").unwrap();
    mode(&elsewhere, 0o666);
    for name in ["master-key.new", "root-token.new"] {
        symlink(&elsewhere, data.join(name)).unwrap();
    }
    system.start_dispatcher().await;
    assert_eq!(std::fs::read_to_string(&elsewhere).unwrap(), "before");
    for name in ["master-key", "root-token", "mayfly.db"] {
        let found = std::fs::symlink_metadata(data.join(name)).unwrap();
        assert!(found.is_file(), "{name}");
        assert_eq!(found.permissions().mode() & 0o777, 0o600, "{name}");
    }
}

/// A read token gets a code and its meaning. Only the root token gets the address of the database and the name of its
/// admin. A command gets neither the token nor its file.
#[tokio::test]
async fn the_operators_words_and_tokens_are_the_operators() {
    let (system, site, path, _engine) = Scenario::on(Server::pg15()).start().await;
    let asked = json!({"read": [path], "ttl": 600});
    let token = system.api.create("/v1/tokens", asked).await["token"].clone();
    let reader = system.api.with_token(token.as_str().unwrap());

    let cli = Cli { system: &system };
    let file = system.directory.join("token");
    std::fs::write(&file, token.as_str().unwrap()).unwrap();
    let mut exec = cli.command(&["exec", &path, "--", "env"]);
    exec.env_remove("MAYFLY_TOKEN")
        .env("MAYFLY_TOKEN_FILE", &file)
        .env("MAYFLY__AMQP__URL", "amqp://u:hunter2@h/v");
    let seen = String::from_utf8(exec.output().unwrap().stdout).unwrap();
    assert!(
        seen.contains("PGPASSWORD=") && seen.contains("MAYFLY_ADDRESS="),
        "{seen}"
    );
    assert!(
        !seen.contains("MAYFLY_TOKEN") && !seen.contains("hunter2"),
        "{seen}"
    );

    let data = site.data();
    let base = format!("/v1/secrets/db:{}:root", site.name);
    let mut wrong = data.clone();
    wrong["password"] = json!("wrong");
    let (status, body) = system.api.put(&base, json!({"data": wrong})).await;
    assert_eq!(status, 200, "{body}");
    let read = format!("/v1/secrets/{path}");
    let words = |body: &Value| body["message"].as_str().unwrap().to_owned();
    let (status, told) = system.api.get(&read).await;
    assert_eq!(
        (status, &told["error"]),
        (502, &json!("database_refused_login"))
    );
    let admin = data["username"].as_str().unwrap();
    assert!(words(&told).contains(admin), "{told}");
    let (status, told) = reader.get(&read).await;
    assert_eq!(
        (status, &told["error"]),
        (502, &json!("database_refused_login"))
    );
    let port = data["port"].to_string();
    for hidden in [admin, data["host"].as_str().unwrap(), port.as_str()] {
        assert!(!words(&told).contains(hidden), "{told}");
    }
    // With the trace the operator finds the message in the log.
    let told = words(&told);
    let trace = told.rsplit(' ').next().unwrap();
    let log = std::fs::read_to_string(system.log()).unwrap();
    let logged = log
        .lines()
        .any(|line| line.contains(trace) && line.contains("not issued") && line.contains(admin));
    assert!(logged, "{told}");
}
