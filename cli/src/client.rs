//! The only file that calls HTTP APIs. It follows no redirect, because a token and a body must reach only the named
//! dispatcher. The time and the size of an answer are limited.

use std::error::Error;
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use reqwest::{Client, Method, RequestBuilder, Response, Url, redirect};
use serde_json::Value;
use zeroize::Zeroizing;

use crate::failure::{Failure, Refusal};
use crate::route::Route;
use crate::session::Session;
use crate::tls::{self, Tls, is_loopback};

const CONNECT_SECONDS: u64 = 5;
/// Time limit of a call. It is longer than the dispatcher's deadline for a create (30 s by default), so that the
/// dispatcher's answer comes first.
const CALL_SECONDS: u64 = 45;
/// Time limit of calls that use a database several times.
const LONG_CALL_SECONDS: u64 = 120;
const ANSWER_BYTES: usize = 64 << 20;

/// The dispatcher's API, with the address and token of one session.
pub(crate) struct Api {
    client: Client,
    /// Scheme, host and port, and a path prefix of a proxy before `/v1`. It has no `/` at the end.
    base: String,
}

impl Api {
    /// A client that has not sent anything yet.
    pub(crate) fn new(session: &Session) -> Result<Self, Failure> {
        let url = address(&session.address)?;
        let mut token = HeaderValue::from_str(&format!("Bearer {}", session.token.expose()))
            .map_err(|_| {
                Failure::Usage("malformed bearer token: it has characters that no token has".into())
            })?;
        token.set_sensitive(true);
        let headers = HeaderMap::from_iter([(AUTHORIZATION, token)]);
        let client = client(&url, &session.tls, headers)?;
        Ok(Self {
            client,
            base: url.as_str().trim_end_matches('/').to_owned(),
        })
    }

    pub(crate) fn address(&self) -> &str {
        &self.base
    }

    pub(crate) async fn get(&self, route: &Route) -> Result<Value, Failure> {
        self.call(Method::GET, route, None, CALL_SECONDS).await
    }

    /// GET with a key. If it is sent again with the same key, it gets the same answer.
    pub(crate) async fn get_once(&self, route: &Route, key: &str) -> Result<Value, Failure> {
        let key = HeaderValue::from_str(key).map_err(|_| {
            Failure::Usage("the idempotency key must be visible ASCII characters".into())
        })?;
        let request = self
            .request(Method::GET, route)
            .timeout(Duration::from_secs(LONG_CALL_SECONDS));
        self.send(request.header("idempotency-key", key), LONG_CALL_SECONDS)
            .await
    }

    /// GET with the limit of a long call.
    pub(crate) async fn get_long(&self, route: &Route) -> Result<Value, Failure> {
        self.call(Method::GET, route, None, LONG_CALL_SECONDS).await
    }

    /// POST. With `None` it sends no body.
    pub(crate) async fn post(&self, route: &Route, body: Option<&Value>) -> Result<Value, Failure> {
        self.call(Method::POST, route, body, CALL_SECONDS).await
    }

    /// POST with the limit of a long call. With `None` it sends no body.
    pub(crate) async fn post_long(
        &self,
        route: &Route,
        body: Option<&Value>,
    ) -> Result<Value, Failure> {
        self.call(Method::POST, route, body, LONG_CALL_SECONDS)
            .await
    }

    pub(crate) async fn put(&self, route: &Route, body: &Value) -> Result<Value, Failure> {
        self.call(Method::PUT, route, Some(body), CALL_SECONDS)
            .await
    }

    pub(crate) async fn delete(&self, route: &Route) -> Result<Value, Failure> {
        self.call(Method::DELETE, route, None, CALL_SECONDS).await
    }

    async fn call(
        &self,
        method: Method,
        route: &Route,
        body: Option<&Value>,
        seconds: u64,
    ) -> Result<Value, Failure> {
        let mut request = self
            .request(method, route)
            .timeout(Duration::from_secs(seconds));
        if let Some(body) = body {
            request = request.json(body);
        }
        self.send(request, seconds).await
    }

    fn request(&self, method: Method, route: &Route) -> RequestBuilder {
        self.client
            .request(method, format!("{}{}", self.base, route.text()))
    }

    /// Sends a request. `seconds` is its time limit, for the message.
    async fn send(&self, request: RequestBuilder, seconds: u64) -> Result<Value, Failure> {
        let response = request
            .send()
            .await
            .map_err(|error| self.no_answer(&error, seconds))?;
        let status = response.status();
        let location = response.headers().get(reqwest::header::LOCATION).cloned();
        let body = self.body(response, seconds).await?;
        if status.is_redirection() {
            let to = location
                .as_ref()
                .and_then(|to| to.to_str().ok())
                .unwrap_or("nowhere");
            return Err(Failure::Local(format!(
                "{} redirects to {to}; if that is the dispatcher, give it as --address",
                self.base
            )));
        }
        if !status.is_success() {
            return Err(Failure::Refused(Refusal::read(status.as_u16(), &body)));
        }
        if body.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&body).map_err(|_| {
            Failure::Local(format!(
                "{} does not answer in JSON: is it a dispatcher?",
                self.base
            ))
        })
    }

    async fn body(&self, mut response: Response, seconds: u64) -> Result<Vec<u8>, Failure> {
        let mut body = Vec::new();
        while let Some(chunk) = response
            .chunk()
            .await
            .map_err(|error| self.no_answer(&error, seconds))?
        {
            if body.len() + chunk.len() > ANSWER_BYTES {
                return Err(Failure::Local(
                    "the answer is too large; ask for less with --limit".into(),
                ));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }

    fn no_answer(&self, error: &reqwest::Error, seconds: u64) -> Failure {
        let base = &self.base;
        if error.is_connect() {
            let help = match tls::is_unknown_authority(error) {
                true => " (name a private authority with --ca-file)",
                false => "",
            };
            Failure::Unreachable(format!(
                "cannot reach the dispatcher at {base}: {}{help}",
                chain(error)
            ))
        } else if error.is_timeout() {
            Failure::NoAnswer(format!(
                "the dispatcher at {base} did not answer within {seconds} s"
            ))
        } else {
            Failure::NoAnswer(format!(
                "no answer from the dispatcher at {base}: {}",
                chain(error)
            ))
        }
    }
}

/// A server with a JSON API and HTTP Basic authentication.
pub(crate) struct Plain {
    client: Client,
    /// The URL without user, password and path.
    base: Url,
    user: String,
    password: Zeroizing<String>,
}

impl Plain {
    /// The server of a URL from [`plain_url`].
    pub(crate) fn new(url: &Url, tls: &Tls) -> Result<Self, Failure> {
        let decoded = |text: &str| {
            let text = percent_encoding::percent_decode_str(text).decode_utf8_lossy();
            text.into_owned()
        };
        let user = decoded(url.username());
        let password = Zeroizing::new(decoded(url.password().unwrap_or_default()));
        let mut base = url.clone();
        base.set_path("");
        // A URL with a host takes both.
        let _ = base.set_username("");
        let _ = base.set_password(None);
        Ok(Self {
            client: client(&base, tls, HeaderMap::new())?,
            base,
            user,
            password,
        })
    }

    /// Calls a path that is given by its segments. An empty answer is `null`.
    pub(crate) async fn call(
        &self,
        method: Method,
        path: &[&str],
        query: &[(&str, &str)],
        body: Option<&Value>,
    ) -> Result<Value, Failure> {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.clear().extend(path);
        }
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        let mut request = self
            .client
            .request(method, url)
            .basic_auth(&self.user, Some(self.password.as_str()))
            .timeout(Duration::from_secs(CALL_SECONDS));
        if let Some(body) = body {
            request = request.json(body);
        }
        let place = self.base.as_str().trim_end_matches('/');
        let unreachable = |error: reqwest::Error| {
            Failure::Unreachable(format!("no answer from {place}: {}", chain(&error)))
        };
        let response = request.send().await.map_err(unreachable)?;
        let status = response.status().as_u16();
        let body = response.bytes().await.map_err(unreachable)?;
        let answer = serde_json::from_slice(&body).unwrap_or(Value::Null);
        match status {
            200..300 => Ok(answer),
            401 | 403 => Err(Failure::NoToken(format!(
                "{place} refuses this user ({status}); it needs the tag `policymaker` or `administrator`, and rights in the virtual host"
            ))),
            _ => {
                let reason = answer["reason"].as_str().unwrap_or_default();
                Err(Failure::Local(format!(
                    "{place} answered {status} {reason}"
                )))
            }
        }
    }
}

/// Parses the URL of another server. It may hold a user and a password, which no error repeats.
pub(crate) fn plain_url(text: &str) -> Result<Url, Failure> {
    let url = Url::parse(text).ok();
    url.filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
        .ok_or_else(|| {
            Failure::Usage("--broker: the URL must be like https://user:password@rabbitmq:15671/vhost (RabbitMQ's management API)".into())
        })
}

fn client(url: &Url, tls: &Tls, headers: HeaderMap) -> Result<Client, Failure> {
    tls.check(url)?;
    // This fails if the process has a provider already, which is then used.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let mut builder = Client::builder()
        .user_agent(concat!("mayfly/", env!("CARGO_PKG_VERSION")))
        .default_headers(headers)
        .connect_timeout(Duration::from_secs(CONNECT_SECONDS))
        .redirect(redirect::Policy::none());
    builder = tls.applied(builder, url)?;
    if is_loopback(url) {
        builder = builder.no_proxy();
    }
    builder
        .build()
        .map_err(|error| Failure::Local(format!("cannot make an HTTP client: {}", chain(&error))))
}

/// Reads `--address`, an `http` or `https` URL.
pub(crate) fn address(text: &str) -> Result<Url, Failure> {
    let wrong = |why: &str| Failure::Usage(format!("the address {text:?} {why}"));
    let url = Url::parse(text).map_err(|_| wrong(FORM))?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err(wrong(FORM));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(Failure::Usage(
            "the address must not contain a user name or password".into(),
        ));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(wrong("must not have a query or a fragment"));
    }
    Ok(url)
}

const FORM: &str = "must be like http://127.0.0.1:8470 or https://mayfly.example.com";

/// The innermost reason. The outer reasons only say that a request failed.
fn chain(error: &reqwest::Error) -> String {
    let mut reason: &dyn Error = error;
    while let Some(source) = reason.source() {
        reason = source;
    }
    reason.to_string()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked() {
        for good in [
            "http://127.0.0.1:8470",
            "https://x.example/mayfly/",
            "http://[::1]:1",
        ] {
            assert!(address(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "127.0.0.1:8470",
            "localhost:8470",
            "ftp://x",
            "http://",
            "http://u:p@x",
            "http://x?y",
        ] {
            assert_eq!(address(bad).unwrap_err().exit_code(), 2, "{bad}");
        }
    }
}
