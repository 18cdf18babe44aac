//! One JSON object (RFC 8259). Its fields are those of `data` in the answer to a read.

use serde_json::{Value, json};
use zeroize::Zeroizing;

use crate::credential::Credential;

pub(super) fn text(credential: &Credential) -> Zeroizing<String> {
    Zeroizing::new(format!("{:#}\n", value(credential)))
}

/// The fields, which templates have too. `expiration` is not among them, because each renewal changes it.
pub(super) fn value(credential: &Credential) -> Value {
    let places: Vec<Value> = credential
        .places
        .iter()
        .map(|(host, port)| json!({"host": host, "port": port}))
        .collect();
    let (host, port) = match credential.places.as_slice() {
        [(host, port)] => (json!(host), json!(port)),
        _ => (json!(credential.hosts()), json!(credential.ports())),
    };
    json!({
        "host": host,
        "port": port,
        "hosts": places,
        "database": credential.database,
        "username": credential.username,
        "password": credential.password.as_str(),
        "url": credential.url.as_str(),
        "ttl": credential.ttl,
        "leaseId": credential.lease,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::credential::tests::{at, with};

    #[test]
    fn values_are_read_back() {
        for value in ["\"", "\\", "\n\u{0}\u{1f}\u{7f}", "</script>", "é\u{2028}"] {
            let text = text(&with(value, value, value));
            let read: Value = serde_json::from_str(&text).unwrap();
            for name in ["database", "username", "password"] {
                assert_eq!(read[name], value, "{name}");
            }
        }
    }

    #[test]
    fn several_hosts_have_their_ports() {
        let text = text(&at(&[("a", 1), ("::1", 2)], "app", "u", "p"));
        let read: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (&read["host"], &read["port"]),
            (&json!("a,::1"), &json!("1,2"))
        );
        assert_eq!(read["hosts"][1], json!({"host": "::1", "port": 2}));
    }
}
