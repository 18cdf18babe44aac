//! A queue that is read without being emptied: all messages are taken, read, and requeued. A second reader at the
//! same time finds the queue empty, and reads again later.

use lapin::options::{BasicAckOptions, BasicGetOptions};

use super::session::Session;
use super::wire::parse_head;
use super::{Broker, BrokerError, declare};
use mayfly_protocol::names::PoolName;
use mayfly_protocol::task::Head;
use mayfly_protocol::topology;

/// Maximum number of messages of the queue that one call reads.
const MOST: usize = 1000;

impl Broker {
    /// Declares the queue of a pool's authorities. Engines call this, because their users have the right to queues
    /// of this name. Safe to repeat. Returns the number of messages, without those that are being read.
    ///
    /// # Errors
    /// The broker is unreachable, or the user lacks the permission.
    pub async fn declare_authorities(&self, pool: &PoolName) -> Result<u32, BrokerError> {
        self.session()?
            .on_admin(async |channel| declare::declare_authorities(channel, pool).await)
            .await
    }

    /// Reads the queue of a pool's authorities, oldest first. `keep` decides which messages stay.
    ///
    /// # Errors
    /// The broker is unreachable, or the user lacks the permission.
    pub async fn read_authorities(
        &self,
        pool: &PoolName,
        keep: impl FnMut(&[(Option<Head>, Vec<u8>)]) -> Vec<bool>,
    ) -> Result<(), BrokerError> {
        let session = self.session()?;
        let reading = read(&session, topology::authorities_queue(pool), keep);
        tokio::time::timeout(super::CONNECT_TIMEOUT, reading)
            .await
            .map_err(|_| BrokerError::Unconfirmed("time-out".to_owned()))?
    }
}

async fn read(
    session: &Session,
    queue: String,
    mut keep: impl FnMut(&[(Option<Head>, Vec<u8>)]) -> Vec<bool>,
) -> Result<(), BrokerError> {
    if session.is_blocked() {
        return Err(BrokerError::Down);
    }
    // This look has a channel of its own: unacknowledged messages go back to the queue when the channel ends.
    let channel = session.open_channel().await?;
    let (mut taken, mut messages) = (Vec::new(), Vec::new());
    while taken.len() < MOST {
        let options = BasicGetOptions { no_ack: false };
        let Some(found) = channel.basic_get(queue.as_str().into(), options).await? else {
            break;
        };
        let mut delivery = found.delivery;
        let body = std::mem::take(&mut delivery.data);
        messages.push((parse_head(&delivery.properties), body));
        taken.push(delivery);
    }
    for (delivery, stays) in taken.iter().zip(keep(&messages)) {
        if !stays {
            delivery.ack(BasicAckOptions::default()).await?;
        }
    }
    channel.close(200, "read".into()).await?;
    Ok(())
}
