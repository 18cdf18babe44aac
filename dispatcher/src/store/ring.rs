//! The dispatcher's secret keys, in generations. A key that is renewed while the dispatcher runs is read from the
//! store within 1 s; until then the earlier generation can be used.

use std::sync::{Arc, PoisonError, RwLock};

use mayfly_protocol::seal::{KeyPair, Open, PublicKey, SealError};
use zeroize::Zeroizing;

/// A generation of a key; the first is 1.
pub(crate) type Generation = u64;

/// The keys as the store has them.
pub(crate) struct Ring {
    /// The newest derivation key: the passwords of new leases come from it.
    pub(crate) derivation: (Generation, Zeroizing<[u8; 32]>),
    /// The keys that seal tasks and open answers, the oldest first. There is one, or two while the key is being
    /// renewed.
    pub(crate) dispatcher: Vec<(Generation, KeyPair)>,
}

/// The keys, shared by all parts of the dispatcher.
#[derive(Clone)]
pub(crate) struct Keys(Arc<RwLock<Ring>>);

impl Keys {
    pub(crate) fn new(ring: Ring) -> Self {
        Self(Arc::new(RwLock::new(ring)))
    }

    fn ring(&self) -> std::sync::RwLockReadGuard<'_, Ring> {
        // No code panics while it holds this lock.
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the keys by the present ones of the store. A pair that stays keeps its encapsulations.
    pub(crate) fn renew(&self, mut ring: Ring) {
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        for (_, pair) in &mut ring.dispatcher {
            let mut before = known.dispatcher.iter().map(|(_, before)| before);
            if let Some(before) = before.find(|before| before.public() == pair.public()) {
                *pair = before.clone();
            }
        }
        *known = ring;
    }

    /// The newest derivation key.
    pub(crate) fn derivation(&self) -> (Generation, Zeroizing<[u8; 32]>) {
        self.ring().derivation.clone()
    }

    /// The key pair of a generation.
    ///
    /// # Errors
    /// This generation does not exist, or is not read yet.
    pub(crate) fn sender(&self, generation: Generation) -> Result<KeyPair, SealError> {
        let ring = self.ring();
        let found = ring.dispatcher.iter().find(|(n, _)| *n == generation);
        found.map(|(_, pair)| pair.clone()).ok_or(SealError::BadKey)
    }

    /// The keys that engines get: the newest generation of the dispatcher's key, and the public halves of all, the
    /// newest first.
    pub(crate) fn public(&self) -> (Generation, Vec<PublicKey>) {
        let ring = self.ring();
        let newest = ring.dispatcher.last().map_or(1, |(n, _)| *n);
        let pairs = ring.dispatcher.iter().rev();
        let keys = pairs.map(|(_, pair)| pair.public().clone());
        (newest, keys.collect())
    }
}

impl Open for Keys {
    fn open(
        &self,
        sender: &PublicKey,
        associated: &[u8],
        envelope: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let ring = self.ring();
        let mut opened = Err(SealError::OtherKey);
        for (_, pair) in &ring.dispatcher {
            opened = pair.open(sender, associated, envelope);
            if opened != Err(SealError::OtherKey) {
                break;
            }
        }
        opened
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use mayfly_protocol::seal::Form;

    /// The keys are read each second; an encapsulation is used for 60 s.
    #[test]
    fn a_pair_that_stays_keeps_its_encapsulations() {
        let (pair, pool) = (KeyPair::generate(), KeyPair::generate());
        let ring = || Ring {
            derivation: (1, Zeroizing::new([1; 32])),
            dispatcher: vec![(1, KeyPair::from_base64(&pair.to_base64()).unwrap())],
        };
        let keys = Keys::new(ring());
        let encapsulation = || {
            let sender = keys.sender(1).unwrap();
            let at = jiff::Timestamp::UNIX_EPOCH;
            let sealed = sender.seal_as(Form::Shared, pool.public(), at, b"head", b"body");
            sealed.unwrap()[9..41].to_vec()
        };
        let first = encapsulation();
        keys.renew(ring());
        assert_eq!(encapsulation(), first);
    }

    #[test]
    fn two_generations_open_side_by_side() {
        let (old, new, pool) = (
            KeyPair::generate(),
            KeyPair::generate(),
            KeyPair::generate(),
        );
        let ring = |dispatcher| Ring {
            derivation: (1, Zeroizing::new([1; 32])),
            dispatcher,
        };
        let keys = Keys::new(ring(vec![(1, old.clone())]));
        let to = |key: &KeyPair| pool.seal(key.public(), b"head", b"body").unwrap();
        let opens = |sealed: &[u8]| keys.open(pool.public(), b"head", sealed).map(|_| ());
        assert_eq!(opens(&to(&old)), Ok(()));
        assert_eq!(opens(&to(&new)), Err(SealError::OtherKey));

        keys.renew(ring(vec![(1, old.clone()), (2, new.clone())]));
        assert_eq!(opens(&to(&old)), Ok(()));
        assert_eq!(opens(&to(&new)), Ok(()));
        let public = vec![new.public().clone(), old.public().clone()];
        assert_eq!(keys.public(), (2, public));

        keys.renew(ring(vec![(2, new.clone())]));
        assert_eq!(opens(&to(&old)), Err(SealError::OtherKey));
        assert_eq!(opens(&to(&new)), Ok(()));
    }
}
