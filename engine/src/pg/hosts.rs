//! The database hosts that an engine may connect to (`pool.hosts`). A caller who can write a base secret
//! chooses the address that every engine of a pool connects to; this list is the engine's own limit.

use std::net::IpAddr;
use std::str::FromStr;

use mayfly_protocol::target::Endpoint;
use mayfly_protocol::task::{Failure, FailureCode};

/// The allowed hosts. By default all are allowed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Hosts {
    /// `None`: all hosts are allowed.
    entries: Option<Vec<Entry>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    place: Place,
    /// `None`: any port is allowed.
    port: Option<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    /// A name, or the directory of a Unix socket, as it is written in a base secret.
    Name(String),
    /// `*.example.com`: longer names that end in `.example.com`.
    Suffix(String),
    /// Addresses with the same first bits; the number is how many.
    Network(IpAddr, u32),
}

impl Hosts {
    /// Checks that the engine may connect to this host.
    ///
    /// # Errors
    /// `database_unreachable`, with the name of the host.
    pub(crate) fn allow(&self, endpoint: &Endpoint) -> Result<(), Failure> {
        let is_allowed = match &self.entries {
            None => true,
            Some(entries) => entries.iter().any(|entry| entry.holds(endpoint)),
        };
        if is_allowed {
            return Ok(());
        }
        Err(Failure::new(
            FailureCode::DatabaseUnreachable,
            format!(
                "this engine does not connect to {endpoint}: it is not among its pool.hosts (MAYFLY__POOL__HOSTS)"
            ),
        ))
    }
}

impl TryFrom<String> for Hosts {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let entries: Result<Vec<Entry>, String> = text.split(',').map(str::parse).collect();
        Ok(Self {
            entries: Some(entries.map_err(|reason| format!("pool.hosts: {reason}"))?),
        })
    }
}

impl Entry {
    fn holds(&self, endpoint: &Endpoint) -> bool {
        if self.port.is_some_and(|port| port != endpoint.port) {
            return false;
        }
        let host = plain(&endpoint.host);
        match &self.place {
            Place::Name(name) => *name == host,
            Place::Suffix(end) => host.len() > end.len() && host.ends_with(end.as_str()),
            // The name is not resolved, because its address could change before the engine connects.
            Place::Network(network, bits) => address(&host)
                .is_some_and(|address| leading(address, *bits) == leading(*network, *bits)),
        }
    }
}

impl FromStr for Entry {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| format!("{text:?} {why}");
        let entry = text.trim();
        if entry.is_empty() {
            return Err("has an empty entry; without pool.hosts all hosts are allowed".to_owned());
        }
        let bad_port = || wrong("has a port that is not a number from 1 to 65535");
        let (host, port) = split_port(entry).ok_or_else(|| wrong("has a [ without a ]"))?;
        let port = match port {
            None => None,
            Some(port) if port.bytes().all(|byte| byte.is_ascii_digit()) => {
                let port = port.parse().ok().filter(|port| *port > 0);
                Some(port.ok_or_else(bad_port)?)
            }
            Some(_) => return Err(bad_port()),
        };
        let host = plain(host);
        let place = if host.starts_with('/') {
            Place::Name(host)
        } else if let Some((network, bits)) = host.split_once('/') {
            let network = network
                .parse::<IpAddr>()
                .map_err(|_| wrong("is not a network such as 10.0.0.0/8"))?;
            let most = match network {
                IpAddr::V4(_) => 32,
                IpAddr::V6(_) => 128,
            };
            let bits = bits.parse().ok().filter(|bits| *bits <= most);
            let bits = bits.ok_or_else(|| {
                wrong(&format!("has a prefix length that is not from 0 to {most}"))
            })?;
            Place::Network(network, bits)
        } else if let Some(address) = address(&host) {
            let bits = match address {
                IpAddr::V4(_) => 32,
                IpAddr::V6(_) => 128,
            };
            Place::Network(address, bits)
        } else if let Some(end) = host.strip_prefix('*') {
            if !end.starts_with('.') || !is_name(&end[1..]) {
                return Err(wrong("is not a pattern such as *.example.com"));
            }
            Place::Suffix(end.to_owned())
        } else if is_name(&host) {
            Place::Name(host)
        } else {
            return Err(wrong("is not a host name, address or network"));
        };
        Ok(Self { place, port })
    }
}

/// A host and its port, if it has one. An IPv6 address needs brackets before a port.
fn split_port(entry: &str) -> Option<(&str, Option<&str>)> {
    if let Some(rest) = entry.strip_prefix('[') {
        let (host, after) = rest.split_once(']')?;
        return match after.strip_prefix(':') {
            Some(port) => Some((host, Some(port))),
            None if after.is_empty() => Some((host, None)),
            None => None,
        };
    }
    match entry.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') => Some((host, Some(port))),
        _ => Some((entry, None)),
    }
}

/// The name in lower case, without a dot at the end.
fn plain(host: &str) -> String {
    if host.starts_with('/') {
        return host.to_owned();
    }
    host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase()
}

fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}

/// An address without its zone. An IPv4 address that is mapped into IPv6 becomes IPv4.
fn address(host: &str) -> Option<IpAddr> {
    let host = host.split_once('%').map_or(host, |(address, _)| address);
    host.parse::<IpAddr>().ok().map(|it| it.to_canonical())
}

/// The first bits of an address, and whether it is IPv6.
fn leading(address: IpAddr, bits: u32) -> (bool, u128) {
    let (is_v4, all, width) = match address {
        IpAddr::V4(address) => (true, u128::from(address.to_bits()), 32),
        IpAddr::V6(address) => (false, address.to_bits(), 128),
    };
    (is_v4, all.checked_shr(width - bits).unwrap_or(0))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use mayfly_protocol::target::endpoints;

    fn hosts(text: &str) -> Result<Hosts, String> {
        text.to_owned().try_into()
    }

    fn allows(list: &str, host: &str, port: u16) -> bool {
        let endpoint = endpoints(host, port).unwrap().remove(0);
        hosts(list).unwrap().allow(&endpoint).is_ok()
    }

    #[test]
    fn only_these_hosts() {
        let list = "db1.example.com, *.site.example:6432,10.1.0.0/16,192.0.2.7:5432,[::1]:5432,fd00::/8,/run/postgresql";
        for (host, port, wanted) in [
            ("db1.example.com", 5432, true),
            ("DB1.Example.com.", 1, true),
            ("db2.example.com", 5432, false),
            ("db1.example.com.evil.test", 5432, false),
            ("xdb1.example.com", 5432, false),
            ("a.site.example", 6432, true),
            ("a.b.site.example", 6432, true),
            ("site.example", 6432, false),
            ("asite.example", 6432, false),
            ("a.site.example", 5432, false),
            ("10.1.255.255", 1, true),
            ("::ffff:10.1.2.3", 1, true),
            ("10.2.0.0", 1, false),
            // The machine's library would read this name as an address.
            ("10.1.1", 1, false),
            ("192.0.2.7", 5432, true),
            ("192.0.2.7", 5433, false),
            ("0:0::1", 5432, true),
            ("::1", 5433, false),
            ("fd12::5%eth0", 9, true),
            ("fe80::1", 9, false),
            ("/run/postgresql", 5432, true),
            ("/tmp", 5432, false),
        ] {
            assert_eq!(allows(list, host, port), wanted, "{host}:{port}");
        }
        assert!(allows("0.0.0.0/0", "203.0.113.9", 1));
        assert!(!allows("0.0.0.0/0", "::1", 1));
        assert!(allows("::/0", "::1", 1));
        let anywhere = endpoints("anywhere", 1).unwrap().remove(0);
        assert!(Hosts::default().allow(&anywhere).is_ok());
        let refused = hosts("db1").unwrap().allow(&anywhere).unwrap_err();
        assert!(
            refused.message.contains("anywhere:1") && refused.message.contains("pool.hosts"),
            "{refused}"
        );
    }

    #[test]
    fn a_list_says_what_is_wrong() {
        for (list, said) in [
            ("", "empty entry"),
            ("db1,,db2", "empty entry"),
            ("db1,", "empty entry"),
            ("db1:0", "port"),
            ("db1:+1", "port"),
            ("db1:postgres", "port"),
            ("db 1", "not a host name"),
            ("10.0.0.0/33", "0 to 32"),
            ("example.com/8", "not a network"),
            ("[::1", "without a ]"),
            ("*", "not a pattern"),
            ("*example.com", "not a pattern"),
            ("db*.example.com", "not a host name"),
        ] {
            let error = hosts(list).unwrap_err();
            assert!(
                error.contains(said) && error.contains("pool.hosts"),
                "{list}: {error}"
            );
        }
    }
}
