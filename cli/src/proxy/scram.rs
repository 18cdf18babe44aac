//! The server's side of SCRAM-SHA-256 (RFC 5802 and 7677), for listeners that ask for a password. The password does
//! not cross the network, and a client learns that the proxy knows it too.

use std::num::NonZeroU32;

use aws_lc_rs::{constant_time, digest, hmac, pbkdf2};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use mayfly_protocol::secret::Secret;
use rand::RngExt;

/// Iterations of PBKDF2: PostgreSQL's default (`scram_iterations`).
const ROUNDS: u32 = 4096;
pub(super) const MECHANISM: &str = "SCRAM-SHA-256";

/// The stored form of a password (RFC 5803).
pub(super) struct Verifier {
    salt: [u8; 16],
    stored_key: [u8; 32],
    server_key: hmac::Key,
}

impl Verifier {
    /// A verifier with a new salt.
    pub(super) fn new(password: &Secret) -> Self {
        Self::salted(password, rand::rng().random())
    }

    fn salted(password: &Secret, salt: [u8; 16]) -> Self {
        let mut salted = zeroize::Zeroizing::new([0; 32]);
        pbkdf2::derive(
            pbkdf2::PBKDF2_HMAC_SHA256,
            NonZeroU32::new(ROUNDS).unwrap_or(NonZeroU32::MIN),
            &salt,
            password.expose().as_bytes(),
            salted.as_mut(),
        );
        let salted = hmac::Key::new(hmac::HMAC_SHA256, salted.as_ref());
        let client_key = hmac::sign(&salted, b"Client Key");
        let server_key = hmac::sign(&salted, b"Server Key");
        let mut stored_key = [0; 32];
        stored_key.copy_from_slice(digest::digest(&digest::SHA256, client_key.as_ref()).as_ref());
        Self {
            salt,
            stored_key,
            server_key: hmac::Key::new(hmac::HMAC_SHA256, server_key.as_ref()),
        }
    }
}

/// An exchange that waits for the client's proof.
pub(super) struct Exchange<'v> {
    verifier: &'v Verifier,
    /// The client's header, as it must come again: `n,,` or `y,,` in base64.
    header: &'static str,
    first_bare: String,
    server_first: String,
    nonce: String,
}

impl<'v> Exchange<'v> {
    /// Begins with the client's first message; `None` if it is malformed or asks for channel binding, which was
    /// not offered.
    pub(super) fn begin(verifier: &'v Verifier, client_first: &[u8]) -> Option<Self> {
        let bytes: [u8; 18] = rand::rng().random();
        Self::with_nonce(verifier, client_first, &BASE64_STANDARD.encode(bytes))
    }

    fn with_nonce(verifier: &'v Verifier, client_first: &[u8], own: &str) -> Option<Self> {
        let text = std::str::from_utf8(client_first).ok()?;
        let (header, first_bare) = match text.split_at_checked(3)? {
            ("n,,", rest) => ("c=biws", rest),
            ("y,,", rest) => ("c=eSws", rest),
            _ => return None,
        };
        let nonce = first_bare.split(',').nth(1)?.strip_prefix("r=")?;
        if nonce.is_empty() {
            return None;
        }
        let nonce = format!("{nonce}{own}");
        let salt = BASE64_STANDARD.encode(verifier.salt);
        Some(Self {
            verifier,
            header,
            first_bare: first_bare.to_owned(),
            server_first: format!("r={nonce},s={salt},i={ROUNDS}"),
            nonce,
        })
    }

    /// The message for the client.
    pub(super) fn server_first(&self) -> &str {
        &self.server_first
    }

    /// Checks the client's final message. Returns the server's final message; `None` if the password is wrong.
    pub(super) fn finish(&self, client_final: &[u8]) -> Option<String> {
        let text = std::str::from_utf8(client_final).ok()?;
        let (without_proof, proof) = text.rsplit_once(",p=")?;
        let mut parts = without_proof.split(',');
        if parts.next()? != self.header || parts.next()?.strip_prefix("r=")? != self.nonce {
            return None;
        }
        let proof = BASE64_STANDARD.decode(proof).ok()?;
        let signed = format!("{},{},{without_proof}", self.first_bare, self.server_first);
        let stored = hmac::Key::new(hmac::HMAC_SHA256, &self.verifier.stored_key);
        let signature = hmac::sign(&stored, signed.as_bytes());
        if proof.len() != signature.as_ref().len() {
            return None;
        }
        let client_key: Vec<u8> = proof
            .iter()
            .zip(signature.as_ref())
            .map(|(a, b)| a ^ b)
            .collect();
        let found = digest::digest(&digest::SHA256, &client_key);
        constant_time::verify_slices_are_equal(found.as_ref(), &self.verifier.stored_key).ok()?;
        let proof = hmac::sign(&self.verifier.server_key, signed.as_bytes());
        Some(format!("v={}", BASE64_STANDARD.encode(proof.as_ref())))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// RFC 7677, section 3.
    #[test]
    fn the_exchange_of_rfc_7677() {
        let salt = BASE64_STANDARD.decode("W22ZaJ0SNY7soEsUEjb6gQ==").unwrap();
        let verifier = Verifier::salted(&Secret::new("pencil"), salt.try_into().unwrap());
        let exchange = Exchange::with_nonce(
            &verifier,
            b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO",
            "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0",
        )
        .unwrap();
        assert_eq!(
            exchange.server_first(),
            "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
        );
        let last = "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=";
        assert_eq!(
            exchange.finish(last.as_bytes()).as_deref(),
            Some("v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=")
        );
        for (from, to) in [
            ("p=dH", "p=dG"),
            ("c=biws", "c=eSws"),
            ("Ilj)", "Ilk)"),
            (",p=", ",q="),
        ] {
            let wrong = last.replacen(from, to, 1);
            assert_eq!(exchange.finish(wrong.as_bytes()), None, "{wrong}");
        }
    }

    #[test]
    fn what_is_no_first_message_is_refused() {
        let verifier = Verifier::new(&Secret::new("p"));
        for first in [
            "",
            "n,,",
            "p=tls-server-end-point,,n=,r=x",
            "n,a=x,n=,r=x",
            "n,,n=,r=",
            "n,,n=",
        ] {
            assert!(
                Exchange::begin(&verifier, first.as_bytes()).is_none(),
                "{first}"
            );
        }
    }
}
