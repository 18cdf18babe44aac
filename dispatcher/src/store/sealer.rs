//! Sealing at rest: AES-256-GCM under the master key, bound to table, row, version and column,
//! so that nothing sealed can be moved to another place of the store.

use aws_lc_rs::aead::{AES_256_GCM, Aad, Nonce, RandomizedNonceKey};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use mayfly_common::secret::Secret;
use zeroize::Zeroizing;

use super::StoreError;

const FORM: u8 = 1;
const NONCE_BYTES: usize = 12;
/// Length of the master key, in bytes.
const KEY_BYTES: usize = 32;

/// Seals and opens columns.
pub(super) struct Sealer(RandomizedNonceKey);

/// Where a sealed value stands.
#[derive(Debug, Clone, Copy)]
pub(super) struct Spot<'a> {
    pub(super) table: &'a str,
    pub(super) row: &'a str,
    pub(super) version: u64,
    pub(super) column: &'a str,
}

impl Spot<'_> {
    fn associated(self) -> Aad<Vec<u8>> {
        Aad::from(
            format!(
                "{}|{}|{}|{}",
                self.table, self.row, self.version, self.column
            )
            .into_bytes(),
        )
    }
}

impl Sealer {
    /// With a master key of 32 bytes in base64; none if it is no such thing.
    pub(super) fn new(key: &Secret) -> Option<Self> {
        let bytes = Zeroizing::new(BASE64_STANDARD.decode(key.expose().trim()).ok()?);
        if bytes.len() != KEY_BYTES {
            return None;
        }
        RandomizedNonceKey::new(&AES_256_GCM, &bytes).ok().map(Self)
    }

    /// A new master key.
    pub(super) fn random_key() -> Secret {
        Secret::new(BASE64_STANDARD.encode(*Zeroizing::new(rand::random::<[u8; KEY_BYTES]>())))
    }

    /// Layout: form byte, nonce, ciphertext and tag.
    pub(super) fn seal(&self, spot: Spot<'_>, clear: &[u8]) -> Result<Vec<u8>, StoreError> {
        // Encrypted in place, with room for the tag: no copy of the clear text stays behind.
        let mut text = Vec::with_capacity(clear.len() + AES_256_GCM.tag_len());
        text.extend_from_slice(clear);
        let nonce = self
            .0
            .seal_in_place_append_tag(spot.associated(), &mut text)
            .map_err(|_| StoreError::Unavailable("sealing failed".to_owned()))?;
        let mut sealed = Vec::with_capacity(1 + NONCE_BYTES + text.len());
        sealed.push(FORM);
        sealed.extend_from_slice(nonce.as_ref());
        sealed.extend_from_slice(&text);
        Ok(sealed)
    }

    /// Opens what [`Sealer::seal`] made for the same spot under the same key.
    pub(super) fn open(
        &self,
        spot: Spot<'_>,
        sealed: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, StoreError> {
        let refuse = || {
            StoreError::Unavailable(format!(
                "{}.{} does not open with this master key",
                spot.table, spot.column
            ))
        };
        if sealed.len() < 1 + NONCE_BYTES || sealed[0] != FORM {
            return Err(refuse());
        }
        let (nonce, text) = sealed[1..].split_at(NONCE_BYTES);
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| refuse())?;
        let mut text = Zeroizing::new(text.to_vec());
        let length = self
            .0
            .open_in_place(nonce, spot.associated(), &mut text)
            .map_err(|_| refuse())?
            .len();
        text.truncate(length);
        Ok(text)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_value_opens_only_in_its_place() {
        let sealer = Sealer::new(&Sealer::random_key()).unwrap();
        let spot = Spot {
            table: "secrets",
            row: "1",
            version: 1,
            column: "data",
        };
        let sealed = sealer.seal(spot, b"hunter2").unwrap();
        assert_eq!(sealer.open(spot, &sealed).unwrap().as_slice(), b"hunter2");
        for other in [
            Spot { row: "2", ..spot },
            Spot { version: 2, ..spot },
            Spot {
                table: "base_versions",
                ..spot
            },
            Spot {
                column: "target",
                ..spot
            },
        ] {
            assert!(sealer.open(other, &sealed).is_err(), "{other:?}");
        }
        let another = Sealer::new(&Sealer::random_key()).unwrap();
        assert!(another.open(spot, &sealed).is_err());
        assert!(Sealer::new(&Secret::new("AAAA")).is_none());
    }
}
