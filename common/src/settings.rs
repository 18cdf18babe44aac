//! Settings of a process (the only file that names the `config` crate): compiled-in defaults,
//! then a TOML file, then the environment `MAYFLY__SECTION__KEY`, then flags. An unknown key is
//! an error that names it.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Serialize, Serializer};

use crate::private_file;
use mayfly_protocol::secret::Secret;

/// Exit status of a process with a bad configuration (`EX_USAGE` of sysexits.h).
pub const EXIT_BAD_CONFIGURATION: u8 = 64;

/// What is wrong with the configuration, with the key's name.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct SettingsError(pub String);

/// Reads the settings. `defaults` is the documented default file, compiled in; `flags` are
/// `section.key` with their values.
///
/// # Errors
/// An unreadable file, an unknown key, a value of the wrong type.
pub fn load<T: DeserializeOwned>(
    defaults: &str,
    file: Option<&Path>,
    flags: &[(&str, String)],
) -> Result<T, SettingsError> {
    // Variables that are not UTF-8 are not Mayfly's.
    let environment = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    load_from(defaults, file, environment, flags)
}

fn load_from<T: DeserializeOwned>(
    defaults: &str,
    file: Option<&Path>,
    environment: std::collections::HashMap<String, String>,
    flags: &[(&str, String)],
) -> Result<T, SettingsError> {
    let refuse = |error: config::ConfigError| SettingsError(error.to_string());
    let mut builder = config::Config::builder()
        .add_source(config::File::from_str(defaults, config::FileFormat::Toml));
    if let Some(file) = file {
        // The format does not depend on the file's name.
        builder = builder.add_source(config::File::from(file).format(config::FileFormat::Toml));
    }
    builder = builder.add_source(
        config::Environment::with_prefix("MAYFLY")
            .prefix_separator("__")
            .separator("__")
            .source(Some(environment)),
    );
    for (key, value) in flags {
        builder = builder.set_override(*key, value.as_str()).map_err(refuse)?;
    }
    builder
        .build()
        .and_then(config::Config::try_deserialize)
        .map_err(refuse)
}

/// The settings as a settings file. The type is serialized, so that no key is left out, and [`Secret`] does not
/// serialize without [`redacted`] or the like.
///
/// # Errors
/// A value that TOML does not have, such as an integer above `i64::MAX`.
pub fn effective(settings: &impl Serialize) -> Result<String, SettingsError> {
    toml::to_string(settings)
        .map_err(|error| SettingsError(format!("cannot print the settings: {error}")))
}

/// For `#[serde(serialize_with)]`: `[secret]` instead of a secret.
///
/// # Errors
/// The errors of the serializer.
pub fn redacted<S: Serializer>(secret: &Option<Secret>, serializer: S) -> Result<S::Ok, S::Error> {
    match secret {
        Some(_) => serializer.serialize_some("[secret]"),
        None => serializer.serialize_none(),
    }
}

/// The keys that a documented default file names, as `section.key`, in order; also those that it only shows in a
/// comment. A test compares them with the settings that a program prints.
#[must_use]
pub fn documented_keys(defaults: &str) -> std::collections::BTreeSet<String> {
    let mut section = String::new();
    let mut keys = std::collections::BTreeSet::new();
    for line in defaults.lines() {
        let line = line.strip_prefix("# ").unwrap_or(line);
        if let Some(name) = line.strip_prefix('[').and_then(|it| it.strip_suffix(']')) {
            section = format!("{name}.");
        } else if let Some((key, _)) = line.split_once(" = ")
            && key
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte == b'_')
        {
            keys.insert(format!("{section}{key}"));
        }
    }
    keys
}

/// A secret key and its `…_file` twin: exactly one of them must be given.
///
/// # Errors
/// Neither, both, or a file that cannot be read.
pub fn secret_or_file(
    key: &str,
    value: Option<Secret>,
    file: Option<&PathBuf>,
) -> Result<Secret, SettingsError> {
    match (value, file) {
        (Some(value), None) => Ok(value),
        (None, Some(file)) => read_secret(key, file),
        (Some(_), Some(_)) => Err(SettingsError(format!(
            "{key} and {key}_file are both given; remove one"
        ))),
        (None, None) => Err(SettingsError(format!(
            "{key} is missing; set MAYFLY__{} or the same with _FILE",
            key.replace('.', "__").to_uppercase()
        ))),
    }
}

/// A secret from a file, without the white space at its ends and a byte order mark.
///
/// # Errors
/// The file cannot be read, or others can read it; the message names the key and the path.
pub fn read_secret(key: &str, file: &Path) -> Result<Secret, SettingsError> {
    private_file::check(file).map_err(|reason| SettingsError(format!("{key}: {reason}")))?;
    let text = zeroize::Zeroizing::new(read_text(key, file)?);
    Ok(Secret::new(private_file::trimmed(&text)))
}

/// The text of a file that holds no secret.
///
/// # Errors
/// The file cannot be read; the message names the key and the path.
pub fn read_text(key: &str, file: &Path) -> Result<String, SettingsError> {
    std::fs::read_to_string(file)
        .map_err(|error| SettingsError(format!("{key}: cannot read {}: {error}", file.display())))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Settings {
        http: Http,
    }
    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Http {
        listen: String,
        limit: u32,
    }
    const DEFAULTS: &str = "[http]\nlisten = 'a'\nlimit = 1\n";

    fn with(
        environment: &[(&str, &str)],
        flags: &[(&str, String)],
    ) -> Result<Settings, SettingsError> {
        let environment = environment
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        load_from(DEFAULTS, None, environment, flags)
    }

    #[test]
    fn later_sources_win() {
        assert_eq!(with(&[], &[]).unwrap().http.listen, "a");
        let environment = [("MAYFLY__HTTP__LISTEN", "b"), ("MAYFLY__HTTP__LIMIT", "2")];
        let settings = with(&environment, &[]).unwrap();
        assert_eq!(
            (settings.http.listen.as_str(), settings.http.limit),
            ("b", 2)
        );
        let settings = with(&environment, &[("http.listen", "c".to_owned())]).unwrap();
        assert_eq!(settings.http.listen, "c");
    }

    #[test]
    fn unknown_and_mistyped_keys_are_named() {
        let unknown = with(&[("MAYFLY__HTTP__LISTNE", "b")], &[])
            .unwrap_err()
            .to_string();
        assert!(unknown.contains("listne"), "{unknown}");
        let mistyped = with(&[("MAYFLY__HTTP__LIMIT", "many")], &[])
            .unwrap_err()
            .to_string();
        assert!(mistyped.contains("limit"), "{mistyped}");
        // The variables of the command line are not settings of the programs.
        assert!(with(&[("MAYFLY_TOKEN", "t"), ("MAYFLY_ADDRESS", "a")], &[]).is_ok());
    }
}
