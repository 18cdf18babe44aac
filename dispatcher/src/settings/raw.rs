//! The sections of a settings file, as they are read.

use std::path::PathBuf;

use mayfly_common::broker::AmqpSettings;
use mayfly_common::serve::{ListenSettings, Room, TlsSettings};
use mayfly_common::settings::SettingsError;
use mayfly_common::telemetry::LogSettings;
use mayfly_common::trace::TraceSettings;
use serde::{Deserialize, Serialize};

use super::Shares;
use super::backend::StoreUrl;

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Raw {
    pub(super) data_dir: PathBuf,
    pub(super) http: Http,
    pub(super) admin: ListenSettings,
    #[serde(default)]
    pub(super) amqp: AmqpSettings,
    pub(super) store: StoreUrl,
    #[serde(default)]
    pub(super) seal: Seal,
    #[serde(default)]
    pub(super) init: Init,
    pub(super) create: Create,
    pub(super) lease: Lease,
    pub(super) limits: ReadLimits,
    pub(super) log: LogSettings,
    pub(super) traces: TraceSettings,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Seal {
    pub(super) key_file: Option<PathBuf>,
    pub(super) next_key_file: Option<PathBuf>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Init {
    pub(super) root_token_file: Option<PathBuf>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Http {
    pub(super) listen: String,
    #[serde(default)]
    pub(super) tls: TlsSettings,
    pub(super) allow_plaintext: bool,
    pub(super) max_connections: u64,
    pub(super) max_connections_per_address: u64,
}

impl Http {
    pub(super) fn room(&self) -> Result<Room, SettingsError> {
        let most = within("http.max_connections", self.max_connections, 1, 1_000_000)?;
        let per_address = within(
            "http.max_connections_per_address",
            self.max_connections_per_address,
            1,
            1_000_000,
        )?;
        let count = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        Ok(Room {
            connections: count(most),
            connections_per_address: count(per_address),
        })
    }
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ReadLimits {
    pub(super) reads_per_server: u64,
    pub(super) reads_per_caller: u64,
    pub(super) waiting_reads_per_caller: u64,
}

impl ReadLimits {
    pub(super) fn shares(&self) -> Result<Shares, SettingsError> {
        let count = |key: &str, n: u64| -> Result<usize, SettingsError> {
            let n = within(&format!("limits.{key}"), n, 1, 100_000)?;
            Ok(usize::try_from(n).unwrap_or(usize::MAX))
        };
        Ok(Shares {
            per_server: count("reads_per_server", self.reads_per_server)?,
            per_caller: count("reads_per_caller", self.reads_per_caller)?,
            waiting_per_caller: count("waiting_reads_per_caller", self.waiting_reads_per_caller)?,
        })
    }
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Create {
    pub(super) deadline_seconds: u64,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Lease {
    pub(super) max_ttl_seconds: u64,
    pub(super) sweep_seconds: u64,
    pub(super) sweep_grace_seconds: u64,
    pub(super) refresh_seconds: u64,
    pub(super) history_days: u64,
}

pub(super) fn within(key: &str, value: u64, least: u64, most: u64) -> Result<u64, SettingsError> {
    if (least..=most).contains(&value) {
        Ok(value)
    } else {
        Err(SettingsError(format!(
            "{key} must be from {least} to {most}; it is {value}"
        )))
    }
}
