//! A credential in the form that programs need: its parts, from the answer to a read.

use serde_json::Value;
use zeroize::Zeroizing;

use crate::failure::Failure;

/// The data that a program needs to log in. It has no `Debug`, because it contains the password.
pub(crate) struct Credential {
    /// Hosts (without brackets) or directories of Unix sockets, each with its port. There is at least one.
    pub(crate) places: Vec<(String, u16)>,
    pub(crate) database: String,
    pub(crate) username: String,
    pub(crate) password: Zeroizing<String>,
    /// A `postgresql://` URI (PostgreSQL documentation, 34.1.1.2).
    pub(crate) url: Zeroizing<String>,
    pub(crate) lease: String,
    /// Life of the lease without a renewal, in seconds.
    pub(crate) ttl: u64,
    /// Variables with which libpq protects the connection, if they are known.
    pub(crate) protection: Vec<(&'static str, String)>,
    /// Root certificates of the server as PEM text, if they are known.
    pub(crate) roots: Option<String>,
}

impl Credential {
    /// Reads the answer to a read of a dynamic secret.
    ///
    /// # Errors
    /// The secret is not a dynamic one, or a field is absent. The message names the field.
    pub(crate) fn read(answer: &Value) -> Result<Self, Failure> {
        let text = |name: &str| match answer.pointer(&format!("/data/{name}")) {
            Some(Value::String(text)) => Ok(text.clone()),
            _ => Err(Failure::Local(format!(
                "the answer does not have data.{name}"
            ))),
        };
        let number = |name: &str| {
            let number = answer
                .pointer(&format!("/data/{name}"))
                .and_then(Value::as_u64);
            number.ok_or_else(|| Failure::Local(format!("the answer does not have data.{name}")))
        };
        let lease = text("leaseId").map_err(|_| {
            Failure::Local("the secret is not a dynamic secret: it has no lease".into())
        })?;
        let url = Zeroizing::new(text("url")?);
        let port = u16::try_from(number("port")?)
            .map_err(|_| Failure::Local("data.port of the answer is not a port".into()))?;
        Ok(Self {
            places: places(&text("host")?, port, &url)?,
            database: text("database")?,
            username: text("username")?,
            password: Zeroizing::new(text("password")?),
            url,
            lease,
            ttl: number("ttl")?,
            protection: Vec::new(),
            roots: None,
        })
    }

    /// All hosts, in the form that libpq expects in one parameter.
    pub(crate) fn hosts(&self) -> String {
        let hosts: Vec<&str> = self.places.iter().map(|(host, _)| host.as_str()).collect();
        hosts.join(",")
    }

    /// A port for each host, in the form that libpq expects in one parameter.
    pub(crate) fn ports(&self) -> String {
        let ports: Vec<String> = self
            .places
            .iter()
            .map(|(_, port)| port.to_string())
            .collect();
        ports.join(",")
    }

    /// The variables that libpq and most drivers read.
    pub(crate) fn environment(&self) -> Vec<(&'static str, Zeroizing<String>)> {
        let mut variables = vec![
            ("PGHOST", Zeroizing::new(self.hosts())),
            ("PGPORT", Zeroizing::new(self.ports())),
            ("PGDATABASE", Zeroizing::new(self.database.clone())),
            ("PGUSER", Zeroizing::new(self.username.clone())),
            ("PGPASSWORD", self.password.clone()),
            ("DATABASE_URL", self.url.clone()),
        ];
        if self.places.len() > 1 {
            let attributes = Zeroizing::new("read-write".to_owned());
            variables.push(("PGTARGETSESSIONATTRS", attributes));
        }
        let protection = self.protection.iter();
        variables.extend(protection.map(|(name, value)| (*name, Zeroizing::new(value.clone()))));
        variables
    }
}

/// The hosts and their ports. If there are several hosts, they come from the URL, which has the port of each.
fn places(host: &str, port: u16, url: &str) -> Result<Vec<(String, u16)>, Failure> {
    if !host.contains(',') {
        // A dispatcher of an earlier version returns an IPv6 address as it was written.
        let bare = host
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'));
        return Ok(vec![(bare.unwrap_or(host).to_owned(), port)]);
    }
    several(url).ok_or_else(|| Failure::Local("data.url does not name hosts and ports".to_owned()))
}

fn several(url: &str) -> Option<Vec<(String, u16)>> {
    let (_, rest) = url.split_once('@')?;
    let (places, _) = rest.split_once('/')?;
    let read = |place: &str| {
        let (host, port) = place.rsplit_once(':')?;
        // A URL has directories of sockets percent-encoded.
        let host = percent_encoding::percent_decode_str(host.trim_matches(['[', ']']));
        Some((host.decode_utf8().ok()?.into_owned(), port.parse().ok()?))
    };
    places.split(',').map(read).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod tests {
    use super::*;
    use serde_json::json;

    /// A credential with these parts and the host `db:5432`.
    pub(crate) fn with(database: &str, username: &str, password: &str) -> Credential {
        at(&[("db", 5432)], database, username, password)
    }

    pub(crate) fn at(
        places: &[(&str, u16)],
        database: &str,
        username: &str,
        password: &str,
    ) -> Credential {
        let places = places
            .iter()
            .map(|(host, port)| ((*host).to_owned(), *port));
        Credential {
            places: places.collect(),
            database: database.to_owned(),
            username: username.to_owned(),
            password: Zeroizing::new(password.to_owned()),
            url: Zeroizing::new("postgresql://…".to_owned()),
            lease: "01890a5d-ac96-774b-bcce-b302099a8057".to_owned(),
            ttl: 60,
            protection: Vec::new(),
            roots: None,
        }
    }

    fn answer(host: &str, url: &str) -> Value {
        json!({"data": {"host": host, "port": 5432, "database": "app", "username": "u", "password": "p",
            "url": url, "leaseId": "l", "ttl": 60, "expiration": "2026-11-26T12:00:00Z"}})
    }

    #[test]
    fn a_credential_is_whole_or_refused() {
        let whole = answer("db", "postgresql://u:p@db:5432/app");
        assert_eq!(
            Credential::read(&whole).unwrap().places,
            [("db".to_owned(), 5432)]
        );
        for name in [
            "host", "port", "database", "username", "password", "url", "leaseId",
        ] {
            let mut part = whole.clone();
            part["data"].as_object_mut().unwrap().remove(name);
            let refused = Credential::read(&part).err().unwrap().to_string();
            let is_named = refused.contains(name) || name == "leaseId";
            assert!(is_named && !refused.contains("p@"), "{name}: {refused}");
        }
    }

    /// PostgreSQL documentation, 34.15, PGHOST: an IPv6 host has brackets in a URL, and none in a variable.
    #[test]
    fn hosts_are_as_libpq_takes_them() {
        for (host, url, hosts, ports) in [
            ("[::1]", "postgresql://u:p@[::1]:5432/app", "::1", "5432"),
            ("::1", "postgresql://u:p@[::1]:5432/app", "::1", "5432"),
            (
                "db1,db2:5433,[::1]",
                "postgresql://u:p%40@db1:5432,db2:5433,[::1]:5432/app?target_session_attrs=read-write",
                "db1,db2,::1",
                "5432,5433,5432",
            ),
            (
                "/run/pg,db2",
                "postgresql://u:p@%2Frun%2Fpg:5432,db2:5432/app",
                "/run/pg,db2",
                "5432,5432",
            ),
        ] {
            let credential = Credential::read(&answer(host, url)).unwrap();
            let variables = credential.environment();
            assert_eq!(variables[0].1.as_str(), hosts);
            assert_eq!(variables[1].1.as_str(), ports);
            let is_list = variables
                .iter()
                .any(|(name, _)| *name == "PGTARGETSESSIONATTRS");
            assert_eq!(is_list, hosts.contains(','), "{hosts}");
        }
    }
}
