//! TLS to another machine: the trusted authorities, the client certificate, and whether plain HTTP is allowed.

use std::error::Error;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use clap::Args;
use reqwest::{Certificate, ClientBuilder, Identity, Url};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::failure::Failure;

/// Options of TLS to the dispatcher.
#[derive(Args)]
pub(crate) struct TlsArgs {
    /// PEM file with the authorities of the dispatcher's certificate, instead of this machine's
    /// [env: MAYFLY_CA_FILE]
    #[arg(long, global = true, value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// PEM file with the certificate to show to the dispatcher [env: MAYFLY_CLIENT_CERT_FILE]
    #[arg(long, global = true, value_name = "FILE")]
    client_cert_file: Option<PathBuf>,
    /// PEM file with its key [env: MAYFLY_CLIENT_KEY_FILE]
    #[arg(long, global = true, value_name = "FILE")]
    client_key_file: Option<PathBuf>,
    /// Send tokens to http:// addresses of other machines, where others can read them
    /// [env: MAYFLY_ALLOW_PLAINTEXT]
    #[arg(long, global = true)]
    allow_plaintext: bool,
}

impl TlsArgs {
    /// The options of the flags, or else of the environment.
    pub(crate) fn given(&self) -> Result<Tls, Failure> {
        // The path is made absolute, because `mayfly login` stores it for commands in other directories.
        let file = |flag: &Option<PathBuf>, name: &str| {
            flag.clone()
                .or_else(|| std::env::var_os(name).map(PathBuf::from))
                .filter(|file| !file.as_os_str().is_empty())
                .map(|file| std::path::absolute(&file).unwrap_or(file))
        };
        let allowed = std::env::var("MAYFLY_ALLOW_PLAINTEXT").unwrap_or_default();
        let allowed = match allowed.to_lowercase().as_str() {
            "" | "0" | "false" | "no" | "off" => false,
            "1" | "true" | "yes" | "on" => true,
            _ => {
                return Err(Failure::Usage(format!(
                    "MAYFLY_ALLOW_PLAINTEXT must be true or false, not {allowed:?}"
                )));
            }
        };
        Ok(Tls {
            ca_file: file(&self.ca_file, "MAYFLY_CA_FILE"),
            client_cert_file: file(&self.client_cert_file, "MAYFLY_CLIENT_CERT_FILE"),
            client_key_file: file(&self.client_key_file, "MAYFLY_CLIENT_KEY_FILE"),
            allow_plaintext: self.allow_plaintext || allowed,
        })
    }
}

/// TLS to one server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Tls {
    #[serde(skip_serializing_if = "Option::is_none")]
    ca_file: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    client_cert_file: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    client_key_file: Option<PathBuf>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    allow_plaintext: bool,
}

impl Tls {
    /// These options; absent ones are taken from `kept`.
    pub(crate) fn over(self, kept: Self) -> Self {
        let (client_cert_file, client_key_file) =
            match self.client_cert_file.is_some() || self.client_key_file.is_some() {
                true => (self.client_cert_file, self.client_key_file),
                false => (kept.client_cert_file, kept.client_key_file),
            };
        Self {
            ca_file: self.ca_file.or(kept.ca_file),
            client_cert_file,
            client_key_file,
            allow_plaintext: self.allow_plaintext || kept.allow_plaintext,
        }
    }

    /// Refuses to send a token or a password to another machine without TLS, unless `--allow-plaintext` is given.
    pub(crate) fn check(&self, url: &Url) -> Result<(), Failure> {
        if url.scheme() == "https" || self.allow_plaintext || is_loopback(url) {
            return Ok(());
        }
        // The URL may hold a password, so only the host is shown.
        let host = url.host_str().unwrap_or_default();
        Err(Failure::Usage(format!(
            "http://{host} is another machine, and without TLS others can read the traffic: use https:// (with --ca-file for a private authority), or allow it with --allow-plaintext or MAYFLY_ALLOW_PLAINTEXT=true"
        )))
    }

    /// A client builder with these authorities and this client certificate.
    pub(crate) fn applied(
        &self,
        builder: ClientBuilder,
        url: &Url,
    ) -> Result<ClientBuilder, Failure> {
        if url.scheme() == "http" {
            // With plain HTTP the machine's authorities are not needed, and may not exist.
            return Ok(builder.tls_certs_only([]));
        }
        let mut builder = builder;
        if let Some(file) = &self.ca_file {
            let bundle = read("--ca-file", file)?;
            let certificates = Certificate::from_pem_bundle(&bundle);
            match certificates {
                Ok(certificates) if !certificates.is_empty() => {
                    builder = builder.tls_certs_only(certificates);
                }
                _ => {
                    return Err(Failure::Usage(format!(
                        "--ca-file: {} has no PEM certificate",
                        file.display()
                    )));
                }
            }
        }
        match (&self.client_cert_file, &self.client_key_file) {
            (None, None) => Ok(builder),
            (Some(certificate), Some(key)) => {
                check_private(key)?;
                let mut pem = read("--client-cert-file", certificate)?;
                pem.push(b'\n');
                pem.extend_from_slice(&read("--client-key-file", key)?);
                let identity = Identity::from_pem(&pem).map_err(|_| {
                    Failure::Usage(format!(
                        "--client-cert-file and --client-key-file: {} and {} are not a certificate and its key in PEM",
                        certificate.display(),
                        key.display()
                    ))
                })?;
                Ok(builder.identity(identity))
            }
            (given, _) => {
                let missing = match given {
                    Some(_) => "--client-key-file",
                    None => "--client-cert-file",
                };
                Err(Failure::Usage(format!(
                    "{missing} is missing: a client certificate needs both files"
                )))
            }
        }
    }
}

fn read(option: &str, file: &Path) -> Result<Zeroizing<Vec<u8>>, Failure> {
    fs::read(file).map(Zeroizing::new).map_err(|error| {
        Failure::Usage(format!("{option}: cannot read {}: {error}", file.display()))
    })
}

/// Refuses a key that others can read, as dispatcher and engine do. The group may read it if the file belongs to
/// another user: a Secret in Kubernetes belongs to root and the pod's group.
fn check_private(file: &Path) -> Result<(), Failure> {
    let Ok(found) = fs::metadata(file) else {
        // An absent file is reported when it is read.
        return Ok(());
    };
    let is_own = found.uid() == rustix::process::geteuid().as_raw();
    let mode = found.mode() & 0o777;
    if found.is_file() && (mode & 0o007 != 0 || (is_own && mode & 0o070 != 0)) {
        return Err(Failure::Usage(format!(
            "--client-key-file: others can read {0} (mode {mode:04o}): chmod 600 {0}",
            file.display()
        )));
    }
    Ok(())
}

/// Whether a connection failed because no trusted authority has signed the certificate.
pub(crate) fn is_unknown_authority(error: &reqwest::Error) -> bool {
    let mut reason: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(one) = reason {
        if let Some(rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer)) =
            of_rustls(one)
        {
            return true;
        }
        reason = one.source();
    }
    false
}

/// The error of rustls. An I/O error contains it without naming it as its source.
fn of_rustls<'e>(error: &'e (dyn Error + 'static)) -> Option<&'e rustls::Error> {
    error.downcast_ref().or_else(|| {
        let inner = error.downcast_ref::<io::Error>()?.get_ref()?;
        of_rustls(inner)
    })
}

/// Whether an address is on this machine. No proxy is used for such an address.
pub(crate) fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost"
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|ip| ip.to_canonical().is_loopback())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn plaintext_is_for_this_machine_alone() {
        for (text, expected) in [
            ("http://127.0.0.1:8470", true),
            ("http://localhost", true),
            ("http://LOCALHOST:1", true),
            ("http://[::1]:8470", true),
            ("http://[::ffff:127.0.0.1]:8470", true),
            ("http://10.0.0.1", false),
            ("http://0.0.0.0", false),
            ("http://localhost.example.com", false),
            ("http://127.0.0.1.example.com", false),
        ] {
            let url = Url::parse(text).unwrap();
            assert_eq!(is_loopback(&url), expected, "{text}");
            assert_eq!(Tls::default().check(&url).is_ok(), expected, "{text}");
            let allowed = Tls {
                allow_plaintext: true,
                ..Tls::default()
            };
            assert!(allowed.check(&url).is_ok(), "{text}");
            let mut encrypted = url.clone();
            encrypted.set_scheme("https").unwrap();
            assert!(Tls::default().check(&encrypted).is_ok(), "{text}");
        }
        let url = Url::parse("http://u:hunter2@rabbitmq:15672/v").unwrap();
        let refused = Tls::default().check(&url).unwrap_err();
        assert_eq!(refused.exit_code(), 2);
        let said = refused.to_string();
        assert!(said.contains("--allow-plaintext") && !said.contains("hunter2"));
    }

    #[test]
    fn what_is_given_goes_before_what_was_kept() {
        let of = |name: &str| Tls {
            ca_file: Some(format!("/{name}/ca").into()),
            client_cert_file: Some(format!("/{name}/cert").into()),
            client_key_file: Some(format!("/{name}/key").into()),
            allow_plaintext: false,
        };
        assert_eq!(of("given").over(of("kept")), of("given"));
        assert_eq!(Tls::default().over(of("kept")), of("kept"));
        let text = serde_json::to_string(&of("kept")).unwrap();
        assert_eq!(serde_json::from_str::<Tls>(&text).unwrap(), of("kept"));
        assert_eq!(serde_json::to_string(&Tls::default()).unwrap(), "{}");
    }

    #[test]
    fn what_is_wrong_with_a_file_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, mode: u32| {
            let file = directory.path().join(name);
            fs::write(&file, "no PEM").unwrap();
            let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
            fs::set_permissions(&file, mode).unwrap();
            file
        };
        let (text, open) = (file("text", 0o600), file("open", 0o644));
        let absent = directory.path().join("absent");
        let url = Url::parse("https://h").unwrap();
        for (ca, certificate, key, word) in [
            (Some(&absent), None, None, "--ca-file: cannot read"),
            (Some(&text), None, None, "--ca-file"),
            (None, Some(&text), None, "--client-key-file is missing"),
            (None, None, Some(&text), "--client-cert-file is missing"),
            (None, Some(&text), Some(&open), "chmod 600"),
            (None, Some(&text), Some(&text), "--client-cert-file and"),
        ] {
            let tls = Tls {
                ca_file: ca.cloned(),
                client_cert_file: certificate.cloned(),
                client_key_file: key.cloned(),
                allow_plaintext: false,
            };
            let refused = tls.applied(reqwest::Client::builder(), &url).err().unwrap();
            assert!(refused.to_string().contains(word), "{refused}");
        }
    }
}
