//! Settles a revocation's message: it is parked again if necessary, and then acked. No other file of this module
//! acks one.

use std::time::Duration;

use mayfly_common::broker::{Address, Message};
use mayfly_common::fault;
use mayfly_protocol::task::Kind;
use tracing::warn;

use super::item::Held;
use crate::metrics::Ending;
use crate::work::Engine;
use mayfly_protocol::revocation::Next;

/// Pause between two tries to park.
const PARK_AGAIN: Duration = Duration::from_secs(1);

/// Parks the next message if there is one, then acks. It never acks before the broker has the next message, nor
/// before the other revocations of the same message are settled.
pub(super) async fn settle(engine: &Engine, held: Held, next: Next, ending: Ending) {
    let seconds = held.seconds();
    if let Next::Park {
        after,
        attempt,
        settling,
    } = next
    {
        let mut head = held.head.clone();
        head.attempt = attempt;
        head.settling = settling;
        loop {
            if held.is_stale() {
                // The broker delivers the message again, so a parked copy would be a second message.
                engine.metrics.ended(Kind::Revoke, ending, seconds);
                return;
            }
            let message = Message {
                to: Address::Delayed(after, engine.pool.clone()),
                head: head.clone(),
                body: held.body().to_vec(),
                reply_as: None,
                answers: None,
                expires: None,
            };
            let parked = match head.kind {
                // A message that this version cannot read completely is parked unchanged.
                Kind::Unknown => {
                    let (broker, pool) = (&engine.broker, &engine.pool);
                    held.park_unchanged(broker, after, pool).await
                }
                _ => engine.broker.publish(message).await,
            };
            match parked {
                Ok(()) => {
                    fault::point("revoke", "parked").await;
                    break;
                }
                Err(error) => {
                    // A dispatcher declares the missing queue or exchange again.
                    warn!(lease = ?head.lease, %error, "a revocation could not be parked yet");
                    tokio::time::sleep(PARK_AGAIN).await;
                }
            }
        }
    }
    held.ack().await;
    engine.metrics.ended(Kind::Revoke, ending, seconds);
}
