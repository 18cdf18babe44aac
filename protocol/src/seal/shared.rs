//! Envelopes that share an encapsulation (suite 2): one HPKE encapsulation for each pair of keys and minute
//! instead of one for each message. Each envelope contains the encapsulation, so it opens alone.
//!
//! Layout: suite byte, recipient's key id, encapsulated key, salt, ciphertext. The message key is
//! `HKDF-Expand(exported secret, label || salt)`, where the secret is exported from the HPKE context
//! (RFC 9180, section 5.3) and the salt is random. A message key is used once, so its nonce is 0.
//! A sender keeps its encapsulations in memory only. After a restart it makes new ones.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aws_lc_rs::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, Prk};
use jiff::{SignedDuration, Timestamp};
use zeroize::Zeroizing;

use super::{ENCAPPED_BYTES, HEAD_BYTES, KeyPair, PublicKey, SUITE_SHARED, SealError, TAG_BYTES};

/// This info differs from the info of suite 1, so that an encapsulation is valid in one suite only.
const INFO: &[u8] = b"mayfly.v2";
const EXPORT_LABEL: &[u8] = b"mayfly.v2 messages";
const KEY_LABEL: &[u8] = b"mayfly.v2 message key";
const SECRET_BYTES: usize = 32;
const SALT_BYTES: usize = 16;
/// Time for which a sender uses an encapsulation.
const USED_FOR: SignedDuration = SignedDuration::from_secs(60);
/// Maximum number of recipients whose encapsulation a sender remembers.
const RECIPIENTS_MAX: usize = 4096;
/// Maximum number of senders of which encapsulations are remembered. Only keys that the reader's configuration
/// or store names count.
const SENDERS_MAX: usize = 1024;
/// Maximum number of remembered encapsulations of one sender. The engines of a pool have one key and each
/// has its own encapsulation.
const ENCAPSULATIONS_MAX: usize = 128;

type Encapped = [u8; ENCAPPED_BYTES];
/// The secret is on the heap, so that a map that grows leaves no copy of it in memory. It is wiped when its last user
/// drops it.
type ExportedSecret = Arc<Zeroizing<[u8; SECRET_BYTES]>>;

/// The encapsulations that one key pair has made and opened.
#[derive(Default)]
pub(super) struct Encapsulations {
    made: Mutex<HashMap<[u8; 32], Made>>,
    opened: Mutex<Opened>,
}

/// An encapsulation for one recipient.
struct Made {
    at: Timestamp,
    encapped: Encapped,
    secret: ExportedSecret,
}

impl Made {
    fn is_usable(&self, at: Timestamp) -> bool {
        at.duration_since(self.at).abs() < USED_FOR
    }
}

/// The opened encapsulations by sender. A sender displaces only its own encapsulations. So a sender that makes many
/// does not slow down the others.
#[derive(Default)]
struct Opened {
    uses: u64,
    senders: HashMap<[u8; 32], OfASender>,
}

#[derive(Default)]
struct OfASender {
    used: u64,
    secrets: HashMap<Encapped, (u64, ExportedSecret)>,
}

impl Opened {
    fn find(&mut self, sender: &PublicKey, encapped: &Encapped) -> Option<ExportedSecret> {
        self.uses += 1;
        let of_sender = self.senders.get_mut(&sender.0)?;
        let (used, secret) = of_sender.secrets.get_mut(encapped)?;
        (of_sender.used, *used) = (self.uses, self.uses);
        Some(secret.clone())
    }

    /// Remembers an encapsulation after its first authentic message. If the sender has too many, the least recently
    /// used one is forgotten.
    fn remember(&mut self, sender: &PublicKey, encapped: Encapped, secret: ExportedSecret) {
        self.uses += 1;
        if self.senders.len() >= SENDERS_MAX
            && !self.senders.contains_key(&sender.0)
            && let Some(oldest) = oldest(self.senders.iter().map(|(key, one)| (*key, one.used)))
        {
            self.senders.remove(&oldest);
        }
        let of_sender = self.senders.entry(sender.0).or_default();
        of_sender.used = self.uses;
        if of_sender.secrets.len() >= ENCAPSULATIONS_MAX
            && let Some(oldest) = oldest(of_sender.secrets.iter().map(|(key, one)| (*key, one.0)))
        {
            of_sender.secrets.remove(&oldest);
        }
        of_sender.secrets.insert(encapped, (self.uses, secret));
    }
}

fn oldest<K>(used: impl Iterator<Item = (K, u64)>) -> Option<K> {
    used.min_by_key(|(_, used)| *used).map(|(key, _)| key)
}

impl Encapsulations {
    fn made(&self) -> MutexGuard<'_, HashMap<[u8; 32], Made>> {
        // No code panics while it holds this lock.
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn opened(&self) -> MutexGuard<'_, Opened> {
        // No code panics while it holds this lock.
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The encapsulation of this minute for a recipient. Those that are older are forgotten when one is made.
fn encapsulation(
    from: &KeyPair,
    to: &PublicKey,
    at: Timestamp,
) -> Result<(Encapped, ExportedSecret), SealError> {
    let mut made = from.encapsulations.made();
    if let Some(known) = made.get(&to.0).filter(|known| known.is_usable(at)) {
        return Ok((known.encapped, known.secret.clone()));
    }
    let mut secret = ExportedSecret::default();
    let encapped = from.encapsulate(to, INFO, EXPORT_LABEL, bytes_of(&mut secret)?)?;
    made.retain(|_, known| known.is_usable(at));
    if made.len() >= RECIPIENTS_MAX {
        made.clear();
    }
    let known = Made {
        at,
        encapped,
        secret: secret.clone(),
    };
    made.insert(to.0, known);
    Ok((encapped, secret))
}

/// The bytes of a secret that has no second owner yet.
fn bytes_of(secret: &mut ExportedSecret) -> Result<&mut [u8], SealError> {
    let bytes = Arc::get_mut(secret).ok_or(SealError::BadKey)?;
    Ok(bytes.as_mut_slice())
}

/// The key of the one message that has this salt.
fn message_key(secret: &ExportedSecret, salt: &[u8]) -> Result<LessSafeKey, SealError> {
    let mut key = Zeroizing::new([0; 32]);
    let parts = [KEY_LABEL, salt];
    Prk::new_less_safe(HKDF_SHA256, secret.as_slice())
        .expand(&parts, HKDF_SHA256)
        .and_then(|output| output.fill(key.as_mut_slice()))
        .and_then(|()| UnboundKey::new(&CHACHA20_POLY1305, key.as_slice()))
        .map(LessSafeKey::new)
        .map_err(|_| SealError::BadKey)
}

fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; 12])
}

pub(super) fn seal(
    from: &KeyPair,
    to: &PublicKey,
    at: Timestamp,
    associated: &[u8],
    body: &[u8],
) -> Result<Vec<u8>, SealError> {
    let (encapped, secret) = encapsulation(from, to, at)?;
    let mut salt = [0; SALT_BYTES];
    // Random, not a counter: a copy of a running virtual machine would continue with the same numbers.
    aws_lc_rs::rand::fill(&mut salt).map_err(|_| SealError::BadKey)?;
    let key = message_key(&secret, &salt)?;
    let mut envelope = Vec::with_capacity(HEAD_BYTES + SALT_BYTES + body.len() + TAG_BYTES);
    envelope.push(SUITE_SHARED);
    envelope.extend_from_slice(&to.id());
    envelope.extend_from_slice(&encapped);
    envelope.extend_from_slice(&salt);
    envelope.extend_from_slice(body);
    let text = &mut envelope[HEAD_BYTES + SALT_BYTES..];
    let tag = key
        .seal_in_place_separate_tag(nonce(), Aad::from(associated), text)
        .map_err(|_| SealError::BadKey)?;
    envelope.extend_from_slice(tag.as_ref());
    Ok(envelope)
}

/// Opens what follows the head. An encapsulation is remembered only if the message is authentic.
pub(super) fn open(
    to: &KeyPair,
    sender: &PublicKey,
    encapped: &[u8],
    associated: &[u8],
    rest: &[u8],
) -> Result<Zeroizing<Vec<u8>>, SealError> {
    let encapped: Encapped = encapped.try_into().map_err(|_| SealError::UnknownForm)?;
    let (salt, ciphertext) = rest
        .split_at_checked(SALT_BYTES)
        .ok_or(SealError::UnknownForm)?;
    let known = to.encapsulations.opened().find(sender, &encapped);
    let is_known = known.is_some();
    let secret = match known {
        Some(secret) => secret,
        None => {
            let mut secret = ExportedSecret::default();
            to.decapsulate(
                sender,
                &encapped,
                INFO,
                EXPORT_LABEL,
                bytes_of(&mut secret)?,
            )?;
            secret
        }
    };
    let mut text = Zeroizing::new(ciphertext.to_vec());
    let length = message_key(&secret, salt)?
        .open_in_place(nonce(), Aad::from(associated), &mut text)
        .map_err(|_| SealError::NotAuthentic)?
        .len();
    text.truncate(length);
    if !is_known {
        to.encapsulations
            .opened()
            .remember(sender, encapped, secret);
    }
    Ok(text)
}

#[cfg(test)]
mod tests;
