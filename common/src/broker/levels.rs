//! The delay levels, and what is declared again when a part of it is missing.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::declare::{
    declare_all, declare_entrances, has_exchange, mark_parked, message_count, unmark_parked,
};
use super::{Broker, BrokerError};
use mayfly_protocol::topology;

/// Everything is declared again at most once in this time.
const REDECLARE_PAUSE: Duration = Duration::from_secs(2);

impl Broker {
    /// Unreadable messages that are kept for the operator. `None`: their queue is absent.
    ///
    /// # Errors
    /// The broker is unreachable.
    pub async fn unreadable_kept(&self) -> Result<Option<u32>, BrokerError> {
        self.session()?
            .on_admin(async |channel| message_count(channel, topology::UNREADABLE.to_owned()).await)
            .await
    }

    /// Messages in the delay levels. A message that moves between two levels may be counted twice or not at all.
    ///
    /// # Errors
    /// The broker is unreachable.
    pub async fn parked(&self) -> Result<u64, BrokerError> {
        let session = self.session()?;
        let mut parked = 0;
        for n in 0..topology::LEVELS {
            // A missing level is not declared here. Otherwise nobody would learn that its revocations are lost.
            let level =
                session.on_admin(async |channel| message_count(channel, topology::level(n)).await);
            parked += u64::from(level.await?.unwrap_or(0));
        }
        Ok(parked)
    }

    /// Declares again the exchanges that engines publish to. Their absence cannot be seen from messages.
    ///
    /// # Errors
    /// The broker is unreachable, or a shared queue is gone.
    pub async fn declare_entrances(&self) -> Result<(), BrokerError> {
        let session = self.session()?;
        session.claim().await?;
        session
            .on_admin(async |channel| declare_entrances(channel).await)
            .await
    }

    /// Declares everything again, after a part of it was found missing. Of several callers one declares, and at most
    /// once in 2 s. Returns the delay levels that had no queue: messages parked there are lost, unless they are
    /// parked again.
    ///
    /// # Errors
    /// The broker is unreachable.
    pub async fn redeclare(&self) -> Result<Vec<u32>, BrokerError> {
        let Ok(mut last) = self.0.redeclared.try_lock() else {
            return Ok(Vec::new());
        };
        if last.is_some_and(|at| at.elapsed() < REDECLARE_PAUSE) {
            return Ok(Vec::new());
        }
        let session = self.session()?;
        let absent = session.absent_levels().await?;
        if !absent.is_empty() {
            self.0.losses.fetch_add(1, Ordering::Relaxed);
            match session
                .on_admin(async |channel| unmark_parked(channel).await)
                .await
            {
                // A user with the permissions of an earlier version cannot delete the mark.
                Ok(()) | Err(BrokerError::NotAllowed(_)) => {}
                Err(error) => return Err(error),
            }
        }
        let done = session
            .on_admin(async |channel| declare_all(channel).await)
            .await;
        *last = Some(Instant::now());
        done.map(|()| absent)
    }

    /// How many times delay levels were found without a queue.
    pub fn losses(&self) -> u64 {
        self.0.losses.load(Ordering::Relaxed)
    }

    /// Whether all revocations are parked, by the mark of the dispatchers ([`topology::PARKED`]).
    ///
    /// # Errors
    /// The broker is unreachable.
    pub async fn has_all_parked(&self) -> Result<bool, BrokerError> {
        self.session()?
            .on_admin(async |channel| has_exchange(channel, topology::PARKED).await)
            .await
    }

    /// Sets the mark that all revocations are parked, unless a level was lost since [`Broker::losses`] gave this
    /// number.
    ///
    /// # Errors
    /// The broker is unreachable, or the user lacks the permission.
    pub async fn all_are_parked(&self, losses: u64) -> Result<(), BrokerError> {
        // With this lock no level is declared again.
        let _one = self.0.redeclared.lock().await;
        if self.losses() != losses {
            return Ok(());
        }
        self.session()?
            .on_admin(async |channel| mark_parked(channel).await)
            .await
    }

    /// The delay levels that had no queue when this connection was opened. Empty from the second call on.
    pub fn found_absent(&self) -> Vec<u32> {
        let session = self.session();
        session.map_or_else(|_| Vec::new(), |session| session.found_absent())
    }
}
