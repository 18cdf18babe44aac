//! The queues of a pool: declared, deleted, and counted.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lapin::options::QueueDeleteOptions;
use tracing::debug;

use super::declare::{self, find_queue, message_count};
use super::{Broker, BrokerError};
use mayfly_protocol::names::PoolName;
use mayfly_protocol::topology;

/// The number of a pool's engines is used again for this long.
const COUNT_KEPT: Duration = Duration::from_millis(250);

/// The engines of each pool by the last count. `None`: its queue was absent.
#[derive(Default)]
pub(super) struct CountCache(Mutex<HashMap<PoolName, (Instant, Option<u32>)>>);

impl CountCache {
    fn engines(&self) -> MutexGuard<'_, HashMap<PoolName, (Instant, Option<u32>)>> {
        // No code panics while it holds this lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lately(&self, pool: &PoolName) -> Option<u32> {
        match *self.engines().get(pool)? {
            (at, _) if at.elapsed() >= COUNT_KEPT => None,
            // An engine may have started since.
            (_, Some(0)) => None,
            // Each look at an absent queue costs a channel.
            (_, count) => Some(count.unwrap_or(0)),
        }
    }

    fn remember(&self, pool: &PoolName, count: Option<u32>) {
        let mut engines = self.engines();
        engines.retain(|_, (at, _)| at.elapsed() < COUNT_KEPT);
        engines.insert(pool.clone(), (Instant::now(), count));
    }
}

/// Messages of a pool that wait for an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiting {
    /// Messages in its create queue.
    pub create: u32,
    /// Messages in its revoke queue.
    pub revoke: u32,
}

impl Broker {
    /// How many engines consume a pool's create queue. A count is used again for 0.25 s, because many callers need
    /// it at once; a count of 0 is not.
    ///
    /// Declares nothing: if a queue is declared again while it is deleted, RabbitMQ before 4.0 moves its consumers
    /// to the new queue without notice, and delivers nothing to them.
    ///
    /// # Errors
    /// The broker is unreachable.
    pub async fn engines_of(&self, pool: &PoolName) -> Result<u32, BrokerError> {
        let session = self.session()?;
        if let Some(engines) = self.0.counted.lately(pool) {
            return Ok(engines);
        }
        session
            .on_admin(async |channel| {
                // Another caller may have counted in the meantime.
                if let Some(engines) = self.0.counted.lately(pool) {
                    return Ok(engines);
                }
                let queue = find_queue(channel, topology::create_queue(pool)).await?;
                let engines = queue.map(|queue| queue.consumer_count());
                self.0.counted.remember(pool, engines);
                Ok(engines.unwrap_or(0))
            })
            .await
    }

    /// Messages that are ready in a pool's create and revoke queues; those that an engine works on do not count.
    /// `None`: one of the queues is absent. Declares nothing: the pool may be about to be deleted.
    ///
    /// # Errors
    /// The broker is unreachable.
    pub async fn waiting(&self, pool: &PoolName) -> Result<Option<Waiting>, BrokerError> {
        let session = self.session()?;
        session
            .on_admin(async |channel| {
                let Some(create) = message_count(channel, topology::create_queue(pool)).await?
                else {
                    return Ok(None);
                };
                let revoke = message_count(channel, topology::revoke_queue(pool)).await?;
                Ok(revoke.map(|revoke| Waiting { create, revoke }))
            })
            .await
    }

    /// Declares what a pool needs. Safe to repeat.
    ///
    /// # Errors
    /// The broker is unreachable.
    pub async fn declare_pool(&self, pool: &PoolName) -> Result<(), BrokerError> {
        let session = self.session()?;
        session
            .on_admin(async |channel| declare::declare_pool(channel, pool).await)
            .await
    }

    /// Deletes a pool's queues.
    ///
    /// # Errors
    /// The broker is unreachable.
    pub async fn delete_pool(&self, pool: &PoolName) -> Result<(), BrokerError> {
        let session = self.session()?;
        session
            .on_admin(async |channel| {
                for queue in [topology::create_queue(pool), topology::revoke_queue(pool)] {
                    channel
                        .queue_delete(queue.into(), QueueDeleteOptions::default())
                        .await?;
                }
                Ok(())
            })
            .await?;
        let deleting = session.on_admin(async |channel| {
            let queue = topology::authorities_queue(pool);
            let options = QueueDeleteOptions::default();
            channel.queue_delete(queue.into(), options).await?;
            Ok(())
        });
        if let Err(error) = deleting.await {
            // A broker user that was made before this queue existed lacks the permission.
            debug!(%pool, %error, "the pool's certificate authorities remain at the broker for at most 400 days");
        }
        Ok(())
    }
}
