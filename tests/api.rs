//! The dispatcher's HTTP API as a client sees it.

use std::time::Duration;

use reqwest::{Method, Response};
use serde_json::Value;

/// A dispatcher's address and a token.
#[derive(Clone)]
pub struct Api {
    pub address: String,
    pub token: String,
    client: reqwest::Client,
}

impl Api {
    pub fn new(address: String, token: String) -> Self {
        // Plain http does not use this provider, but every client needs one.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let client = reqwest::Client::builder()
            // The system's authorities are 140 certificates, read for each client.
            .tls_certs_only([])
            .timeout(Duration::from_secs(60))
            .no_proxy()
            .build()
            .unwrap();
        Self {
            address,
            token,
            client,
        }
    }

    /// The same dispatcher with another token.
    pub fn with_token(&self, token: &str) -> Self {
        Self {
            token: token.to_owned(),
            ..self.clone()
        }
    }

    /// A request without changes; the body is sent as it is.
    pub async fn raw(&self, method: Method, path: &str, body: Option<String>) -> Response {
        let mut request = self
            .client
            .request(method, format!("{}{path}", self.address))
            .header("authorization", format!("Bearer {}", self.token));
        if let Some(body) = body {
            request = request
                .header("content-type", "application/json")
                .body(body);
        }
        request
            .send()
            .await
            .unwrap_or_else(|error| panic!("{path}: {error:?}"))
    }

    async fn call(&self, method: Method, path: &str, body: Option<Value>) -> (u16, Value) {
        let response = self
            .raw(method, path, body.map(|body| body.to_string()))
            .await;
        let status = response.status().as_u16();
        let text = response.text().await.unwrap();
        let value = if text.is_empty() {
            Value::Null
        } else {
            serde_json::from_str(&text).unwrap_or(Value::String(text))
        };
        (status, value)
    }

    pub async fn get(&self, path: &str) -> (u16, Value) {
        self.call(Method::GET, path, None).await
    }

    /// The text of a page; `None` without an answer.
    pub async fn try_text(&self, path: &str) -> Option<String> {
        let asked = self.client.get(format!("{}{path}", self.address));
        asked.send().await.ok()?.text().await.ok()
    }

    /// A request that may get no answer, or an answer that is not JSON.
    pub async fn try_call(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> Option<(u16, Value)> {
        let mut request = self
            .client
            .request(method, format!("{}{path}", self.address))
            .header("authorization", format!("Bearer {}", self.token))
            .timeout(std::time::Duration::from_secs(30));
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await.ok()?;
        let status = response.status().as_u16();
        Some((status, response.json().await.ok()?))
    }

    /// A GET with another header.
    pub async fn get_with(&self, path: &str, header: (&str, &str)) -> (u16, Value) {
        let response = self
            .client
            .get(format!("{}{path}", self.address))
            .header("authorization", format!("Bearer {}", self.token))
            .header(header.0, header.1)
            .send()
            .await
            .unwrap_or_else(|error| panic!("{path}: {error:?}"));
        let status = response.status().as_u16();
        (status, response.json().await.unwrap())
    }

    pub async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        self.call(Method::POST, path, Some(body)).await
    }

    pub async fn put(&self, path: &str, body: Value) -> (u16, Value) {
        self.call(Method::PUT, path, Some(body)).await
    }

    pub async fn delete(&self, path: &str) -> (u16, Value) {
        self.call(Method::DELETE, path, None).await
    }

    /// A GET that must succeed.
    pub async fn ok(&self, path: &str) -> Value {
        let (status, body) = self.get(path).await;
        assert_eq!(status, 200, "GET {path}: {body}");
        body
    }

    /// A POST that must create.
    pub async fn create(&self, path: &str, body: Value) -> Value {
        let (status, answer) = self.post(path, body.clone()).await;
        assert_eq!(status, 201, "POST {path} {body}: {answer}");
        answer
    }
}
