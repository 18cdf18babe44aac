//! Logs.

use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::settings::SettingsError;

/// The section `[log]`: level and format.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct LogSettings {
    /// `error`, `warn`, `info`, `debug`, `trace`, or directives of tracing's `EnvFilter`.
    pub level: String,
    /// Form of a line: `text` or `json`.
    pub format: LogFormat,
}

/// Form of the log lines, on standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Lines for people, with colours on a terminal.
    Text,
    /// One JSON object for each line.
    Json,
}

/// Starts logging to standard error.
///
/// # Errors
/// The level does not exist.
pub fn start(settings: &LogSettings) -> Result<(), SettingsError> {
    let filter = EnvFilter::builder()
        // Libraries log errors only, unless a directive names them. They could log a frame or a row.
        .parse(format!(
            "error,lapin::returned_messages=off,mayfly={0},mayfly_common={0},mayfly_dispatcher={0},mayfly_engine={0}",
            settings.level
        ))
        .or_else(|_| EnvFilter::builder().parse(&settings.level))
        .map_err(|error| SettingsError(format!("log.level: {error}")))?;
    let registry = tracing_subscriber::registry().with(filter);
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    match settings.format {
        LogFormat::Text => {
            use std::io::IsTerminal;
            registry
                .with(layer.with_ansi(std::io::stderr().is_terminal()))
                .init();
        }
        LogFormat::Json => registry.with(layer.json().flatten_event(true)).init(),
    }
    Ok(())
}
