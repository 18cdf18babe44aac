//! Paths and queries of API calls. Every part of them is percent-encoded.

use std::fmt::Display;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use crate::failure::Failure;

/// All but the unreserved characters of RFC 3986.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// The part after the dispatcher's address, such as `/v1/leases?limit=1`.
#[derive(Debug)]
pub(crate) struct Route {
    path: String,
    query: String,
}

impl Route {
    /// A collection, such as `leases`.
    pub(crate) fn to(collection: &str) -> Self {
        Self {
            path: format!("/v1/{collection}"),
            query: String::new(),
        }
    }

    /// One item of a collection, by its name or id.
    pub(crate) fn item(collection: &str, name: &str) -> Result<Self, Failure> {
        Ok(Self::to(&format!(
            "{collection}/{}",
            segment(name, "a name")?
        )))
    }

    /// A secret by its path. `/` and `:` are the same, and `:` is sent.
    pub(crate) fn secret(path: &str) -> Result<Self, Failure> {
        let segments: Result<Vec<String>, Failure> = path
            .split(['/', ':'])
            .map(|part| segment(part, "a segment of a path"))
            .collect();
        Ok(Self::to(&format!("secrets/{}", segments?.join(":"))))
    }

    /// Adds a fixed suffix, such as `/ping`.
    pub(crate) fn then(mut self, suffix: &str) -> Self {
        self.path.push_str(suffix);
        self
    }

    /// Adds a query field, if it has a value.
    pub(crate) fn with<T: Display>(mut self, key: &str, value: Option<T>) -> Self {
        if let Some(value) = value {
            let value = value.to_string();
            let mark = if self.query.is_empty() { '?' } else { '&' };
            self.query.push(mark);
            self.query.push_str(key);
            self.query.push('=');
            self.query.extend(utf8_percent_encode(&value, ENCODED));
        }
        self
    }

    pub(crate) fn text(&self) -> String {
        format!("{}{}", self.path, self.query)
    }
}

/// Encodes a segment. `.` and `..` are refused, because they would be removed from the URL even if they were
/// encoded.
fn segment(text: &str, what: &str) -> Result<String, Failure> {
    match text {
        "" => Err(Failure::Usage(format!("{what} must not be empty"))),
        "." | ".." => Err(Failure::Usage(format!("{what} must not be `{text}`"))),
        text => Ok(utf8_percent_encode(text, ENCODED).to_string()),
    }
}

/// Whether two texts are the same path.
pub(crate) fn same_path(a: &str, b: &str) -> bool {
    a.replace('/', ":") == b.replace('/', ":")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn paths_have_one_encoded_form() {
        for (path, expected) in [
            ("db:postgresql:dyn1", "/v1/secrets/db:postgresql:dyn1"),
            ("db/postgresql/dyn1", "/v1/secrets/db:postgresql:dyn1"),
            ("db/a b?c#d%:e&f", "/v1/secrets/db:a%20b%3Fc%23d%25:e%26f"),
            ("db:é", "/v1/secrets/db:%C3%A9"),
            ("a:...", "/v1/secrets/a:..."),
        ] {
            assert_eq!(Route::secret(path).unwrap().text(), expected);
        }
        for path in ["", ":", "a::b", "/a", "a/", "..", "a/../b", "a:."] {
            assert_eq!(Route::secret(path).unwrap_err().exit_code(), 2, "{path:?}");
        }
    }

    #[test]
    fn names_and_queries_are_encoded() {
        let route = Route::item("engines", "a/b").unwrap().then("/ping");
        assert_eq!(route.text(), "/v1/engines/a%2Fb/ping");
        assert!(Route::item("leases", "..").is_err());
        let route = Route::to("leases")
            .with("path", Some("db:a&b"))
            .with("pool", None::<&str>)
            .with("limit", Some(5));
        assert_eq!(route.text(), "/v1/leases?path=db%3Aa%26b&limit=5");
    }
}
