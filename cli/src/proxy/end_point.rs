//! What a SCRAM login is bound to: the certificate of a TLS server.

use aws_lc_rs::digest;
use x509_cert::Certificate;
use x509_cert::der::Decode;

/// The channel binding of RFC 5929, section 4: the hash of the certificate. The hash function is that of its signature,
/// with SHA-256 instead of MD5 and SHA-1. `None`: the signature has no hash function, such as Ed25519.
pub(super) fn tls_server_end_point(certificate: &[u8]) -> Option<Vec<u8>> {
    let signature = Certificate::from_der(certificate)
        .ok()?
        .signature_algorithm
        .oid;
    let algorithm = match signature.to_string().as_str() {
        // RSA with MD5, SHA-1 and SHA-256; ECDSA with SHA-1 and SHA-256.
        "1.2.840.113549.1.1.4"
        | "1.2.840.113549.1.1.5"
        | "1.2.840.113549.1.1.11"
        | "1.2.840.10045.4.1"
        | "1.2.840.10045.4.3.2" => &digest::SHA256,
        "1.2.840.113549.1.1.12" | "1.2.840.10045.4.3.3" => &digest::SHA384,
        "1.2.840.113549.1.1.13" | "1.2.840.10045.4.3.4" => &digest::SHA512,
        _ => return None,
    };
    Some(digest::digest(algorithm, certificate).as_ref().to_vec())
}
