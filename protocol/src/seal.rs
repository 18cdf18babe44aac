//! Seals messages for the broker with HPKE (RFC 9180) in auth mode. The broker's operator cannot read, forge
//! or change a task, and an engine cannot send messages for another pool. Also the key file of an engine.
//! An envelope has an encapsulation of its own, or shares one with the others of its minute (`shared.rs`).

mod shared;

use std::sync::Arc;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use hpke::aead::{ChaCha20Poly1305, ExportOnlyAead};
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256;
use hpke::{Deserializable, Kem as _, OpModeR, OpModeS, Serializable};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::names::PoolName;
use crate::secret::{self, Secret};

type Kem = X25519HkdfSha256;
type RawPrivate = <Kem as hpke::Kem>::PrivateKey;
type RawPublic = <Kem as hpke::Kem>::PublicKey;

/// DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, ChaCha20-Poly1305.
const SUITE: u8 = 1;
/// The same, with an encapsulation that other envelopes share.
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
    /// Sealed to a key that is not ours.
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
    /// With an encapsulation of its own. Every version opens it.
    Alone,
    /// With the encapsulation of its minute. Only peers that announce it open it.
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

/// A public X25519 key.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey([u8; 32]);

impl PublicKey {
    /// From base64.
    ///
    /// # Errors
    /// [`SealError::BadKey`].
    pub fn from_base64(text: &str) -> Result<Self, SealError> {
        let bytes = BASE64_STANDARD
            .decode(text.trim())
            .map_err(|_| SealError::BadKey)?;
        let key = Self(bytes.try_into().map_err(|_| SealError::BadKey)?);
        key.raw()?;
        Ok(key)
    }

    /// The key in standard base64.
    pub fn to_base64(&self) -> String {
        BASE64_STANDARD.encode(self.0)
    }

    fn raw(&self) -> Result<RawPublic, SealError> {
        RawPublic::from_bytes(&self.0).map_err(|_| SealError::BadKey)
    }

    fn id(&self) -> [u8; KEY_ID_BYTES] {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &self.0);
        let mut id = [0; KEY_ID_BYTES];
        id.copy_from_slice(&digest.as_ref()[..KEY_ID_BYTES]);
        id
    }
}

impl std::fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.to_base64())
    }
}

/// A key pair of the dispatcher or of a pool.
#[derive(Clone)]
pub struct KeyPair {
    private: Zeroizing<[u8; 32]>,
    public: PublicKey,
    /// Clones of the pair share it.
    encapsulations: Arc<shared::Encapsulations>,
}

impl KeyPair {
    /// A new random pair.
    pub fn generate() -> Self {
        let (private, _) = Kem::gen_keypair();
        let bytes: [u8; 32] = private.to_bytes().into();
        // A generated key is always valid.
        Self::from_bytes(bytes).unwrap_or_else(|_| unreachable!("X25519 takes any 32 bytes"))
    }

    fn from_bytes(bytes: [u8; 32]) -> Result<Self, SealError> {
        let private = RawPrivate::from_bytes(&bytes).map_err(|_| SealError::BadKey)?;
        let public = Kem::sk_to_pk(&private);
        Ok(Self {
            private: Zeroizing::new(bytes),
            public: PublicKey(public.to_bytes().into()),
            encapsulations: Arc::default(),
        })
    }

    /// From the private key in base64.
    ///
    /// # Errors
    /// [`SealError::BadKey`].
    pub fn from_base64(text: &Secret) -> Result<Self, SealError> {
        let bytes = Zeroizing::new(
            BASE64_STANDARD
                .decode(text.expose().trim())
                .map_err(|_| SealError::BadKey)?,
        );
        Self::from_bytes(bytes.as_slice().try_into().map_err(|_| SealError::BadKey)?)
    }

    /// The private key in base64.
    pub fn to_base64(&self) -> Secret {
        Secret::new(BASE64_STANDARD.encode(*self.private))
    }

    /// The public key of the pair.
    pub fn public(&self) -> &PublicKey {
        &self.public
    }

    fn raw(&self) -> Result<(RawPrivate, RawPublic), SealError> {
        let private = RawPrivate::from_bytes(&*self.private).map_err(|_| SealError::BadKey)?;
        Ok((private, self.public.raw()?))
    }

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

/// Encapsulations that several messages share (RFC 9180, section 5.3). Both write the exported secret.
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
    /// What it seals with.
    pub newest: KeyPair,
    /// Earlier ones, while messages sealed to them may come.
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

/// What `mayfly pool create --key-file` writes and an engine reads.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct EngineKey {
    /// Form of this file; 1.
    pub version: u32,
    /// The pool the key is for.
    pub pool: PoolName,
    /// The pool's private key, base64.
    #[serde(serialize_with = "secret::expose")]
    pub private_key: Secret,
    /// Private keys before a rotation, base64. Messages sealed to them may still come.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        serialize_with = "secret::expose_list"
    )]
    pub previous_keys: Vec<Secret>,
    /// The dispatcher's public key, base64: the newest.
    pub dispatcher_key: String,
    /// Its earlier public keys, base64. Messages sealed with them may still come.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub previous_dispatcher_keys: Vec<String>,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_hands_open_it() {
        let (dispatcher, pool, other) = (
            KeyPair::generate(),
            KeyPair::generate(),
            KeyPair::generate(),
        );
        let sealed = dispatcher.seal(pool.public(), b"head", b"body").unwrap();
        assert_eq!(
            pool.open(dispatcher.public(), b"head", &sealed)
                .unwrap()
                .as_slice(),
            b"body"
        );
        assert_eq!(
            other.open(dispatcher.public(), b"head", &sealed),
            Err(SealError::OtherKey)
        );
        assert_eq!(
            pool.open(other.public(), b"head", &sealed),
            Err(SealError::NotAuthentic)
        );
        assert_eq!(
            pool.open(dispatcher.public(), b"other", &sealed),
            Err(SealError::NotAuthentic)
        );
        for at in 0..sealed.len() {
            let mut bent = sealed.clone();
            bent[at] ^= 1;
            assert!(
                pool.open(dispatcher.public(), b"head", &bent).is_err(),
                "byte {at}"
            );
        }
        assert_eq!(
            pool.open(dispatcher.public(), b"head", b"short"),
            Err(SealError::UnknownForm)
        );
    }

    /// An engine drops what is no envelope, and keeps an envelope that it cannot open for another version.
    #[test]
    fn an_envelope_is_recognised_by_its_length_and_its_suite() {
        let shortest = HEAD_BYTES + TAG_BYTES;
        for (length, suite, is_envelope) in [
            (0, 1, false),
            (shortest - 1, 1, false),
            (shortest, 1, true),
            (shortest + 1, 1, true),
            (shortest, 0, false),
            (shortest, 99, true),
        ] {
            let mut bytes = vec![7; length];
            if let Some(first) = bytes.first_mut() {
                *first = suite;
            }
            assert_eq!(is_sealed(&bytes), is_envelope, "{length} bytes, {suite}");
        }
    }

    #[test]
    fn the_form_of_an_envelope_is_its_first_byte() {
        let (from, to) = (KeyPair::generate(), KeyPair::generate());
        for form in [Form::Alone, Form::Shared] {
            let at = Timestamp::UNIX_EPOCH;
            let sealed = from.seal_as(form, to.public(), at, b"", b"x").unwrap();
            assert_eq!(Form::of(&sealed), form);
        }
        assert_eq!(Form::of(b""), Form::Alone);
    }

    /// A head alone, and a head with less than a tag, say that the form is unknown or that nothing is authentic.
    #[test]
    fn what_is_too_short_is_refused_by_its_form() {
        let (from, to) = (KeyPair::generate(), KeyPair::generate());
        let sealed = from.seal(to.public(), b"", b"x").unwrap();
        let opened = |length: usize| to.open(from.public(), b"", &sealed[..length]);
        assert_eq!(opened(HEAD_BYTES - 1), Err(SealError::UnknownForm));
        assert_eq!(opened(HEAD_BYTES), Err(SealError::NotAuthentic));
        let mut other_suite = sealed.clone();
        other_suite[0] = 3;
        assert_eq!(
            to.open(from.public(), b"", &other_suite),
            Err(SealError::UnknownForm)
        );
    }

    #[test]
    fn two_keys_are_valid_side_by_side() {
        let dispatcher = KeyPair::generate();
        let ring = KeyRing {
            newest: KeyPair::generate(),
            previous: vec![KeyPair::generate()],
        };
        for key in [&ring.newest, &ring.previous[0]] {
            let sealed = dispatcher.seal(key.public(), b"head", b"body").unwrap();
            let opened = Open::open(&ring, dispatcher.public(), b"head", &sealed).unwrap();
            assert_eq!(opened.as_slice(), b"body");
        }
        let sealed = dispatcher
            .seal(KeyPair::generate().public(), b"head", b"body")
            .unwrap();
        assert_eq!(
            Open::open(&ring, dispatcher.public(), b"head", &sealed),
            Err(SealError::OtherKey)
        );
    }

    #[test]
    fn keys_travel_as_base64() {
        let pair = KeyPair::generate();
        let again = KeyPair::from_base64(&pair.to_base64()).unwrap();
        assert_eq!(again.public(), pair.public());
        assert!(PublicKey::from_base64("AAAA").is_err());
        assert!(KeyPair::from_base64(&Secret::new("AAAA")).is_err());
        let public = pair.public().to_base64();
        assert_eq!(PublicKey::from_base64(&public).unwrap(), *pair.public());
        assert_eq!(format!("{:?}", pair.public()), public);
    }
}
