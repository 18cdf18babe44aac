//! The engine's settings, checked before anything is opened.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use mayfly_common::broker::{AmqpSettings, Login};
use mayfly_common::serve::{Listening, TlsSettings};
use mayfly_common::settings::{self, SettingsError, read_secret};
use mayfly_common::telemetry::LogSettings;
use mayfly_common::trace::TraceSettings;
use mayfly_protocol::names::{EngineName, PoolName};
use mayfly_protocol::seal::{EngineKey, KeyPair, KeyRing, PublicKey};
use serde::Deserialize;

use crate::pg::{Connections, Hosts};

/// The documented default file.
pub(crate) const DEFAULTS: &str = include_str!("default.toml");

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    #[serde(default)]
    amqp: AmqpSettings,
    #[serde(default)]
    pool: Pool,
    #[serde(default)]
    engine: Engine,
    admin: Admin,
    log: LogSettings,
    traces: TraceSettings,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pool {
    name: Option<PoolName>,
    key_file: Option<PathBuf>,
    #[serde(default)]
    hosts: Hosts,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Engine {
    name: Option<EngineName>,
    #[serde(default)]
    connections_per_server: Connections,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Admin {
    listen: SocketAddr,
    #[serde(default)]
    tls: TlsSettings,
    allow_plaintext: bool,
}

/// Settings that can be used as they are.
pub(crate) struct Settings {
    pub(crate) login: Login,
    pub(crate) pool: PoolName,
    pub(crate) pool_keys: KeyRing,
    /// The newest first; there is one at least.
    pub(crate) dispatcher_keys: Vec<PublicKey>,
    /// The database hosts it connects to.
    pub(crate) hosts: Hosts,
    /// Most connections to one server.
    pub(crate) connections: Connections,
    pub(crate) name: EngineName,
    pub(crate) admin: Listening,
    pub(crate) log: LogSettings,
    pub(crate) traces: TraceSettings,
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
        let written: Written = settings::load(DEFAULTS, file, flags)?;
        written.traces.check()?;
        let login = Login::new(written.amqp)?;
        let key_file = written.pool.key_file.ok_or_else(|| {
            SettingsError(
                "pool.key_file is missing; `mayfly pool create NAME --key-file FILE` makes one, set MAYFLY__POOL__KEY_FILE to it".to_owned(),
            )
        })?;
        let bad = |reason: &dyn std::fmt::Display| {
            SettingsError(format!(
                "pool.key_file: {} is not an engine key: {reason}",
                key_file.display()
            ))
        };
        let text = read_secret("pool.key_file", &key_file)?;
        // Only the place of a mistake is told: the text around it is the key.
        let key: EngineKey = serde_json::from_str(text.expose())
            .map_err(|error| bad(&format!("line {}, column {}", error.line(), error.column())))?;
        if key.version != 1 {
            return Err(bad(&format!("version {} is unknown", key.version)));
        }
        if let Some(name) = written.pool.name
            && name != key.pool
        {
            return Err(SettingsError(format!(
                "pool.name is {name}, but pool.key_file is for {}",
                key.pool
            )));
        }
        let admin = written.admin;
        let admin = Listening::admin(admin.listen, admin.tls, admin.allow_plaintext)?;
        Ok(Self {
            login,
            pool_keys: KeyRing {
                newest: KeyPair::from_base64(&key.private_key).map_err(|error| bad(&error))?,
                previous: key
                    .previous_keys
                    .iter()
                    .map(KeyPair::from_base64)
                    .collect::<Result<_, _>>()
                    .map_err(|error| bad(&error))?,
            },
            dispatcher_keys: std::iter::once(&key.dispatcher_key)
                .chain(&key.previous_dispatcher_keys)
                .map(|key| PublicKey::from_base64(key))
                .collect::<Result<_, _>>()
                .map_err(|error| bad(&error))?,
            pool: key.pool,
            hosts: written.pool.hosts,
            connections: written.engine.connections_per_server,
            name: written
                .engine
                .name
                .unwrap_or_else(|| EngineName::random(&host_name())),
            admin,
            log: written.log,
            traces: written.traces,
        })
    }

    /// The effective settings as text, secrets redacted.
    pub(crate) fn describe(&self) -> String {
        format!(
            "{}\n[pool]\nname = \"{}\"\nkey_file = \"[redacted]\"\n{}\n[engine]\nname = \"{}\"\nconnections_per_server = {}\n\n\
             [admin]\n{}{}\n[log]\nlevel = \"{}\"\nformat = \"{}\"\n\n[traces]\nendpoint = {:?}\n",
            self.login.redacted(),
            self.pool,
            self.hosts,
            self.name,
            self.connections,
            self.admin.described(),
            self.admin.described_tls("admin.tls"),
            self.log.level,
            format!("{:?}", self.log.format).to_lowercase(),
            self.traces.endpoint,
        )
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
}
