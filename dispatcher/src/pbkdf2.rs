//! PBKDF2 with HMAC-SHA256 for 32 bytes of output (RFC 8018, section 5.2): the function `Hi` of SCRAM (RFC 5802,
//! section 2.2). A verifier of 4096 rounds is the largest part of a read's CPU. A general HMAC copies its context
//! twice in each round. Here the two halves of the key are hashed once, and a round is two calls of the compression
//! function, which uses the processor's SHA instructions if it has them.

use std::num::NonZeroU32;
use std::slice;

use aws_lc_rs::{digest, hmac};
use sha2::block_api::compress256;
use zeroize::Zeroizing;

type State = Zeroizing<[u32; 8]>;
type Block = Zeroizing<[u8; BLOCK_BYTES]>;

const BLOCK_BYTES: usize = 64;
const HASH_BYTES: usize = 32;
/// The initial hash value of SHA-256 (FIPS 180-4, section 5.3.3).
const INITIAL: [u32; 8] = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];

/// Derives 32 bytes from a password.
pub(crate) fn derive(
    password: &[u8],
    salt: &[u8],
    rounds: NonZeroU32,
) -> Zeroizing<[u8; HASH_BYTES]> {
    let mut first = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, password));
    first.update(salt);
    first.update(&1_u32.to_be_bytes());
    let first = first.sign();
    let halves = Halves::of(password);
    let mut block = block_of_hash();
    block[..HASH_BYTES].copy_from_slice(first.as_ref());
    let mut sum = Zeroizing::new([0_u8; HASH_BYTES]);
    sum.copy_from_slice(first.as_ref());
    let mut state = State::default();
    for _ in 1..rounds.get() {
        halves.sign(&mut block, &mut state);
        for (byte, other) in sum.iter_mut().zip(block.iter()) {
            *byte ^= other;
        }
    }
    sum
}

/// The padded last block of a message of one block and 32 bytes.
fn block_of_hash() -> Block {
    let mut block = Zeroizing::new([0_u8; BLOCK_BYTES]);
    block[HASH_BYTES] = 0x80;
    let bits = ((BLOCK_BYTES + HASH_BYTES) * 8) as u64;
    block[BLOCK_BYTES - 8..].copy_from_slice(&bits.to_be_bytes());
    block
}

/// SHA-256 after the first block of the inner and of the outer hash of HMAC (RFC 2104).
struct Halves {
    inner: State,
    outer: State,
}

impl Halves {
    fn of(key: &[u8]) -> Self {
        let mut padded = Zeroizing::new([0_u8; BLOCK_BYTES]);
        if key.len() > BLOCK_BYTES {
            let short = digest::digest(&digest::SHA256, key);
            padded[..HASH_BYTES].copy_from_slice(short.as_ref());
        } else {
            padded[..key.len()].copy_from_slice(key);
        }
        let after = |pad: u8| {
            let block = Zeroizing::new(padded.map(|byte| byte ^ pad));
            let mut state = Zeroizing::new(INITIAL);
            compress256(&mut state, slice::from_ref(&*block));
            state
        };
        Self {
            inner: after(0x36),
            outer: after(0x5c),
        }
    }

    /// Replaces the first 32 bytes of a [`block_of_hash`] by their HMAC. `state` is scratch memory, cleared once and
    /// not in each round.
    fn sign(&self, block: &mut Block, state: &mut State) {
        for half in [&self.inner, &self.outer] {
            state.copy_from_slice(half.as_slice());
            compress256(state, slice::from_ref(&**block));
            for (bytes, word) in block.chunks_exact_mut(4).zip(state.iter()) {
                bytes.copy_from_slice(&word.to_be_bytes());
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use aws_lc_rs::pbkdf2;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_pbkdf2(
            password in prop::collection::vec(any::<u8>(), 0..200),
            salt in prop::collection::vec(any::<u8>(), 0..100),
            rounds in 1_u32..40,
        ) {
            let rounds = NonZeroU32::new(rounds).unwrap();
            let mut expected = [0; HASH_BYTES];
            pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, rounds, &salt, &password, &mut expected);
            prop_assert_eq!(*derive(&password, &salt, rounds), expected);
        }
    }
}
