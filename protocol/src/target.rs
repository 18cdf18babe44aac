//! What an engine needs to reach a PostgreSQL server: the data of a base secret.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::authorities::Authorities;
use crate::secret::{self, Secret};

/// How the connection is protected, in libpq's words (PostgreSQL documentation, "SSL Support").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SslMode {
    /// Never TLS. It is never the default.
    Disable,
    /// TLS if the server offers it. The default on loopback.
    Prefer,
    /// TLS is required. The server's certificate is not verified, except its chain if `sslrootcert` is given,
    /// as in libpq. The login is bound to the connection. The default for other hosts.
    Require,
    /// TLS, the certificate's chain and the host name verified against `sslrootcert`, or without it
    /// against the machine's authorities.
    VerifyFull,
}

impl SslMode {
    /// The default for these hosts: `prefer` if all are on this machine, else `require`.
    pub fn default_for(endpoints: &[Endpoint]) -> Self {
        if !endpoints.is_empty() && endpoints.iter().all(Endpoint::is_on_this_machine) {
            Self::Prefer
        } else {
            Self::Require
        }
    }
}

/// The weakest method by which a base secret lets its password be used (`data.auth`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Auth {
    /// SCRAM-SHA-256 (RFC 7677): the server gets neither the password nor anything that replaces it.
    #[default]
    Scram,
    /// MD5 is allowed too: the server gets a hash with which it can log in at other servers.
    Md5,
    /// The password in clear is allowed too.
    Password,
}

impl Auth {
    /// Whether this is the default.
    pub fn is_default(&self) -> bool {
        *self == Self::Scram
    }
}

/// Whether a login is bound to its TLS connection, in libpq's words (PostgreSQL documentation,
/// "Database Connection Control Functions", `channel_binding`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChannelBinding {
    /// A login that cannot be bound is refused.
    Require,
    /// The login is bound if the server can.
    Prefer,
    /// The login is not bound.
    Disable,
}

/// Maximum number of hosts of one base secret.
pub const MAX_HOSTS: usize = 8;

/// One of the hosts and ports at which a server may be reached.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// Host name, IP address (without brackets) or directory of a Unix socket.
    pub host: String,
    /// TCP port, 1 to 65535.
    pub port: u16,
}

impl Endpoint {
    /// Loopback, or a Unix socket: no other machine is in the middle.
    pub fn is_on_this_machine(&self) -> bool {
        let address = self.host.parse::<std::net::IpAddr>();
        self.host == "localhost"
            || self.host.starts_with('/')
            || address.is_ok_and(|address| address.is_loopback())
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// The endpoints that a `host` names: one, or several separated by commas (`db1,db2:5433,[::1]`). One of
/// several may have its own port; otherwise it has `port`.
///
/// # Errors
/// What is wrong, naming the part.
pub fn endpoints(host: &str, port: u16) -> Result<Vec<Endpoint>, String> {
    let parts: Vec<&str> = host.split(',').collect();
    if parts.len() > MAX_HOSTS {
        return Err(format!(
            "names {} hosts; at most {MAX_HOSTS} are possible",
            parts.len()
        ));
    }
    let mut found: Vec<Endpoint> = Vec::with_capacity(parts.len());
    for part in &parts {
        let endpoint = endpoint(part, port, parts.len() > 1)?;
        if found.contains(&endpoint) {
            return Err(format!("names {endpoint} twice"));
        }
        found.push(endpoint);
    }
    Ok(found)
}

fn endpoint(part: &str, default_port: u16, is_one_of_several: bool) -> Result<Endpoint, String> {
    let wrong = |why: &str| Err(format!("{part:?} {why}"));
    if part.is_empty() {
        return Err(if is_one_of_several {
            "has an empty entry between two commas".to_owned()
        } else {
            "must not be empty".to_owned()
        });
    }
    if part.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return wrong("has white space or control characters");
    }
    let (host, port) = if let Some(rest) = part.strip_prefix('[') {
        let Some((address, after)) = rest.split_once(']') else {
            return wrong("has a [ without a ]");
        };
        if !is_ipv6(address) {
            return wrong("has something other than an IPv6 address in its brackets");
        }
        match (after, after.strip_prefix(':')) {
            ("", _) => (address, None),
            (_, Some(port)) => (address, Some(port)),
            _ => return wrong("has something other than a port after its ]"),
        }
    } else if part.starts_with('/') || is_ipv6(part) {
        (part, None)
    } else {
        match part.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (part, None),
        }
    };
    if host.is_empty() || (!host.starts_with('/') && host.contains(['[', ']', '/', '@', '?', '#']))
    {
        return wrong("is not a host name or address");
    }
    let port = match port {
        None => default_port,
        // A caller gets host and port separately, so a single host has its port there.
        Some(_) if !is_one_of_several => {
            return wrong("has a port: put the port of a single host into `port`");
        }
        Some(text) => match text.parse() {
            Ok(port) if port > 0 && text.bytes().all(|byte| byte.is_ascii_digit()) => port,
            _ => return wrong("has a port that is not a number from 1 to 65535"),
        },
    };
    Ok(Endpoint {
        host: host.to_owned(),
        port,
    })
}

/// An IPv6 address, with a zone or without.
fn is_ipv6(text: &str) -> bool {
    let address = text.split_once('%').map_or(text, |(address, _)| address);
    address.parse::<std::net::Ipv6Addr>().is_ok()
}

/// The admin connection of a PostgreSQL server. Only ever serialized to be sealed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Host name or IP address, or several with commas between them; see [`endpoints`].
    pub host: String,
    /// TCP port of hosts without their own port.
    pub port: u16,
    /// The database the admin connects to.
    pub database: String,
    /// Name of the admin.
    pub username: String,
    /// Password of the admin.
    #[serde(serialize_with = "secret::expose")]
    pub password: Secret,
    /// Protection of the connection.
    pub sslmode: SslMode,
    /// The weakest method by which the password may be used.
    #[serde(default, skip_serializing_if = "Auth::is_default")]
    pub auth: Auth,
    /// The written channel binding; see [`crate::pg_login::Rule::binding`] for the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channel_binding: Option<ChannelBinding>,
    /// Root certificates of the server, `sslrootcert`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sslrootcert: Option<Authorities>,
    /// Client certificate chain, PEM text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sslcert: Option<String>,
    /// Client key, PEM text.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "secret::expose_option"
    )]
    pub sslkey: Option<Secret>,
}

impl Target {
    /// Host and port, as the base secret has them.
    pub fn address(&self) -> String {
        format!("{} {}", self.host, self.port)
    }

    /// The hosts and ports of the server, see [`endpoints`].
    ///
    /// # Errors
    /// What is wrong with `host`.
    pub fn endpoints(&self) -> Result<Vec<Endpoint>, String> {
        endpoints(&self.host, self.port)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn shown(host: &str) -> Vec<String> {
        let found = endpoints(host, 5432).unwrap();
        found.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn one_host_or_several() {
        assert_eq!(shown("db.example"), ["db.example:5432"]);
        assert_eq!(shown("::1"), ["[::1]:5432"]);
        assert_eq!(shown("[::1]"), ["[::1]:5432"]);
        assert_eq!(
            shown("db1,db2:5433,[::1],[fe80::1%eth0]:6000,10.0.0.1:1"),
            [
                "db1:5432",
                "db2:5433",
                "[::1]:5432",
                "[fe80::1%eth0]:6000",
                "10.0.0.1:1"
            ]
        );
        assert_eq!(shown("/run/postgresql"), ["/run/postgresql:5432"]);
    }

    #[test]
    fn each_part_is_checked() {
        for (host, said) in [
            ("", "empty"),
            ("db1,,db2", "empty entry"),
            ("db1,", "empty entry"),
            ("db1, db2", "\" db2\" has white space"),
            ("db:5433", "into `port`"),
            ("db1,db2:0", "not a number from 1 to 65535"),
            ("db1,db2:+1", "not a number from 1 to 65535"),
            ("db1,db2:70000", "not a number from 1 to 65535"),
            ("db1,[::1", "without a ]"),
            ("db1,[db2]:1", "IPv6 address"),
            ("db1,[::1]5", "after its ]"),
            ("db1,:5432", "not a host name"),
            ("u@db", "not a host name"),
            ("db1,db2,db1:5432", "db1:5432 twice"),
            ("1,2,3,4,5,6,7,8,9", "at most 8"),
        ] {
            let error = endpoints(host, 5432).unwrap_err();
            assert!(error.contains(said), "{host}: {error}");
        }
    }

    #[test]
    fn only_loopback_prefers() {
        let default = |host: &str| SslMode::default_for(&endpoints(host, 1).unwrap());
        assert_eq!(default("localhost,127.0.0.2:5,[::1]"), SslMode::Prefer);
        assert_eq!(default("/run/postgresql"), SslMode::Prefer);
        assert_eq!(default("localhost,db2"), SslMode::Require);
        assert_eq!(default("db1"), SslMode::Require);
    }
}
