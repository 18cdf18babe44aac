//! A credential as it is shown: its parts, and a connection URI.

use mayfly_protocol::target::{self, Endpoint};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};

use super::date;
use crate::leases::order::Issued;

/// All characters except the unreserved ones of RFC 3986, 2.3.
const URL_PART: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// The members of the answer to a read.
pub(super) fn credential(issued: &Issued) -> Value {
    let password = issued.password.expose();
    json!({
        "host": bare_host(&issued.host, issued.port),
        "port": issued.port,
        "database": issued.database,
        "username": issued.username,
        "password": password,
        "url": url(&issued.host, issued.port, &issued.database, &issued.username, password),
        "ttl": issued.ttl_seconds,
        "expiration": date(issued.expiration),
        "leaseId": issued.lease.to_string(),
    })
}

/// The host for a separate parameter of a driver: an IPv6 address has no brackets. Several hosts stay as
/// written.
fn bare_host(host: &str, port: u16) -> String {
    match target::endpoints(host, port).as_deref() {
        Ok([only]) => only.host.clone(),
        Ok(_) | Err(_) => host.to_owned(),
    }
}

/// A PostgreSQL connection URI (PostgreSQL documentation, 34.1.1.2). If there are several hosts, the client selects
/// the host that accepts writes, as the engines do.
fn url(host: &str, port: u16, database: &str, user: &str, password: &str) -> String {
    let part = |text: &str| utf8_percent_encode(text, URL_PART).to_string();
    let place = |endpoint: &Endpoint| match endpoint.host.parse::<std::net::Ipv6Addr>() {
        Ok(address) => format!("[{address}]:{}", endpoint.port),
        Err(_) => format!("{}:{}", part(&endpoint.host), endpoint.port),
    };
    // A stored host may not pass a check that was added later.
    let endpoints = target::endpoints(host, port).unwrap_or_else(|_| {
        vec![Endpoint {
            host: host.to_owned(),
            port,
        }]
    });
    let places: Vec<String> = endpoints.iter().map(place).collect();
    let options = if places.len() > 1 {
        "?target_session_attrs=read-write"
    } else {
        ""
    };
    format!(
        "postgresql://{}:{}@{}/{}{options}",
        part(user),
        part(password),
        places.join(","),
        part(database)
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_encoded() {
        assert_eq!(
            url("db.example", 5432, "app", "mayfly_x", "abc"),
            "postgresql://mayfly_x:abc@db.example:5432/app"
        );
        assert_eq!(
            url("::1", 1, "my db", "a b/é@", "p:w"),
            "postgresql://a%20b%2F%C3%A9%40:p%3Aw@[::1]:1/my%20db"
        );
        assert_eq!(
            url("db1,db2:5433,[::1]", 5432, "app", "u", "p"),
            "postgresql://u:p@db1:5432,db2:5433,[::1]:5432/app?target_session_attrs=read-write"
        );
    }

    /// A host as drivers take it in a separate parameter.
    #[test]
    fn a_host_alone_has_no_brackets() {
        for (host, bare) in [
            ("[::1]", "::1"),
            ("::1", "::1"),
            ("[fe80::1%eth0]", "fe80::1%eth0"),
            ("db.example", "db.example"),
            ("/run/postgresql", "/run/postgresql"),
            ("db1,[::1]:5433", "db1,[::1]:5433"),
        ] {
            assert_eq!(bare_host(host, 5432), bare);
        }
    }

    #[test]
    fn dates_have_no_fraction_and_never_promise_more() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (1_795_608_000_000, "2026-11-25T12:00:00Z"),
            (1_795_608_000_001, "2026-11-25T12:00:00Z"),
            (1_795_608_000_999, "2026-11-25T12:00:00Z"),
            (221_845_392_000_000, "9000-01-01T00:00:00Z"),
        ] {
            assert_eq!(
                date(jiff::Timestamp::from_millisecond(ms).unwrap()),
                text,
                "{ms}"
            );
        }
    }
}
