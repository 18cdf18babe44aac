//! Logs, and the W3C trace context that ties the log lines of one lease together across
//! dispatcher, broker and engine.

use serde::Deserialize;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::settings::SettingsError;

/// The `[log]` section.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogSettings {
    /// `error`, `warn`, `info`, `debug`, `trace`, or directives of tracing's `EnvFilter`.
    pub level: String,
    /// `text` or `json`.
    pub format: LogFormat,
}

/// Form of the log lines, on standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts logging to standard error.
///
/// # Errors
/// A level that is none.
pub fn start(settings: &LogSettings) -> Result<(), SettingsError> {
    let filter = EnvFilter::builder()
        // Libraries speak when asked for; above all they never print a frame or a row.
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

/// Position in a trace (W3C Trace Context, level 1, `traceparent`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceContext {
    trace: String,
    span: String,
}

impl TraceContext {
    /// Goes on with what the caller sent, or begins a new trace where that is none.
    pub fn from_header(header: Option<&str>) -> Self {
        let trace = header
            .and_then(parse_trace)
            .unwrap_or_else(|| random_hex(16));
        Self {
            trace,
            span: random_hex(8),
        }
    }

    /// The trace's id, 32 hexadecimal digits; the `trace` field of log lines.
    pub fn trace(&self) -> &str {
        &self.trace
    }

    /// The header for the next hop.
    pub fn to_header(&self) -> String {
        format!("00-{}-{}-01", self.trace, self.span)
    }
}

fn parse_trace(header: &str) -> Option<String> {
    let mut parts = header.split('-');
    let (version, trace, span) = (parts.next()?, parts.next()?, parts.next()?);
    let hex = |text: &str, length: usize| {
        text.len() == length
            && text
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    let sound = hex(version, 2)
        && version != "ff"
        && hex(trace, 32)
        && hex(span, 16)
        && trace.bytes().any(|b| b != b'0')
        && span.bytes().any(|b| b != b'0');
    sound.then(|| trace.to_owned())
}

fn random_hex(bytes: usize) -> String {
    use rand::RngExt;
    let mut rng = rand::rng();
    (0..bytes)
        .map(|_| format!("{:02x}", rng.random::<u8>()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_goes_on_or_begins() {
        let header = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let next = TraceContext::from_header(Some(header));
        assert_eq!(next.trace(), "0af7651916cd43dd8448eb211c80319c");
        assert_ne!(next.to_header(), header, "each hop has its own span");
        for bad in [
            "",
            "00-xyz-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        ] {
            assert_eq!(TraceContext::from_header(Some(bad)).trace().len(), 32);
        }
    }
}
