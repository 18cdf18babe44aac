//! Traces: the W3C trace context that ties what is done about one lease together across
//! dispatcher, broker and engine. Its spans are exported by OTLP in `export` (the only file that names
//! `opentelemetry`), which the feature `otlp` builds.
//!
//! A read of a secret begins a span or continues the caller's trace. Every message about the lease, also the
//! revocation that waits for the TTL, carries its sender's span, and its receiver begins a child span. Without an
//! endpoint no span is made, and the context is passed on as it is.

#[cfg(feature = "otlp")]
mod export;
#[cfg(not(feature = "otlp"))]
#[path = "trace/no_export.rs"]
mod export;

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::settings::SettingsError;
pub use export::Export;
use export::Exported;

/// The section `[traces]`: where spans are sent.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TraceSettings {
    /// Base URL of an OTLP/HTTP receiver, such as `http://collector:4318`; empty: no traces.
    pub endpoint: String,
}

impl TraceSettings {
    /// Checks the endpoint.
    ///
    /// # Errors
    /// It is neither empty nor an `http` or `https` URL without a password in it.
    pub fn check(&self) -> Result<(), SettingsError> {
        let url = self.endpoint.as_str();
        let rest = url
            .strip_prefix("http://")
            .or_else(|| url.strip_prefix("https://"));
        match rest {
            None if url.is_empty() => Ok(()),
            Some(rest)
                if !rest.is_empty()
                    && !rest.starts_with('/')
                    && !rest.contains(|c: char| c == '@' || c.is_whitespace()) =>
            {
                Ok(())
            }
            _ => Err(SettingsError(
                "traces.endpoint must be the base URL of an OTLP/HTTP receiver, such as http://collector:4318; put its credentials into OTEL_EXPORTER_OTLP_HEADERS".to_owned(),
            )),
        }
    }
}

/// Position in a trace (W3C Trace Context, level 1, `traceparent`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceContext {
    trace: [u8; 16],
    span: [u8; 8],
    sampled: bool,
}

impl TraceContext {
    /// Parses a `traceparent`. `None`: it is not valid.
    pub fn parse(header: &str) -> Option<Self> {
        let mut parts = header.split('-');
        let (version, trace, span, flags) =
            (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let [version] = hex(version)?;
        let [flags] = hex(flags)?;
        let context = Self {
            trace: hex(trace)?,
            span: hex(span)?,
            sampled: flags & 1 == 1,
        };
        let sound = version != 0xff && context.trace != [0; 16] && context.span != [0; 8];
        sound.then_some(context)
    }

    /// The beginning of a new trace.
    fn begin() -> Self {
        Self {
            trace: rand::random(),
            span: rand::random(),
            sampled: true,
        }
    }

    /// The trace's id, 32 hexadecimal digits; the `trace` field of log lines.
    pub fn trace(&self) -> String {
        digits(&self.trace)
    }
}

/// The value of a `traceparent` header.
impl std::fmt::Display for TraceContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (trace, span) = (digits(&self.trace), digits(&self.span));
        write!(f, "00-{trace}-{span}-{:02x}", u8::from(self.sampled))
    }
}

/// The trace id of a `traceparent`. Empty if the text is not a `traceparent`.
pub fn trace_of(header: &str) -> String {
    TraceContext::parse(header).map_or_else(String::new, |context| context.trace())
}

/// Exactly `N` bytes in lower-case hexadecimal digits.
fn hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    let is_digit = |b: &u8| b.is_ascii_digit() || (b'a'..=b'f').contains(b);
    if digits.len() != 2 * N || !digits.iter().all(is_digit) {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

fn digits(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The part that a process has in a request or a message (OpenTelemetry, "Span Kind").
#[derive(Debug, Clone, Copy)]
enum Kind {
    Server,
    Producer,
    Consumer,
}

/// A span, from its creation to its drop. If spans are not exported, it is only a position in a trace.
#[derive(Debug)]
pub struct Span {
    context: TraceContext,
    exported: Option<Exported>,
}

impl Span {
    /// The span of a request: continues the caller's trace, or begins one.
    pub fn serve(name: &'static str, header: Option<&str>) -> Self {
        let parent = header.and_then(TraceContext::parse);
        Self::begin(Kind::Server, name.into(), parent)
    }

    /// The span of a publish.
    pub(crate) fn produce(name: String, header: &str) -> Option<Self> {
        Self::hop(Kind::Producer, name, header)
    }

    /// The span of a delivered message.
    pub(crate) fn consume(name: String, header: &str) -> Option<Self> {
        Self::hop(Kind::Consumer, name, header)
    }

    /// A span within a trace. `None`: there is no trace, or spans are not exported.
    fn hop(kind: Kind, name: String, header: &str) -> Option<Self> {
        if !export::is_on() {
            return None;
        }
        let parent = TraceContext::parse(header)?;
        Some(Self::begin(kind, name.into(), Some(parent)))
    }

    fn begin(kind: Kind, name: Cow<'static, str>, parent: Option<TraceContext>) -> Self {
        match export::begin(kind, name, parent.as_ref()) {
            Some((context, exported)) => Self {
                context,
                exported: Some(exported),
            },
            None => Self {
                context: parent.unwrap_or_else(TraceContext::begin),
                exported: None,
            },
        }
    }

    /// The span's position, for log lines and child spans.
    pub fn context(&self) -> &TraceContext {
        &self.context
    }

    /// Adds an attribute. Never a secret.
    pub fn tag(&mut self, key: &'static str, value: impl std::fmt::Display) {
        if let Some(span) = &mut self.exported {
            span.tag(key, value.to_string());
        }
    }

    /// Marks the span as failed, with the stable code.
    pub fn fail(&mut self, code: &'static str) {
        if let Some(span) = &mut self.exported {
            span.fail(code);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const HEADER: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_traceparent_is_read_and_written() {
        let context = TraceContext::parse(HEADER).unwrap();
        assert_eq!(context.trace(), "0af7651916cd43dd8448eb211c80319c");
        assert_eq!(context.to_string(), HEADER);
        let unsampled = HEADER.replace("-01", "-00");
        let context = TraceContext::parse(&unsampled).unwrap();
        assert_eq!(context.to_string(), unsampled, "the caller's choice stays");
        for bad in [
            "",
            "00-xyz-b7ad6b7169203331-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
        ] {
            assert_eq!(TraceContext::parse(bad), None, "{bad}");
            assert_eq!(trace_of(bad), "");
        }
    }

    #[test]
    fn a_trace_goes_on_or_begins() {
        let goes_on = Span::serve("issue", Some(HEADER));
        assert_eq!(goes_on.context().trace(), trace_of(HEADER));
        let begun = Span::serve("issue", Some("nonsense"));
        assert_ne!(begun.context().trace(), trace_of(HEADER));
        assert!(TraceContext::parse(&begun.context().to_string()).is_some());
    }

    #[test]
    fn an_endpoint_is_a_url() {
        let check = |endpoint: &str| {
            TraceSettings {
                endpoint: endpoint.to_owned(),
            }
            .check()
        };
        for good in ["", "http://collector:4318", "https://c/v1/traces"] {
            check(good).unwrap();
        }
        for bad in [
            "collector:4318",
            "http://",
            "ftp://h",
            "http://a b",
            "http://u:hunter2@h",
        ] {
            let refused = check(bad).unwrap_err().to_string();
            assert!(refused.starts_with("traces.endpoint"), "{bad}");
            assert!(!refused.contains("hunter2"));
        }
    }
}
