//! TLS of a listener: its certificate, its key and the authorities of its clients, from files that are read
//! again. TLS 1.2 and 1.3. A connection keeps what it began with. If files cannot be used, those
//! that were read before stay in use, which is logged and shown as a metric.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use aws_lc_rs::digest::{Context, SHA256};
use rustls::ServerConfig;
use rustls::server::WebPkiClientVerifier;
use rustls::sign::SingleCertAndKey;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::settings::{SettingsError, read_secret, read_text};
use crate::tls::{Pair, checked_pair, roots_of};
use mayfly_protocol::secret::Secret;

/// The files are read every 2 s. Their times are not used: Kubernetes changes the target of a link, and others write
/// into the old file.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// The sections `[http.tls]` and `[admin.tls]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TlsSettings {
    /// The listener's certificate, in PEM, with the intermediate ones after it.
    cert_file: Option<PathBuf>,
    /// The key of this certificate, in PEM.
    key_file: Option<PathBuf>,
    /// Authorities of clients, in PEM. A client must then show a certificate.
    client_ca_file: Option<PathBuf>,
}

/// The keys of the settings, as errors name them.
#[derive(Debug)]
struct Names {
    cert_file: &'static str,
    key_file: &'static str,
    client_ca_file: &'static str,
}

const HTTP: Names = Names {
    cert_file: "http.tls.cert_file",
    key_file: "http.tls.key_file",
    client_ca_file: "http.tls.client_ca_file",
};
const ADMIN: Names = Names {
    cert_file: "admin.tls.cert_file",
    key_file: "admin.tls.key_file",
    client_ca_file: "admin.tls.client_ca_file",
};

/// TLS of one listener.
#[derive(Debug, Clone)]
pub struct Tls(Arc<Kept>);

#[derive(Debug)]
struct Kept {
    names: Names,
    cert_file: PathBuf,
    key_file: PathBuf,
    client_ca_file: Option<PathBuf>,
    /// The configuration of new connections.
    config: RwLock<Arc<ServerConfig>>,
    /// A digest of what the files held when they were last read, and what was wrong with it.
    read: Mutex<([u8; 32], Option<String>)>,
    /// Whether the present content of the files is in use.
    is_current: AtomicBool,
}

/// Content of the files.
struct Files {
    certificate: String,
    key: Secret,
    client_authorities: Option<String>,
}

impl Tls {
    fn new(names: Names, settings: &TlsSettings) -> Result<Option<Self>, SettingsError> {
        let missing = |key: &str| Err(SettingsError(format!("{key} is missing; TLS needs it")));
        let (cert_file, key_file) = match (&settings.cert_file, &settings.key_file) {
            (Some(cert_file), Some(key_file)) => (cert_file.clone(), key_file.clone()),
            (None, None) if settings.client_ca_file.is_none() => return Ok(None),
            (None, _) => return missing(names.cert_file),
            (Some(_), None) => return missing(names.key_file),
        };
        let client_ca_file = settings.client_ca_file.clone();
        let files = Files::read(&names, &cert_file, &key_file, client_ca_file.as_deref())?;
        let config = files.config(&names)?;
        Ok(Some(Self(Arc::new(Kept {
            read: Mutex::new((files.digest(), None)),
            names,
            cert_file,
            key_file,
            client_ca_file,
            config: RwLock::new(config),
            is_current: AtomicBool::new(true),
        }))))
    }

    /// Whether the present content of the files is in use. If not, the content that was read before is.
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.0.is_current.load(Ordering::Relaxed)
    }

    /// The handshake with a client.
    pub(super) async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: S,
    ) -> io::Result<TlsStream<S>> {
        let config = self.0.config.read();
        let config = config.unwrap_or_else(PoisonError::into_inner).clone();
        TlsAcceptor::from(config).accept(stream).await
    }

    /// Looks at the files until `stop`.
    pub(super) async fn watch(self, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
            let kept = self.0.clone();
            // A file may be on a disk that does not answer.
            let _ = tokio::task::spawn_blocking(move || kept.look()).await;
        }
    }
}

impl Kept {
    /// Uses the present content of the files, if it is new and valid.
    fn look(&self) {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let authorities = self.client_ca_file.as_deref();
        let files = Files::read(&self.names, &self.cert_file, &self.key_file, authorities);
        let digest = files.as_ref().map_or(read.0, Files::digest);
        if files.is_ok() && digest == read.0 && read.1.is_none() {
            return;
        }
        let why = match files.and_then(|files| files.config(&self.names)) {
            Ok(config) => {
                *self.config.write().unwrap_or_else(PoisonError::into_inner) = config;
                info!(file = %self.cert_file.display(), "the files of {} were read again and are in use", self.names.cert_file);
                None
            }
            Err(error) => Some(error.to_string()),
        };
        self.is_current.store(why.is_none(), Ordering::Relaxed);
        if let Some(why) = &why
            && read.1.as_ref() != Some(why)
        {
            warn!(
                why,
                "the certificate of a listener was not renewed: the earlier one stays in use"
            );
        }
        *read = (digest, why);
    }
}

impl Files {
    fn read(
        names: &Names,
        cert_file: &Path,
        key_file: &Path,
        client_ca_file: Option<&Path>,
    ) -> Result<Self, SettingsError> {
        Ok(Self {
            certificate: read_text(names.cert_file, cert_file)?,
            key: read_secret(names.key_file, key_file)?,
            client_authorities: client_ca_file
                .map(|file| read_text(names.client_ca_file, file))
                .transpose()?,
        })
    }

    fn digest(&self) -> [u8; 32] {
        let mut context = Context::new(&SHA256);
        let authorities = self.client_authorities.as_deref();
        for part in [
            &self.certificate,
            self.key.expose(),
            authorities.unwrap_or_default(),
        ] {
            context.update(part.as_bytes());
            // A separator: PEM text has no zero byte.
            context.update(&[0]);
        }
        let mut digest = [0; 32];
        digest.copy_from_slice(context.finish().as_ref());
        digest
    }

    fn config(&self, names: &Names) -> Result<Arc<ServerConfig>, SettingsError> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let pair = Pair {
            fields: (names.cert_file, names.key_file),
            certificate: &self.certificate,
            key: &self.key,
        };
        let pair = checked_pair(&provider, &pair).map_err(SettingsError)?;
        let clients = match &self.client_authorities {
            Some(pem) => {
                let field = names.client_ca_file;
                let roots = roots_of(field, pem).map_err(SettingsError)?;
                WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
                    .build()
                    .map_err(|error| SettingsError(format!("{field}: {error}")))?
            }
            None => WebPkiClientVerifier::no_client_auth(),
        };
        let mut config = ServerConfig::builder_with_provider(provider)
            // 1.2 and 1.3.
            .with_safe_default_protocol_versions()
            .map_err(|error| SettingsError(error.to_string()))?
            .with_client_cert_verifier(clients)
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(pair)));
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

/// The section `[admin]`: address and TLS.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ListenSettings {
    listen: String,
    allow_plaintext: bool,
    #[serde(default)]
    tls: TlsSettings,
}

/// Where a listener is and whether it speaks TLS, checked.
#[derive(Debug, Clone)]
pub struct Listening {
    /// Address and port to listen on.
    pub address: SocketAddr,
    /// Certificate of the listener. `None`: plain HTTP.
    pub tls: Option<Tls>,
}

impl Listening {
    /// The API, by the section `[http]`.
    ///
    /// # Errors
    /// The address or a file of its certificate is wrong, or other machines reach it without TLS and
    /// `allow_plaintext` is not set. The message names the key and the way out.
    pub fn http(
        listen: &str,
        tls: &TlsSettings,
        allow_plaintext: bool,
    ) -> Result<Self, SettingsError> {
        Self::new("http", HTTP, listen, tls, allow_plaintext)
    }

    /// The admin listener, by the section `[admin]`.
    ///
    /// # Errors
    /// As [`Self::http`].
    pub fn admin(settings: &ListenSettings) -> Result<Self, SettingsError> {
        let ListenSettings {
            listen,
            allow_plaintext,
            tls,
        } = settings;
        Self::new("admin", ADMIN, listen, tls, *allow_plaintext)
    }

    fn new(
        section: &str,
        names: Names,
        listen: &str,
        tls: &TlsSettings,
        allow_plaintext: bool,
    ) -> Result<Self, SettingsError> {
        let address: SocketAddr = listen.parse().map_err(|_| {
            SettingsError(format!(
                "{section}.listen must be ADDRESS:PORT, such as 127.0.0.1:8470; this is {listen:?}"
            ))
        })?;
        let tls = Tls::new(names, tls)?;
        if tls.is_none() && !allow_plaintext && !address.ip().to_canonical().is_loopback() {
            let variable = section.to_uppercase();
            return Err(SettingsError(format!(
                "{section}.listen is {address}, which other machines reach, and has no TLS: give {section}.tls.cert_file and {section}.tls.key_file, or listen on 127.0.0.1 only (behind a proxy with TLS), or allow it with {section}.allow_plaintext = true (MAYFLY__{variable}__ALLOW_PLAINTEXT=true)"
            )));
        }
        Ok(Self { address, tls })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn plaintext_is_for_this_machine_alone() {
        let tried = |listen: &str, allowed: bool| {
            Listening::admin(&ListenSettings {
                listen: listen.to_owned(),
                allow_plaintext: allowed,
                tls: TlsSettings::default(),
            })
        };
        for (listen, is_fine) in [
            ("127.0.0.1:1", true),
            ("127.9.0.1:1", true),
            ("[::1]:1", true),
            ("[::ffff:127.0.0.1]:1", true),
            ("0.0.0.0:1", false),
            ("[::]:1", false),
            ("10.0.0.1:1", false),
        ] {
            assert_eq!(tried(listen, false).is_ok(), is_fine, "{listen}");
            assert!(tried(listen, true).is_ok(), "{listen}");
        }
        let error = tried("0.0.0.0:8471", false).unwrap_err().to_string();
        for word in [
            "admin.listen is 0.0.0.0:8471",
            "admin.tls.cert_file",
            "MAYFLY__ADMIN__ALLOW_PLAINTEXT=true",
        ] {
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let tried = |cert: bool, key: bool, authorities: bool| {
            let file = || Some(PathBuf::from("/absent"));
            let settings = TlsSettings {
                cert_file: file().filter(|_| cert),
                key_file: file().filter(|_| key),
                client_ca_file: file().filter(|_| authorities),
            };
            Listening::http("127.0.0.1:1", &settings, false)
        };
        assert!(tried(false, false, false).unwrap().tls.is_none());
        for (cert, key, authorities, missing) in [
            (true, false, false, "http.tls.key_file is missing"),
            (false, true, false, "http.tls.cert_file is missing"),
            (false, false, true, "http.tls.cert_file is missing"),
            (true, true, false, "http.tls.cert_file: cannot read"),
        ] {
            let error = tried(cert, key, authorities).unwrap_err();
            assert!(error.to_string().contains(missing), "{error}");
        }
    }
}
