//! The export of spans by OTLP over HTTP.

use std::borrow::Cow;
use std::sync::OnceLock;
use std::time::Duration;

use opentelemetry::trace::{
    Span as _, SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId,
    TraceState, Tracer as _, TracerProvider as _,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};

use super::{Kind, TraceContext, TraceSettings};
use crate::VERSION;
use crate::settings::SettingsError;

/// A stop waits at most this long for the last spans.
const FLUSH_WITHIN: Duration = Duration::from_secs(3);

static TRACER: OnceLock<SdkTracer> = OnceLock::new();

/// Sends spans until it is ended.
#[must_use = "ended, it sends the last spans"]
pub struct Export(Option<SdkTracerProvider>);

impl Export {
    /// Starts sending, if there is an endpoint. Called once, outside of any runtime and after
    /// the TLS provider is installed.
    ///
    /// # Errors
    /// There is no client for the endpoint.
    pub fn start(
        settings: &TraceSettings,
        service: &'static str,
        instance: &str,
    ) -> Result<Self, SettingsError> {
        if settings.endpoint.is_empty() {
            return Ok(Self(None));
        }
        let endpoint = settings.endpoint.trim_end_matches('/');
        // OTLP/HTTP: the signal's path below the base URL.
        let endpoint = match endpoint.ends_with("/v1/traces") {
            true => endpoint.to_owned(),
            false => format!("{endpoint}/v1/traces"),
        };
        let exporter = SpanExporter::builder()
            .with_http()
            .with_endpoint(endpoint)
            .build()
            .map_err(|error| SettingsError(format!("traces.endpoint: {error}")))?;
        let resource = Resource::builder()
            .with_service_name(service)
            .with_attribute(KeyValue::new("service.version", VERSION))
            .with_attribute(KeyValue::new("service.instance.id", instance.to_owned()))
            .build();
        let provider = SdkTracerProvider::builder()
            .with_resource(resource)
            .with_batch_exporter(exporter)
            .build();
        // After a second start in one process the first tracer stays in use.
        let _ = TRACER.set(provider.tracer("mayfly"));
        Ok(Self(Some(provider)))
    }

    /// Sends the last spans, for three seconds at most.
    pub fn end(self) {
        if let Some(provider) = self.0 {
            // Spans that an absent collector does not get are lost. Nothing depends on them.
            let _ = provider.shutdown_with_timeout(FLUSH_WITHIN);
        }
    }
}

/// A span that is sent when it is dropped.
#[derive(Debug)]
pub(super) struct Exported(opentelemetry_sdk::trace::Span);

/// Whether spans are exported.
pub(super) fn is_on() -> bool {
    TRACER.get().is_some()
}

/// Begins a span below `parent`, and returns its position. `None`: spans are not exported.
pub(super) fn begin(
    kind: Kind,
    name: Cow<'static, str>,
    parent: Option<&TraceContext>,
) -> Option<(TraceContext, Exported)> {
    let tracer = TRACER.get()?;
    let above = parent.map_or_else(Context::new, |parent| {
        Context::new().with_remote_span_context(SpanContext::new(
            TraceId::from_bytes(parent.trace),
            SpanId::from_bytes(parent.span),
            TraceFlags::new(u8::from(parent.sampled)),
            true,
            TraceState::NONE,
        ))
    });
    let kind = match kind {
        Kind::Server => SpanKind::Server,
        Kind::Producer => SpanKind::Producer,
        Kind::Consumer => SpanKind::Consumer,
    };
    let span = tracer
        .span_builder(name)
        .with_kind(kind)
        .start_with_context(tracer, &above);
    let own = span.span_context();
    let context = TraceContext {
        trace: own.trace_id().to_bytes(),
        span: own.span_id().to_bytes(),
        sampled: own.is_sampled(),
    };
    Some((context, Exported(span)))
}

impl Exported {
    pub(super) fn tag(&mut self, key: &'static str, value: String) {
        self.0.set_attribute(KeyValue::new(key, value));
    }

    pub(super) fn fail(&mut self, code: &'static str) {
        self.0.set_attribute(KeyValue::new("error.type", code));
        self.0.set_status(Status::error(code));
    }
}
