//! The channels a session publishes on. Each is taken for one publish and then given back or closed, whether the
//! publish is confirmed, refused, timed out or given up by its caller.
//!
//! A connection has 2,047 channels at most (RabbitMQ's `channel_max`). A channel keeps its permit until
//! the broker has closed it, so there are never more than [`PUBLISHERS`] of them.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lapin::Channel;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::BrokerError;

/// Number of publisher channels. Each has one publish in progress, because lapin mixes up the returns of pipelined
/// publishes. A confirm of a quorum queue waits for an fsync, which the broker shares among the publishes of all
/// channels: with 8 channels and 5 ms that was 1,600 publishes per second.
pub(super) const PUBLISHERS: usize = 32;
/// A publish waits at most this long for its turn. After that it was certainly not sent.
const PERMIT_TIMEOUT: Duration = Duration::from_secs(30);
/// If a channel is not closed after this time, its connection does not answer.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Idle channels, and the permits for channels in use.
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
    /// Closes the channel. `false`: the broker did not answer.
    pub(super) async fn done(self) -> bool {
        let closing = self
            .channel
            .close(200, "a channel is not used again".into());
        // A channel that the broker has closed in the meantime counts as closed.
        tokio::time::timeout(CLOSE_TIMEOUT, closing).await.is_ok()
    }
}

/// The turn of one publish, and its channel if it has one yet.
pub(super) struct Turn<'p> {
    publishers: &'p Publishers,
    permit: Option<OwnedSemaphorePermit>,
    channel: Option<Channel>,
}

impl Publishers {
    /// Publishers without a channel, and the queue of channels to close. At most [`PUBLISHERS`] channels wait in it.
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
        // No code panics while it holds this lock.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a turn.
    ///
    /// # Errors
    /// [`BrokerError::Down`]: other publishes took all turns for 30 s.
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
    /// The channel, opened by `open` if none is idle.
    ///
    /// # Errors
    /// The errors of `open`.
    pub(super) async fn channel(
        &mut self,
        open: impl AsyncFnOnce() -> Result<Channel, BrokerError>,
    ) -> Result<&Channel, BrokerError> {
        if self.channel.is_none() {
            self.channel = Some(open().await?);
        }
        self.channel.as_ref().ok_or(BrokerError::Down)
    }

    /// Ends the turn and keeps its channel for the next one.
    pub(super) fn give_back(mut self) {
        self.publishers.idle().extend(self.channel.take());
    }
}

impl Drop for Turn<'_> {
    /// The result of a publish that was given up is unknown: its late confirm or return would be taken for that of
    /// another publish on this channel.
    fn drop(&mut self) {
        if let (Some(channel), Some(_permit)) = (self.channel.take(), self.permit.take())
            && channel.status().connected()
        {
            // After the end of the session nobody receives this. The session's channels have ended too.
            let _ = self.publishers.closing.send(Closing { channel, _permit });
        }
    }
}
