//! A URL for PgJDBC (<https://jdbc.postgresql.org/documentation/use/>). Its values are decoded as
//! `application/x-www-form-urlencoded`, so all but unreserved characters are percent-encoded.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use zeroize::Zeroizing;

use crate::credential::Credential;

/// All but the unreserved characters of RFC 3986, 2.3.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

pub(super) fn text(credential: &Credential) -> Result<Zeroizing<String>, String> {
    let mut url = url(credential)?;
    url.push('\n');
    Ok(url)
}

/// The URL, without a line end.
pub(super) fn url(credential: &Credential) -> Result<Zeroizing<String>, String> {
    let places: Result<Vec<String>, String> = credential
        .places
        .iter()
        .map(|(host, port)| Ok(format!("{}:{port}", host_part(host)?)))
        .collect();
    let part = |text: &str| utf8_percent_encode(text, ENCODED).to_string();
    let mut url = Zeroizing::new(format!(
        "jdbc:postgresql://{}/{}?user={}&password=",
        places?.join(","),
        part(&credential.database),
        part(&credential.username)
    ));
    url.extend(utf8_percent_encode(&credential.password, ENCODED));
    if credential.places.len() > 1 {
        url.push_str("&targetServerType=primary");
    }
    Ok(url)
}

/// The host as a part of the URL. PgJDBC does not decode hosts, and cannot connect to Unix sockets.
fn host_part(host: &str) -> Result<String, String> {
    if host.parse::<std::net::Ipv6Addr>().is_ok() {
        return Ok(format!("[{host}]"));
    }
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    match !host.is_empty() && host.chars().all(is_plain) {
        true => Ok(host.to_owned()),
        false => {
            Err("a JDBC URL cannot name this host: it is neither a name nor an address".into())
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::credential::tests::{at, with};

    #[test]
    fn values_are_encoded() {
        assert_eq!(
            *text(&with("my db/é", "u&user=x", "p+q%&;=#? ")).unwrap(),
            "jdbc:postgresql://db:5432/my%20db%2F%C3%A9?user=u%26user%3Dx&password=p%2Bq%25%26%3B%3D%23%3F%20\n"
        );
        assert_eq!(
            *url(&at(&[("db1", 5432), ("::1", 1)], "app", "u", "p")).unwrap(),
            "jdbc:postgresql://db1:5432,[::1]:1/app?user=u&password=p&targetServerType=primary"
        );
    }

    /// A host with a query would set a property, such as `socketFactory`, which loads a class.
    #[test]
    fn a_host_is_a_host() {
        for host in [
            "/run/pg",
            "db/app?socketFactory=x&",
            "a b",
            "",
            "é",
            "fe80::1%eth0",
        ] {
            assert!(url(&at(&[(host, 1)], "app", "u", "p")).is_err(), "{host}");
        }
    }
}
