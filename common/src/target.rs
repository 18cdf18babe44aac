//! What an engine needs to reach a PostgreSQL server: the data of a base secret.

use serde::{Deserialize, Serialize};

use crate::secret::{self, Secret};

/// How the connection is protected, in libpq's words (PostgreSQL documentation, "SSL Support").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SslMode {
    /// Never TLS. Must be asked for.
    Disable,
    /// TLS where the server offers it; the default on loopback.
    Prefer,
    /// TLS or nothing, the server's certificate not verified (unless `sslrootcert` is given:
    /// then its chain is, as libpq does). The default.
    Require,
    /// TLS, the certificate's chain and the host name verified against `sslrootcert`.
    VerifyFull,
}

impl SslMode {
    /// The default for a host: `prefer` on loopback, `require` anywhere else.
    pub fn default_for(host: &str) -> Self {
        let loopback = host == "localhost"
            || host
                .parse::<std::net::IpAddr>()
                .is_ok_and(|address| address.is_loopback());
        if loopback {
            Self::Prefer
        } else {
            Self::Require
        }
    }
}

/// The admin connection of a PostgreSQL server. Only ever serialized to be sealed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Host name or IP address.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// The database the admin connects to; advisory locks are taken there.
    pub database: String,
    /// The admin role.
    pub username: String,
    /// The admin's password.
    #[serde(serialize_with = "secret::expose")]
    pub password: Secret,
    /// Protection of the connection.
    pub sslmode: SslMode,
    /// Root certificates, PEM text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sslrootcert: Option<String>,
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
