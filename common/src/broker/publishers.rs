//! The channels a session publishes on. Each is taken for one publish and then given back or closed,
//! whatever becomes of the publish: confirmed, refused, timed out, or given up by its caller.
//!
//! A connection has 2,047 channels at most (RabbitMQ's `channel_max`). A channel keeps its permit until
//! the broker has closed it, so there are never more than [`PUBLISHERS`] of them.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lapin::Channel;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::BrokerError;

/// Publisher channels. Each has one publish under way, because lapin mixes up the returns of
/// pipelined ones.
pub(super) const PUBLISHERS: usize = 8;
/// Longest a publish waits for its turn. What waits longer was certainly not sent.
const PERMIT_TIMEOUT: Duration = Duration::from_secs(30);
/// A channel that is not closed after this belongs to a connection that does not answer.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Channels that nobody uses now, and the permits for those in use.
pub(super) struct Publishers {
    idle: Mutex<Vec<Channel>>,
    permits: Arc<Semaphore>,
    closing: mpsc::UnboundedSender<Closing>,
}

/// A channel that is not used again.
pub(super) struct Closing {
    channel: Channel,
    _permit: OwnedSemaphorePermit,
}

impl Closing {
    /// Closes it. `false`: the broker did not answer.
    pub(super) async fn done(self) -> bool {
        let closing = self.channel.close(200, "not used again".into());
        // One that the broker has closed meanwhile is closed too.
        tokio::time::timeout(CLOSE_TIMEOUT, closing).await.is_ok()
    }
}

/// The place of one publish, with its channel once there is one.
pub(super) struct Turn<'p> {
    publishers: &'p Publishers,
    permit: Option<OwnedSemaphorePermit>,
    channel: Option<Channel>,
}

impl Publishers {
    /// None yet, and where those go that are to be closed; at most [`PUBLISHERS`] wait there.
    pub(super) fn new() -> (Self, mpsc::UnboundedReceiver<Closing>) {
        let (closing, to_close) = mpsc::unbounded_channel();
        let publishers = Self {
            idle: Mutex::default(),
            permits: Arc::new(Semaphore::new(PUBLISHERS)),
            closing,
        };
        (publishers, to_close)
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Channel>> {
        // Nothing panics while it is held.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a turn.
    ///
    /// # Errors
    /// [`BrokerError::Down`]: others took all the time.
    pub(super) async fn turn(&self) -> Result<Turn<'_>, BrokerError> {
        let permit = self.permits.clone().acquire_owned();
        let permit = tokio::time::timeout(PERMIT_TIMEOUT, permit).await;
        let permit = permit
            .map_err(|_| BrokerError::Down)?
            .map_err(|_| BrokerError::Down)?;
        let mut idle = self.idle();
        idle.retain(|channel| channel.status().connected());
        Ok(Turn {
            publishers: self,
            permit: Some(permit),
            channel: idle.pop(),
        })
    }
}

impl Turn<'_> {
    /// The channel, opened by `open` where none was idle.
    ///
    /// # Errors
    /// Of `open`.
    pub(super) async fn channel(
        &mut self,
        open: impl AsyncFnOnce() -> Result<Channel, BrokerError>,
    ) -> Result<&Channel, BrokerError> {
        if self.channel.is_none() {
            self.channel = Some(open().await?);
        }
        self.channel.as_ref().ok_or(BrokerError::Down)
    }

    /// Ends the turn. Its channel is as good as before.
    pub(super) fn give_back(mut self) {
        self.publishers.idle().extend(self.channel.take());
    }
}

impl Drop for Turn<'_> {
    /// What becomes of a publish that was given up is not known: a later confirm or return on this
    /// channel would be taken for another's.
    fn drop(&mut self) {
        if let (Some(channel), Some(_permit)) = (self.channel.take(), self.permit.take())
            && channel.status().connected()
        {
            // Nobody takes it where the session has ended, and its channels with it.
            let _ = self.publishers.closing.send(Closing { channel, _permit });
        }
    }
}
