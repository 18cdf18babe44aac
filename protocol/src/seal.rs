//! Seals messages for the broker with HPKE (RFC 9180) in auth mode. The broker's operator cannot read, forge
//! or change a task, and an engine cannot send messages for another pool.
//! An envelope has an encapsulation of its own, or shares one with the others of its minute (`shared.rs`).

mod keys;
mod shared;

use hpke::aead::{ChaCha20Poly1305, ExportOnlyAead};
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256;
use hpke::{Deserializable, OpModeR, OpModeS, Serializable};
use jiff::Timestamp;
use zeroize::Zeroizing;

pub use keys::{EngineKey, KeyPair, PublicKey};

type Kem = X25519HkdfSha256;

/// DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, ChaCha20-Poly1305.
const SUITE: u8 = 1;
/// The suite of [`SUITE`], with an encapsulation that other envelopes share.
const SUITE_SHARED: u8 = 2;
const INFO: &[u8] = b"mayfly.v1";
const KEY_ID_BYTES: usize = 8;
const ENCAPPED_BYTES: usize = 32;
/// Length of the AEAD's tag, at the end (RFC 8439, section 2.8).
const TAG_BYTES: usize = 16;
const HEAD_BYTES: usize = 1 + KEY_ID_BYTES + ENCAPPED_BYTES;

/// Why an envelope or a key is refused. It reveals nothing of the content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// The envelope is too short, or this version does not know its suite.
    #[error("this version does not know the form of the envelope")]
    UnknownForm,
    /// The envelope is sealed to a key that this key pair does not have.
    #[error("the envelope is sealed for another key")]
    OtherKey,
    /// The envelope is forged or changed, or has another sender.
    #[error("the envelope cannot be opened")]
    NotAuthentic,
    /// A key is not 32 bytes in base64.
    #[error("a key must be 32 bytes in base64")]
    BadKey,
}

/// The form of an envelope.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// The envelope has an encapsulation of its own. Every version opens it.
    Alone,
    /// The envelope has the encapsulation of its minute. Only peers that announce this form open it.
    Shared,
}

impl Form {
    /// The form of an envelope. The answer to a request has the form of the request: its dispatcher opens it.
    pub fn of(envelope: &[u8]) -> Self {
        match envelope.first() {
            Some(&SUITE_SHARED) => Self::Shared,
            _ => Self::Alone,
        }
    }
}

impl KeyPair {
    /// Seals `body` from this key pair for `recipient` in a form. `associated` is authenticated but not
    /// encrypted. `at` is the time by the sender's clock: a shared encapsulation is used for 60 s.
    ///
    /// # Errors
    /// Only for a recipient key X25519 refuses.
    pub fn seal_as(
        &self,
        form: Form,
        recipient: &PublicKey,
        at: Timestamp,
        associated: &[u8],
        body: &[u8],
    ) -> Result<Vec<u8>, SealError> {
        match form {
            Form::Alone => self.seal(recipient, associated, body),
            Form::Shared => shared::seal(self, recipient, at, associated, body),
        }
    }

    /// Seals `body` from this key pair for `recipient`. `associated` is authenticated but not encrypted.
    /// Layout: suite byte, recipient's key id, encapsulated key, ciphertext.
    ///
    /// # Errors
    /// Only for a recipient key X25519 refuses.
    pub fn seal(
        &self,
        recipient: &PublicKey,
        associated: &[u8],
        body: &[u8],
    ) -> Result<Vec<u8>, SealError> {
        let mode = OpModeS::Auth(self.raw()?);
        let (encapped, ciphertext) = hpke::single_shot_seal::<ChaCha20Poly1305, HkdfSha256, Kem>(
            &mode,
            &recipient.raw()?,
            INFO,
            body,
            associated,
        )
        .map_err(|_| SealError::BadKey)?;
        let mut envelope = Vec::with_capacity(HEAD_BYTES + ciphertext.len());
        envelope.push(SUITE);
        envelope.extend_from_slice(&recipient.id());
        envelope.extend_from_slice(&encapped.to_bytes());
        envelope.extend_from_slice(&ciphertext);
        Ok(envelope)
    }

    /// Opens an envelope of either form that `sender` sealed to this key pair.
    ///
    /// # Errors
    /// See [`SealError`].
    pub fn open(
        &self,
        sender: &PublicKey,
        associated: &[u8],
        envelope: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, SealError> {
        if envelope.len() < HEAD_BYTES || ![SUITE, SUITE_SHARED].contains(&envelope[0]) {
            return Err(SealError::UnknownForm);
        }
        let (head, ciphertext) = envelope.split_at(HEAD_BYTES);
        if head[1..=KEY_ID_BYTES] != self.public.id() {
            return Err(SealError::OtherKey);
        }
        if head[0] == SUITE_SHARED {
            let encapped = &head[1 + KEY_ID_BYTES..];
            return shared::open(self, sender, encapped, associated, ciphertext);
        }
        let encapped = <Kem as hpke::Kem>::EncappedKey::from_bytes(&head[1 + KEY_ID_BYTES..])
            .map_err(|_| SealError::NotAuthentic)?;
        let (private, _) = self.raw()?;
        hpke::single_shot_open::<ChaCha20Poly1305, HkdfSha256, Kem>(
            &OpModeR::Auth(sender.raw()?),
            &private,
            &encapped,
            INFO,
            ciphertext,
            associated,
        )
        .map(Zeroizing::new)
        .map_err(|_| SealError::NotAuthentic)
    }
}

/// Encapsulations that several messages share (RFC 9180, section 5.3). Both functions write the exported secret into
/// `secret`.
impl KeyPair {
    fn encapsulate(
        &self,
        recipient: &PublicKey,
        info: &[u8],
        label: &[u8],
        secret: &mut [u8],
    ) -> Result<[u8; ENCAPPED_BYTES], SealError> {
        let mode = OpModeS::Auth(self.raw()?);
        let recipient = recipient.raw()?;
        let (encapped, context) =
            hpke::setup_sender::<ExportOnlyAead, HkdfSha256, Kem>(&mode, &recipient, info)
                .map_err(|_| SealError::BadKey)?;
        context
            .export(label, secret)
            .map_err(|_| SealError::BadKey)?;
        Ok(encapped.to_bytes().into())
    }

    fn decapsulate(
        &self,
        sender: &PublicKey,
        encapped: &[u8],
        info: &[u8],
        label: &[u8],
        secret: &mut [u8],
    ) -> Result<(), SealError> {
        let encapped = <Kem as hpke::Kem>::EncappedKey::from_bytes(encapped)
            .map_err(|_| SealError::NotAuthentic)?;
        let (private, _) = self.raw()?;
        let mode = OpModeR::Auth(sender.raw()?);
        let context = hpke::setup_receiver::<ExportOnlyAead, HkdfSha256, Kem>(
            &mode, &private, &encapped, info,
        )
        .map_err(|_| SealError::NotAuthentic)?;
        context
            .export(label, secret)
            .map_err(|_| SealError::NotAuthentic)
    }
}

/// Whether this has the form of an envelope, of any suite and for any key.
pub fn is_sealed(envelope: &[u8]) -> bool {
    envelope.len() >= HEAD_BYTES + TAG_BYTES && envelope[0] != 0
}

/// Opens envelopes with one key pair, or with several that are valid at the same time.
pub trait Open {
    /// See [`KeyPair::open`].
    ///
    /// # Errors
    /// See [`SealError`].
    fn open(
        &self,
        sender: &PublicKey,
        associated: &[u8],
        envelope: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, SealError>;
}

impl Open for KeyPair {
    fn open(
        &self,
        sender: &PublicKey,
        associated: &[u8],
        envelope: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, SealError> {
        Self::open(self, sender, associated, envelope)
    }
}

/// An engine's keys. It seals with the newest and opens envelopes for any of them.
#[derive(Clone)]
pub struct KeyRing {
    /// The key pair that it seals with.
    pub newest: KeyPair,
    /// Earlier key pairs, kept while messages sealed to them may arrive.
    pub previous: Vec<KeyPair>,
}

impl Open for KeyRing {
    fn open(
        &self,
        sender: &PublicKey,
        associated: &[u8],
        envelope: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let mut opened = self.newest.open(sender, associated, envelope);
        for key in &self.previous {
            if opened != Err(SealError::OtherKey) {
                break;
            }
            opened = key.open(sender, associated, envelope);
        }
        opened
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
