//! The password of a lease: derived from a key of the store and the lease's id, so it is stored
//! nowhere and a repeated create carries the same verifier. PostgreSQL gets only the verifier.

use std::num::NonZeroU32;

use aws_lc_rs::{digest, hkdf, hmac, pbkdf2};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use mayfly_common::names::LeaseId;
use mayfly_common::secret::Secret;
use zeroize::Zeroizing;

/// 32 of 62 characters: 190 bits. Only letters and digits, so that no tool has to quote it.
const LENGTH: usize = 32;
const ALPHABET: &[u8; 62] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
/// Bytes from here on would make some characters likelier than others.
const UNBIASED: u8 = 248;
const SALT_BYTES: usize = 16;

struct Length(usize);

impl hkdf::KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

/// HKDF-SHA256 (RFC 5869) of the derivation key, for one use by one lease.
fn derive(key: &[u8; 32], lease: &LeaseId, purpose: &str, out: &mut [u8]) {
    let lease = lease.to_string();
    let info = [lease.as_bytes(), b"|", purpose.as_bytes()];
    hkdf::Salt::new(hkdf::HKDF_SHA256, b"mayfly.v1.lease")
        .extract(key)
        .expand(&info, Length(out.len()))
        .and_then(|okm| okm.fill(out))
        .unwrap_or_else(|_| unreachable!("HKDF-SHA256 gives up to 8160 bytes"));
}

/// The password of a lease.
pub(crate) fn password(key: &[u8; 32], lease: &LeaseId) -> Secret {
    let mut text = Zeroizing::new(String::with_capacity(LENGTH));
    let mut block = Zeroizing::new([0_u8; 64]);
    for n in 0.. {
        derive(key, lease, &format!("password|{n}"), block.as_mut());
        for byte in block.iter().filter(|byte| **byte < UNBIASED) {
            text.push(char::from(ALPHABET[usize::from(byte % 62)]));
            if text.len() == LENGTH {
                return Secret::new(text.as_str());
            }
        }
    }
    unreachable!("the loop above has no end but its return")
}

/// The SCRAM-SHA-256 verifier of a lease's password (RFC 5803, as `pg_authid.rolpassword` has
/// it). The password is ASCII letters and digits: SASLprep leaves it as it is. Takes 1 to 2 ms
/// for 4096 iterations.
pub(crate) fn verifier(
    key: &[u8; 32],
    lease: &LeaseId,
    password: &Secret,
    iterations: u32,
) -> String {
    let mut salt = [0_u8; SALT_BYTES];
    derive(key, lease, "salt", &mut salt);
    scram(password, &salt, iterations)
}

fn scram(password: &Secret, salt: &[u8], iterations: u32) -> String {
    let rounds = NonZeroU32::new(iterations).unwrap_or(NonZeroU32::MIN);
    let mut salted = Zeroizing::new([0_u8; 32]);
    pbkdf2::derive(
        pbkdf2::PBKDF2_HMAC_SHA256,
        rounds,
        salt,
        password.expose().as_bytes(),
        salted.as_mut(),
    );
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The exchange of RFC 7677, section 3: its server signature follows from our server key.
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
        let (key, lease) = ([7; 32], LeaseId::random());
        let first = password(&key, &lease);
        assert!(first == password(&key, &lease), "the same again");
        assert!(first != password(&key, &LeaseId::random()));
        assert!(first != password(&[8; 32], &lease));
        assert_eq!(first.expose().len(), LENGTH);
        assert!(first.expose().bytes().all(|b| b.is_ascii_alphanumeric()));
        assert_eq!(
            verifier(&key, &lease, &first, 1),
            verifier(&key, &lease, &first, 1)
        );
    }
}
