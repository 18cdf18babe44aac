//! The bundles of certificate authorities that were published to the broker recently. In memory only.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mayfly_protocol::authorities::Digest;
use mayfly_protocol::names::PoolName;

use crate::store::Generation;

/// A bundle counts as present for this time after it was published. By then engines have read it and report
/// that every 2 s.
const TRUSTED_FOR: Duration = Duration::from_secs(30);
/// After a refused publish, for example because the queue is full, messages contain the bundles for this
/// time.
const REFUSED_FOR: Duration = Duration::from_secs(60);

/// A bundle as it is sealed: for whom, and by which of the dispatcher's keys.
pub(crate) type Sealed = (PoolName, Digest, String, Generation);

/// The results of recent publishes of bundles.
#[derive(Default)]
pub(crate) struct Bundles {
    put: Mutex<HashMap<Sealed, (Instant, bool)>>,
    /// One task publishes a bundle, and the others wait.
    pub(crate) putting: tokio::sync::Mutex<()>,
}

impl Bundles {
    fn put(&self) -> MutexGuard<'_, HashMap<Sealed, (Instant, bool)>> {
        // No code panics while it holds this lock.
        self.put.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The recent result: whether the broker has the bundle or refused it.
    pub(crate) fn lately(&self, bundle: &Sealed) -> Option<bool> {
        let (at, is_there) = *self.put().get(bundle)?;
        let good_for = if is_there { TRUSTED_FOR } else { REFUSED_FOR };
        (at.elapsed() < good_for).then_some(is_there)
    }

    pub(crate) fn remember(&self, bundle: Sealed, is_there: bool) {
        let mut put = self.put();
        put.retain(|_, (at, _)| at.elapsed() < REFUSED_FOR);
        put.insert(bundle, (Instant::now(), is_there));
    }

    /// An engine of the pool did not find a bundle that a message named.
    pub(crate) fn forget(&self, pool: &PoolName) {
        self.put().retain(|(of, ..), _| of != pool);
    }
}
