//! Traces: one lease is followed from the caller's own trace through dispatcher, broker and engine to its end, as a
//! collector gets it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use mayfly_tests::postgres::{Admin, Server};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::System;
use mayfly_tests::{eventually, seconds};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value as Any};
use opentelemetry_proto::tonic::trace::v1::{Span, span::SpanKind};
use prost::Message;
use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

/// Spans, each with its service.
type Spans = Arc<Mutex<Vec<(String, Span)>>>;

/// An OTLP/HTTP receiver: its URL, and the received spans.
async fn collector() -> (String, Spans) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let spans = Spans::default();
    let got = spans.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream, got.clone()));
        }
    });
    (url, spans)
}

async fn serve(stream: TcpStream, spans: Spans) {
    let mut stream = BufReader::new(stream);
    loop {
        let mut length = 0;
        let mut first = String::new();
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line).await.unwrap_or(0) == 0 {
                return;
            }
            let line = line.trim_end().to_ascii_lowercase();
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
            if line.is_empty() {
                break;
            }
            if first.is_empty() {
                first = line;
            }
        }
        assert!(first.starts_with("post /v1/traces "), "{first}");
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await.unwrap();
        let request = ExportTraceServiceRequest::decode(body.as_slice()).unwrap();
        for of_service in request.resource_spans {
            let resource = of_service.resource.unwrap();
            let service = tag(&resource.attributes, "service.name").unwrap();
            assert!(tag(&resource.attributes, "service.version").is_some());
            for scope in of_service.scope_spans {
                let named = scope.spans.into_iter().map(|span| (service.clone(), span));
                spans.lock().unwrap().extend(named);
            }
        }
        let answer =
            "HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n";
        if stream.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}

fn tag(attributes: &[KeyValue], key: &str) -> Option<String> {
    let found = attributes.iter().find(|one| one.key == key)?;
    match found.value.as_ref()?.value.as_ref()? {
        Any::StringValue(text) => Some(text.clone()),
        other => panic!("{key} is {other:?}"),
    }
}

#[tokio::test]
async fn one_lease_is_followed_to_its_end() {
    let (url, spans) = collector().await;
    let endpoint = [("MAYFLY__TRACES__ENDPOINT", url.as_str())];
    let system = System::start_with(Rabbit::shared(), &endpoint).await;
    let site = Server::pg15().site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let _engine = system.engine_with(&pool, &endpoint);
    let path = system.secret(&site, &pool, json!({})).await;
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let caller = "b7ad6b7169203331";
    let header = format!("00-{trace}-{caller}-01");
    let read = format!("/v1/secrets/{path}?ttl=2");
    let answer = eventually("an account is issued", seconds(20), async || {
        let (status, answer) = system.api.get_with(&read, ("traceparent", &header)).await;
        (status == 200).then_some(answer)
    })
    .await;
    let lease = answer["data"]["leaseId"].as_str().unwrap().to_owned();
    let password = answer["data"]["password"].as_str().unwrap();
    system.lease_becomes(&lease, "revoked", seconds(10)).await;

    // Spans are sent in batches.
    let chain = eventually(
        "the way of the revocation is traced",
        seconds(30),
        async || {
            let spans = spans.lock().unwrap().clone();
            let of_lease =
                |span: &Span| tag(&span.attributes, "mayfly.lease").as_ref() == Some(&lease);
            let by_id: HashMap<_, _> = spans
                .iter()
                .map(|one| (one.1.span_id.clone(), one.clone()))
                .collect();
            // The chain begins at the dispatcher's work on the last outcome and goes up.
            let (_, last) = spans.iter().find(|(service, span)| {
                service == "mayfly-dispatcher" && span.name == "process outcome" && of_lease(span)
            })?;
            let mut chain = Vec::new();
            let mut id = last.span_id.clone();
            while let Some((service, span)) = by_id.get(&id) {
                assert_eq!(hex(&span.trace_id), trace);
                chain.push((service.clone(), span.name.clone(), span.kind()));
                id = span.parent_span_id.clone();
            }
            (hex(&id) == caller).then_some(chain)
        },
    )
    .await;
    let names: Vec<_> = chain
        .iter()
        .rev()
        .map(|(service, name, _)| (service.as_str(), name.as_str()))
        .collect();
    assert_eq!(
        names,
        [
            ("mayfly-dispatcher", "issue"),
            ("mayfly-dispatcher", "send revoke"),
            ("mayfly-engine", "process revoke"),
            ("mayfly-engine", "send outcome"),
            ("mayfly-dispatcher", "process outcome"),
        ]
    );
    assert_eq!(chain.last().unwrap().2, SpanKind::Server);
    assert_eq!(chain[3].2, SpanKind::Producer);
    assert_eq!(chain[2].2, SpanKind::Consumer);

    let spans = spans.lock().unwrap();
    let issue = spans.iter().find(|(_, span)| {
        span.name == "issue" && tag(&span.attributes, "mayfly.lease").as_ref() == Some(&lease)
    });
    assert_eq!(tag(&issue.unwrap().1.attributes, "mayfly.path"), Some(path));
    let created = spans.iter().any(|(service, span)| {
        service == "mayfly-engine" && span.name == "process create" && hex(&span.trace_id) == trace
    });
    assert!(created);
    let told = format!("{spans:?}");
    assert!(!told.contains(password), "a password in a span");
}

#[tokio::test]
async fn a_failed_read_tells_why() {
    let (url, spans) = collector().await;
    let endpoint = [("MAYFLY__TRACES__ENDPOINT", url.as_str())];
    let (system, _site, path, _) = Scenario::on(Server::pg15())
        .settings(&endpoint)
        .start_without_engine()
        .await;
    let (status, _) = system.api.get(&format!("/v1/secrets/{path}")).await;
    assert_eq!(status, 503);
    eventually("the span tells the code", seconds(20), async || {
        let spans = spans.lock().unwrap();
        let issue = &spans.iter().find(|(_, span)| span.name == "issue")?.1;
        assert_eq!(tag(&issue.attributes, "error.type").unwrap(), "no_engine");
        Some(())
    })
    .await;
}

/// Nobody waits for a collector that is unreachable.
#[tokio::test]
async fn a_collector_that_is_away_hinders_nothing() {
    let endpoint = [("MAYFLY__TRACES__ENDPOINT", "http://127.0.0.1:9")];
    let mut system = System::start_with(Rabbit::shared(), &endpoint).await;
    let site = Server::pg15().site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let engine = system.engine_with(&pool, &endpoint);
    let path = system.secret(&site, &pool, json!({})).await;
    eventually("an account is issued", seconds(20), async || {
        let (status, _) = system.api.get(&format!("/v1/secrets/{path}?ttl=1")).await;
        (status == 200).then_some(())
    })
    .await;
    engine.process.stop();
    system.stop_dispatcher();
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
