//! The engine's settings, checked before anything is opened.

use std::path::{Path, PathBuf};

use mayfly_common::broker::{AmqpSettings, Login};
use mayfly_common::serve::{ListenSettings, Listening};
use mayfly_common::settings::{self, SettingsError, read_secret};
use mayfly_common::telemetry::LogSettings;
use mayfly_common::trace::TraceSettings;
use mayfly_protocol::names::{EngineName, PoolName};
use mayfly_protocol::seal::{EngineKey, KeyPair, KeyRing, PublicKey};
use serde::{Deserialize, Serialize};

use crate::pg::{Connections, Hosts};

/// The documented default file.
pub(crate) const DEFAULTS: &str = include_str!("default.toml");

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Written {
    #[serde(default)]
    amqp: AmqpSettings,
    #[serde(default)]
    pool: Pool,
    #[serde(default)]
    engine: Engine,
    admin: ListenSettings,
    log: LogSettings,
    traces: TraceSettings,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Pool {
    name: Option<PoolName>,
    key_file: Option<PathBuf>,
    hosts: Option<String>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Engine {
    name: Option<EngineName>,
    connections_per_server: usize,
}

/// Settings after all checks.
pub(crate) struct Settings {
    pub(crate) login: Login,
    pub(crate) pool: PoolName,
    pub(crate) pool_keys: KeyRing,
    /// The dispatcher's public keys: at least one, the newest first.
    pub(crate) dispatcher_keys: Vec<PublicKey>,
    /// The database hosts that this engine connects to.
    pub(crate) hosts: Hosts,
    /// Maximum number of connections to one server.
    pub(crate) connections: Connections,
    pub(crate) name: EngineName,
    pub(crate) admin: Listening,
    pub(crate) log: LogSettings,
    pub(crate) traces: TraceSettings,
    /// The settings as a settings file, with secrets redacted.
    pub(crate) effective: String,
}

impl Settings {
    /// Reads and checks the settings.
    ///
    /// # Errors
    /// A message that names the key.
    pub(crate) fn load(
        file: Option<&Path>,
        flags: &[(&str, String)],
    ) -> Result<Self, SettingsError> {
        let mut written: Written = settings::load(DEFAULTS, file, flags)?;
        written.traces.check()?;
        let admin = Listening::admin(&written.admin)?;
        let hosts = written.pool.hosts.clone().map(Hosts::try_from).transpose();
        let hosts = hosts.map_err(SettingsError)?.unwrap_or_default();
        let connections = Connections::try_from(written.engine.connections_per_server);
        let connections = connections.map_err(SettingsError)?;
        let login = Login::new(written.amqp.clone())?;
        let keys = Keys::read(written.pool.key_file.as_deref())?;
        match &written.pool.name {
            Some(name) if *name != keys.pool => {
                return Err(SettingsError(format!(
                    "pool.name is {name}, but pool.key_file belongs to pool {}",
                    keys.pool
                )));
            }
            _ => written.pool.name = Some(keys.pool.clone()),
        }
        let name = written.engine.name.take();
        let name = name.unwrap_or_else(|| EngineName::random(&host_name()));
        written.engine.name = Some(name.clone());
        Ok(Self {
            login,
            pool: keys.pool,
            pool_keys: keys.ring,
            dispatcher_keys: keys.dispatcher,
            hosts,
            connections,
            name,
            admin,
            effective: settings::effective(&written)?,
            log: written.log,
            traces: written.traces,
        })
    }
}

/// What the pool's key file holds.
struct Keys {
    pool: PoolName,
    ring: KeyRing,
    dispatcher: Vec<PublicKey>,
}

impl Keys {
    fn read(file: Option<&Path>) -> Result<Self, SettingsError> {
        let file = file.ok_or_else(|| {
            SettingsError(
                "pool.key_file is missing; `mayfly pool create NAME --key-file FILE` makes one, set MAYFLY__POOL__KEY_FILE to it".to_owned(),
            )
        })?;
        let bad = |reason: &dyn std::fmt::Display| {
            SettingsError(format!(
                "pool.key_file: {} is not an engine key: {reason}",
                file.display()
            ))
        };
        let text = read_secret("pool.key_file", file)?;
        // The error names only the position, because the text is the key.
        let key: EngineKey = serde_json::from_str(text.expose())
            .map_err(|error| bad(&format!("line {}, column {}", error.line(), error.column())))?;
        if key.version != 1 {
            return Err(bad(&format!("version {} is unknown", key.version)));
        }
        Ok(Self {
            ring: KeyRing {
                newest: KeyPair::from_base64(&key.private_key).map_err(|error| bad(&error))?,
                previous: key
                    .previous_keys
                    .iter()
                    .map(KeyPair::from_base64)
                    .collect::<Result<_, _>>()
                    .map_err(|error| bad(&error))?,
            },
            dispatcher: std::iter::once(&key.dispatcher_key)
                .chain(&key.previous_dispatcher_keys)
                .map(|key| PublicKey::from_base64(key))
                .collect::<Result<_, _>>()
                .map_err(|error| bad(&error))?,
            pool: key.pool,
        })
    }
}

fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|name| name.trim().to_owned())
        .ok()
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "engine".to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_default_file_is_sound_and_says_what_is_missing() {
        let error = Settings::load(None, &[]).err().unwrap().to_string();
        assert!(error.contains("amqp.url"), "{error}");
        let error = Settings::load(None, &[("amqp.url", "amqp://localhost".to_owned())])
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("pool.key_file"), "{error}");
        let flags = [("pool.hosts", "db1,10.0.0.0/64".to_owned())];
        let error = Settings::load(None, &flags).err().unwrap().to_string();
        assert!(
            error.contains("pool.hosts") && error.contains("10.0.0.0/64"),
            "{error}"
        );
        for wrong in ["1", "201", "many"] {
            let flags = [("engine.connections_per_server", wrong.to_owned())];
            let error = Settings::load(None, &flags).err().unwrap().to_string();
            assert!(error.contains("connections_per_server"), "{error}");
        }
    }

    /// `--check-config` prints each key that the default file documents, and no other key.
    #[test]
    fn every_documented_key_is_printed() {
        let all = "amqp.url amqp.url_file amqp.ca_file amqp.client_cert_file amqp.client_key_file \
                   pool.name pool.key_file pool.hosts engine.name \
                   admin.tls.cert_file admin.tls.key_file admin.tls.client_ca_file";
        let flags: Vec<_> = all
            .split_whitespace()
            .map(|key| (key, "x".to_owned()))
            .collect();
        let written: Written = settings::load(DEFAULTS, None, &flags).unwrap();
        let printed = settings::effective(&written).unwrap();
        assert_eq!(
            settings::documented_keys(&printed),
            settings::documented_keys(DEFAULTS)
        );
        assert!(printed.contains("url = \"[secret]\""), "{printed}");
    }
}
