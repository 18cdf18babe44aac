//! Settings as a file has them, and what is wrong with them.

use super::*;
use clap::Parser;
use mayfly_common::settings::documented_keys;

fn with(toml: &str) -> Result<Settings, SettingsError> {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("settings");
    std::fs::write(&file, toml).unwrap();
    let flags = Flags::parse_from(["x", "--config", file.to_str().unwrap()]);
    Settings::load(&flags)
}

const AMQP: &str = "[amqp]\nurl = 'amqp://u:hunter2@localhost:1/%2f'\n";

#[test]
fn the_defaults_are_settings() {
    let settings = with(AMQP).unwrap();
    assert_eq!(
        settings.place.backend.to_string(),
        "./mayfly-data/mayfly.db"
    );
    assert_eq!(
        settings.place.key_file,
        PathBuf::from("./mayfly-data/master-key")
    );
    assert!(!settings.effective.contains("hunter2"));
    let again = with(
        &settings
            .effective
            .replace("[secret]", "amqp://u:p@localhost:1/%2f"),
    )
    .unwrap();
    assert_eq!(
        again.effective, settings.effective,
        "what is printed is a settings file"
    );
}

#[test]
fn what_is_wrong_is_named() {
    for (toml, key) in [
        ("", "amqp.url"),
        ("[http]\nlisten = 'x'", "amqp.url"),
        (&format!("{AMQP}[http]\nlisten = 'x'"), "http.listen"),
        (&format!("{AMQP}[http]\nlisen = 'x'"), "lisen"),
        (
            &format!("{AMQP}[http]\nlisten = '0.0.0.0:8470'"),
            "http.allow_plaintext",
        ),
        (
            &format!("{AMQP}[admin]\nlisten = '[::]:8471'"),
            "admin.allow_plaintext",
        ),
        (
            "[amqp]\nurl = 'amqp://u:hunter2@h:1/%2f'",
            "amqp.allow_plaintext",
        ),
        (
            &format!("{AMQP}[http.tls]\ncert_file = '/absent'"),
            "http.tls.key_file",
        ),
        (
            &format!("{AMQP}[store]\nurl = 'postgres://u:p@h:x/d'"),
            "store.url",
        ),
        (&format!("{AMQP}[store]\nurl = 'mysql:x'"), "store.url"),
        (
            &format!("{AMQP}[http]\nmax_connections_per_address = 0"),
            "http.max_connections_per_address",
        ),
        (
            &format!("{AMQP}[limits]\nreads_per_caller = 0"),
            "limits.reads_per_caller",
        ),
        (
            &format!("{AMQP}[create]\ndeadline_seconds = 0"),
            "create.deadline_seconds",
        ),
    ] {
        let error = with(toml).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
    }
}

/// `--check-config` prints each key that the default file documents, and no other key.
#[test]
fn every_documented_key_is_printed() {
    let all = "amqp.url amqp.url_file amqp.ca_file amqp.client_cert_file amqp.client_key_file \
               store.url store.url_file seal.key_file seal.next_key_file init.root_token_file \
               http.tls.cert_file http.tls.key_file http.tls.client_ca_file \
               admin.tls.cert_file admin.tls.key_file admin.tls.client_ca_file";
    let all = all.split_whitespace();
    let flags: Vec<_> = all
        .map(|key| (key, "postgres://u:hunter2@h/d".to_owned()))
        .collect();
    let raw: Raw = load(DEFAULTS, None, &flags).unwrap();
    assert_eq!(
        documented_keys(&effective(&raw).unwrap()),
        documented_keys(DEFAULTS)
    );
}

#[test]
fn no_password_is_printed() {
    let settings = with(&format!("{AMQP}[store]\nurl = 'postgres://u:hunter2@h/d'")).unwrap();
    assert!(!settings.effective.contains("hunter2"));
    assert!(settings.effective.contains("[store]\nurl = \"[secret]\""));
}
