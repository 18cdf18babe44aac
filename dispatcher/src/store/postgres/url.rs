//! The URL of a lease store in PostgreSQL: hosts, database, TLS options and the accepted methods of login.

use std::sync::Arc;
use std::time::Duration;

use mayfly_common::pg_connect::Login;
use mayfly_protocol::authorities::Authorities;
use mayfly_protocol::pg_login::{Auth, ChannelBinding, Methods, Rule, WrittenIn};
use mayfly_protocol::secret::Secret;
use mayfly_protocol::target::{Endpoint, SslMode, Target};
use tokio_postgres::Config;
use tokio_postgres::config::Host;

use super::primary::Primary;

/// Time limit for each host of the URL.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);

/// A `postgres://…` URL, parsed.
#[derive(Clone)]
pub(crate) struct Url {
    pub(super) config: Config,
    /// The TLS options, in the form of a base secret.
    target: Target,
    rule: Rule,
    /// Host and database, without user and password.
    pub(super) place: String,
    /// Which of its servers is the primary. All copies of the URL share it.
    pub(in crate::store) primary: Arc<Primary>,
}

impl std::fmt::Debug for Url {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.place)
    }
}

impl std::fmt::Display for Url {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.place)
    }
}

/// The parameters of a URL that Mayfly reads, and the others unchanged.
struct Parameters<'u> {
    sslmode: Option<SslMode>,
    /// The certificates, PEM text.
    sslrootcert: Option<String>,
    methods: Methods,
    channel_binding: Option<ChannelBinding>,
    others: Vec<&'u str>,
}

impl<'u> Parameters<'u> {
    fn parse(query: &'u str) -> Result<Self, String> {
        let mut found = Self {
            sslmode: None,
            sslrootcert: None,
            methods: Methods::from(Auth::Scram),
            channel_binding: None,
            others: Vec::new(),
        };
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            match pair.split_once('=') {
                Some(("sslmode", mode)) => {
                    found.sslmode = Some(word(mode).ok_or(
                        "has an unknown sslmode; known: disable, prefer, require, verify-full",
                    )?);
                }
                Some(("channel_binding", wanted)) => {
                    found.channel_binding = Some(word(wanted).ok_or(
                        "has an unknown channel_binding; known: require, prefer, disable",
                    )?);
                }
                Some(("require_auth", list)) => found.methods = Methods::parse(&decoded(list)?)?,
                Some(("sslnegotiation", _)) => {
                    return Err("has an sslnegotiation, which is not supported".to_owned());
                }
                Some(("sslrootcert", file)) => {
                    let pem = std::fs::read_to_string(decoded(file)?).map_err(|error| {
                        format!("has an sslrootcert that cannot be read: {error}")
                    })?;
                    found.sslrootcert = Some(pem);
                }
                _ => found.others.push(pair),
            }
        }
        Ok(found)
    }
}

impl Url {
    /// Parses `postgres://user:password@host:port/database?sslmode=…&sslrootcert=FILE`, also with
    /// libpq's `channel_binding` and `require_auth`.
    ///
    /// # Errors
    /// A message that does not repeat the URL, which holds a password.
    pub(crate) fn parse(url: &Secret) -> Result<Self, String> {
        let (plain, query) = url.expose().split_once('?').unwrap_or((url.expose(), ""));
        let Parameters {
            sslmode,
            sslrootcert,
            methods,
            channel_binding,
            others,
        } = Parameters::parse(query)?;
        let text = Secret::new(format!("{plain}?{}", others.join("&")));
        let mut config: Config = text.expose().parse().map_err(|_| {
            "is not postgres://user:password@host:port/database (special characters in a password are percent-encoded)"
                .to_owned()
        })?;
        let endpoints = endpoints(&config);
        let Some(Endpoint { host, port }) = endpoints.first().cloned() else {
            return Err("names no host".to_owned());
        };
        if endpoints.len() > 1 && endpoints.iter().any(|one| one.host.starts_with('/')) {
            return Err("names a Unix socket together with another host".to_owned());
        }
        let sslmode = sslmode.unwrap_or_else(|| SslMode::default_for(&endpoints));
        config
            .application_name("mayfly-dispatcher")
            .connect_timeout(CONNECT_TIMEOUT)
            .keepalives_idle(Duration::from_secs(5))
            .tcp_user_timeout(Duration::from_secs(10))
            .target_session_attrs(tokio_postgres::config::TargetSessionAttrs::ReadWrite);
        let database = config.get_dbname().unwrap_or_default().to_owned();
        let place = format!("{host}:{port}, database {database}");
        let target = Target {
            host,
            port,
            database,
            username: String::new(),
            password: Secret::new(""),
            sslmode,
            auth: Auth::Scram,
            channel_binding,
            sslrootcert: sslrootcert.map(Authorities::Pem),
            sslcert: None,
            sslkey: None,
        };
        let rule = Rule {
            methods,
            written_in: WrittenIn::StoreUrl,
            ..Rule::of(&target)
        };
        if rule.binding() == ChannelBinding::Require && !rule.methods.scram {
            return Err("has a require_auth that cannot be bound to a TLS connection, which its sslmode or channel_binding requires; use sslmode=verify-full".to_owned());
        }
        // A malformed certificate is refused at the start.
        Login::new(&target, rule)?;
        Ok(Self {
            config,
            target,
            rule,
            place,
            primary: Arc::default(),
        })
    }
}

impl Url {
    /// How to log in.
    ///
    /// # Errors
    /// As [`Login::new`].
    pub(super) fn login(&self) -> Result<Login, String> {
        Login::new(&self.target, self.rule)
    }
}

/// Parses one of a few words.
fn word<T: serde::de::DeserializeOwned>(text: &str) -> Option<T> {
    serde_json::from_value(serde_json::Value::String(text.to_owned())).ok()
}

fn decoded(text: &str) -> Result<String, String> {
    let decoded = percent_encoding::percent_decode_str(text).decode_utf8();
    decoded
        .map(Into::into)
        .map_err(|_| "has a parameter that is not UTF-8".to_owned())
}

fn endpoints(config: &Config) -> Vec<Endpoint> {
    let ports = config.get_ports();
    let hosts = config.get_hosts().iter().enumerate();
    hosts
        .map(|(n, host)| Endpoint {
            host: match host {
                Host::Tcp(host) => host.clone(),
                Host::Unix(path) => path.display().to_string(),
            },
            port: ports.get(n).or(ports.first()).copied().unwrap_or(5432),
        })
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_parsed_and_never_shown() {
        let url = Url::parse(&Secret::new(
            "postgres://app:hunter2@db:5433/mayfly?sslmode=require",
        ));
        let url = url.unwrap();
        assert_eq!(format!("{url:?}"), "db:5433, database mayfly");
        assert_eq!(url.rule.sslmode, SslMode::Require);
        assert_eq!(url.rule.binding(), ChannelBinding::Require);
        let mode = |url: &str| Url::parse(&Secret::new(url)).unwrap().rule.sslmode;
        assert_eq!(mode("postgres://localhost,127.0.0.1/x"), SslMode::Prefer);
        assert_eq!(
            mode("postgres://localhost,db2/x"),
            SslMode::Require,
            "not only the first host counts"
        );
        let url = Url::parse(&Secret::new(
            "postgres://app@db/x?require_auth=scram-sha-256%2Cmd5&channel_binding=prefer",
        ));
        let rule = url.unwrap().rule;
        assert!(rule.methods.md5 && !rule.methods.password && !rule.methods.none);
        assert_eq!(rule.binding(), ChannelBinding::Prefer);
        for (bad, why) in [
            ("postgres://app:hunter2@db/x?sslmode=maybe", "sslmode"),
            (
                "postgres://app:hunter2@db/x?sslmode=verify-full&sslrootcert=/no/such",
                "sslrootcert",
            ),
            (
                "postgres://app:hunter2@db/x?require_auth=gss",
                "require_auth",
            ),
            (
                "postgres://app:hunter2@db/x?channel_binding=maybe",
                "channel_binding",
            ),
            (
                "postgres://app:hunter2@db/x?require_auth=md5&channel_binding=require",
                "bound",
            ),
            ("postgres://app:hunter2@%2Frun,db/x", "Unix socket"),
            ("postgres://app:hunter2@db:port/x", "postgres://user"),
        ] {
            let error = Url::parse(&Secret::new(bad)).unwrap_err();
            assert!(error.contains(why) && !error.contains("hunter2"), "{error}");
        }
    }
}
