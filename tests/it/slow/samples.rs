//! Examples in `deploy/`, used as they are.

use std::path::{Path, PathBuf};
use std::process::Command;

use mayfly_tests::process::binary;
use mayfly_tests::{run_dir, word};
use serde_json::json;

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
    // The environment that systemd would give the units.
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
        ("mayfly-backup.service", "mayfly-dispatcher"),
        ("mayfly-engine@.service", "mayfly-engine"),
    ] {
        let directory = run_dir().join(format!("units-{}", word()));
        std::fs::create_dir_all(&directory).unwrap();
        let text = std::fs::read_to_string(deployed("systemd").join(unit)).unwrap();
        let installed = format!("/usr/local/bin/{program} ");
        assert!(text.contains(&installed));
        // The program's place in this build.
        let here = text.replace(&installed, &format!("{} ", binary(program).display()));
        let file = directory.join(unit);
        std::fs::write(&file, here).unwrap();
        let file = file.to_str().unwrap();
        for arguments in [
            &["verify", "--man=no", file][..],
            // The exposure has a scale from 0 to 10. The limit is 2.0.
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
