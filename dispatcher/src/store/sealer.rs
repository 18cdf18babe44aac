//! Uses of the master key. Columns are sealed at rest with AES-256-GCM, bound to table, row, version and column, so
//! that a sealed value cannot be moved to another place of the store. Whole rows are authenticated with HMAC-SHA256
//! (see [`super::authentic`]). Each use has a key of its own, derived from the master key by HKDF (RFC 5869).
//!
//! A sealed value begins with its form. Form 1 is from versions that did not authenticate rows. It is written and
//! accepted only during the upgrade of a store, so that nobody can pass a newer store off as an older one.

use std::sync::{Arc, PoisonError, RwLock};

use aws_lc_rs::aead::{AES_256_GCM, Aad, Nonce, RandomizedNonceKey};
use aws_lc_rs::{hkdf, hmac};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use jiff::Timestamp;
use mayfly_common::private_file::trimmed;
use mayfly_protocol::secret::Secret;
use zeroize::Zeroizing;

use super::StoreError;

/// Sealed under the master key itself, by a version that authenticated no rows.
pub(super) const FIRST_FORM: u8 = 1;
/// Sealed under a key derived from the master key.
const FORM: u8 = 2;
const NONCE_BYTES: usize = 12;
/// Length of the master key, in bytes.
const KEY_BYTES: usize = 32;

/// The keys that are derived from one master key.
pub(super) struct Keys {
    /// Distinguishes master keys, and reveals nothing else about them: 16 hexadecimal digits.
    pub(super) id: String,
    first: RandomizedNonceKey,
    seal: RandomizedNonceKey,
    mac: hmac::Key,
}

/// The place of a sealed value.
#[derive(Debug, Clone, Copy)]
pub(super) struct CellId<'a> {
    pub(super) table: &'a str,
    pub(super) row: &'a str,
    pub(super) version: u64,
    pub(super) column: &'a str,
}

impl CellId<'_> {
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

impl Keys {
    /// The keys of a master key of 32 bytes in base64. `None`: the text is not such a key.
    pub(super) fn new(key: &Secret) -> Option<Self> {
        let bytes = Zeroizing::new(BASE64_STANDARD.decode(trimmed(key.expose())).ok()?);
        if bytes.len() != KEY_BYTES {
            return None;
        }
        let master = hkdf::Salt::new(hkdf::HKDF_SHA256, b"mayfly.v1.store").extract(&bytes);
        let derived = |purpose: &[u8]| {
            let mut out = Zeroizing::new([0_u8; KEY_BYTES]);
            let info = [purpose];
            let okm = master.expand(&info, hkdf::HKDF_SHA256).ok()?;
            okm.fill(out.as_mut()).ok()?;
            Some(out)
        };
        let id = derived(b"id")?;
        Some(Self {
            id: id[..8].iter().map(|byte| format!("{byte:02x}")).collect(),
            first: RandomizedNonceKey::new(&AES_256_GCM, &bytes).ok()?,
            seal: RandomizedNonceKey::new(&AES_256_GCM, derived(b"seal")?.as_ref()).ok()?,
            mac: hmac::Key::new(hmac::HMAC_SHA256, derived(b"row")?.as_ref()),
        })
    }

    /// A new master key.
    pub(super) fn random() -> Secret {
        Secret::new(BASE64_STANDARD.encode(*Zeroizing::new(rand::random::<[u8; KEY_BYTES]>())))
    }

    /// The code that authenticates these bytes.
    pub(super) fn mac(&self, bytes: &[u8]) -> Vec<u8> {
        hmac::sign(&self.mac, bytes).as_ref().to_vec()
    }

    /// Whether `mac` is the result of [`Keys::mac`] for these bytes. The comparison takes the same time for every
    /// `mac`.
    pub(super) fn is_mac(&self, bytes: &[u8], mac: &[u8]) -> bool {
        hmac::verify(&self.mac, bytes, mac).is_ok()
    }
}

/// How the store is sealed at present.
#[derive(Clone)]
pub(super) struct Sealing {
    pub(super) keys: Arc<Keys>,
    /// The end of the upgrade, by the store's clock. Until then a dispatcher that authenticates no rows may be
    /// writing, so rows count without a code.
    pub(super) upgrade_until: Option<Timestamp>,
}

impl Sealing {
    /// Seals a value. Layout: form byte, nonce, ciphertext and tag.
    pub(super) fn seal(&self, cell: CellId<'_>, clear: &[u8]) -> Result<Vec<u8>, StoreError> {
        let (form, key) = match self.upgrade_until {
            Some(_) => (FIRST_FORM, &self.keys.first),
            None => (FORM, &self.keys.seal),
        };
        // The text is encrypted in place, with room for the tag, so that no copy of the clear text stays in memory.
        let mut text = Vec::with_capacity(clear.len() + AES_256_GCM.tag_len());
        text.extend_from_slice(clear);
        let nonce = key
            .seal_in_place_append_tag(cell.associated(), &mut text)
            .map_err(|_| StoreError::Unavailable("sealing failed".to_owned()))?;
        let mut sealed = Vec::with_capacity(1 + NONCE_BYTES + text.len());
        sealed.push(form);
        sealed.extend_from_slice(nonce.as_ref());
        sealed.extend_from_slice(&text);
        Ok(sealed)
    }

    /// Opens what [`Sealing::seal`] made for the same cell under the same key.
    pub(super) fn open(
        &self,
        cell: CellId<'_>,
        sealed: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, StoreError> {
        let refuse = || {
            StoreError::Unavailable(format!(
                "{}.{} does not open with this master key",
                cell.table, cell.column
            ))
        };
        let key = match sealed.first() {
            Some(&FORM) => &self.keys.seal,
            Some(&FIRST_FORM) if self.upgrade_until.is_some() => &self.keys.first,
            _ => return Err(refuse()),
        };
        let (nonce, text) = sealed[1..]
            .split_at_checked(NONCE_BYTES)
            .ok_or_else(refuse)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| refuse())?;
        let mut text = Zeroizing::new(text.to_vec());
        let length = key
            .open_in_place(nonce, cell.associated(), &mut text)
            .map_err(|_| refuse())?
            .len();
        text.truncate(length);
        Ok(text)
    }
}

/// Seals and opens columns under the present keys of the store. The master key may change while the
/// dispatcher runs.
pub(super) struct Sealer(RwLock<Sealing>);

impl Sealer {
    pub(super) fn new(sealing: Sealing) -> Self {
        Self(RwLock::new(sealing))
    }

    /// The keys and the form that are in use at present.
    pub(super) fn sealing(&self) -> Sealing {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Uses these keys from now on.
    pub(super) fn change(&self, sealing: Sealing) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = sealing;
    }

    pub(super) fn seal(&self, cell: CellId<'_>, clear: &[u8]) -> Result<Vec<u8>, StoreError> {
        self.sealing().seal(cell, clear)
    }

    pub(super) fn open(
        &self,
        cell: CellId<'_>,
        sealed: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, StoreError> {
        self.sealing().open(cell, sealed)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sealing(upgrade_until: Option<Timestamp>) -> Sealing {
        Sealing {
            keys: Arc::new(Keys::new(&Keys::random()).unwrap()),
            upgrade_until,
        }
    }

    const CELL: CellId<'_> = CellId {
        table: "secrets",
        row: "1",
        version: 1,
        column: "data",
    };

    #[test]
    fn a_value_opens_only_in_its_place() {
        let sealer = sealing(None);
        let sealed = sealer.seal(CELL, b"hunter2").unwrap();
        assert_eq!(sealer.open(CELL, &sealed).unwrap().as_slice(), b"hunter2");
        for other in [
            CellId { row: "2", ..CELL },
            CellId { version: 2, ..CELL },
            CellId {
                table: "base_versions",
                ..CELL
            },
            CellId {
                column: "target",
                ..CELL
            },
        ] {
            assert!(sealer.open(other, &sealed).is_err(), "{other:?}");
        }
        assert!(sealing(None).open(CELL, &sealed).is_err());
        assert!(sealer.open(CELL, &sealed[..5]).is_err());
        assert!(sealer.open(CELL, b"").is_err());
        assert!(Keys::new(&Secret::new("AAAA")).is_none());
    }

    #[test]
    fn the_first_form_is_for_an_upgrade_alone() {
        let upgrading = sealing(Some(Timestamp::UNIX_EPOCH));
        let strict = Sealing {
            upgrade_until: None,
            ..upgrading.clone()
        };
        let older = upgrading.seal(CELL, b"x").unwrap();
        assert_eq!(older[0], FIRST_FORM);
        assert!(upgrading.open(CELL, &older).is_ok());
        assert!(strict.open(CELL, &older).is_err());
        let newer = strict.seal(CELL, b"x").unwrap();
        assert!(upgrading.open(CELL, &newer).is_ok());
        let passed_off = [&[FIRST_FORM], &newer[1..]].concat();
        assert!(upgrading.open(CELL, &passed_off).is_err());
    }

    #[test]
    fn rows_are_authenticated_under_the_master_key() {
        let (one, other) = (sealing(None).keys, sealing(None).keys);
        assert_ne!(one.id, other.id);
        let mac = one.mac(b"row");
        assert!(one.is_mac(b"row", &mac) && !one.is_mac(b"raw", &mac));
        assert!(!other.is_mac(b"row", &mac) && !one.is_mac(b"row", &[]));
    }
}
