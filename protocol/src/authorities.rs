//! The certificate authorities of a server: PEM text, or the name of a text that the broker stores once for
//! all messages of a pool.
//!
//! A bundle of a managed service has 200 KB, and each delay level writes a parked message again. So a message
//! names a large bundle by its SHA-256, inside the seal. The text is in a durable queue of the pool
//! ([`crate::topology::authorities_queue`]), sealed to the pool. Engines read this queue without emptying it,
//! so a revocation needs no dispatcher. A forged text has another digest and is never used.

use std::fmt;

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD_NO_PAD;
use serde::{Deserialize, Serialize};

/// A bundle of at most this size goes inside each message. It holds one or two certificates.
pub const INLINE_MAX_BYTES: usize = 4096;

/// The SHA-256 of a bundle's PEM text (FIPS 180-4).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

impl Digest {
    /// SHA-256 of a PEM text.
    pub fn of(pem: &str) -> Self {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest(&SHA256, pem.as_bytes()).as_ref());
        Self(bytes)
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        BASE64_STANDARD_NO_PAD.encode(digest.0)
    }
}

impl TryFrom<String> for Digest {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let wrong = "a SHA-256 digest is 32 bytes in base64 without padding";
        let bytes = BASE64_STANDARD_NO_PAD.decode(text).map_err(|_| wrong)?;
        bytes.try_into().map(Self).map_err(|_| wrong)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from(*self))
    }
}

/// The authorities of a target. On the wire they are a text, or an object with `sha256`. An engine of an
/// earlier version cannot read the object and refuses the message: it must not connect without the
/// authorities.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Authorities {
    /// The certificates, in PEM.
    Pem(String),
    /// A bundle that the broker stores.
    Named {
        /// The digest of the PEM text.
        sha256: Digest,
    },
}

impl Authorities {
    /// The PEM text, if this process has it.
    ///
    /// # Errors
    /// Only the name of the text is known. The error is a message for users.
    pub fn pem(&self) -> Result<&str, String> {
        match self {
            Self::Pem(pem) => Ok(pem),
            Self::Named { sha256 } => Err(format!("the bundle {sha256} has not been read yet")),
        }
    }
}

/// A bundle in its form at the broker.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Bundle {
    /// The certificates, in PEM.
    pub pem: String,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_text_stays_as_it_was_on_the_wire_and_a_name_is_no_text() {
        let pem = Authorities::Pem("-----BEGIN".to_owned());
        let text = serde_json::to_string(&pem).unwrap();
        assert_eq!(text, "\"-----BEGIN\"");
        assert_eq!(serde_json::from_str::<Authorities>(&text).unwrap(), pem);
        let sha256 = Digest::of("-----BEGIN");
        let named = Authorities::Named { sha256 };
        let text = serde_json::to_string(&named).unwrap();
        assert_eq!(serde_json::from_str::<Authorities>(&text).unwrap(), named);
        // An engine of the previous version reads the field as an optional text.
        assert!(serde_json::from_str::<Option<String>>(&text).is_err());
        assert!(named.pem().is_err());
    }

    #[test]
    fn a_digest_is_of_32_bytes() {
        // FIPS 180-4, the example of "abc".
        let known = "ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0";
        assert_eq!(Digest::of("abc").to_string(), known);
        for wrong in [
            "",
            "abc",
            "ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0=",
            "****",
        ] {
            assert!(Digest::try_from(wrong.to_owned()).is_err(), "{wrong}");
        }
    }
}
