//! `--filter data.password` selects one value of an answer.

use std::str::FromStr;

use serde_json::Value;

/// The place of a value in an answer: names and positions, separated by dots.
#[derive(Clone, Debug)]
pub(crate) struct Filter(String);

impl FromStr for Filter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.split('.').any(str::is_empty) {
            return Err(
                "a filter consists of names separated by dots, such as data.password".into(),
            );
        }
        Ok(Self(text.to_owned()))
    }
}

impl Filter {
    /// The filter as it was written.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// The value. `None` if it is absent or null.
    pub(crate) fn find<'a>(&self, answer: &'a Value) -> Option<&'a Value> {
        find(answer, &self.0).filter(|value| !value.is_null())
    }
}

/// Finds the value. Keys may contain dots, so each way to split the path is tried, first those with the shortest
/// first key.
fn find<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    let step = |key: &str| match value {
        Value::Object(members) => members.get(key),
        Value::Array(items) => items.get(key.parse::<usize>().ok()?),
        _ => None,
    };
    path.match_indices('.')
        .find_map(|(at, _)| find(step(&path[..at])?, &path[at + 1..]))
        .or_else(|| step(path))
}

/// The value in the form for scripts: text unchanged, all else as JSON.
pub(crate) fn raw(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(_) | Value::Object(_) => format!("{value:#}"),
        other => other.to_string(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_filter_finds_its_value_or_nothing() {
        let answer = json!({
            "data": {"password": "p\"w\n", "port": 5432, "none": null, "a.b": {"c": 1}, "a": {"x": 2}},
            "leases": [{"id": "one"}, {"id": "two"}],
        });
        let found = |text: &str| text.parse::<Filter>().unwrap().find(&answer).map(raw);
        assert_eq!(found("data.password").as_deref(), Some("p\"w\n"));
        assert_eq!(found("data.port").as_deref(), Some("5432"));
        assert_eq!(found("leases.1.id").as_deref(), Some("two"));
        assert_eq!(found("data.a.b.c").as_deref(), Some("1"));
        assert_eq!(found("data.a.x").as_deref(), Some("2"));
        assert_eq!(found("data.a").as_deref(), Some("{\n  \"x\": 2\n}"));
        for absent in [
            "data.none",
            "data.missing",
            "password",
            "leases.2.id",
            "leases.id",
            "data.port.x",
        ] {
            assert_eq!(found(absent), None, "{absent}");
        }
    }

    #[test]
    fn an_empty_name_is_not_a_filter() {
        for text in ["", ".", "data.", ".data", "a..b"] {
            assert!(text.parse::<Filter>().is_err(), "{text:?}");
        }
    }
}
