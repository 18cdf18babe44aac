//! An engine that lies: it has a pool's key, and reports anything.

use std::path::Path;

use jiff::Timestamp;
use lapin::BasicProperties;
use lapin::message::Delivery;
use lapin::types::{AMQPValue, FieldTable};
use mayfly_protocol::request::RequestId;
use mayfly_protocol::seal::{EngineKey, Form, KeyPair, PublicKey};
use mayfly_protocol::task::{Head, Kind};
use serde_json::{Value, json};

use crate::amqp::put;

/// The holder of a pool's key.
pub struct Liar {
    url: String,
    pool: mayfly_protocol::names::PoolName,
    keys: KeyPair,
    dispatcher: PublicKey,
}

/// A request that was opened.
pub struct Asked {
    pub kind: Kind,
    pub body: Value,
    request: Option<RequestId>,
    delivery: Delivery,
}

impl Liar {
    /// One with this key file.
    pub fn new(url: String, key_file: &Path) -> Self {
        let text = std::fs::read(key_file).unwrap();
        let key: EngineKey = serde_json::from_slice(&text).unwrap();
        Self {
            url,
            pool: key.pool,
            keys: KeyPair::from_base64(&key.private_key).unwrap(),
            dispatcher: PublicKey::from_base64(&key.dispatcher_key).unwrap(),
        }
    }

    fn head(&self, kind: Kind, lease: Option<&str>) -> Head {
        Head {
            kind,
            pool: self.pool.clone(),
            lease: lease.map(|id| id.parse().unwrap()),
            issued: Timestamp::from_millisecond(Timestamp::now().as_millisecond()).unwrap(),
            deadline: None,
            attempt: 0,
            settling: false,
            traceparent: String::new(),
        }
    }

    /// Opens a request.
    pub fn open(&self, delivery: Delivery) -> Asked {
        let properties = &delivery.properties;
        let headers = properties.headers().as_ref().unwrap().inner();
        let number = |name: &str| match headers.get(name) {
            Some(AMQPValue::LongLongInt(ms)) => Some(Timestamp::from_millisecond(*ms).unwrap()),
            _ => None,
        };
        let lease = match headers.get("mayfly-lease") {
            Some(AMQPValue::LongString(text)) => Some(text.to_string()),
            _ => None,
        };
        let kind = Kind::parse(properties.kind().as_ref().unwrap().as_str());
        let head = Head {
            issued: number("mayfly-issued-ms").unwrap(),
            deadline: number("mayfly-deadline-ms"),
            ..self.head(kind, lease.as_deref())
        };
        let (body, request) = head
            .open_request(&self.keys, &self.dispatcher, &delivery.data)
            .unwrap();
        Asked {
            kind,
            body,
            request,
            delivery,
        }
    }

    /// Answers a request in the right form, with a content of its choice.
    pub async fn answer(&self, asked: &Asked, result: Value) {
        let properties = &asked.delivery.properties;
        let reply_to = properties.reply_to().clone().unwrap();
        let correlation = properties.correlation_id().clone().unwrap();
        let body = json!({"engine": "rogue", "result": result});
        let (sealed, properties) = self.seal(Kind::Reply, None, &body, asked.request);
        let properties = properties.with_correlation_id(correlation);
        put(&self.url, reply_to.as_str(), &sealed, properties).await;
    }

    /// Reports the outcome of a revocation that nobody asked it for.
    pub async fn outcome(&self, lease: &str, role: Option<&str>, result: Value) {
        let body = json!({"lease": lease, "engine": "rogue", "attempts": 1, "role": role, "result": result});
        let (sealed, properties) = self.seal(Kind::Outcome, Some(lease), &body, None);
        put(&self.url, "mayfly.v1.outcomes", &sealed, properties).await;
    }

    /// Reports outcomes of several leases in one message: each with its role and result.
    pub async fn outcomes(&self, all: &[(&str, &str, Value)]) {
        let one = |(lease, role, result): &(&str, &str, Value)| json!({"lease": lease, "engine": "rogue", "attempts": 1, "role": role, "result": result});
        let (first, others) = all.split_first().unwrap();
        let mut body = one(first);
        body["others"] = others.iter().map(one).collect();
        let (sealed, properties) = self.seal(Kind::Outcome, Some(first.0), &body, None);
        put(&self.url, "mayfly.v1.outcomes", &sealed, properties).await;
    }

    fn seal(
        &self,
        kind: Kind,
        lease: Option<&str>,
        body: &Value,
        request: Option<RequestId>,
    ) -> (Vec<u8>, BasicProperties) {
        let head = self.head(kind, lease);
        let sealed = head
            .seal_request(Form::Alone, &self.keys, &self.dispatcher, body, request)
            .unwrap();
        let mut headers = FieldTable::default();
        let text = |text: &str| AMQPValue::LongString(text.into());
        headers.insert("mayfly-pool".into(), text(self.pool.as_str()));
        headers.insert(
            "mayfly-issued-ms".into(),
            AMQPValue::LongLongInt(head.issued.as_millisecond()),
        );
        if let Some(lease) = lease {
            headers.insert("mayfly-lease".into(), text(lease));
        }
        let properties = BasicProperties::default()
            .with_type(kind.as_str().into())
            .with_message_id(crate::word().into())
            .with_headers(headers);
        (sealed, properties)
    }
}
