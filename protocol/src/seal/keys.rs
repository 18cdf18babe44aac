//! Keys: of the dispatcher, of a pool, and the key file of an engine.

use std::sync::Arc;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use hpke::{Deserializable, Kem as _, Serializable};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::shared::Encapsulations;
use super::{KEY_ID_BYTES, Kem, SealError};
use crate::names::PoolName;
use crate::secret::{self, Secret};

type RawPrivate = <Kem as hpke::Kem>::PrivateKey;
type RawPublic = <Kem as hpke::Kem>::PublicKey;

/// A public X25519 key.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey(pub(super) [u8; 32]);

impl PublicKey {
    /// Reads a key from base64.
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

    pub(super) fn raw(&self) -> Result<RawPublic, SealError> {
        RawPublic::from_bytes(&self.0).map_err(|_| SealError::BadKey)
    }

    pub(super) fn id(&self) -> [u8; KEY_ID_BYTES] {
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
    pub(super) public: PublicKey,
    /// Clones of the pair share it.
    pub(super) encapsulations: Arc<Encapsulations>,
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

    /// Makes a key pair from the private key in base64.
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

    pub(super) fn raw(&self) -> Result<(RawPrivate, RawPublic), SealError> {
        let private = RawPrivate::from_bytes(&*self.private).map_err(|_| SealError::BadKey)?;
        Ok((private, self.public.raw()?))
    }
}

/// What `mayfly pool create --key-file` writes and an engine reads.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct EngineKey {
    /// Version of this file's format. It is 1.
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
    /// The dispatcher's earlier public keys, base64. Messages sealed with them may still come.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub previous_dispatcher_keys: Vec<String>,
}
