//! What lies in `deploy/` for others to start from, used as it is.

use std::path::{Path, PathBuf};
use std::process::Command;

use lapin::{Connection, ConnectionProperties};
use mayfly_tests::process::{binary, prometheus, run};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::script;
use mayfly_tests::{run_dir, word};
use serde_json::{Value, json};

/// A key file's content: 32 bytes are as good a private as a public key.
fn engine_key() -> String {
    let key = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";
    json!({"version": 1, "pool": "pool1", "privateKey": key, "dispatcherKey": key}).to_string()
}

fn deployed(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../deploy")
        .join(name)
        .canonicalize()
        .unwrap()
}

#[test]
fn settings_files_are_valid() {
    let directory = run_dir().join(format!("samples-{}", word()));
    std::fs::create_dir_all(&directory).unwrap();
    let url = directory.join("amqp-url");
    std::fs::write(&url, "amqp://mayfly:hunter2@127.0.0.1/mayfly").unwrap();
    // What systemd would put into the units' environment.
    let check = |program: &str, file: &str, environment: &[(&str, &Path)]| {
        let output = Command::new(binary(program))
            .arg("--config")
            .arg(deployed(file))
            .arg("--check-config")
            .envs(environment.iter().copied())
            .output()
            .unwrap();
        let told = String::from_utf8(output.stdout).unwrap();
        assert!(
            output.status.success(),
            "{file}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(!told.contains("hunter2"));
        told
    };
    let told = check(
        "mayfly-dispatcher",
        "systemd/dispatcher.toml",
        &[("MAYFLY__AMQP__URL_FILE", &url)],
    );
    assert!(told.contains("/var/lib/mayfly"), "{told}");
    let system = ("MAYFLY__AMQP__URL_FILE", url.as_path());
    let key = directory.join("pool.key");
    std::fs::write(&key, engine_key()).unwrap();
    let told = check(
        "mayfly-engine",
        "systemd/engine.toml",
        &[system, ("MAYFLY__POOL__KEY_FILE", &key)],
    );
    // Prometheus has to know the port.
    assert!(
        told.contains("pool1") && told.contains("127.0.0.1:8472"),
        "{told}"
    );
}

#[test]
fn units_are_valid_and_closed() {
    for (unit, program) in [
        ("mayfly-dispatcher.service", "mayfly-dispatcher"),
        ("mayfly-engine@.service", "mayfly-engine"),
    ] {
        let directory = run_dir().join(format!("units-{}", word()));
        std::fs::create_dir_all(&directory).unwrap();
        let text = std::fs::read_to_string(deployed("systemd").join(unit)).unwrap();
        let installed = format!("/usr/local/bin/{program} ");
        assert!(text.contains(&installed));
        // Where it is here.
        let here = text.replace(&installed, &format!("{} ", binary(program).display()));
        let file = directory.join(unit);
        std::fs::write(&file, here).unwrap();
        let file = file.to_str().unwrap();
        for arguments in [
            &["verify", "--man=no", file][..],
            // Of 10: 2.0 and more is refused.
            &["security", "--offline=yes", "--threshold=20", file],
        ] {
            let output = Command::new("systemd-analyze")
                .args(arguments)
                .output()
                .unwrap();
            let told = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{arguments:?}: {told}");
            assert!(told.is_empty() || arguments[0] == "security", "{told}");
        }
    }
}

/// The compose file's own secrets, settings and mounts, without its containers.
#[tokio::test]
async fn the_compose_file_fits_the_programs() {
    let secrets = run_dir().join(format!("compose-{}", word()));
    let setup = deployed("compose/setup.sh");
    run(&setup, &[secrets.to_str().unwrap()]);
    std::fs::write(secrets.join("engine/pool.key"), engine_key()).unwrap();

    let text = std::fs::read_to_string(deployed("compose.yaml")).unwrap();
    let mut file: serde_yaml_ng::Value = serde_yaml_ng::from_str(&text).unwrap();
    file.apply_merge().unwrap();
    let file: Value = serde_json::to_value(&file).unwrap();
    let mut programs = 0;
    for (name, service) in file["services"].as_object().unwrap() {
        let mut mounts = Vec::new();
        for mount in service["volumes"].as_array().unwrap() {
            let parts: Vec<_> = mount.as_str().unwrap().split(':').collect();
            let (from, to) = (parts[0], parts[1]);
            if !from.starts_with('.') {
                assert!(!file["volumes"][from].is_null(), "{name}: {from}");
                continue;
            }
            assert_eq!(parts.get(2), Some(&"ro"), "{name}: {from}");
            let here = match from.strip_prefix("./compose/secrets/") {
                Some(secret) => secrets.join(secret),
                None => deployed("").join(from),
            };
            assert!(here.exists(), "{name}: {from} is not there");
            mounts.push((to.to_owned(), here.to_str().unwrap().to_owned()));
        }
        for port in service["ports"].as_array().into_iter().flatten() {
            assert!(port.as_str().unwrap().starts_with("127.0.0.1:"), "{name}");
        }
        let image = service["image"].as_str().unwrap();
        let Some((program, _)) = image.split_once(":${MAYFLY_VERSION") else {
            continue;
        };
        programs += 1;
        assert_eq!(service["read_only"], true);
        let mut command = Command::new(binary(program));
        command.arg("--check-config");
        for (key, value) in service["environment"].as_object().unwrap() {
            let value = value.as_str().unwrap();
            let here = mounts.iter().find(|(to, _)| to == value);
            command.env(key, here.map_or(value, |(_, here)| here));
        }
        let output = command.output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name}: {told}");
    }
    assert_eq!(programs, 3);

    // The passwords are those of the definitions.
    let rabbit = Rabbit::own();
    let directory = rabbit.directory().to_str().unwrap();
    let definitions = secrets.join("definitions.json");
    let import = ["ctl", directory, "-q", "import_definitions"];
    let arguments = [&import[..], &[definitions.to_str().unwrap()]].concat();
    run(&script("rabbitmq.sh"), &arguments);
    let url = rabbit.url();
    let place = url.split_once('@').unwrap().1.split_once('/').unwrap().0;
    for user in ["dispatcher", "engine"] {
        let url = std::fs::read_to_string(secrets.join(format!("{user}/amqp-url"))).unwrap();
        let here = url.trim().replace("rabbitmq:5672", place);
        let properties = ConnectionProperties::default();
        Connection::connect(&here, properties).await.unwrap();
    }

    let promtool = Command::new(prometheus("promtool"))
        .args(["check", "config", "--syntax-only"])
        .arg(deployed("compose/prometheus.yml"))
        .output()
        .unwrap();
    assert!(promtool.status.success(), "{promtool:?}");
}
