//! Parses parts of requests strictly: query, path, body, and pages of lists.

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::StatusCode;
use axum::http::request::Parts;
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::error::{ApiError, Code, Limit, Problems};
use crate::secrets::{Object, parse_object};

const PAGE: usize = 100;
const LARGEST_PAGE: usize = 500;

/// `malformed`: the request cannot be parsed.
pub(super) fn malformed(message: impl std::fmt::Display) -> ApiError {
    ApiError::new(Code::Malformed, message.to_string())
}

/// Refuses NUL: PostgreSQL's texts cannot contain it, and no value of Mayfly does.
fn no_nul(text: &str) -> Result<(), ApiError> {
    match text.contains('\0') {
        true => Err(malformed("it contains a NUL")),
        false => Ok(()),
    }
}

/// Parses the query. `T` may deny unknown members.
pub(super) struct Asked<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Asked<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let Query(asked) = Query::try_from_uri(&parts.uri).map_err(|error| {
            malformed(format!("the query cannot be parsed: {}", error.body_text()))
        })?;
        Ok(Self(asked))
    }
}

/// A query without parameters.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Nothing {}

/// The last part of the URL's path, decoded.
pub(super) struct Named(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let Path(name) = Path::<String>::from_request_parts(parts, state)
            .await
            .map_err(|error| malformed(error.body_text()))?;
        no_nul(&name)?;
        Ok(Self(name))
    }
}

/// A body that is not parsed yet.
pub(super) struct Raw(pub(super) Bytes);

impl<S: Send + Sync> FromRequest<S> for Raw {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let text = Bytes::from_request(request, state).await.map_err(|error| {
            let is_large = error.status() == StatusCode::PAYLOAD_TOO_LARGE;
            ApiError {
                limit: is_large.then_some(Limit::Body),
                ..malformed(format!(
                    "the body cannot be read (its limit is 1 MiB): {}",
                    error.body_text()
                ))
            }
        })?;
        Ok(Self(text))
    }
}

pub(super) struct Body(pub(super) Object);

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let Raw(text) = Raw::from_request(request, state).await?;
        parse_object(&text).map(Self)
    }
}

/// Refuses each member of a body that is not one of these.
pub(super) fn only_known(problems: &mut Problems, body: &Object, known: &[&str]) {
    let reason = match known {
        [] => "is not known; this action has no members".to_owned(),
        _ => format!("is not known; known: {}", known.join(", ")),
    };
    let unknown = body
        .keys()
        .filter(|member| !known.contains(&member.as_str()));
    for member in unknown {
        problems.insert(member.clone(), vec![reason.clone()]);
    }
}

/// The requested page of a list.
#[derive(Debug)]
pub(super) struct Page {
    /// The key of the last item of the page before. Empty: this is the first page.
    pub(super) after: String,
    limit: usize,
}

impl Page {
    pub(super) fn parse(limit: Option<&str>, cursor: Option<&str>) -> Result<Self, ApiError> {
        let limit = match limit.map(str::parse) {
            None => PAGE,
            Some(Ok(limit)) if (1..=LARGEST_PAGE).contains(&limit) => limit,
            Some(_) => return Err(malformed(format!("limit must be from 1 to {LARGEST_PAGE}"))),
        };
        let after = BASE64_URL_SAFE_NO_PAD
            .decode(cursor.unwrap_or_default())
            .ok()
            .and_then(|bytes| String::from_utf8(bytes).ok())
            .filter(|after| no_nul(after).is_ok())
            .ok_or_else(|| malformed("cursor is not from an earlier list"))?;
        Ok(Self { after, limit })
    }

    /// Number of items to load: one more than the page, to know whether there is a next page.
    pub(super) fn look_for(&self) -> usize {
        self.limit + 1
    }

    /// The answer with a page of items. The next page begins after the `key` of the last item.
    pub(super) fn show<T>(
        &self,
        name: &str,
        mut items: Vec<T>,
        key: impl Fn(&T) -> String,
        view: impl Fn(&T) -> Value,
    ) -> Value {
        let more = items.len() > self.limit;
        items.truncate(self.limit);
        let cursor = match items.last() {
            Some(last) if more => BASE64_URL_SAFE_NO_PAD.encode(key(last)),
            Some(_) | None => String::new(),
        };
        let list: Vec<Value> = items.iter().map(view).collect();
        json!({name: list, "length": list.len(), "limit": self.limit, "cursor": cursor})
    }
}

/// The query of a list without filters.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PageAsked {
    limit: Option<String>,
    cursor: Option<String>,
}

impl PageAsked {
    pub(super) fn page(&self) -> Result<Page, ApiError> {
        Page::parse(self.limit.as_deref(), self.cursor.as_deref())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn pages_follow_each_other() {
        let page = Page::parse(Some("2"), None).unwrap();
        let shown = page.show("x", vec!["a", "b", "c"], |x| (*x).to_owned(), |x| json!(x));
        assert_eq!(
            (&shown["x"], &shown["length"], &shown["limit"]),
            (&json!(["a", "b"]), &json!(2), &json!(2))
        );
        let next = Page::parse(Some("2"), shown["cursor"].as_str()).unwrap();
        assert_eq!(next.after, "b");
        assert_eq!(
            next.show("x", vec!["c"], |x| (*x).to_owned(), |x| json!(x))["cursor"],
            ""
        );
        for bad in ["0", "501", "-1", "x", ""] {
            assert!(Page::parse(Some(bad), None).is_err(), "{bad:?}");
        }
        assert!(Page::parse(None, Some("*")).is_err());
    }
}
