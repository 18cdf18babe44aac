//! Kubernetes Secrets, as `kubectl create -f -` takes them.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Map, Value, json};

use crate::failure::Failure;

/// Checks that this can be the name of a Secret (RFC 1123 subdomain, as Kubernetes requires).
pub(crate) fn check_name(name: &str) -> Result<(), Failure> {
    let part = |part: &str| {
        let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        !part.is_empty()
            && part.bytes().all(inner)
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    if name.len() <= 253 && name.split('.').all(part) {
        return Ok(());
    }
    Err(Failure::Usage(format!(
        "--secret: {name:?} is not a name of a Kubernetes Secret (1 to 253 of a-z, 0-9, `-` and `.`)"
    )))
}

/// A Secret with these entries.
pub(crate) fn secret(name: &str, entries: &[(&str, &str)]) -> Value {
    let data: Map<String, Value> = entries
        .iter()
        .map(|(key, value)| ((*key).to_owned(), BASE64_STANDARD.encode(value).into()))
        .collect();
    json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "Opaque",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/part-of": "mayfly"}},
        "data": data,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_holds_its_entries() {
        let made = secret("keys", &[("pool.key", "{\"pool\":\"orders\"}\n")]);
        let held = made["data"]["pool.key"].as_str().unwrap();
        assert_eq!(
            BASE64_STANDARD.decode(held).unwrap(),
            b"{\"pool\":\"orders\"}\n"
        );
        assert_eq!(made["metadata"]["name"], "keys");
    }

    #[test]
    fn names_are_those_of_kubernetes() {
        for good in ["a", "mayfly-keys", "mayfly.keys-2"] {
            check_name(good).unwrap();
        }
        for bad in ["", "Keys", "-a", "a-", "a..b", "a_b", &"a".repeat(254)] {
            assert_eq!(check_name(bad).unwrap_err().exit_code(), 2, "{bad}");
        }
    }
}
