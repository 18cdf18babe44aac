//! The place of the lease store, as settings and flags name it.

use std::path::{Path, PathBuf};

use mayfly_common::settings::{SettingsError, redacted, secret_or_file};
use mayfly_protocol::secret::Secret;
use serde::{Deserialize, Serialize, Serializer};

use crate::store::{Backend, Url};

/// Name of the SQLite store, below the data directory.
const STORE_FILE: &str = "mayfly.db";

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StoreUrl {
    #[serde(serialize_with = "without_password")]
    pub(super) url: Option<Secret>,
    pub(super) url_file: Option<PathBuf>,
}

/// A SQLite URL as it is, and `[secret]` for all others: they may hold a password.
fn without_password<S: Serializer>(url: &Option<Secret>, to: S) -> Result<S::Ok, S::Error> {
    match url.as_ref().map(Secret::expose) {
        Some(url) if url.starts_with("sqlite:") => to.serialize_some(url),
        _ => redacted(url, to),
    }
}

/// The place that `--copy-store` names: `sqlite:PATH`, or a file with a URL. A URL with a password must not be on
/// the command line.
///
/// # Errors
/// What is wrong.
pub(crate) fn copy_target(to: &str, data_dir: &Path) -> Result<Backend, SettingsError> {
    let store = match to.split_once(':') {
        Some(("sqlite", _)) => StoreUrl {
            url: Some(Secret::new(to)),
            url_file: None,
        },
        Some(("postgres" | "postgresql", _)) => {
            return Err(SettingsError(
                "--copy-store: others can see a password on the command line; write the URL to a file of mode 0600 and name the file".to_owned(),
            ));
        }
        _ => StoreUrl {
            url: None,
            url_file: Some(PathBuf::from(to)),
        },
    };
    backend(&store, data_dir)
        .map_err(|SettingsError(reason)| SettingsError(format!("--copy-store: {reason}")))
}

pub(super) fn backend(store: &StoreUrl, data_dir: &Path) -> Result<Backend, SettingsError> {
    if store.url.is_none() && store.url_file.is_none() {
        return Ok(Backend::Sqlite(data_dir.join(STORE_FILE)));
    }
    let url = secret_or_file("store.url", store.url.clone(), store.url_file.as_ref())?;
    // The URL may hold a password, so it is not repeated.
    let refuse = |why: &str| Err(SettingsError(format!("store.url {why}")));
    match url.expose().split_once(':') {
        Some(("sqlite", "")) => refuse("lacks the path: sqlite:PATH"),
        Some(("sqlite", STORE_FILE)) => Ok(Backend::Sqlite(data_dir.join(STORE_FILE))),
        Some(("sqlite", path)) => Ok(Backend::Sqlite(PathBuf::from(path))),
        Some(("postgres" | "postgresql", _)) => match Url::parse(&url) {
            Ok(url) => Ok(Backend::Postgres(Box::new(url))),
            Err(why) => refuse(&why),
        },
        Some(_) | None => refuse("must be sqlite:PATH or postgres://…"),
    }
}
