//! TLS of clients. To RabbitMQ: chain and name are always verified. To PostgreSQL in libpq's modes: `prefer` and
//! `require` encrypt without verifying the server, a root certificate adds the verification of the chain, and
//! `verify-full` that of the name, by the machine's authorities if no root certificate is given.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::private_file::trimmed;
use mayfly_protocol::secret::Secret;
use mayfly_protocol::target::{SslMode, Target};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
};

/// The client's side of TLS for a target.
///
/// # Errors
/// A certificate or key cannot be parsed; the message names the field.
pub fn client_config(target: &Target) -> Result<ClientConfig, String> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let roots = match &target.sslrootcert {
        Some(authorities) => Some(roots_of("sslrootcert", authorities.pem()?)?),
        None if target.sslmode == SslMode::VerifyFull => {
            Some(machine_roots("sslmode verify-full", "sslrootcert")?)
        }
        None => None,
    };
    let chain = match roots {
        Some(roots) => Some(
            WebPkiServerVerifier::builder_with_provider(roots, provider.clone())
                .build()
                .map_err(|error| format!("sslrootcert: {error}"))?,
        ),
        None => None,
    };
    let verify_name = target.sslmode == SslMode::VerifyFull;
    let builder = builder
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(LibpqVerifier {
            chain,
            verify_name,
            provider: provider.clone(),
        }));
    match (&target.sslcert, &target.sslkey) {
        (Some(certificate), Some(key)) => {
            let pair = Pair {
                fields: ("sslcert", "sslkey"),
                certificate,
                key,
            };
            let pair = checked_pair(&provider, &pair)?;
            Ok(builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(pair))))
        }
        _ => Ok(builder.with_no_client_auth()),
    }
}

/// A certificate and its key, and the settings they come from.
pub(crate) struct Pair<'p> {
    pub(crate) fields: (&'static str, &'static str),
    pub(crate) certificate: &'p str,
    pub(crate) key: &'p Secret,
}

/// The client's side of TLS to a server whose chain and name are checked: by the authorities in
/// `authorities`, which the setting `field` has, or else by the machine's.
///
/// # Errors
/// A certificate or key cannot be parsed; the message names the field.
pub(crate) fn verified(
    field: &str,
    authorities: Option<&str>,
    pair: Option<Pair<'_>>,
) -> Result<ClientConfig, String> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let roots = match authorities {
        Some(pem) => roots_of(field, pem)?,
        None => machine_roots("amqps://", field)?,
    };
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots);
    Ok(match pair {
        Some(pair) => {
            let pair = checked_pair(&provider, &pair)?;
            builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(pair)))
        }
        None => builder.with_no_client_auth(),
    })
}

pub(crate) fn roots_of(field: &str, pem: &str) -> Result<Arc<RootCertStore>, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(field, pem)? {
        roots
            .add(certificate)
            .map_err(|error| format!("{field}: {error}"))?;
    }
    Ok(Arc::new(roots))
}

/// The machine's authorities are read again after this time. They are 200 kB of text, and a
/// connection takes a few milliseconds.
const ROOTS_KEPT: Duration = Duration::from_secs(60);
static ROOTS: Mutex<Option<(Instant, Arc<RootCertStore>)>> = Mutex::new(None);

/// The machine's authorities, or those in the file that `SSL_CERT_FILE` names.
///
/// # Errors
/// No authority was found.
fn machine_roots(wanted: &str, instead: &str) -> Result<Arc<RootCertStore>, String> {
    let mut kept = ROOTS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((at, roots)) = &*kept
        && at.elapsed() < ROOTS_KEPT
    {
        return Ok(roots.clone());
    }
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        return Err(format!(
            "{wanted} found no certificate authorities on this machine: install the package ca-certificates, name a PEM file in SSL_CERT_FILE, or give {instead}"
        ));
    }
    let roots = Arc::new(roots);
    *kept = Some((Instant::now(), roots.clone()));
    Ok(roots)
}

/// Certificates and their key, which must belong together.
///
/// # Errors
/// One of them cannot be parsed, or they do not belong together; the message names the field.
pub(crate) fn checked_pair(
    provider: &CryptoProvider,
    pair: &Pair<'_>,
) -> Result<CertifiedKey, String> {
    let (cert_field, key_field) = pair.fields;
    let chain = certificates(cert_field, pair.certificate)?;
    let key =
        PrivateKeyDer::from_pem_slice(trimmed(pair.key.expose()).as_bytes()).map_err(|_| {
            format!("{key_field} is not a PEM private key (an encrypted one is not supported)")
        })?;
    let key = provider
        .key_provider
        .load_private_key(key)
        .map_err(|error| format!("{key_field}: {error}"))?;
    // rustls would refuse certificates of X.509 version 1, which the recipe in PostgreSQL's own
    // documentation makes. A public key stands in a certificate as it is.
    let is_its_key = match (chain.first(), key.public_key()) {
        (Some(first), Some(public)) => first
            .windows(public.len())
            .any(|part| part == public.as_ref()),
        _ => true,
    };
    if is_its_key {
        Ok(CertifiedKey::new(chain, key))
    } else {
        Err(format!(
            "{key_field} is not the key of the first certificate in {cert_field}"
        ))
    }
}

fn certificates(field: &str, pem: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let pem = trimmed(pem).as_bytes();
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(format!("{field} has no PEM certificate")),
    }
}

#[derive(Debug)]
struct LibpqVerifier {
    chain: Option<Arc<WebPkiServerVerifier>>,
    verify_name: bool,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for LibpqVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(chain) = &self.chain else {
            return Ok(ServerCertVerified::assertion());
        };
        match chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            // webpki checks the chain first, then the name.
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if !self.verify_name => Ok(ServerCertVerified::assertion()),
            verdict => verdict,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
