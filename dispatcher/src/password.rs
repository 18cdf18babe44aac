//! The password of a lease. It is derived from a key of the store and the lease's nonce, so it is stored
//! nowhere and can be given out again while the lease lives. PostgreSQL gets only the verifier.

use std::num::NonZeroU32;

use aws_lc_rs::{digest, hkdf, hmac};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use mayfly_protocol::names::LeaseId;
use mayfly_protocol::secret::Secret;
use zeroize::Zeroizing;

use crate::pbkdf2;

/// 32 of 62 characters: 190 bits. Only letters and digits, so that no tool has to quote it.
const LENGTH: usize = 32;
const ALPHABET: &[u8; 62] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
/// Bytes from this value on are rejected: they would make some characters more likely.
const UNBIASED: u8 = 248;
const SALT_BYTES: usize = 16;

struct Length(usize);

impl hkdf::KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

/// Length of a lease's nonce, in bytes.
const NONCE_BYTES: usize = 32;

/// A lease's nonce: random, secret, and forgotten when the lease ends. Its id is public, since each
/// role's comment has it.
#[derive(Clone)]
pub(crate) struct Nonce(Zeroizing<[u8; NONCE_BYTES]>);

impl Nonce {
    pub(crate) fn random() -> Self {
        Self(Zeroizing::new(rand::random()))
    }

    pub(crate) fn expose(&self) -> &[u8] {
        self.0.as_ref()
    }
}

impl std::fmt::Debug for Nonce {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[redacted]")
    }
}

/// What the password of a lease is derived from.
#[derive(Clone)]
pub(crate) struct Seed {
    key: Zeroizing<[u8; 32]>,
    salt: &'static [u8],
    lease: Zeroizing<Vec<u8>>,
}

impl Seed {
    /// The seed of a lease with a nonce.
    pub(crate) fn of_nonce(key: Zeroizing<[u8; 32]>, nonce: &[u8]) -> Self {
        Self {
            key,
            salt: b"mayfly.v2.lease",
            lease: Zeroizing::new(nonce.to_vec()),
        }
    }

    /// The seed of a lease that was made before leases had nonces.
    pub(crate) fn of_id(key: Zeroizing<[u8; 32]>, lease: &LeaseId) -> Self {
        Self {
            key,
            salt: b"mayfly.v1.lease",
            lease: Zeroizing::new(lease.to_string().into_bytes()),
        }
    }

    /// HKDF-SHA256 (RFC 5869) of the derivation key, for one use by one lease.
    fn derive(&self, purpose: &str, out: &mut [u8]) {
        let info = [self.lease.as_slice(), b"|", purpose.as_bytes()];
        hkdf::Salt::new(hkdf::HKDF_SHA256, self.salt)
            .extract(self.key.as_ref())
            .expand(&info, Length(out.len()))
            .and_then(|okm| okm.fill(out))
            .unwrap_or_else(|_| unreachable!("HKDF-SHA256 gives up to 8160 bytes"));
    }

    pub(crate) fn password(&self) -> Secret {
        let mut text = Zeroizing::new(String::with_capacity(LENGTH));
        let mut block = Zeroizing::new([0_u8; 64]);
        for n in 0.. {
            self.derive(&format!("password|{n}"), block.as_mut());
            for byte in block.iter().filter(|byte| **byte < UNBIASED) {
                text.push(char::from(ALPHABET[usize::from(byte % 62)]));
                if text.len() == LENGTH {
                    return Secret::new(text.as_str());
                }
            }
        }
        unreachable!("the loop above has no end but its return")
    }

    /// The SCRAM-SHA-256 verifier of the password (RFC 5803, as `pg_authid.rolpassword` has it). The password is
    /// ASCII letters and digits: SASLprep does not change it. Takes about 0.5 ms for 4096 iterations.
    pub(crate) fn verifier(&self, password: &Secret, iterations: u32) -> String {
        let mut salt = [0_u8; SALT_BYTES];
        self.derive("salt", &mut salt);
        scram(password, &salt, iterations)
    }
}

fn scram(password: &Secret, salt: &[u8], iterations: u32) -> String {
    let rounds = NonZeroU32::new(iterations).unwrap_or(NonZeroU32::MIN);
    let salted = pbkdf2::derive(password.expose().as_bytes(), salt, rounds);
    let salted = hmac::Key::new(hmac::HMAC_SHA256, salted.as_ref());
    let client_key = hmac::sign(&salted, b"Client Key");
    let stored_key = digest::digest(&digest::SHA256, client_key.as_ref());
    let server_key = hmac::sign(&salted, b"Server Key");
    format!(
        "SCRAM-SHA-256${rounds}:{}${}:{}",
        BASE64_STANDARD.encode(salt),
        BASE64_STANDARD.encode(stored_key),
        BASE64_STANDARD.encode(server_key)
    )
}

/// Whether a password has a digit, a lower-case letter and a capital letter, as password checks require.
pub(crate) fn has_every_kind(password: &Secret) -> bool {
    let has = |kind: fn(&u8) -> bool| password.expose().as_bytes().iter().any(&kind);
    has(u8::is_ascii_digit) && has(u8::is_ascii_lowercase) && has(u8::is_ascii_uppercase)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The exchange of RFC 7677, section 3: the server signature follows from the server key that Mayfly computes.
    #[test]
    fn the_verifier_is_that_of_rfc_7677() {
        let salt = BASE64_STANDARD.decode("W22ZaJ0SNY7soEsUEjb6gQ==").unwrap();
        let verifier = scram(&Secret::new("pencil"), &salt, 4096);
        assert!(verifier.starts_with("SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$"));
        let server_key = BASE64_STANDARD
            .decode(verifier.rsplit(':').next().unwrap())
            .unwrap();
        let exchange = "n=user,r=rOprNGfwEbeRWgbNEkqO,\
            r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096,\
            c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0";
        let signature = hmac::sign(
            &hmac::Key::new(hmac::HMAC_SHA256, &server_key),
            exchange.as_bytes(),
        );
        assert_eq!(
            BASE64_STANDARD.encode(signature),
            "6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="
        );
    }

    #[test]
    fn a_lease_has_one_password() {
        let key = |byte| Zeroizing::new([byte; 32]);
        let lease = LeaseId::random();
        let seed = Seed::of_nonce(key(7), &[1; NONCE_BYTES]);
        let first = seed.password();
        assert!(first == seed.password(), "the same again");
        for other in [
            Seed::of_nonce(key(7), &[2; NONCE_BYTES]),
            Seed::of_nonce(key(8), &[1; NONCE_BYTES]),
            Seed::of_nonce(key(7), lease.to_string().as_bytes()),
            Seed::of_id(key(7), &lease),
        ] {
            assert!(first != other.password());
        }
        assert_eq!(first.expose().len(), LENGTH);
        assert!(first.expose().bytes().all(|b| b.is_ascii_alphanumeric()));
        assert_eq!(seed.verifier(&first, 1), seed.verifier(&first, 1));
    }

    #[test]
    fn a_password_may_lack_a_digit() {
        for (password, has) in [("aB3", true), ("aB", false), ("a3", false), ("B3", false)] {
            assert_eq!(has_every_kind(&Secret::new(password)), has, "{password}");
        }
    }

    /// Accounts of the previous version still work: the values are those that it computes.
    #[test]
    fn a_lease_of_before_keeps_its_password() {
        let lease = "01890a5d-ac96-774b-bcce-b302099a8057".parse().unwrap();
        let seed = Seed::of_id(Zeroizing::new([7; 32]), &lease);
        assert_eq!(seed.password().expose(), "tpTczHkQHdyRu36utNiiqAj5jydG0fsO");
    }
}
