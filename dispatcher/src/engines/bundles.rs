//! Which bundles of certificate authorities were put at the broker lately: memory only.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mayfly_protocol::authorities::Digest;
use mayfly_protocol::names::PoolName;

use crate::store::Generation;

/// A bundle counts as present for this time after it was published. By then engines have read it, and say so
/// every 2 s.
const TRUSTED_FOR: Duration = Duration::from_secs(30);
/// After a refused publish, as where the queue is full, bundles go inside messages for this time.
const REFUSED_FOR: Duration = Duration::from_secs(60);

/// A bundle as it is sealed: for whom, and by which of the dispatcher's keys.
pub(super) type Sealed = (PoolName, Digest, String, Generation);

/// What was put at the broker lately.
#[derive(Default)]
pub(crate) struct Bundles {
    put: Mutex<HashMap<Sealed, (Instant, bool)>>,
    /// One puts a bundle there, and the others wait.
    pub(super) putting: tokio::sync::Mutex<()>,
}

impl Bundles {
    fn put(&self) -> MutexGuard<'_, HashMap<Sealed, (Instant, bool)>> {
        // No code panics while it holds the lock.
        self.put.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is there, or could not be put there, as was seen lately.
    pub(super) fn lately(&self, bundle: &Sealed) -> Option<bool> {
        let (at, is_there) = *self.put().get(bundle)?;
        let good_for = if is_there { TRUSTED_FOR } else { REFUSED_FOR };
        (at.elapsed() < good_for).then_some(is_there)
    }

    pub(super) fn remember(&self, bundle: Sealed, is_there: bool) {
        let mut put = self.put();
        put.retain(|_, (at, _)| at.elapsed() < REFUSED_FOR);
        put.insert(bundle, (Instant::now(), is_there));
    }

    /// An engine of the pool did not find what it was sent the name of.
    pub(crate) fn forget(&self, pool: &PoolName) {
        self.put().retain(|(of, ..), _| of != pool);
    }
}
