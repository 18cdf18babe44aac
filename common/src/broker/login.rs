//! The broker's address and the login. The settings' files are read again whenever a connection is opened:
//! a renewed password or certificate is used without a restart.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lapin::tcp::RustlsConnector;
use lapin::uri::{AMQPScheme, AMQPUri, SASLMechanism};
use lapin::{AsyncTcpStream, Connection, ConnectionProperties};
use serde::{Deserialize, Serialize};

use super::{BrokerError, CONNECT_TIMEOUT, HEARTBEAT_SECONDS};
use crate::settings::{SettingsError, read_secret, read_text, redacted, secret_or_file};
use crate::tls;
use mayfly_protocol::secret::Secret;

/// The section `[amqp]` of both programs.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct AmqpSettings {
    /// `amqp://user:password@host:port/vhost` or `amqps://…`; several with commas.
    #[serde(serialize_with = "redacted")]
    url: Option<Secret>,
    /// A file that holds the URL.
    url_file: Option<PathBuf>,
    /// Authorities of the broker's certificate, in PEM. They replace those of the machine.
    ca_file: Option<PathBuf>,
    /// This process' certificate, in PEM, with the intermediate ones after it.
    client_cert_file: Option<PathBuf>,
    /// The key of this certificate, in PEM.
    client_key_file: Option<PathBuf>,
    /// Whether other machines may be reached without TLS.
    #[serde(default)]
    allow_plaintext: bool,
}

/// How to log in. The settings were checked at the start.
#[derive(Debug, Clone)]
pub struct Login(AmqpSettings);

/// The settings and their files as they were last read.
#[derive(Clone)]
pub(super) struct Access {
    pub(super) urls: Vec<AMQPUri>,
    /// `None`: no certificates are named, and lapin uses the authorities of the machine.
    tls: Option<RustlsConnector>,
}

impl Login {
    /// Checks the settings, with the files they name.
    ///
    /// # Errors
    /// What is wrong, with its key.
    pub fn new(settings: AmqpSettings) -> Result<Self, SettingsError> {
        let login = Self(settings);
        login.read().map(|_| login)
    }

    /// A login from a URL alone, without certificates.
    ///
    /// # Errors
    /// The text is not a URL of a broker.
    pub fn with_url(url: &str) -> Result<Self, SettingsError> {
        Self::new(AmqpSettings {
            url: Some(Secret::new(url)),
            ..AmqpSettings::default()
        })
    }

    /// Reads the settings' files again.
    pub(super) fn read(&self) -> Result<Access, SettingsError> {
        let settings = &self.0;
        let url = secret_or_file("amqp.url", settings.url.clone(), settings.url_file.as_ref())?;
        let urls = parse_urls(&url)?;
        let in_the_clear = |url: &&AMQPUri| {
            url.scheme == AMQPScheme::AMQP && !is_this_machine(&url.authority.host)
        };
        if let Some(url) = urls.iter().find(in_the_clear)
            && !settings.allow_plaintext
        {
            return Err(SettingsError(format!(
                "amqp.url reaches {} without TLS, and the password would travel in the clear: use amqps://…, or allow it with amqp.allow_plaintext = true (MAYFLY__AMQP__ALLOW_PLAINTEXT=true)",
                url.authority.host
            )));
        }
        let encrypted = urls.iter().filter(|url| url.scheme == AMQPScheme::AMQPS);
        let (encrypted, all) = (encrypted.count(), urls.len());
        let tls = settings.tls()?;
        if tls.is_some() && encrypted < all {
            return Err(SettingsError(
                "amqp.url must be amqps://… if amqp.ca_file or amqp.client_cert_file is given"
                    .to_owned(),
            ));
        }
        let external = |url: &AMQPUri| url.query.auth_mechanism == Some(SASLMechanism::External);
        if settings.client_cert_file.is_none() && urls.iter().any(external) {
            return Err(SettingsError(
                "amqp.client_cert_file is missing: auth_mechanism=external in amqp.url logs in by a certificate".to_owned(),
            ));
        }
        Ok(Access {
            urls,
            tls: tls.map(|config| Arc::new(config).into()),
        })
    }
}

impl AmqpSettings {
    fn tls(&self) -> Result<Option<rustls::ClientConfig>, SettingsError> {
        let text = |key: &str, file: &Option<PathBuf>| {
            let file: Option<&Path> = file.as_deref();
            file.map(|file| read_text(key, file)).transpose()
        };
        let pair = match (&self.client_cert_file, &self.client_key_file) {
            (None, None) => None,
            (Some(_), Some(key)) => {
                let certificate = text("amqp.client_cert_file", &self.client_cert_file)?;
                let key = read_secret("amqp.client_key_file", key)?;
                certificate.map(|certificate| (certificate, key))
            }
            (certificate, _) => {
                let missing = match certificate {
                    Some(_) => "amqp.client_key_file",
                    None => "amqp.client_cert_file",
                };
                return Err(SettingsError(format!(
                    "{missing} is missing; a client certificate needs both files"
                )));
            }
        };
        let authorities = text("amqp.ca_file", &self.ca_file)?;
        if pair.is_none() && authorities.is_none() {
            return Ok(None);
        }
        let pair = pair.as_ref().map(|(certificate, key)| tls::Pair {
            fields: ("amqp.client_cert_file", "amqp.client_key_file"),
            certificate,
            key,
        });
        tls::verified("amqp.ca_file", authorities.as_deref(), pair)
            .map(Some)
            .map_err(SettingsError)
    }
}

impl Access {
    /// Connects to one of the addresses.
    pub(super) async fn connect(
        &self,
        url: &AMQPUri,
        properties: ConnectionProperties,
    ) -> Result<Connection, BrokerError> {
        let Some(connector) = self.tls.clone() else {
            return Ok(Connection::connect_uri(url.clone(), properties).await?);
        };
        let runtime = lapin::runtime::default_runtime()?;
        let connect = async move |url: AMQPUri, runtime| {
            let place = (url.authority.host.as_str(), url.authority.port);
            let found: Vec<_> = tokio::net::lookup_host(place).await?.collect();
            let stream = AsyncTcpStream::connect(&runtime, found).await?;
            Ok(stream.into_rustls(&connector, &url.authority.host).await?)
        };
        Ok(Connection::connector(url.clone(), runtime, connect, properties).await?)
    }
}

/// Whether a host is this machine: a loopback address or `localhost`. Other names may resolve to any address.
fn is_this_machine(host: &str) -> bool {
    let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
    host.eq_ignore_ascii_case("localhost")
        || address.is_ok_and(|address| address.to_canonical().is_loopback())
}

fn parse_urls(urls: &Secret) -> Result<Vec<AMQPUri>, SettingsError> {
    urls.expose()
        .split(',')
        .map(|url| {
            // lapin's message would repeat the URL, and with it the password.
            let mut uri: AMQPUri = url.trim().parse().map_err(|_| {
                SettingsError(
                    "amqp.url must be amqp://user:password@host:port/vhost (or amqps://…), several separated by commas; the vhost `/` is written %2f".to_owned(),
                )
            })?;
            // `…:5672/` names a virtual host with an empty name. RabbitMQ's Cluster Operator writes it
            // for the default one, `/`.
            if uri.vhost.is_empty() {
                "/".clone_into(&mut uri.vhost);
            }
            uri.query.heartbeat = Some(HEARTBEAT_SECONDS);
            uri.query.connection_timeout = Some(CONNECT_TIMEOUT.as_millis() as u64);
            Ok(uri)
        })
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn refused(settings: &str) -> String {
        let settings: AmqpSettings = serde_json::from_str(settings).unwrap();
        Login::new(settings).unwrap_err().to_string()
    }

    #[test]
    fn a_bad_url_does_not_repeat_its_password() {
        for bad in ["http://u:hunter2@h", "amqp://u:hunter2@h:port/", "hunter2"] {
            let error = Login::with_url(bad).unwrap_err().to_string();
            assert!(!error.contains("hunter2"), "{error}");
        }
        let login = Login::with_url("amqp://u:hunter2@127.0.0.1:1/%2f, amqps://u:p@b/v").unwrap();
        assert!(
            !format!("{login:?}{}", crate::settings::effective(&login.0).unwrap())
                .contains("hunter2")
        );
    }

    #[test]
    fn the_virtual_host_is_the_default_one_unless_named() {
        for (url, vhost) in [
            ("amqp://u:p@a:5672/", "/"),
            ("amqp://u:p@a:5672", "/"),
            ("amqp://u:p@a/%2f", "/"),
            ("amqp://u:p@a/mayfly", "mayfly"),
        ] {
            let parsed = parse_urls(&Secret::new(url)).unwrap();
            assert_eq!(parsed[0].vhost, vhost, "{url}");
        }
    }

    #[test]
    fn plaintext_is_for_this_machine_alone() {
        for (url, is_fine) in [
            ("amqp://u:hunter2@127.0.0.1:5672", true),
            ("amqp://u:hunter2@LOCALHOST", true),
            ("amqp://u:hunter2@[::1]:5672", true),
            ("amqp://u:hunter2@[::ffff:127.0.0.1]:5672", true),
            ("amqps://u:hunter2@rabbitmq", true),
            ("amqp://u:hunter2@rabbitmq", false),
            ("amqp://u:hunter2@localhost.example.com", false),
            ("amqp://u:hunter2@10.0.0.1", false),
            ("amqps://u:hunter2@a, amqp://u:hunter2@b", false),
            ("amqp://localhost, amqp://u:hunter2@b", false),
        ] {
            let tried = Login::with_url(url);
            assert_eq!(tried.is_ok(), is_fine, "{url}");
            if let Err(error) = tried {
                let error = error.to_string();
                assert!(error.contains("MAYFLY__AMQP__ALLOW_PLAINTEXT"), "{error}");
                assert!(!error.contains("hunter2"), "{error}");
            }
            let allowed = AmqpSettings {
                url: Some(Secret::new(url)),
                allow_plaintext: true,
                ..AmqpSettings::default()
            };
            assert!(Login::new(allowed).is_ok(), "{url}");
        }
    }

    #[test]
    fn what_does_not_fit_together_is_named() {
        for (settings, key) in [
            ("{}", "amqp.url"),
            (r#"{"url": "amqp://rabbitmq"}"#, "amqp.allow_plaintext"),
            (
                r#"{"url": "amqps://a", "client_cert_file": "/absent"}"#,
                "amqp.client_key_file",
            ),
            (
                r#"{"url": "amqps://a", "client_key_file": "/absent"}"#,
                "amqp.client_cert_file",
            ),
            (
                r#"{"url": "amqps://a", "ca_file": "/absent"}"#,
                "amqp.ca_file",
            ),
            (
                r#"{"url": "amqps://a?auth_mechanism=external"}"#,
                "amqp.client_cert_file",
            ),
        ] {
            let error = refused(settings);
            assert!(error.contains(key), "{error}");
        }
    }
}
