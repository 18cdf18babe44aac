//! Plain text to another machine needs a setting that allows it.

use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use mayfly_tests::process::binary;
use mayfly_tests::{run_dir, word};
use serde_json::json;

use super::{KEY, pki, said};

/// Runs a program's check of its settings; returns its refusal.
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

/// A listener that other machines reach, RabbitMQ on another machine and a dispatcher on another machine need TLS, or
/// a setting that allows plain text.
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
        // A listener with TLS is allowed too.
        let (name, value, _) = admin;
        let tls = [
            (name, value),
            ("MAYFLY__ADMIN__TLS__CERT_FILE", &*certificate),
            ("MAYFLY__ADMIN__TLS__KEY_FILE", &*key),
        ];
        checked(program, &tls).unwrap();
        // Nobody else may read the key.
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
    // With the permission the only failure is that nothing answers.
    let allowed = [&elsewhere[..], &["--allow-plaintext"]].concat();
    assert_eq!(asked(&allowed, None).0, Some(5));
    assert_eq!(asked(&elsewhere, Some("true")).0, Some(5));
    assert_eq!(
        asked(&["--address", "https://mayfly.invalid:1"], None).0,
        Some(5)
    );
    assert_eq!(asked(&["--address", "http://127.0.0.1:1"], None).0, Some(5));
}
